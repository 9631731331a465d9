"""Oracles: conductances worked out by hand, a brute-force coder that programs weight by weight, binomial bounds."""

from dataclasses import replace
from math import sqrt

import pytest
import torch

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import cell_arrays
from halora.hardware.cells import (
    clip_limit,
    clipped,
    target_conductance,
    weight_scale,
    with_faults,
)
from halora.hardware.chip import Cells, Coding, Faults, Tile, load_chip
from halora.hardware.noise import programmed_weight
from halora.hardware.read_noise import white_variance_us2
from halora.hardware.regions import widened

KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="programming")
TILE = Tile(rows=25, columns=16)
CELLS = Cells(g_min_us=10.0, g_max_us=50.0, read_voltage_v=0.2, read_time_ns=10.0)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(40, 60, generator=generator) * torch.logspace(-2, 0, 40)[:, None]


def _chip(**sections):
    return load_chip({"preset": "ideal", **sections})


FRESH = {"refresh_interval_s": 1.0}


def _programmed(weight, **sections):
    chip = _chip(**sections)
    return programmed_weight(weight, chip, KEY, chip.noise.level)


def test_a_weight_is_the_difference_of_two_cells_of_which_one_stands_at_g_min():
    stored = torch.tensor([-1.0, -0.25, 0.0, 0.5, 1.0])
    assert target_conductance(stored, 1, CELLS).tolist() == [10, 10, 10, 30, 50]
    assert target_conductance(stored, -1, CELLS).tolist() == [50, 20, 10, 10, 10]


def test_finite_levels_are_the_nearest_of_evenly_spaced_conductances():
    cells = CELLS.model_copy(update={"levels": 5})  # 10, 20, 30, 40, 50 uS
    stored = torch.tensor([0.0, 0.12, 0.13, 0.37, 0.38, 0.99, -0.6])
    assert target_conductance(stored, 1, cells).tolist() == [10, 10, 20, 20, 30, 50, 10]
    assert target_conductance(stored, -1, cells).tolist() == [10, 10, 10, 10, 10, 10, 30]


def test_clipping_is_at_standard_deviations_of_what_the_scale_is_taken_of(weight):
    assert clip_limit(weight, Coding(), TILE) is None
    assert clipped(weight, None, TILE) is weight
    assert clip_limit(weight, Coding(clip_std=2.0), TILE).item() == pytest.approx(2 * weight.std().item())
    limit = clip_limit(weight, Coding(clip_std=2.0, scale="channel_max"), TILE)
    torch.testing.assert_close(limit, 2 * weight.std(dim=1, keepdim=True))
    rows = clipped(weight, limit, TILE)
    assert (rows.abs() <= limit).all()
    outside = weight.abs() > limit
    assert 0.02 < outside.double().mean() < 0.08
    assert torch.equal(rows[~outside], weight[~outside])
    assert torch.equal(rows[outside], (limit * weight.sign())[outside])


def test_the_scale_is_the_largest_weight_of_the_matrix_or_of_each_output(weight):
    assert weight_scale(weight, Coding(), TILE).item() == weight.abs().max().item()
    assert torch.equal(weight_scale(weight, Coding(scale="channel_max"), TILE)[:, 0], weight.abs().amax(dim=1))
    for scale in ("tensor_max", "channel_max", "tile_max"):
        assert (weight_scale(torch.zeros(2, 2), Coding(scale=scale), TILE) == 1).all()


