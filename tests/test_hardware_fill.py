"""Oracles: the mean conductance of every cell that programming aims at, cell by cell; fills counted beforehand on real
SmolLM2 and on a real Qwen2.5-class model; and the array's energy summed over single cells.
"""

import pytest
import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import cell_arrays
from halora.hardware.cells import clip_limit, clipped, weight_scale
from halora.hardware.chip import Chip, load_chip
from halora.hardware.energy import energy_per_token
from halora.hardware.families import LINEAR_NAMES
from halora.hardware.fill import layer_fill
from halora.hardware.mapping import LM_HEAD
from halora.hardware.noise import ir_drop_gain, programmed_weight
from halora.hardware.shapes import known_shape, named_shapes
from halora.training.models import model_shape, plain_base

CODINGS = [
    {},
    {"coding": {"scale": "channel_max"}},
    {"coding": {"clip_std": 2.5}},
    {"coding": {"scale": "channel_max", "clip_std": 1.5}},
    {"cells": {"levels": 8}},
    {"coding": {"slices": 4, "replicas": 2}, "cells": {"levels": 4}},
    {"coding": {"slices": 2, "slice_ratio": 8.0}},
]


def _chip(**sections) -> Chip:
    return load_chip({"preset": "ideal", **sections})


def _mean_us(weight: Tensor, chip: Chip) -> float:
    """Of all cells, where programming aims them."""
    values = clipped(weight, clip_limit(weight, chip.coding, chip.tile), chip.tile)
    arrays = cell_arrays(values / weight_scale(values, chip.coding, chip.tile), chip, None, None)
    return torch.stack([array.fresh.double().mean() for array in arrays]).mean().item()


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """Heavy tails, and more weights than are looked at together."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1100, 500, generator=generator) * torch.rand(1100, 500, generator=generator) ** 2


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_the_fill_gives_the_mean_conductance_of_all_cells(weight, coding):
    chip = _chip(**coding)
    assert chip.cells.mean_us(layer_fill(weight, chip)) == pytest.approx(_mean_us(weight, chip), rel=1e-5)


def test_a_chip_that_states_a_fill_has_it(weight):
    assert layer_fill(weight, _chip(cells={"mean_fill": 0.25})) == 0.25


def test_clipping_raises_the_conductance_that_wires_lose_by(weight):
    """IR drop, in the simulation, by the same fill: with a stated one the spread of the columns' gains is equal."""
    wires = {"resistance_ohm": 2.7}
    for coding in CODINGS:
        measured = _chip(wires=wires, **coding)
        cells = measured.cells.model_copy(update={"mean_fill": layer_fill(weight, measured)})
        stated = measured.model_copy(update={"cells": cells})
        torch.testing.assert_close(ir_drop_gain(weight, measured), ir_drop_gain(weight, stated))
    spread = [
        ir_drop_gain(weight, _chip(wires=wires, coding={"clip_std": clip})).std() for clip in (None, 4.0, 2.0, 1.0)
    ]
    assert spread == sorted(spread)
    assert spread[-1] > 1.5 * spread[0]
    key = NoiseKey(role=Role.SEARCH, chip_seed=0)
    chip = _chip(wires=wires, coding={"clip_std": 2.0})
    limit = clip_limit(weight, chip.coding, chip.tile)
    torch.testing.assert_close(
        programmed_weight(weight, chip, key, 0.0), clipped(weight, limit, chip.tile) * ir_drop_gain(weight, chip)
    )


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_energy_of_a_model_whose_weights_are_at_hand_is_that_of_its_cells(tiny_models, coding):
    chip = _chip(mapping={"lm_head": True}, **coding)
    shape = model_shape(tiny_models["llama"])
    expected_fj = 0.0
    for name, module in plain_base(tiny_models["llama"], "fp32").causal_lm.named_modules():
        if name.rpartition(".")[2] in (*LINEAR_NAMES, LM_HEAD):
            cells = 2 * module.weight.numel() * chip.coding.slices * chip.coding.replicas
            expected_fj += cells * 0.13**2 * _mean_us(module.weight.detach(), chip) * 10
    energy = energy_per_token(shape, chip, rank=0, targets=())
    assert energy.fill == "weights"
    assert energy.components_uj["array"] == pytest.approx(expected_fj * 1e-9, rel=1e-5)


def _whole(shape, **coding) -> float:
    """Fill over all weights of the decoder blocks."""
    chip, layers = _chip(coding=coding), shape.linear_layers
    return sum(shape.fill(name, chip) * layer.weights for name, layer in layers.items()) / sum(
        layer.weights for layer in layers.values()
    )


def test_fills_of_the_real_smollm2_as_reviewed_and_as_estimated():
    measured, estimated = model_shape("smollm2-135m-instruct"), named_shapes()["smollm2-135m-instruct"]
    assert "estimate" in energy_per_token(estimated, _chip(), rank=0, targets=()).fill
    for coding, reviewed in (
        ({}, 0.061),
        ({"scale": "channel_max"}, 0.222),
        ({"clip_std": 2.5}, 0.306),
    ):
        assert _whole(measured, **coding) == pytest.approx(reviewed, rel=0.02)
        assert _whole(estimated, **coding) == pytest.approx(reviewed, rel=0.05)
    four = {"cells": {"levels": 4}, "coding": {"slices": 4}}
    for name in ("model.layers.7.mlp.down_proj", "model.layers.20.self_attn.q_proj"):
        assert estimated.fill(name, _chip(**four)) == pytest.approx(measured.fill(name, _chip(**four)), rel=0.35)


def test_estimates_for_qwen_are_those_of_its_measured_tails():
    """Mean |w| over the largest, per kind of layer, of a de-quantised 0.5B-class Qwen2.5."""
    shape = known_shape("Qwen/Qwen2.5-0.5B")
    for name, fill in (
        ("mlp.down_proj", 0.014),
        ("self_attn.q_proj", 0.031),
        ("mlp.gate_proj", 0.030),
        ("mlp.up_proj", 0.036),
    ):
        assert shape.fill(f"model.layers.3.{name}", _chip()) == pytest.approx(fill, rel=0.15)
    for name in ("k_proj", "v_proj", "o_proj"):
        assert 0.034 * 0.85 < shape.fill(f"model.layers.3.self_attn.{name}", _chip()) < 0.062 * 1.15
    assert "qwen2.5" in shape.fill_source


def test_coding_and_clipping_move_the_arrays_energy_of_every_preset():
    shape = named_shapes()["llama-3.2-1b"]
    for preset in ("halora-2026", "neurram-2022", "isaac", "cmo-hfox", "ideal"):
        array = [
            energy_per_token(shape, load_chip({"preset": preset, "coding": coding}), rank=0, targets=()).components_uj[
                "array"
            ]
            for coding in ({}, {"scale": "channel_max"}, {"clip_std": 2.5})
        ]
        assert array[0] * 1.2 < array[1] < array[2]
