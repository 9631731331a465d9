"""Oracles: the shipped YAML files, and a change seen in both energy and simulation."""

import pytest
import torch
import yaml
from pydantic import ValidationError

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.chip_files import PRESETS, merge, preset_names
from halora.hardware.converters import full_scale, tilewise_product
from halora.hardware.energy import energy_per_token
from halora.hardware.mapping import Mapping, Placement
from halora.hardware.noise import programmed_weight
from halora.hardware.shapes import LinearShape, ModelShape
from halora.settings.trial import TrialConfig

BASE = "halora-2026"


def test_presets_load_and_say_what_their_files_say():
    readings = {f"halora-2026-{reference}" for reference in ("tensor-max", "channel-max", "absolute")}
    assert (
        set(preset_names())
        == {"halora-2026", "neurram-2022", "isaac", "cmo-hfox", "ideal", "rram-variation", "pcm-like"} | readings
    )
    for name in preset_names():
        chip = load_chip(name)
        assert chip.name == name
        said = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        base = said.pop("preset", None)
        assert merge(chip.model_dump(), said) == chip.model_dump()
        if base is not None:
            assert chip.tile == load_chip(base).tile


def test_overrides_reach_into_sections_and_keep_the_rest():
    base = load_chip(BASE)
    chip = load_chip({"preset": BASE, "tile": {"rows": 128}, "lora": {"weight_bits": 4}})
    assert (chip.tile.rows, chip.lora.weight_bits) == (128, 4)
    assert chip.tile.columns == base.tile.columns
    assert chip.noise == base.noise


def test_a_chip_is_read_from_a_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    content = load_chip(BASE).model_dump(mode="json") | {"name": "mine", "lora": {"weight_bits": 6}}
    path.write_text(yaml.safe_dump(content))
    assert load_chip(str(path)).lora.weight_bits == 6
    assert load_chip({"preset": str(path), "adc": {"bits": 5}}).adc.bits == 5


def test_a_chip_file_may_lay_overrides_over_a_preset(tmp_path):
    overrides = {"name": "mine", "tile": {"rows": 128}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"preset": BASE, **overrides}))
    assert load_chip(str(path)) == load_chip({"preset": BASE, **overrides})
    assert load_chip({"preset": str(path), "adc": {"bits": 5}}).tile.rows == 128
    path.write_text(yaml.safe_dump({"preset": "halora-2025"}))
    with pytest.raises(UserError, match=r"mine\.yaml': no preset 'halora-2025'; did you mean 'halora-2026'\?"):
        load_chip(str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"noise": {"sigma": 0.011}},
        {"noise": {"reference": "std"}},
        {"adc": {"bits": 7}},
        {"adc": {"lossless": True}},
        {"tile": {"rows": 65}},
        {"tile": {"columns": 65}},
        {"wires": {"resistance_ohm": 2.5}},
        {"boundary": {"attention": False}},
        {"mapping": {"lm_head": True}},
        {"sram": {"input_bits": 7}},
        {"attention": {"bits": 7}},
        {"lora": {"weight_bits": 7}},
        {"mapping": {"sram_fraction": 0.1}},
        {"cells": {"levels": 16}},
        {"coding": {"replicas": 2}},
        {"write_verify": {"pulses": 3.0}},
        {"faults": {"stuck_low_rate": 0.001}},
        {"retention": {"refresh_interval_s": 2.0}},
        {"read": {"averaged": 2}},
        {"dac": {"bits": 4}},
        {"costs": {"shift_add_pj": 0.03}},
    ],
    ids=str,
)
def test_hash_changes_with_every_value(change):
    assert load_chip({"preset": BASE, **change}).content_hash != load_chip(BASE).content_hash


def test_hash_does_not_change_with_the_name():
    assert load_chip({"preset": BASE, "name": "other"}).content_hash == load_chip(BASE).content_hash


def test_all_bad_values_are_told_at_once():
    with pytest.raises(ValidationError) as caught:
        load_chip(
            {
                "preset": BASE,
                "noise": {"sigma": -1, "reference": "mean"},
                "adc": {"bits": 1.5},
                "tile": {"rows": 0},
                "cells": {"g_min_us": 50.0},
                "lora": {"weight_bits": 99},
                "costs": {"shift_ad_pj": 1.0},
            }
        )
    places = {".".join(map(str, error["loc"])) for error in caught.value.errors()}
    fields = ("sigma", "reference", "adc.bits", "tile.rows", "cells", "lora.weight_bits", "costs")
    assert len(places) == len(fields)
    assert all(any(place.endswith(field) for place in places) for field in fields)
    assert "did you mean 'shift_add_pj'?" in str(caught.value)
    assert "g_min_us 50 must be below g_max_us 40" in str(caught.value)


