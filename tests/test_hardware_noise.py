"""Oracles: closed forms of noise statistics and of first-order IR drop, checked by a resistor-ladder sum."""

import math
from itertools import pairwise

import pytest
import torch

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.noise import ir_drop_gain, noise_to_signal_db, programmed_weight

KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="programming")


def _chip(reference: str = "std", resistance_ohm: float = 0.0, rows: int = 64):
    return load_chip(
        {
            "preset": "ideal",
            "noise": {"reference": reference},
            "wires": {"resistance_ohm": resistance_ohm},
            "tile": {"rows": rows},
        }
    )


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Rows of very different size, so that the references differ."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-1, 0, 600)[:, None] * 0.05
    return torch.randn(600, 500, generator=generator) * sizes


def test_no_sigma_and_no_wire_resistance_give_the_weight_itself(weight):
    torch.testing.assert_close(programmed_weight(weight, _chip(), KEY, 0.0), weight, rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.005, 0.3])
@pytest.mark.parametrize("reference", ["absolute", "tensor_max", "channel_max", "std"])
def test_noise_has_the_standard_deviation_of_sigma_times_its_reference(weight, reference, sigma):
    expected = {
        "absolute": torch.ones(600, 1),
        "tensor_max": torch.full((600, 1), weight.abs().max().item()),
        "channel_max": torch.tensor([[max(map(abs, row))] for row in weight.tolist()]),
        "std": torch.full((600, 1), weight.double().square().mean().sub(weight.mean() ** 2).sqrt().item()),
    }[reference]
    error = (programmed_weight(weight, _chip(reference), KEY, sigma) - weight) / (sigma * expected)
    assert error.std().item() == pytest.approx(1, rel=0.01)
    assert error.mean().item() == pytest.approx(0, abs=0.01)
    for part in (error[:100], error[-100:]):  # small and large channels alike
        assert part.std().item() == pytest.approx(1, rel=0.02)


def test_noise_leaves_the_frozen_weight_alone_and_keeps_its_dtype(weight):
    for dtype in (torch.float32, torch.bfloat16):
        frozen = weight.to(dtype)
        before = frozen.clone()
        programmed = programmed_weight(frozen, _chip(resistance_ohm=2.0), KEY, 0.1)
        assert programmed.dtype == dtype
        assert torch.equal(frozen, before)
        assert programmed.data_ptr() != frozen.data_ptr()


@pytest.mark.parametrize("sigma", [0.001, 0.1, 3.0])
def test_noise_to_signal_is_20_log10_sigma_when_relative_to_std(weight, sigma):
    programmed = programmed_weight(weight, _chip("std"), KEY, sigma)
    assert noise_to_signal_db(weight, programmed) == pytest.approx(20 * math.log10(sigma), abs=0.05)


def test_no_noise_is_minus_infinite_db(weight):
    assert noise_to_signal_db(weight, weight) == -math.inf


@pytest.mark.parametrize(("rows", "in_features"), [(64, 64), (64, 150), (128, 96)])
def test_ir_drop_gain_is_the_loss_of_every_wire_segment_summed_up(rows, in_features):
    chip = _chip(resistance_ohm=2.0, rows=rows)
    r_g = 2.0 * chip.wires.conductance_us * 1e-6
    gains = []
    for i in range(in_features):
        cell = i % rows + 1  # segments between the cell and the converter
        # Segment j carries the unit currents of the cells behind it, j .. rows.
        drop = r_g * sum(rows - j + 1 for j in range(1, cell + 1))
        gains.append(1 / (1 + drop))
    expected = torch.tensor(gains) / (sum(gains) / len(gains))
    torch.testing.assert_close(ir_drop_gain(in_features, chip), expected, rtol=5e-4, atol=0)  # k/2 dropped


def test_ir_drop_gain_has_mean_one_falls_along_the_column_and_repeats_per_tile():
    gain = ir_drop_gain(3 * 64, _chip(resistance_ohm=5.0))
    assert gain.mean().item() == pytest.approx(1, abs=1e-6)
    tiles = gain.reshape(3, 64)
    assert (tiles.diff(dim=1) <= 0).all()
    assert (tiles[:, 0] > tiles[:, -1] * 1.01).all()
    assert torch.equal(tiles[0], tiles[2])


def test_taller_tiles_and_thinner_wires_spread_the_gain():
    spreads = [ir_drop_gain(1024, _chip(resistance_ohm=2.0, rows=rows)).std().item() for rows in (32, 64, 128, 256)]
    assert all(b > 3 * a for a, b in pairwise(spreads))  # grows with the square of rows
    assert ir_drop_gain(64, _chip(resistance_ohm=4.0)).std() > 1.9 * ir_drop_gain(64, _chip(resistance_ohm=2.0)).std()


def test_ir_drop_scales_the_noisy_columns(weight):
    clean = programmed_weight(weight, _chip(), KEY, 0.1)
    dropped = programmed_weight(weight, _chip(resistance_ohm=2.0), KEY, 0.1)
    torch.testing.assert_close(dropped, clean * ir_drop_gain(500, _chip(resistance_ohm=2.0)))
