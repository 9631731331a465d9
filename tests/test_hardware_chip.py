"""Oracles: the shipped YAML files, and a change seen in both energy and simulation."""

import pytest
import torch
import yaml
from pydantic import ValidationError

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import PRESETS, load_chip, merge, preset_names
from halora.hardware.converters import full_scale, tilewise_product
from halora.hardware.energy import LinearShape, ModelShape, energy_per_token
from halora.hardware.noise import programmed_weight
from halora.trial import TrialConfig

BASE = "halora-2026"


def test_presets_load_and_say_what_their_files_say():
    assert {"halora-2026", "ideal"} <= set(preset_names())
    for name in preset_names():
        chip = load_chip(name)
        assert chip.name == name
        assert merge(chip.model_dump(), yaml.safe_load((PRESETS / f"{name}.yaml").read_text())) == chip.model_dump()


def test_overrides_reach_into_sections_and_keep_the_rest():
    base = load_chip(BASE)
    chip = load_chip({"preset": BASE, "tile": {"rows": 128}, "lora_weight_bits": 4})
    assert (chip.tile.rows, chip.lora_weight_bits) == (128, 4)
    assert chip.tile.columns == base.tile.columns
    assert chip.noise == base.noise


def test_a_chip_is_read_from_a_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    content = load_chip(BASE).model_dump(mode="json") | {"name": "mine", "lora_weight_bits": 6}
    path.write_text(yaml.safe_dump(content))
    assert load_chip(str(path)).lora_weight_bits == 6
    assert load_chip({"preset": str(path), "adc": {"bits": 5}}).adc.bits == 5


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
        {"wires": {"conductance_us": 5.0}},
        {"boundary": {"attention": False}},
        {"boundary": {"lm_head": True}},
        {"lora_weight_bits": 7},
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
                "adc": {"bits": 3},
                "tile": {"rows": 4},
                "lora_weight_bits": 99,
            }
        )
    places = {".".join(map(str, error["loc"])) for error in caught.value.errors()}
    assert places == {"noise.sigma", "noise.reference", "adc.bits", "tile.rows", "lora_weight_bits"}


@pytest.mark.parametrize("extra", [{"tiles": 3}, {"adc": {"bit": 8}}], ids=str)
def test_unknown_keys_are_refused(extra):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        load_chip({"preset": BASE, **extra})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sigma_must_be_a_finite_number(value):
    with pytest.raises(ValidationError, match="finite number"):
        load_chip({"preset": BASE, "noise": {"sigma": value}})


def test_a_chip_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_chip(BASE).lora_weight_bits = 4


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
    programmed = programmed_weight(weight, chip, key, chip.noise.sigma)
    return tilewise_product(x, programmed, chip, full_scale(x, weight, chip))


@pytest.mark.parametrize("change", [{"tile": {"rows": 128}}, {"adc": {"bits": 6}}], ids=str)
def test_one_value_moves_both_energy_and_simulation(change):
    base, changed = load_chip(BASE), load_chip({"preset": BASE, **change})
    assert _energy(changed) < _energy(base)
    assert (_simulated(changed) - _simulated(base)).std() > 1e-3 * _simulated(base).std()


@pytest.mark.parametrize(
    "change",
    [{"wires": {"resistance_ohm": 8.0}}, {"wires": {"conductance_us": 16.0}}, {"noise": {"sigma": 0.02}}],
    ids=str,
)
def test_analog_imperfections_move_the_simulation(change):
    base, changed = load_chip(BASE), load_chip({"preset": BASE, **change})
    assert (_simulated(changed) - _simulated(base)).std() > 1e-3 * _simulated(base).std()
