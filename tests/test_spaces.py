"""Oracles: the shipped files, a file with every mistake listed beside it, Optuna's own record of what it was asked."""

from functools import reduce
from operator import getitem

import optuna
import pytest
import yaml

from halora.errors import UserError
from halora.spaces.language import with_values
from halora.spaces.sweep import load_sweep, shipped_sweeps
from halora.sweep.search.samplers import choose

_WRONG = """
name: wrong
family: tests
trials: 4
trails: 3
trial:
  model: smollm2-135m-instuct
  task: arc-easi
  chip: halora-2025
  lora: {rank: 0}
  training: {method: halora, steps: 8, shedule: {shape: constant}}
  evaluation: {chip_instances: 2}
space:
  training.method: {choices: [lora, halorra]}
  training.learning_rate: {low: 1.0e-2, high: 1.0e-3, log: true}
  training.learnin_rate: {low: 1.0e-3, high: 1.0e-2}
  training.mu: {low: 0.0, high: 1.0, when: {training.methd: [halora]}}
  training.batch_size: {low: 0, high: 8, kind: int}
  training.reg_norm: {choices: [spectral], when: {training.method: [halo]}}
  training.warmup_steps: {normal: [0, 1]}
  lora.alpha_over_rank: {low: 2, high: 2}
derived:
  training.weight_decay: training.step / 100
  training.gradient_clip: "1 if training.steps else 2"
  training.batch_size: "8"
constraints: [energy_mj <= 3, accuracy > 0.5]
search: {sampler: tpa}
early_stopping: {rungs: [{steps: 4}, {steps: 4}], reduction_factor: 1.0}
first:
  - {training.batch_size: 9, training.steps: 4}
reference_point: {accuracy: 0.0, energy_uj_per_token: 6.0}
comparison: {rows: 8, chip_instances: 2}
"""

_MISTAKES = {
    "trails: unknown key; did you mean 'trials'?",
    "trial.model: no model 'smollm2-135m-instuct'",
    "did you mean 'smollm2-135m-instruct'?",
    "trial.task: no task 'arc-easi'",
    "did you mean 'arc-easy'?",
    "trial.chip: no chip 'halora-2025'",
    "did you mean 'halora-2026'?",
    "trial.lora.rank: input should be greater than or equal to 1, got 0",
    "trial.training.shedule: unknown key; did you mean 'schedule'?",
    "space.training.method: halorra: training.method: input should be 'lora', 'noise_lora' or 'halora', got 'halorra'",
    "space.training.learning_rate: low must be below high, got 0.01 and 0.001",
    "space.training.learnin_rate: a trial has no such field; did you mean 'training.learning_rate'?",
    "space.training.mu.when: 'training.methd' is not searched before it; did you mean 'training.method'?",
    "space.training.batch_size: 0: training.batch_size: input should be greater than or equal to 1, got 0",
    "space.training.reg_norm.when: 'training.method' is never 'halo'",
    "space.training.warmup_steps: a distribution is `choices: [...]`, or `low` and `high`",
    "space.lora.alpha_over_rank: low must be below high, got 2.0 and 2.0",
    "derived.training.weight_decay: 'training.step' is neither searched, nor derived before it, nor written in trial",
    "derived.training.gradient_clip: '1 if training.steps else 2': a formula has numbers, names,",
    "derived.training.batch_size: is searched already",
    "constraints.0: no metric 'energy_mj' (known: energy_uj_per_token, latency_us_per_token",
    "constraints.1: write `METRIC <= NUMBER` or `METRIC >= NUMBER`, got 'accuracy > 0.5'",
    "search.sampler: input should be 'tpe', 'gp', 'nsga2', 'nsga3', 'random' or 'qmc', got 'tpa'",
    "early_stopping.rungs: every rung needs more steps than the one before it, got 4, 4",
    "early_stopping.reduction_factor: input should be greater than 1, got 1.0",
    "first[0].training.batch_size: 9 is outside the space",
    "first[0].training.steps: not searched",
    "comparison: needs trial.evaluation.rows",
}


def _write(path, text):
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


def test_every_mistake_of_a_file_is_told_at_once_and_nothing_else(tmp_path):
    with pytest.raises(UserError) as caught:
        load_sweep(_write(tmp_path / "wrong.yaml", _WRONG))
    told = caught.value.problems
    assert not [mistake for mistake in _MISTAKES if not any(mistake in problem for problem in told)]
    assert not [problem for problem in told if not any(mistake in problem for mistake in _MISTAKES)]
    assert len(told) == len(set(told))
    assert caught.value.next_step


