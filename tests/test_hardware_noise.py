"""Oracles: closed forms of noise statistics, of rectified moments and of first-order IR drop (a resistor-ladder sum);
rejection sampling for write-verify; cells read one by one for the read noise; bit equality with the plain formula.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from sampled_reads import sampled_read_error
from torch import Tensor

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import cell_arrays, write_verify_factor
from halora.hardware.chip import load_chip
from halora.hardware.chip_files import preset_names
from halora.hardware.converters import drive, full_scale, noise_power
from halora.hardware.noise import Programming, ir_drop_gain, mean_db, noise_to_signal_db, programmed_weight
from halora.hardware.read_noise import read_noise, slow_deviation_us

KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="programming")
DRIFT = {"kind": "power-law", "nu_mean": 0.05, "nu_std": 0.01}


def _chip(**sections):
    return load_chip({"preset": "ideal", **sections})


def _gaussian(reference: str = "std", sigma: float = 0.1, **sections):
    return _chip(noise={"sigma": sigma, "reference": reference}, **sections)


def _programmed(weight: Tensor, key: NoiseKey = KEY, **sections) -> Tensor:
    chip = _chip(**sections)
    return programmed_weight(weight, chip, key, chip.noise.level)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """Rows of very different size, so that the references differ."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-1, 0, 600)[:, None] * 0.05
    return torch.randn(600, 500, generator=generator) * sizes


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"coding": {"slices": 3, "replicas": 2, "scale": "channel_max"}},
        {"noise": {"kind": "wan-2022", "strength": 0.0}},
        {"retention": {"ageing": {**DRIFT, "strength": 0.0}, "refresh_interval_s": 1e6, "compensation": "column"}},
        {"write_verify": {"pulses": 20}, "coding": {"clip_std": None}},
    ],
    ids=str,
)
def test_where_nothing_moves_the_weight_it_is_returned_itself(weight, sections):
    for dtype in (torch.float32, torch.bfloat16):
        frozen = weight.to(dtype)
        assert _programmed(frozen, **sections) is frozen


