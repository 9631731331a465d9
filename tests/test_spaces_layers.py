"""Oracles: the language of sweep files, and chips without groups."""

import jsonschema
import pytest

from halora.errors import UserError
from halora.hardware.chip import load_chip
from halora.hardware.chip_files import merge
from halora.pricing import trial_energy
from halora.spaces.ranked import ranked_points
from halora.spaces.recipes import first_points
from halora.spaces.schema import sweep_schema
from halora.spaces.sweep import load_sweep

GROUPS = {"down": {"match": "*.down_proj", "adc": {"bits": 7}}, "late": {"depth": [0.5, 1]}}
SWEEP = {
    "trial.chip": {"preset": "halora-2026", "layers": GROUPS, "mapping": {"ranking": ["*.2[0-9].*", "*.down_proj"]}},
    "space": {
        "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "chip.layers.down.adc.bits": {"low": 5, "high": 8, "kind": "int"},
        "chip.layers.late.tile.rows": {"choices": [64, 128, 256]},
        "chip.layers.late.mapping.outliers.share": {"choices": [0, 0.001, 1]},
    },
    "first": [],
}


def test_fields_of_groups_are_searched_like_any_other():
    sweep = load_sweep("quickstart", SWEEP)
    values = {"chip.layers.down.adc.bits": 5, "chip.layers.late.tile.rows": 256}
    chip = sweep.resolve(values).chip
    assert chip == load_chip(
        SWEEP["trial.chip"]
        | {
            "layers": {"down": GROUPS["down"] | {"adc": {"bits": 5}}, "late": GROUPS["late"] | {"tile": {"rows": 256}}},
        }
    )
    assert _uj(sweep, values) < _uj(sweep, {})


def _uj(sweep, values):
    return trial_energy(sweep.resolve(values), estimated=True).total_uj_per_token


def test_mistakes_about_groups_are_told_with_their_paths():
    space = SWEEP["space"] | {
        "chip.layers.down.adc.bitz": {"choices": [5, 6]},
        "chip.layers.dwn.adc.bits": {"choices": [5, 6]},
        "chip.layers.late.adc.bits": {"choices": [5, 12]},
        "chip.layers.down.cells.levels": {"choices": [8, 16]},
        "chip.layers.down.tile.rows": {"choices": [4, 64]},
    }
    with pytest.raises(UserError) as caught:
        load_sweep("quickstart", SWEEP | {"space": space})
    told = [problem.removeprefix("quickstart: ") for problem in caught.value.problems]
    wanted = [
        "space.chip.layers.down.adc.bitz: a trial has no such field; did you mean 'chip.layers.NAME.adc.bits'?",
        "space.chip.layers.dwn.adc.bits: 5: chip.layers.dwn: says of no layers; give it match (patterns of layers)",
        "chip.layers.late.adc.bits: the costs 'isaac' cover 4 to 10 bits, got 12",
        "space.chip.layers.down.cells.levels: a trial has no such field",
        "space.chip.layers.down.tile.rows: 4: chip.layers.down.tile.rows: input should be greater than or equal to 8",
        "trial.chip.layers: 'down' and 'late' both give adc.bits of 'model.layers.15.mlp.down_proj' and 14 more",
    ]
    assert not [each for each in wanted if not any(each in problem for problem in told)], told


def test_the_ranking_orders_the_first_points():
    points = ranked_points(load_sweep("quickstart", SWEEP))
    assert points == [  # the last third of the blocks come first, so `late` does; of one group's finest values
        {
            "chip.layers.down.adc.bits": 5,
            "chip.layers.late.tile.rows": 64,
            "chip.layers.late.mapping.outliers.share": 1,
        }
    ]
    first = first_points(load_sweep("quickstart", SWEEP))
    assert first[0].items() > points[0].items()
    without = {"preset": "halora-2026", "layers": GROUPS}
    assert ranked_points(load_sweep("quickstart", SWEEP | {"trial.chip": without})) == []


def test_a_recipe_has_the_chip_s_own_value_where_a_group_has_none():
    chip = {"preset": "halora-2026", "layers": GROUPS, "tile": {"rows": 128}}
    (paper, *_) = first_points(load_sweep("quickstart", SWEEP | {"trial.chip": chip}))
    assert (paper["chip.layers.down.adc.bits"], paper["chip.layers.late.tile.rows"]) == (7, 128)


def test_the_schema_knows_fields_of_groups():
    schema = sweep_schema()
    names = jsonschema.Draft202012Validator(schema["properties"]["space"]["propertyNames"])
    assert names.is_valid("chip.layers.down-first.adc.bits")
    assert names.is_valid("chip.adc.bits")
    assert not names.is_valid("chip.layers.down.adc.bitz")
    group = schema["$defs"]["LayerGroup"]["properties"]
    assert {"match", "depth", "adc", "tile", "mapping"} <= set(group)


def test_the_shipped_sweep_has_every_uniform_chip_and_mixed_ones_that_cost_less_than_the_finest():
    sweep = load_sweep("mixed-precision")
    points = first_points(sweep)
    bits = [sorted(value for path, value in point.items() if path.endswith("adc.bits")) for point in points]
    uniform, mixed = [b for b in bits if len(set(b)) == 1], [b for b in bits if len(set(b)) > 1]
    assert [each[0] for each in uniform] == [8, 7, 6, 5, 4]
    assert mixed[-3:] == [[4, 4, 4, 4, 8, 8], [4, 4, 4, 8, 8, 8], [4, 4, 8, 8, 8, 8]]
    plain = sweep.resolve({}).chip.model_dump(mode="json") | {"layers": {}}
    for own, point in zip(bits, points, strict=True):
        config = sweep.resolve(point)
        priced = trial_energy(config, estimated=True)
        if len(set(own)) == 1:
            chip = load_chip(merge(plain, {"adc": {"bits": own[0]}}))
            assert priced == trial_energy(config.model_copy(update={"chip": chip}), estimated=True)
        else:
            assert priced.total_uj_per_token < _uj(sweep, points[0])