_STAGES = """
name: stages
family: tests
trial:
  model: smollm2-135m-instruct
  task: arc-easy
  chip: {preset: halora-2026, mapping: {sram: [nothing.*]}}
  training: {method: halora, steps: 8}
  evaluation: {chip_instances: 2, rows: 8}
chips:
  own: halora-2026
  broken: {preset: halora-2026, adc: {bits: 99}}
space:
  training.method: {choices: [lora, halora]}
  training.learnin_rate: {low: 1.0e-3, high: 1.0e-2}
  training.mu: {low: 0.0, high: 1.0, when: {training.method: []}}
  chip.adc.bits: {choices: [6, 12]}
  training.batch_size: {low: 8, high: 16, kind: int}
derived:
  training.warmup_steps: training.batch_size
early_stopping: {rungs: [{steps: 4}, {steps: 9}]}
racing: {extra: 4, most: 2}
comparison: {rows: 8, chip_instances: 2, by: training.method, against: nobody}
reference_point: {accuracy: 0.0, energy_uj_per_token: 6.0}
"""

_TOLD = {
    "trials: required, but missing",
    "chips.broken.adc.bits: input should be less than or equal to 14, got 99",
    "space.training.learnin_rate: a trial has no such field; did you mean 'training.learning_rate'?",
    "space.training.mu.when.training.method: tuple should have at least 1 item after validation, not 0",
    "comparison.chips: required with comparison.by, as the trials' own chips differ",
    "comparison.against: 'nobody' is not a value of comparison.by (choices: lora, halora)",
    "early_stopping.rungs[1].steps: 9, but a trial has 8 steps; a rung comes before its end",
    "racing.most: 2, but every trial has 2 chip instances already",
    "derived, with training.batch_size 8: training.warmup_steps: 8, but the training has 8 steps",
    "derived, with training.batch_size 16: training.warmup_steps: 16, but the training has 8 steps",
    "trial.chip.mapping.sram: 'nothing.*' matches no layer",
    "'isaac' cover 4 to 10 bits, got 12",
}


def test_no_stage_of_the_checks_hides_another(tmp_path):
    """A field that does not exist, a chip, a comparison, rungs, a formula and a price are wrong at once."""
    with pytest.raises(UserError) as caught:
        load_sweep(_write(tmp_path / "stages.yaml", _STAGES))
    told = [problem.removeprefix(f"{tmp_path / 'stages.yaml'}: ") for problem in caught.value.problems]
    assert not [problem for problem in told if not any(mistake in problem for mistake in _TOLD)], told
    assert not [mistake for mistake in _TOLD if not any(mistake in problem for problem in told)], told


@pytest.mark.parametrize("overrides", [{"trial.model": "nobody"}, {"trial.task": "nothing"}, {"trial.chip": "none"}])
def test_one_mistake_is_told_once_whatever_rests_on_it(overrides):
    with pytest.raises(UserError) as caught:
        load_sweep("early-stopping", overrides)
    assert len(caught.value.problems) == 1, caught.value.problems


def test_every_override_that_cannot_be_set_is_told_beside_the_other_mistakes():
    with pytest.raises(UserError) as caught:
        load_sweep("quickstart", {"trials.x": 1, "first.x": 2, "seed": -1})
    paths = [problem.removeprefix("quickstart: ").partition(":")[0] for problem in caught.value.problems]
    assert paths == ["trials.x", "first.x", "seed"]


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        ({"trials": 0}, "trials: input should be greater than or equal to 1, got 0"),
        ({"trials.x": 1}, "trials.x: 'trials' is a int, which has no keys"),
        ({"first.x": 1}, "first.x: 'first' is a list"),
        ({"name": "../outside"}, "name: string should match"),
        ({"trial": 5}, "trial: input should be a valid dictionary"),
        ({"trial.evaluation": 5}, "trial.evaluation: input should be a valid dictionary"),
        ({"trial.evaluation.rows": None}, "comparison: needs trial.evaluation.rows"),
        ({"trial.chip.adc.bit": 8}, "trial.chip.adc.bit: unknown key; did you mean 'bits'?"),
        ({"trial.training.schedule.strength_end": 0.1}, "strength_end is not allowed for shape 'constant'"),
        ({"space": {"training.weight_decay": {"low": 0, "high": 1, "log": True}}}, "a log range needs low > 0, got 0"),
        ({"space": {"chip.adc.bits": {"low": 4.5, "high": 6, "kind": "int"}}}, "an int range needs whole limits"),
        ({"space.lora.rank.choices": []}, "space.lora.rank.choices: tuple should have at least 1 item"),
        ({"space.lora.rank.choice": [4]}, "space.lora.rank.choice: unknown key; did you mean 'choices'?"),
        ({"first": [{"chip.adc.bits": 7.5}]}, "first[0].chip.adc.bits: 7.5 is outside the space"),
        ({"trial.task": {"arc-easy": 1, "piqua": 2}}, "trial.task: no task 'piqua'"),
        ({"trial.task": {"arc-easy": -1}}, "trial.task: task 'arc-easy': the weight of a task is a positive number"),
        ({"trial.task": "arc-easy+2*openbokqa"}, "did you mean 'openbookqa'?"),
        ({"trial.evaluation.answer_pattern": "("}, "answer_pattern is not a regular expression"),
        ({"trial.prompt_format": "chatty"}, "trial.prompt_format: input should be 'plain' or 'chat', got 'chatty'"),
        ({"reference_point.energy_uj_per_token": 0}, "energy_uj_per_token: input should be greater than 0, got 0"),
    ],
)
def test_a_wrong_override_is_named(overrides, mistake):
    with pytest.raises(UserError) as caught:
        load_sweep("quickstart", overrides)
    assert any(mistake in problem for problem in caught.value.problems), caught.value.problems


