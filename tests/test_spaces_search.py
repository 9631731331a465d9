"""Oracles: brute force (every combination), Python's own arithmetic, the JSON Schema validator, the shipped files."""

import itertools
import json

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter

from halora.errors import UserError
from halora.hardware.energy import COSTS, ENERGY
from halora.records import names
from halora.spaces.expressions import Expression
from halora.spaces.language import Categorical, Distribution, Range, grid, size
from halora.spaces.recipes import RECIPES, first_points
from halora.spaces.schema import sweep_schema
from halora.spaces.search import METRICS, Constraint
from halora.spaces.sweep import SHIPPED, SweepConfig, load_sweep, shipped_sweeps
from halora.yaml_files import parse_yaml


def in_space(space, values):
    """Whether the values are one whole point of the space: all fields whose condition holds, and no others."""
    return values.keys() == {path for path, each in space.items() if each.applies(values)} and all(
        space[path].contains(value) for path, value in values.items()
    )


def _space(**fields):
    return TypeAdapter(dict[str, Distribution]).validate_python(fields)


_NESTED = _space(
    method={"choices": ["lora", "halora"]},
    shape={"choices": ["constant", "linear", "cosine"], "when": {"method": ["halora"]}},
    warmup={"low": 0, "high": 3, "kind": "int", "when": {"shape": ["cosine", "linear"], "method": ["halora"]}},
    rank={"choices": [2, 4]},
)


def test_the_size_of_a_space_counts_every_combination_once():
    listed = [list(distribution.values) for distribution in _NESTED.values()]
    points = set()
    for values in itertools.product(*listed):
        chosen = {}
        for (path, distribution), value in zip(_NESTED.items(), values, strict=True):
            if distribution.applies(chosen):
                chosen[path] = value
        points.add(tuple(chosen.items()))
    assert size(_NESTED) == len(points) == 2 * (1 + 1 + 2 * 4)
    assert {tuple(point.items()) for point in grid(_NESTED)} == points
    assert all(in_space(_NESTED, dict(point)) for point in points)
    assert size(_space(x={"choices": list(range(10))}, y={"low": 1, "high": 10**9, "kind": "int"})) == 10**10
    assert size(_space(x={"low": 0.0, "high": 1.0})) is None


@pytest.mark.parametrize(
    "values",
    [
        {"method": "lora", "rank": 8},
        {"method": "lora"},
        {"method": "lora", "shape": "linear", "rank": 2},
        {"method": "halora", "shape": "linear", "rank": 2},
    ],
)
def test_what_is_no_whole_point_is_told_apart(values):
    assert not in_space(_NESTED, values)


def test_conditions_name_what_they_need_themselves():
    assert _NESTED["warmup"].condition(_NESTED) == {"method": "halora", "shape": "cosine"}


def test_formulas_are_arithmetic_and_nothing_else():
    values = {"training.steps": 30, "lora.rank": 4, "task": "arc"}
    for text in ("max(training.steps // 7, 1) + 2", "-lora.rank * 1.5 % 4", "round(training.steps / lora.rank)"):
        python = text.replace("training.steps", "30").replace("lora.rank", "4")
        assert Expression(text).value(values) == eval(python)
    assert Expression("training.steps / lora.rank").names == {"training.steps", "lora.rank"}
    for text in (
        "__import__('os')",
        "[1]",
        "'a'",
        "a if b else c",
        "a.b(1)",
        "1 +",
        "lambda: 1",
        "True",
        "a[0]",
        "2**9",
    ):
        with pytest.raises(ValueError, match=r"formula|no function"):
            Expression(text)
    for text, reason in (("1 / (lora.rank - 4)", "division by zero"), ("task + 1", "'arc', not a number")):
        with pytest.raises(ValueError, match=reason):
            Expression(text).value(values)