@pytest.mark.parametrize("tile", [TILE, Tile(rows=8, columns=1024), Tile(rows=1024, columns=8)], ids=str)
def test_a_tile_s_scale_and_limit_are_those_of_its_own_weights(weight, tile):
    """Loops over the tiles, of which the last ones are not full."""
    coding = Coding(clip_std=2.0, scale="tile_max")
    scale, limit = (
        widened(of_tiles.expand(len(weight), -1), weight.shape[1], tile.rows).expand(weight.shape)
        for of_tiles in (weight_scale(weight, coding, tile), clip_limit(weight, coding, tile))
    )
    inside = clipped(weight, clip_limit(weight, coding, tile), tile)
    for top in range(0, weight.shape[0], tile.columns):
        for left in range(0, weight.shape[1], tile.rows):
            at = slice(top, top + tile.columns), slice(left, left + tile.rows)
            own = weight[at]
            assert (scale[at] == own.abs().max()).all()
            torch.testing.assert_close(limit[at], (2 * own.std()).expand(own.shape), rtol=1e-4, atol=0)
            torch.testing.assert_close(inside[at], own.clamp(-2 * own.std(), 2 * own.std()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", ["tensor_max", "channel_max", "tile_max"])
def test_cells_err_by_the_full_scale_of_their_own_region(scale):
    """An error of one share of the range: in weights it is that share of the largest weight of the region."""
    sizes = torch.logspace(-2, 0, 12).reshape(4, 3)
    weight = torch.ones(4 * 40, 3 * 50) * sizes.repeat_interleave(40, 0).repeat_interleave(50, 1)
    states = [{"conductance_us": g, "mean_us": g, "std_us": 0.39, "time_s": 1.0} for g in (0.0, 40.0)]
    sections = {
        "noise": {"kind": "measured", "states": states},
        "cells": {"g_min_us": 1.0},
        "tile": {"rows": 50, "columns": 40},
        "coding": {"scale": scale},
        "retention": FRESH,
    }
    error = (_programmed(weight, **sections) - weight) / (0.39 / 39 * sqrt(2))
    by_tile = error.unflatten(0, (4, 40)).unflatten(2, (3, 50)).square().mean(dim=(1, 3)).sqrt()
    expected = {"tensor_max": sizes.max(), "channel_max": sizes.amax(1, keepdim=True), "tile_max": sizes}[scale]
    torch.testing.assert_close(by_tile, expected.expand(4, 3).contiguous(), rtol=0.1, atol=0)


def test_clipping_lowers_the_noise_that_is_relative_to_the_largest_weight(weight):
    noise = {"kind": "gaussian", "sigma": 0.05, "reference": "tensor_max"}
    coding = {"clip_std": 1.5}
    error = _programmed(weight, noise=noise, coding=coding) - _programmed(weight, coding=coding)
    assert error.std().item() == pytest.approx(0.05 * 1.5 * weight.std().item(), rel=0.05)


def _by_hand(value: float, ratio: float, slices: int, levels: int) -> float:
    """One weight over scale, programmed slice by slice into exact cells with levels, each reading back the last."""
    left, total = value, 0.0
    for index in range(slices):
        wanted = max(-1.0, min(1.0, left))
        held = round(abs(wanted) * (levels - 1)) / (levels - 1) * (1 if wanted >= 0 else -1)
        total += held * ratio**-index
        left = (left - held) * ratio
    return total


@pytest.mark.parametrize(("levels", "slices", "ratio"), [(4, 1, 4.0), (4, 3, 4.0), (2, 5, 2.0), (16, 2, 16.0)])
def test_slices_hold_what_the_read_back_of_those_before_left_over(weight, levels, slices, ratio):
    stored = _programmed(weight, cells={"levels": levels}, coding={"slices": slices, "slice_ratio": ratio})
    scale = weight.abs().max().item()
    expected = [[scale * _by_hand(w / scale, ratio, slices, levels) for w in row] for row in weight.tolist()]
    torch.testing.assert_close(stored, torch.tensor(expected), rtol=0, atol=2e-5 * scale)


def test_every_further_slice_shrinks_the_error_by_its_ratio(weight):
    def error(slices: int) -> float:
        states = [{"conductance_us": g, "mean_us": g, "std_us": 1.0, "time_s": 1.0} for g in (0.0, 60.0)]
        noise, cells = {"kind": "measured", "states": states}, {"g_min_us": 10.0, "g_max_us": 50.0}
        coding = {"slices": slices, "slice_ratio": 4.0}
        return (_programmed(weight, noise=noise, cells=cells, coding=coding, retention=FRESH) - weight).std().item()

    errors = [error(slices) for slices in (1, 2, 3)]
    assert errors[0] == pytest.approx(weight.abs().max().item() * 2**0.5 / 40, rel=0.05)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_replicas_average_errors_of_their_own(weight):
    def error(replicas: int) -> torch.Tensor:
        return _programmed(weight, noise={"kind": "wan-2022"}, coding={"replicas": replicas}) - weight

    assert error(4).std() / error(1).std() == pytest.approx(0.5, rel=0.1)


def test_the_shares_of_all_cells_add_up_to_the_weight(weight):
    chip = _chip(coding={"slices": 2, "replicas": 3}, cells={"levels": 8})
    arrays = list(cell_arrays(weight / weight.abs().max(), chip, None, None))
    assert len(arrays) == len({array.name for array in arrays}) == 2 * 2 * 3
    total = sum(array.share * array.aged for array in arrays) * weight.abs().max()
    torch.testing.assert_close(total, _programmed(weight, coding={"slices": 2}, cells={"levels": 8}), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.004), (0.02, 0.0), (0.013, 0.3)])