@pytest.mark.parametrize("sigma", [0.005, 0.3])
@pytest.mark.parametrize("reference", ["absolute", "tensor_max", "channel_max", "tile_max", "std"])
def test_noise_has_the_standard_deviation_of_sigma_times_its_reference(weight, reference, sigma):
    magnitude = [[abs(w) for w in row] for row in weight.tolist()]
    tile = {"rows": 96, "columns": 64}  # inputs, outputs; the last ones are not full
    tiles = [
        [max(max(row[j : j + 96]) for row in magnitude[i : i + 64]) for j in range(0, 500, 96)]
        for i in range(0, 600, 64)
    ]
    expected = {
        "absolute": torch.ones(600, 1),
        "tensor_max": torch.full((600, 1), weight.abs().max().item()),
        "channel_max": torch.tensor([[max(row)] for row in magnitude]),
        "tile_max": torch.tensor([[tiles[i // 64][j // 96] for j in range(500)] for i in range(600)]),
        "std": torch.full((600, 1), weight.double().square().mean().sub(weight.mean() ** 2).sqrt().item()),
    }[reference]
    chip = _gaussian(reference, tile=tile)
    error = (programmed_weight(weight, chip, KEY, sigma) - weight) / (sigma * expected)
    assert error.std().item() == pytest.approx(1, rel=0.01)
    assert error.mean().item() == pytest.approx(0, abs=0.01)
    for part in (error[:100], error[-100:]):  # small and large channels alike
        assert part.std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_gaussian_noise_is_one_draw_per_weight_and_nothing_else(weight, dtype):
    frozen = weight.to(dtype)
    unit = torch.from_numpy(KEY.standard_normal((600, 500)))
    expected = torch.addcmul(frozen.float(), unit, 0.07 * frozen.float().abs().amax()).to(dtype)
    assert torch.equal(programmed_weight(frozen, _gaussian("tensor_max"), KEY, 0.07), expected)


@pytest.mark.parametrize("reference", ["tensor_max", "channel_max", "tile_max"])
def test_recycled_noise_on_bf16_weights_is_that_of_float32_rounded(weight, reference):
    """The draw and its deviation are rounded to 8 bits, then the sum is."""
    key, chip, frozen = replace(KEY, role=Role.TRAIN), _gaussian(reference), weight.bfloat16()
    exact = programmed_weight(frozen.float(), chip, key, 0.3)
    found = programmed_weight(frozen, chip, key, 0.3)
    error = exact - frozen.float()
    assert found.dtype == torch.bfloat16
    assert ((found.float() - exact).abs() <= (error.abs() * 2.02 + exact.abs() * 1.02) * 2**-8).all()
    assert (found.float() - frozen.float()).std() == pytest.approx(error.std().item(), rel=2e-3)


@pytest.mark.parametrize("sections", [{"noise": {"sigma": 0.1, "reference": "std"}}, {"noise": {"kind": "wan-2022"}}])
def test_errors_of_all_rows_are_independent(sections):
    """Rows are worked on some at a time."""
    error = _programmed(torch.eye(300), **sections) - torch.eye(300)
    correlation = torch.corrcoef(error.fill_diagonal_(0)).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(300)


def test_the_level_replaces_the_chips_own(weight):
    own = _programmed(weight, noise={"sigma": 0.3, "reference": "std"})
    assert torch.equal(programmed_weight(weight, _gaussian("std", 0.01), KEY, 0.3), own)
    cells = _chip(noise={"kind": "wan-2022"})
    half, full = (programmed_weight(weight, cells, KEY, level) - weight for level in (0.05, 0.1))
    assert full.std() / half.std() == pytest.approx(2, rel=0.02)


EVERYTHING = {
    "noise": {"kind": "wan-2022"},
    "coding": {"slices": 2, "replicas": 2, "clip_std": 3.0, "scale": "channel_max"},
    "cells": {"levels": 32},
    "faults": {"stuck_low_rate": 0.001, "stuck_high_rate": 0.001},
    "retention": {"ageing": DRIFT, "refresh_interval_s": 86400.0, "compensation": "column"},
    "write_verify": {"pulses": 2},
    "wires": {"resistance_ohm": 2.0},
}


WEIGHT_NOISES = ({"sigma": 0.1, "reference": "std"}, {"sigma": 0.05, "reference": "tile_max"})


@pytest.mark.parametrize("sections", [{"noise": {"sigma": 0.1}, "wires": {"resistance_ohm": 2.0}}, EVERYTHING], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_leaves_the_frozen_weight_alone_and_keeps_its_dtype(weight, sections, dtype):
    frozen = weight.to(dtype)
    before = frozen.clone()
    programmed = _programmed(frozen, **sections)
    assert programmed.dtype == dtype
    assert torch.equal(frozen, before)
    assert not torch.equal(programmed, before)
    assert programmed.data_ptr() != frozen.data_ptr()
    assert torch.isfinite(programmed).all()
    assert torch.equal(_programmed(frozen, **sections), programmed)


@pytest.mark.parametrize("part", EVERYTHING)
def test_each_part_of_a_chip_moves_the_weight(weight, part):
    without = {key: value for key, value in EVERYTHING.items() if key != part}
    assert not torch.equal(_programmed(weight, **without), _programmed(weight, **EVERYTHING))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_programs_a_weight(weight, name):
    chip = load_chip(name)
    programmed = programmed_weight(weight, chip, KEY, chip.noise.level)
    db = noise_to_signal_db(weight, programmed)
    assert (db == -math.inf) == (name == "ideal")
    assert db < -2


@pytest.mark.parametrize("sigma", [0.001, 0.1, 3.0])
def test_noise_to_signal_is_20_log10_sigma_when_relative_to_std(weight, sigma):
    programmed = programmed_weight(weight, _gaussian("std"), KEY, sigma)
    assert noise_to_signal_db(weight, programmed) == pytest.approx(20 * math.log10(sigma), abs=0.05)


def test_no_noise_is_minus_infinite_db(weight):
    assert noise_to_signal_db(weight, weight) == -math.inf


# Programming error of cells.


@pytest.mark.parametrize("stored", [0.0, 0.1, 0.5, 0.9])
def test_cell_error_is_the_models_before_the_clamp_and_has_the_rectified_moments_after(stored):
    chip = _chip(noise={"kind": "wan-2022"}, cells={"g_min_us": 0.5})
    noise = chip.noise.with_level(1.0)
    arrays = list(cell_arrays(torch.full((1000, 1000), stored), chip, noise, KEY))
    for array, wanted in zip(arrays, (0.5 + 39.5 * stored, 0.5), strict=True):
        sigma = noise.std(torch.tensor(wanted), 1.0).item()
        # Moments of max(x, 0) for x ~ N(wanted, sigma^2).
        z = wanted / sigma
        inside, density = 0.5 * math.erfc(-z / math.sqrt(2)), math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        mean = wanted * inside + sigma * density
        power = (wanted**2 + sigma**2) * inside + wanted * sigma * density
        assert array.fresh.min() >= 0
        assert array.fresh.mean().item() == pytest.approx(mean, rel=0.01)
        assert array.fresh.std().item() == pytest.approx(math.sqrt(power - mean**2), rel=0.01)


def test_cells_at_the_same_level_have_errors_of_their_own_where_mnsim_draws_one_per_level():
    weight = torch.tensor([1.0, -1.0]).repeat(50, 50)
    programmed = _programmed(weight, noise={"kind": "wan-2022"}, cells={"levels": 2})
    assert programmed[weight > 0].unique().numel() > 2400


def test_the_two_sides_of_a_pair_slices_replicas_and_layers_are_independent():
    chip = _chip(noise={"kind": "wan-2022"}, coding={"slices": 2, "replicas": 2}, cells={"g_min_us": 10.0})
    arrays = [
        array
        for key in (KEY, replace(KEY, module="other"))
        for array in cell_arrays(torch.zeros(150, 150), chip, chip.noise, key)
    ]
    correlation = torch.corrcoef(torch.stack([array.fresh.flatten() for array in arrays])).fill_diagonal_(0)
    first = [i for i, array in enumerate(arrays) if "slice 0" in array.name]
    second = [i for i, array in enumerate(arrays) if "slice 1, side 1" in array.name]
    # The two sides of a second slice are aimed at the same residual, so among them only one side is an oracle.
    for group in (first, second):
        assert len(group) == (8 if group is first else 4)
        assert correlation[group][:, group].abs().max() < 4.5 / 150


# Write-verify.


@pytest.mark.parametrize("pulses", [1.0, 1.2, 2.0, 8.52, 100.0, 10_000.0])
def test_write_verify_factor_is_the_spread_of_a_truncated_normal(pulses):
    """Bisection for the window and Simpson's rule for the second moment."""
    low, high = 0.0, 10.0
    for _ in range(200):
        window = (low + high) / 2
        low, high = (window, high) if math.erf(window / math.sqrt(2)) < 1 / pulses else (low, window)
    steps = 2000
    xs = [window * i / steps for i in range(steps + 1)]
    density = [math.exp(-x * x / 2) for x in xs]
    simpson = [1, *[4, 2] * (steps // 2 - 1), 4, 1]
    mass = sum(w * d for w, d in zip(simpson, density, strict=True))
    power = sum(w * d * x * x for w, d, x in zip(simpson, density, xs, strict=True))
    assert write_verify_factor(pulses) == pytest.approx(math.sqrt(power / mass), rel=1e-5)


@pytest.mark.parametrize("window", [2.0, 0.8, 0.2])
def test_write_verify_factor_is_what_trying_until_accepted_gives(window):
    tries = torch.from_numpy(KEY.part("tries").standard_normal((2_000_000,)))
    kept = tries[tries.abs() < window]  # in a row of independent tries, the accepted ones are kept
    pulses = len(tries) / len(kept)
    assert write_verify_factor(pulses) == pytest.approx(kept.std().item(), rel=0.01)


def test_write_verify_scales_errors_of_cells_and_weights_relative_to_its_reference(weight):
    for noise in ({"kind": "cmo"}, {"kind": "gaussian", "sigma": 0.01, "reference": "tensor_max"}):
        cells = {"g_min_us": 9.0, "g_max_us": 88.2}
        base = _programmed(weight, noise=noise, cells=cells) - weight
        for pulses, reference in ((4, 1), (1, 4), (50, 8.52)):
            effort = {"pulses": pulses, "reference_pulses": reference}
            error = _programmed(weight, noise=noise, cells=cells, write_verify=effort) - weight
            expected = write_verify_factor(pulses) / write_verify_factor(reference)
            assert (error.std() / base.std()).item() == pytest.approx(expected, rel=0.01)
    assert write_verify_factor(1.0) == 1.0
    assert all(b < a for a, b in pairwise(write_verify_factor(1 + n) for n in range(50)))


@pytest.mark.parametrize(("slices", "replicas"), [(1, 4), (2, 1), (3, 2)])
def test_weight_noise_shrinks_with_slices_and_replicas_as_averaging_would(weight, slices, replicas):
    coding = {"slices": slices, "slice_ratio": 4.0, "replicas": replicas}
    error = _programmed(weight, noise={"sigma": 0.1, "reference": "std"}, coding=coding) - weight
    expected = 0.1 * weight.std().item() * 4.0 ** -(slices - 1) / math.sqrt(replicas)
    assert error.std().item() == pytest.approx(expected, rel=0.01)


# Ageing.


def _aged(weight: Tensor, time_s: float, compensation: str = "none", **ageing) -> Tensor:
    retention = {"ageing": DRIFT | ageing, "refresh_interval_s": time_s, "compensation": compensation}
    return _programmed(weight, retention=retention, cells={"g_min_us": 0.0})


def test_drift_shrinks_weights_by_the_power_law(weight):
    for time_s in (1e2, 1e6):
        aged = _aged(weight, time_s, nu_std=0.0)
        torch.testing.assert_close(aged, weight * time_s**-0.05, rtol=1e-4, atol=1e-6)


def test_a_weight_keeps_its_draws_between_two_times(weight):
    early, late = (_aged(weight, time_s).div(weight).log() / math.log(time_s) for time_s in (1e3, 1e6))
    wanted = weight.abs() > 0.01 * weight.std()
    torch.testing.assert_close(early[wanted], late[wanted], rtol=1e-2, atol=1e-3)  # the exponent of each cell
    relaxed = [
        _programmed(
            weight,
            retention={"ageing": {"kind": "cmo-relaxation"}, "refresh_interval_s": time_s},
            cells={"g_min_us": 9.0, "g_max_us": 88.2},
        )
        - weight
        for time_s in (1.0, 1e6)
    ]
    assert torch.corrcoef(torch.stack([change.flatten() for change in relaxed]))[0, 1] > 0.99
    assert relaxed[1].std() / relaxed[0].std() == pytest.approx((0.4118 + 0.042 * math.log(1e6)) / 0.4118, rel=0.02)


def test_ageing_has_draws_of_its_own():
    sections = {
        "noise": {"kind": "cmo"},
        "retention": {"ageing": {"kind": "cmo-relaxation"}, "refresh_interval_s": 100.0},
        "cells": {"g_min_us": 9.0, "g_max_us": 88.2},
    }
    chip = _chip(**sections)
    for array in cell_arrays(torch.full((200, 200), 0.5), chip, chip.noise, KEY):
        programming, ageing = array.fresh - array.fresh.mean(), array.aged - array.fresh
        assert abs(torch.corrcoef(torch.stack([programming.flatten(), ageing.flatten()]))[0, 1]) < 4.5 / 200


@pytest.mark.parametrize("compensation", ["global", "column"])
def test_compensation_brings_back_the_mean_magnitude(weight, compensation):
    aged = _aged(weight, 1e6, compensation)
    assert aged.abs().mean().item() == pytest.approx(weight.abs().mean().item(), rel=1e-4)
    per_output = aged.abs().mean(dim=1) / weight.abs().mean(dim=1)
    spread = (per_output - 1).abs().max().item()
    assert spread < 1e-4 if compensation == "column" else spread > 1e-3
    lost, fixed = (
        noise_to_signal_db(weight, _aged(weight, 1e6, compensation=choice)) for choice in ("none", compensation)
    )
    assert fixed < lost - 6


def test_weight_noise_is_measured_and_compensated_along_with_the_cells(weight):
    noise = {"kind": "gaussian", "sigma": 0.5, "reference": "std"}
    retention = {"ageing": DRIFT | {"nu_std": 0.0}, "refresh_interval_s": 1e4, "compensation": "global"}
    programmed = _programmed(weight, noise=noise, retention=retention, cells={"g_min_us": 0.0})
    error = 0.5 * weight.std() * torch.from_numpy(KEY.standard_normal((600, 500)))
    fresh, aged = weight + error, weight * 1e4**-0.05 + error
    torch.testing.assert_close(programmed, aged * (fresh.abs().mean() / aged.abs().mean()), rtol=1e-3, atol=1e-5)


def test_slices_are_read_back_before_they_relax(weight):
    """The second slice undoes the error that the first has right after programming, not what it becomes later."""
    states = [
        {"conductance_us": g, "mean_us": g, "std_us": std, "time_s": time_s}
        for time_s, std in ((1.0, 1.0), (1e4, 3.0))
        for g in (0.0, 40.0)
    ]
    noise, coding = {"kind": "measured", "states": states}, {"slices": 2, "slice_ratio": 8.0}
    one_us = weight.abs().max().item() / 39
    early, late = (
        (_programmed(weight, noise=noise, coding=coding, retention={"refresh_interval_s": time_s}) - weight)
        .std()
        .item()
        for time_s in (1.0, 1e4)
    )
    # Cells at 1 uS are cut off at 0, which takes a part of their error.
    assert 1 / 8 < early / one_us < math.sqrt(2) / 8
    assert 2.0 < late / one_us < 2 * math.sqrt(2)


# Wires.


@pytest.mark.parametrize(("rows", "in_features"), [(64, 64), (64, 150), (128, 96)])
def test_ir_drop_gain_is_the_loss_of_every_wire_segment_summed_up(rows, in_features):
    chip = _chip(wires={"resistance_ohm": 2.0}, tile={"rows": rows}, cells={"mean_fill": 0.1})
    r_g = 2.0 * chip.cells.mean_us(0.1) * 1e-6
    gains = []
    for i in range(in_features):
        cell = i % rows + 1  # segments between the cell and the converter
        # Segment j carries the unit currents of the cells behind it, j .. rows.
        drop = r_g * sum(rows - j + 1 for j in range(1, cell + 1))
        gains.append(1 / (1 + drop))
    expected = torch.tensor(gains) / (sum(gains) / len(gains))
    torch.testing.assert_close(
        ir_drop_gain(torch.ones(1, in_features), chip), expected, rtol=5e-4, atol=0
    )  # k/2 dropped


def test_ir_drop_gain_has_mean_one_falls_along_the_column_and_repeats_per_tile():
    gain = ir_drop_gain(torch.ones(1, 3 * 64), _chip(wires={"resistance_ohm": 5.0}))
    assert gain.mean().item() == pytest.approx(1, abs=1e-6)
    tiles = gain.reshape(3, 64)
    assert (tiles.diff(dim=1) <= 0).all()
    assert (tiles[:, 0] > tiles[:, -1] * 1.01).all()
    assert torch.equal(tiles[0], tiles[2])


def test_taller_tiles_and_thinner_wires_spread_the_gain():
    def spread(rows: int, resistance_ohm: float) -> float:
        chip = _chip(wires={"resistance_ohm": resistance_ohm}, tile={"rows": rows})
        return ir_drop_gain(torch.ones(1, 1024), chip).std().item()

    assert all(b > 3 * a for a, b in pairwise(spread(rows, 2.0) for rows in (32, 64, 128, 256)))  # with rows squared
    assert spread(64, 4.0) > 1.9 * spread(64, 2.0)


def test_ir_drop_scales_the_noisy_columns(weight):
    wires = {"resistance_ohm": 2.0}
    for sections in ({"noise": {"sigma": 0.1}}, {"noise": {"kind": "wan-2022"}}):
        clean, dropped = _programmed(weight, **sections), _programmed(weight, **sections, wires=wires)
        torch.testing.assert_close(dropped, clean * ir_drop_gain(weight, _chip(wires=wires)))


# Read noise.


def _power(weight: Tensor, chip) -> Tensor:
    """Variance of each input's weights in one read, mean over outputs."""
    noise = read_noise(weight, chip)
    return noise.fresh.inputs + (0 if noise.lasting is None else noise.lasting.inputs)


READS = {
    "white": {"white_us": 0.4, "thermal": False},
    "thermal": {"thermal": True},
    "flicker": {"flicker": 0.02},
    "all": {"white_us": 0.2, "thermal": True, "flicker": 0.01},
}
CODINGS = {
    "plain": {},
    "sliced": {"coding": {"slices": 2, "replicas": 2, "scale": "channel_max", "clip_std": 2.0}, "cells": {"levels": 8}},
}


@pytest.mark.parametrize("averaged", [1, 3])
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("read", READS)
def test_read_noise_power_is_the_variance_of_reads_drawn_cell_by_cell(weight, read, coding, averaged):
    chip = _chip(**CODINGS[coding], read=READS[read] | {"averaged": averaged}, wires={"resistance_ohm": 2.0})
    small = weight[::8, :60]
    power = _power(small, chip)
    assert power.shape == (60,)
    reads = torch.stack([sampled_read_error(small, chip, replace(KEY, example=f"row {i}"))[0] for i in range(60)])
    sampled = reads.double().square().mean(dim=(0, 1))  # 60 products x 75 outputs of each input
    assert (sampled / power).mean().item() == pytest.approx(1, abs=0.03)
    assert ((sampled / power - 1).abs() < 0.25).all()
    assert reads.mean(dim=0).abs().mean() < 0.2 * reads.std()


def test_read_noise_has_its_closed_form(weight):
    chip = _chip(read={"white_us": 0.3, "averaged": 4})
    expected = 2 * 0.3**2 / 4 / 39**2 * weight.abs().max().item() ** 2
    torch.testing.assert_close(_power(weight, chip), torch.full((500,), expected))
    assert read_noise(weight, _chip()) is None
    wires = {"resistance_ohm": 50.0}
    dropped = _power(weight, _chip(read={"white_us": 0.3, "averaged": 4}, wires=wires))
    torch.testing.assert_close(dropped, expected * ir_drop_gain(weight, _chip(wires=wires)).square())


def test_white_noise_falls_with_the_reads_and_flicker_is_its_floor(weight):
    def power(averaged: int, **read) -> float:
        return _power(weight, _chip(read=read | {"averaged": averaged})).mean().item()

    for read in ({"white_us": 0.3}, {"thermal": True}):
        assert power(1, **read) / power(16, **read) == pytest.approx(16, rel=1e-4)
    assert power(1, flicker=0.01) == power(64, flicker=0.01) > 0
    mixed = [power(averaged, white_us=0.3, flicker=0.01) for averaged in (1, 2, 64)]
    assert mixed[0] > mixed[1] > mixed[2] > power(1, flicker=0.01)


def test_longer_and_stronger_read_pulses_lower_the_thermal_noise(weight):
    def power(**cells) -> float:
        return _power(weight, _chip(read={"thermal": True}, cells=cells)).mean().item()

    base = power(read_voltage_v=0.1, read_time_ns=10.0)
    assert base / power(read_voltage_v=0.2, read_time_ns=10.0) == pytest.approx(4, rel=1e-4)
    assert base / power(read_voltage_v=0.1, read_time_ns=50.0) == pytest.approx(5, rel=1e-4)


def test_averaged_reads_are_different_draws(weight):
    small, one, two = weight[:20, :20], _chip(read={"white_us": 0.3}), _chip(read={"white_us": 0.3, "averaged": 2})
    first = sampled_read_error(small, one, KEY)[0]
    second = 2 * sampled_read_error(small, two, KEY)[0] - first  # the mean of two holds the first as one of them
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.2
    assert second.std() / first.std() == pytest.approx(1, abs=0.15)
    assert torch.equal(sampled_read_error(small, one, KEY)[0], first)
    assert not torch.equal(sampled_read_error(small, one, replace(KEY, example="other"))[0], first)


@pytest.mark.parametrize("scale", ["tensor_max", "channel_max", "tile_max"])
@pytest.mark.parametrize("cycles", [1, 2, 4, 7])
def test_noise_of_a_product_is_that_of_reads_drawn_cycle_by_cycle_for_every_output(weight, scale, cycles):
    """White and thermal noise are drawn anew in every cycle, 1/f noise once for all."""
    sections = {
        "coding": {"scale": scale, "replicas": 2},
        "tile": {"rows": 24, "columns": 16},
        "dac": {"lossless": False, "input_bits": 8, "bits": -(-7 // cycles)},
        "read": {"white_us": 0.4, "thermal": True, "flicker": 0.004},
    }
    chip = _chip(**sections)
    assert chip.dac.cycles == cycles
    small, x = weight[::15, :60], torch.randn(5, 60, generator=torch.Generator().manual_seed(5))
    in_scale, driven = drive(x, chip.dac, None)
    noise = read_noise(small, chip)
    predicted = noise_power(in_scale, driven, len(small), chip, full_scale(x, small, chip), noise)
    reads = []
    for i in range(800):
        errors = sampled_read_error(small, chip, replace(KEY, example=f"row {i}"), cycles)
        reads.append(sum(s * digits @ error.T for (s, digits), error in zip(driven, errors, strict=True)) * in_scale)
    ratio = torch.stack(reads).square().mean(dim=0) / predicted
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    per_output = ratio.mean(dim=0)  # 4,000 draws each
    assert (per_output - 1).abs().max() < 0.12


def test_cycles_average_white_noise_as_per_cycle_sampling_does(weight):
    """Per-cycle sampling of white noise on normal inputs: the deviation of one read over that of 1, 2, 4, 7 cycles."""
    x = torch.randn(200, 500, generator=torch.Generator().manual_seed(6))
    deviations = []
    for bits in (7, 4, 2, 1):
        chip = _chip(dac={"lossless": False, "input_bits": 8, "bits": bits}, read={"white_us": 0.4})
        in_scale, driven = drive(x, chip.dac, None)
        power = noise_power(in_scale, driven, 600, chip, full_scale(x, weight, chip), read_noise(weight, chip))
        deviations.append(power.mean().sqrt().item())
    assert [deviations[0] / deviation for deviation in deviations] == pytest.approx([1.0, 1.13, 1.21, 1.30], abs=0.03)


@pytest.mark.parametrize("time_s", [1.0, 86_400.0])
def test_cmo_read_noise_is_the_published_fit_at_its_age(time_s):
    """A pair at 13 and 9 uS; a share of the conductance fitted at 50 uS and 1 s was 2.7 and 3.7 times too small."""
    chip = load_chip({"preset": "cmo-hfox", "retention": {"refresh_interval_s": time_s}})
    pair = slow_deviation_us(torch.tensor([13.0, 9.0]), chip)
    fit = [0.0277 * math.log10(g) * math.sqrt(math.log((time_s + 1e-6) / 2e-6)) for g in (13.0, 9.0)]
    assert pair.tolist() == pytest.approx(fit, rel=1e-6)
    former = 0.0034 * math.hypot(13.0, 9.0)
    assert math.hypot(*fit) / former == pytest.approx({1.0: 2.7, 86_400.0: 3.7}[time_s], abs=0.05)
    weight = torch.tensor([[1.0, (13.0 - 9.0) / (88.2 - 9.0)]])  # the second is that pair
    whole = read_noise(weight, chip)
    assert whole is not None
    drop = ir_drop_gain(weight, chip)[1].item()
    assert whole.lasting.inputs[1].sqrt().item() == pytest.approx(math.hypot(*fit) / 79.2 * drop, rel=1e-4)


def test_a_published_read_noise_is_refused_where_it_was_not_measured():
    with pytest.raises(ValidationError, match=r"read.slow: cmo was measured from 9 to 88.2 uS"):
        _chip(read={"slow": "cmo"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_zeros_has_no_noise_to_signal_ratio_but_infinite_ones(dtype):
    zeros, ones = torch.zeros(4, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype)
    assert noise_to_signal_db(zeros, zeros) == -math.inf
    assert noise_to_signal_db(zeros, ones) == math.inf
    assert mean_db([-math.inf, math.inf]) == math.inf
    for name in preset_names():
        for scale in ("tensor_max", "channel_max", "tile_max"):
            chip = load_chip({"preset": name, "coding": {"scale": scale, "clip_std": 2.0}, "read": {"white_us": 0.1}})
            held = programmed_weight(zeros, chip, KEY, chip.noise.level)
            assert torch.isfinite(held).all()
            assert not math.isnan(noise_to_signal_db(zeros, held))
            noise = read_noise(zeros.float(), chip)
            assert noise is not None
            assert torch.isfinite(noise.fresh.of_product(torch.ones(3, 5))).all()


@pytest.mark.parametrize(
    "sections", [EVERYTHING, *({**EVERYTHING, "noise": noise} for noise in WEIGHT_NOISES)], ids=str
)
@pytest.mark.parametrize("compensation", ["none", "global", "column"])
def test_slices_and_replicas_add_up_to_what_is_held(weight, sections, compensation):
    retention = {**EVERYTHING["retention"], "compensation": compensation}
    chip = _chip(**{**sections, "retention": retention, "coding": EVERYTHING["coding"] | {"slices": 3}})
    programming = Programming.of(weight, chip, chip.noise.level)
    copies = programming.copies(weight, KEY)
    assert copies.shape == (2, 3, 600, 500)
    total = sum(4.0**-index * copies[:, index].mean(dim=0) for index in range(3))
    held = programming.held(weight, KEY)
    torch.testing.assert_close(total, held, rtol=0, atol=1e-5 * held.abs().max().item())


@pytest.mark.parametrize("slices", [1, 2])
def test_weight_noise_of_slices_and_replicas_is_independent_and_of_one_pair_s_size(weight, slices):
    """What each holds beside what it was to hold has the model's own deviation, whatever the others err by."""
    coding = {"slices": slices, "slice_ratio": 4.0, "replicas": 3}
    chip = _gaussian("std", 0.1, coding=coding)
    copies = Programming.of(weight, chip, 0.1).copies(weight, KEY)
    of_pair = 0.1 * weight.std().item()
    errors = [copies[:, 0] - weight]
    if slices == 2:
        errors.append(copies[:, 1] + 4 * errors[0])  # the second was to undo the first
    flat = torch.cat(errors).flatten(1)
    assert flat.std(dim=1).tolist() == pytest.approx([of_pair] * len(flat), rel=0.01)
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(weight.numel())