def test_derived_values_follow_the_searched_ones():
    derived = {
        "training.warmup_steps": "training.steps // 4",
        "lora.alpha_over_rank": "16 / lora.rank",
        "training.weight_decay": "training.mu / 10",
        "training.schedule.warmup_steps": "2 * training.warmup_steps",
    }
    sweep = load_sweep("quickstart", {"derived": derived})
    config = sweep.resolve({"training.method": "halora", "training.mu": 0.5, "lora.rank": 8})
    assert config.training.warmup_steps == 2
    assert config.training.schedule.warmup_steps == 4
    assert config.lora.alpha_over_rank == 2.0
    assert config.training.weight_decay == 0.05
    plain = load_sweep("quickstart", {"derived": {"training.weight_decay": "training.schedule.strength_end"}})
    assert plain.resolve({"lora.rank": 8}).training.weight_decay == 0.0  # strength_end is not searched there
    with pytest.raises(UserError, match=r"derived, with lora.rank 2: lora.alpha_over_rank: .*less than or equal to 64"):
        load_sweep("quickstart", {"derived": {"lora.alpha_over_rank": "130 / lora.rank"}})


def test_constraints_bound_metrics_that_are_recorded():
    assert set(METRICS) == {*COSTS, *names.SCORE_METRICS}
    upper, lower = Constraint.model_validate(f"{ENERGY} <= 5"), Constraint.model_validate(" accuracy>=0.5 ")
    assert [upper.violation({ENERGY: e}) for e in (4, 5, 7)] == [-1, 0, 2]
    assert [lower.violation({"accuracy": a}) for a in (0.75, 0.5, 0.25)] == [-0.25, 0, 0.25]
    assert (str(upper), str(lower)) == (f"{ENERGY} <= 5", "accuracy >= 0.5")
    for bound in ("4.2951234567", "1e-07", "0.1", "3"):  # read back bit for bit
        written = str(Constraint.model_validate(f"{ENERGY} <= {bound}"))
        assert Constraint.model_validate(written).bound == float(bound)


def test_the_paper_s_recipe_and_a_tuned_lora_are_tried_in_every_sweep_that_allows_them():
    for name in shipped_sweeps():
        sweep = load_sweep(name)
        points = first_points(sweep)
        assert points[: len(sweep.first)] == list(sweep.first)
        methods = sweep.space.get("training.method")
        for recipe in RECIPES.values():
            if methods and recipe["training.method"] in methods.choices:
                wanted = {p: v for p, v in recipe.items() if p in sweep.space and sweep.space[p].contains(v)}
                wanted.pop("training.learning_rate", None)
                assert any(wanted.items() <= point.items() for point in points), (name, recipe)
    alone = load_sweep("quickstart", {"first": []})
    points = first_points(alone)
    assert [point["training.method"] for point in points] == ["halora", "lora", "lora"]
    assert all(in_space(alone.space, point) for point in points)
    assert points[0] == {
        "training.method": "halora",
        "training.mu": 0.1,
        "training.schedule.shape": "constant",
        "training.schedule.strength_start": 0.01,
        "training.learning_rate": 2e-3,
        "lora.rank": 4,
        "chip.adc.bits": 8,  # the chip's own
        "chip.tile.rows": 64,
        "chip.mapping.outliers.share": 0.0,
    }
    narrow = load_sweep(
        "quickstart", {"first": [], "space.lora.rank": {"choices": [2, 6]}, "space.training.mu.low": 0.3}
    )
    assert [(p["lora.rank"], p.get("training.mu")) for p in first_points(narrow)] == [(2, 0.3), (6, None), (6, None)]


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        ({"early_stopping": {"rungs": [{"steps": 8}]}}, "early_stopping.rungs[0].steps: 8, but a trial has 8 steps"),
        ({"early_stopping": {"rungs": [{"steps": 4, "rows": 20}]}}, "rungs[0].rows: 20, more than the 10"),
        ({"early_stopping": {"rungs": [{"steps": 4, "chip_instances": 9}]}}, "rungs[0].chip_instances: 9, more than"),
        ({"early_stopping": {"rungs": []}}, "early_stopping.rungs: tuple should have at least 1 item"),
        ({"racing": {"extra": 8, "most": 3}}, "racing.most: 3, but every trial has 3 chip instances already"),
        ({"budget": {"hours": 0}}, "budget.hours: input should be greater than 0, got 0"),
        ({"search.history": 3}, "search.history: input should be greater than or equal to 20, got 3"),
    ],
)
def test_a_search_that_cannot_work_is_named(overrides, mistake):
    with pytest.raises(UserError) as caught:
        load_sweep("quickstart", overrides)
    assert any(mistake in problem for problem in caught.value.problems), caught.value.problems