def test_a_mixture_is_a_mapping_or_a_sum_and_may_be_searched():
    overrides = {"trial.task": {"arc-easy": 1, "piqa": 2.5}, "space.task": {"choices": ["arc-easy", "arc-easy+siqa"]}}
    sweep = load_sweep("quickstart", overrides | {"comparison": None})
    first = {name: distribution.probes[0] for name, distribution in sweep.space.items() if not distribution.when}
    assert sweep.resolve({**first, "task": "arc-easy+siqa"}).task == "arc-easy+siqa"
    del first["task"]
    assert sweep.resolve(first).task == "1*arc-easy+2.5*piqa"


def test_what_is_no_sweep_file_is_refused(tmp_path):
    for given, message in (
        ("quikstart", "no sweep 'quikstart'.*did you mean 'quickstart'"),
        (_write(tmp_path / "list.yaml", "[1, 2]"), "a sweep is a mapping"),
        (_write(tmp_path / "broken.yaml", "a: [1"), "not YAML"),
    ):
        with pytest.raises(UserError, match=message):
            load_sweep(given)


def test_every_shipped_sweep_gives_a_valid_trial_wherever_the_sampler_goes():
    assert "quickstart" in shipped_sweeps()
    for name in shipped_sweeps():
        sweep = load_sweep(name)
        assert sweep.name == name
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for point in sweep.first:
            study.enqueue_trial(point)
        for _ in range(60):
            values = choose(study.ask(), sweep.space)
            config = sweep.resolve(values)
            resolved = config.model_dump(mode="json")
            named = {path: value for path, value in values.items() if path == "chip"}
            assert all(sweep.chip(name) == config.chip for name in named.values())
            for path in values.keys() - named:
                assert reduce(getitem, path.split("."), resolved) == values[path]
            assert config.seed == sweep.seed


def test_a_point_written_in_the_file_is_searched_whole():
    """No value of `first` is left out for a condition that does not hold, and none is added by the sampler."""
    for name in shipped_sweeps():
        sweep = load_sweep(name)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for point in sweep.first:
            study.enqueue_trial(point)
        assert [choose(study.ask(), sweep.space) for _ in sweep.first] == list(sweep.first)


def test_only_fields_whose_condition_holds_are_suggested():
    sweep = load_sweep("quickstart")
    conditional = {path: d.when for path, d in sweep.space.items() if d.when}
    assert {"training.mu", "training.schedule.strength_end"} <= conditional.keys()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(100):
        trial = study.ask()
        values = choose(trial, sweep.space)
        assert values == trial.params  # what Optuna was asked, and nothing beside it
        for path, distribution in sweep.space.items():
            holds = all(values.get(name) in allowed for name, allowed in distribution.when.items())
            assert (path in values) == holds
            seen.add((path, holds))
    assert {(path, holds) for path in conditional for holds in (True, False)} <= seen


def test_overrides_replace_values_of_the_file_and_leave_it_alone():
    plain = load_sweep("quickstart")
    changed = load_sweep(
        "quickstart",
        {
            "trials": 3,
            "trial.training.steps": 5,
            "trial.chip.noise.sigma": 0.02,
            "space.training.learning_rate.high": 0.004,
            "space.lora.rank": {"choices": [4, 8, 16]},
        },
    )
    assert (changed.trials, changed.trial["training"]["steps"]) == (3, 5)
    assert (changed.space["lora.rank"].choices, changed.space["training.learning_rate"].low) == ((4, 8, 16), 5e-4)
    assert (changed.space["training.learning_rate"].high, plain.space["training.learning_rate"].high) == (0.004, 0.005)
    before, after = plain.resolve({}).chip, changed.resolve({}).chip
    assert after.noise.sigma == 0.02
    assert after.model_copy(update={"noise": before.noise}) == before  # the rest of the preset stands
    assert load_sweep("quickstart") == plain