@pytest.mark.parametrize("extra", [{"tiles": 3}, {"adc": {"bit": 8}}], ids=str)
def test_unknown_keys_are_refused(extra):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        load_chip({"preset": BASE, **extra})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sigma_must_be_a_finite_number(value):
    with pytest.raises(ValidationError, match="finite number"):
        load_chip({"preset": BASE, "noise": {"sigma": value}})


def test_a_preset_can_change_its_noise_model_as_a_whole():
    chip = load_chip({"preset": BASE, "noise": {"kind": "wan-2022"}})
    assert chip.noise.kind == "wan-2022"
    assert load_chip({"preset": BASE, "noise": {"kind": "gaussian", "sigma": 0.5}}).noise.reference == "tile_max"


SIZES = {f"model.layers.{i}.mlp.{name}": 100 for i in range(4) for name in ("up_proj", "down_proj")}


def test_mapping_by_fraction_takes_whole_layers_in_the_order_of_the_ranking():
    by_depth = Mapping(sram_fraction=0.4).places(SIZES)
    assert [name for name, place in by_depth.items() if place is Placement.SRAM] == list(SIZES)[:3]
    ranked = Mapping(sram_fraction=0.25, ranking=("model.layers.3.mlp.up_proj", "*.down_proj")).places(SIZES)
    in_sram = {name for name, place in ranked.items() if place is Placement.SRAM}
    assert in_sram == {"model.layers.3.mlp.up_proj", "model.layers.0.mlp.down_proj"}


def test_a_layer_that_two_patterns_rank_takes_its_room_once():
    ranking = ("model.layers.3.mlp.up_proj", "*.3.*", "*")
    assert set(Mapping(sram_fraction=1.0, ranking=ranking).places(SIZES).values()) == {Placement.SRAM}


def test_mapping_by_pattern_with_digital_above_sram():
    places = Mapping(sram=("*.layers.0.*",), digital=("*.0.mlp.up_proj",)).places(SIZES)
    assert places["model.layers.0.mlp.up_proj"] is Placement.DIGITAL
    assert places["model.layers.0.mlp.down_proj"] is Placement.SRAM
    assert set(list(places.values())[2:]) == {Placement.RRAM}


def test_all_patterns_that_match_nothing_are_told_at_once():
    with pytest.raises(UserError) as caught:
        Mapping(sram=("*.up_prj",), digital=("x",), ranking=("y",)).places(SIZES)
    assert len(caught.value.problems) == 3


def test_a_chip_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_chip(BASE).name = "other"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"no chip 'halora-2025'.*did you mean 'halora-2026'\?"):
        load_chip("halora-2025")
    with pytest.raises(ValidationError, match=r"did you mean 'ideal'\?"):
        TrialConfig.model_validate({"model": "m", "task": "t", "chip": "ideel", "training": {"steps": 1}})


SHAPE = ModelShape(1, 128, 2, 64, 256, (LinearShape("q_proj", 256, 128),))


def _energy(chip) -> float:
    return energy_per_token(SHAPE, chip, rank=4, targets=("q_proj",)).total_uj_per_token


def _simulated(chip) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(128, 256, generator=generator), torch.randn(20, 256, generator=generator)
    key = NoiseKey(role=Role.SEARCH, chip_seed=0)
    programmed = programmed_weight(weight, chip, key, chip.noise.level)
    return tilewise_product(x, programmed, chip, full_scale(x, weight, chip))


@pytest.mark.parametrize("change", [{"tile": {"rows": 128}}, {"adc": {"bits": 6}}], ids=str)
def test_one_value_moves_both_energy_and_simulation(change):
    base, changed = load_chip(BASE), load_chip({"preset": BASE, **change})
    assert _energy(changed) < _energy(base)
    assert (_simulated(changed) - _simulated(base)).std() > 1e-3 * _simulated(base).std()


@pytest.mark.parametrize(
    "change",
    [{"wires": {"resistance_ohm": 8.0}}, {"cells": {"g_max_us": 160.0}}, {"noise": {"sigma": 0.02}}],
    ids=str,
)
def test_analog_imperfections_move_the_simulation(change):
    base, changed = load_chip(BASE), load_chip({"preset": BASE, **change})
    assert (_simulated(changed) - _simulated(base)).std() > 1e-3 * _simulated(base).std()