def test_stuck_cells_come_at_their_rates_and_stand_where_stated(low, high):
    faults = Faults(stuck_low_rate=low, stuck_high_rate=high, stuck_low_us=0.5, stuck_high_us=500.0)
    uniform = torch.from_numpy(KEY.uniform((1000, 1000)))
    conductance = with_faults(torch.full((1000, 1000), 20.0), faults, uniform)
    for rate, value in ((low, 0.5), (high, 500.0), (1 - low - high, 20.0)):
        found = (conductance == value).double().mean().item()
        assert abs(found - rate) <= 4 * sqrt(rate * (1 - rate) / 1e6)


def test_very_rare_faults_are_drawn_finer_than_a_byte():
    faults = Faults(stuck_low_rate=1e-5, stuck_low_us=7.0)
    stuck = sum(
        (
            with_faults(torch.ones(2000, 1000), faults, torch.from_numpy(KEY.part(str(i)).uniform((2000, 1000)))) == 7
        ).sum()
        for i in range(2)
    )
    assert abs(stuck.item() - 40) <= 4 * sqrt(40)


def test_a_stuck_pair_gives_the_weight_of_its_two_conductances(weight):
    def held(**faults) -> torch.Tensor:
        return _programmed(weight, faults=faults, cells={"g_min_us": 1.0, "g_max_us": 41.0})

    scale = weight.abs().max()
    both = held(stuck_low_rate=0.5, stuck_low_us=3.0, stuck_high_rate=0.5, stuck_high_us=203.0)  # every cell is stuck
    assert set((both / scale).round(decimals=4).unique().tolist()) == {-5.0, 0.0, 5.0}  # 200 uS over a span of 40
    assert (both.abs() > scale).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_faults_belong_to_the_chip_and_programming_again_keeps_them(weight):
    chip = _chip(
        faults={"stuck_high_rate": 0.02, "stuck_high_us": 900.0},
        noise={"kind": "wan-2022"},
        retention={"ageing": {"kind": "power-law", "nu_mean": 0.1}, "refresh_interval_s": 1000.0},
    )
    first, again, other = (
        programmed_weight(weight, chip, key, 1.0) for key in (KEY, replace(KEY, draw=1), replace(KEY, chip_seed=1))
    )
    stuck = first.abs() > 10 * weight.abs().max()
    assert stuck.double().mean().item() == pytest.approx(2 * 0.02 * 0.98, abs=0.015)  # 3.5 standard errors
    assert torch.equal(stuck, again.abs() > 10 * weight.abs().max())
    assert not torch.equal(first[~stuck], again[~stuck])
    assert not torch.equal(stuck, other.abs() > 10 * weight.abs().max())
    span = weight.abs().max() / 39
    largest = first[stuck].abs()
    assert (largest > span * (900 - 60)).all()  # a stuck cell does not drift; its healthy partner is the rest
    assert (largest <= span * 900).all()


def test_thermal_noise_is_that_of_the_energy_of_each_cells_own_read():
    cells = {"g_min_us": 1.0, "g_max_us": 40.0, "read_voltage_v": 0.1, "read_time_ns": 10.0}
    conductance = torch.tensor([1.0, 10.0, 40.0], dtype=torch.float64)
    relative = white_variance_us2(conductance, _chip(cells=cells, read={"thermal": True})).sqrt() / conductance
    energy_j = 0.1**2 * conductance * 1e-6 * 10e-9
    torch.testing.assert_close(relative, (2 * 1.380649e-23 * 300 / energy_j).sqrt())
    assert relative[1].item() == pytest.approx(0.0029, abs=1e-4)  # 0.29 percent at 1 fJ
    torch.testing.assert_close(
        white_variance_us2(conductance, _chip(cells=cells, read={"thermal": True, "white_us": 0.5})),
        0.25 + (relative * conductance).square(),
    )