def test_paths_set_nested_values():
    base = {"chip": "ideal", "lora": {"rank": 4}, "space": {"lora.rank": {"low": 1}}}
    changed = with_values(base, {"chip.adc.bits": 6, "lora.rank": 8, "a.b.c": 1, "space.lora.rank.low": 2})
    assert changed == {
        "chip": {"preset": "ideal", "adc": {"bits": 6}},
        "lora": {"rank": 8},
        "space": {"lora.rank": {"low": 2}},
        "a": {"b": {"c": 1}},
    }
    assert base == {"chip": "ideal", "lora": {"rank": 4}, "space": {"lora.rank": {"low": 1}}}


def test_what_cannot_be_priced_is_refused_before_anything_runs():
    chip = {"preset": "halora-2026", "mapping": {"sram": ["*.w_proj"]}}
    with pytest.raises(UserError, match=r"'\*\.w_proj' matches no layer") as caught:
        load_sweep("quickstart", {"trial.chip": chip})
    assert len(caught.value.problems) == 1
    with pytest.raises(UserError, match=r"adc.bits.*12.*\(with chip.adc.bits 12\)"):
        load_sweep("quickstart", {"space.chip.adc.bits": {"low": 6, "high": 12, "kind": "int"}})


_CHIPS = {"quiet": {"preset": "halora-2026", "noise": {"sigma": 0.001}}}


def test_a_sweep_names_its_own_chips():
    sweep = load_sweep("quickstart", {"chips": _CHIPS, "trial.chip": "quiet", "comparison.chips": ["quiet", "ideal"]})
    chip = sweep.resolve({"chip.adc.bits": 6}).chip
    assert (chip.name, chip.noise.sigma, chip.adc.bits) == ("quiet", 0.001, 6)
    assert sweep.chip("quiet").noise.sigma == 0.001
    assert sweep.chip("ideal").name == "ideal"
    assert load_sweep("quickstart", {"chips": _CHIPS, "trial.chip.preset": "quiet"}).resolve({}).chip.name == "quiet"


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        (
            {"comparison.by": "training.methd"},
            "comparison.by: 'training.methd' is not searched over choices; did you mean",
        ),
        ({"comparison.by": "training.mu"}, "comparison.by: 'training.mu' is not searched over choices"),
        ({"comparison.against": "lora"}, "comparison.against: 'lora' is not a value of comparison.by (there is no"),
        (
            {
                "comparison": {
                    "rows": 4,
                    "chip_instances": 2,
                    "by": "training.method",
                    "against": "lor",
                    "chips": ["ideal"],
                }
            },
            "comparison.against: 'lor' is not a value of comparison.by (choices: lora, noise_lora, halora)",
        ),
        ({"comparison.by": "training.method"}, "comparison.chips: required with comparison.by"),
        ({"comparison.chips": ["quite"], "chips": _CHIPS}, "comparison.chips[0]: no chip 'quite'"),
        (
            {"chips": {"odd": {"preset": "halora-2026", "adc": {"bits": 0}}}},
            "chips.odd.adc.bits: input should be greater",
        ),
        ({"chips": {"odd": "halora-2025"}}, "chips.odd: no chip 'halora-2025'"),
        ({"chips": {"odd": {"preset": "ideal"}}, "trial.chip": "od"}, "trial.chip: no chip 'od'"),
    ],
)
def test_a_wrong_comparison_or_chip_is_named(overrides, mistake):
    with pytest.raises(UserError) as caught:
        load_sweep("quickstart", overrides)
    assert any(mistake in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        (
            {"space": {"training.workers": {"choices": [1, 2]}}, "first": []},
            "space.training.workers: cannot be searched, every trial has the same; set trial.training.workers",
        ),
        (
            {"trial.training.workers": 4, "trial.training.gradient_accumulation": 8},
            "is less than a row for each of workers 4 x gradient_accumulation 8",
        ),
        (
            {"trial.lora.variant": "dora", "trial.training.zero_stage": 3},
            "trial.lora.variant: 'dora' reads frozen weights whole",
        ),
        (
            {"space.lora.rank": {"low": 2, "high": 16}, "first": []},  # both ends are whole, what lies between is not
            "space.lora.rank: 10.652475842498529: lora.rank: input should be a valid integer",
        ),
    ],
)
def test_an_engine_that_cannot_work_is_refused(overrides, mistake):
    with pytest.raises(UserError) as caught:
        load_sweep("quickstart", overrides)
    assert any(mistake in problem for problem in caught.value.problems), caught.value.problems