def test_a_sweep_written_down_is_read_back_the_same():
    changes = {
        "constraints": ["energy_uj_per_token <= 4", "clean_accuracy >= 0.5"],
        "derived": {"training.warmup_steps": "training.steps // 8"},
        "early_stopping": {"rungs": [{"steps": 4, "rows": 8, "chip_instances": 1}], "accuracy_floor": 0.2},
        "racing": {"extra": 8, "most": 6},
        "search": {"sampler": "nsga2"},
        "budget": {"steps": 100},
    }
    sweep = load_sweep("quickstart", changes)
    again = SweepConfig.model_validate(yaml.safe_load(yaml.safe_dump(sweep.model_dump(mode="json"))))
    assert again == sweep
    jsonschema.validate(sweep.model_dump(mode="json", exclude_none=True), sweep_schema())


def test_the_schema_accepts_the_shipped_files_and_refuses_what_is_unknown():
    schema = sweep_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in shipped_sweeps():
        validator.validate(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()))
    content = yaml.safe_load((SHIPPED / "quickstart.yaml").read_text())
    for path, wrong in (
        (("trial", "training", "shedule"), {}),
        (("trial", "chip"), {"preset": "ideal", "adc": {"bit": 4}}),
        (("space", "lora.rnk"), {"choices": [1]}),
        (("constraints",), ["clean <= 3"]),
        (("search",), {"sampler": "cma"}),
    ):
        changed = json.loads(json.dumps(content))
        node = changed
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = wrong
        assert list(validator.iter_errors(changed)), path


def test_a_space_is_shown_with_its_size_and_its_points(halora, halora_json):
    code, out, err = halora("space show methods --set 'constraints=[clean_accuracy >= 0.4]'")
    assert code == 0
    assert "training.learning_rate" in out
    assert "6 configurations; 6 trials by tpe" in err
    assert "constraint: clean_accuracy >= 0.4" in err
    rows = {row["field"]: row for row in halora_json("space show quickstart")}
    assert rows["training.mu"] == {
        "field": "training.mu",
        "kind": "log float",
        "values": "0.001 .. 1",
        "when": "training.method is halora",
        "default": "0.01",
    }
    assert {row["sweep"] for row in halora_json("space list")} == set(shipped_sweeps())
    code, out, _ = halora("space schema")
    assert json.loads(out) == sweep_schema()


def test_values_that_are_equal_as_numbers_are_equal():
    rates, ranks = Categorical(choices=(1e-3, 0.01)), Range(low=2, high=16, kind="int")
    flags = Categorical(choices=(True, "auto"))
    assert rates.own(0.001) == rates.choices[0]
    assert (ranks.own(8.0), type(ranks.own(8.0))) == (8, int)
    assert not ranks.contains(8.5)
    assert (flags.contains(1), flags.contains(True)) == (False, True)
    with pytest.raises(ValueError, match=r"0\.001 is given twice"):
        Categorical(choices=(0.001, 0.01, 1e-3))
    assert Categorical(choices=(True, 1)).choices == (True, 1)
    comparison = {"rows": 4, "chip_instances": 2, "by": "training.learning_rate", "chips": ["ideal"]}
    text = yaml.safe_dump(
        {
            "space": {
                "training.learning_rate": {"choices": [0.001, 0.01]},
                "lora.rank": {"choices": [4, 8], "when": {"training.learning_rate": ["RATE"]}},
            },
            "first": [{"training.learning_rate": "RATE", "lora.rank": 8.0}],
            "comparison": comparison | {"against": "RATE"},
        },
        sort_keys=False,
    )
    read = []
    for written in ("1e-3", "0.001", ".1e-02"):
        overrides = parse_yaml(text.replace("RATE", written), "a sweep")
        sweep = load_sweep("quickstart", overrides)
        point = first_points(sweep)[0]
        assert [(value, type(value)) for value in point.values()] == [(0.001, float), (8, int)]
        assert sweep.space["lora.rank"].applies(point)
        assert sweep.space["training.learning_rate"].named(sweep.comparison.against) == 0.001
        read.append(sweep)
    assert read[0] == read[1] == read[2]
    assert sweep.space["training.learning_rate"].named("0.001") == 0.001  # in quotes, as it is shown
