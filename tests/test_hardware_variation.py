"""Oracles: closed forms of every variation's statistics, over 10^4 chip instances of one small layer; the plain formula
of a conversion; binomial coverage over simulated chips.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.converter_model import fit_converters
from halora.hardware.converters import ExactReads, full_scale, tilewise_product
from halora.hardware.energy import energy_per_token
from halora.hardware.instance import ChipInstance
from halora.hardware.manufactured import (
    Columns,
    ColumnSpread,
    WeightGain,
    conductance_factor,
    cubic,
    strength_factor,
    stuck_rates,
)
from halora.hardware.noise import Programming, programmed_weight
from halora.hardware.read_noise import at_temperature, read_noise
from halora.hardware.shapes import named_shapes
from halora.hardware.variation import differences
from halora.selection.certificate import yield_lower_bound

CHIPS = 10_000
KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="programming")
TILE = {"rows": 8, "columns": 8}
LIKE = torch.zeros(16, 24)  # two columns of tiles, three rows of them
VARIED = {
    "variation": {
        "strength": 0.2,
        "conductance": 0.1,
        "gradient": 0.05,
        "adc_gain": 0.1,
        "adc_offset_steps": 1.5,
        "adc_inl_steps": 1.0,
    }
}


def _chip(**sections):
    return load_chip({"preset": "ideal", "adc": {"lossless": False}, "tile": TILE, **sections})


def _keys(chips: int = CHIPS):
    return (replace(KEY, chip_seed=seed) for seed in range(chips))


def _close(values: np.ndarray, mean: float, std: float) -> None:
    """Within five standard errors of the stated moments."""
    count = values.size
    assert values.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    assert values.std() == pytest.approx(std, rel=5 * math.sqrt((kurtosis - 1) / 4 / count))


# Statistics over chips.


@pytest.mark.parametrize(("cause", "factor"), [("strength", strength_factor), ("conductance", conductance_factor)])
def test_spreads_of_a_chip_are_log_normal_with_median_one(cause, factor):
    chip = _chip(variation={cause: 0.2})
    _close(np.log([factor(chip, key) for key in _keys()]), 0.0, 0.2)


def test_a_gradient_is_a_plane_over_every_tile_and_tiles_are_independent():
    chip = _chip(variation={"gradient": 0.03})
    slopes = np.stack([WeightGain.of(chip, key, LIKE).slope[:, ::8].numpy() for key in _keys()]).reshape(CHIPS, 12)
    _close(slopes.ravel(), 0.0, 0.03)
    assert np.abs(np.corrcoef(slopes.T) - np.eye(12)).max() < 5 / math.sqrt(CHIPS)
    gain = WeightGain.of(chip, KEY, LIKE)
    of_cells = gain.of_cells(slice(0, 16)).numpy() - 1
    for column in range(2):
        for row in range(3):
            along_inputs, along_outputs = gain.slope[:, 8 * column, row].tolist()
            places = np.linspace(-1, 1, 8)
            plane = along_inputs * places[None, :] + along_outputs * places[:, None]
            tile = of_cells[8 * column : 8 * column + 8, 8 * row : 8 * row + 8]
            np.testing.assert_allclose(tile, plane, atol=1e-6)
    np.testing.assert_array_equal(gain.of_cells(slice(5, 11)), gain.of_cells(slice(0, 16))[5:11])


def test_adc_errors_of_columns_have_the_stated_spread_and_are_independent():
    chip = _chip(**VARIED, coding={"replicas": 2})
    drawn = [(WeightGain.of(chip, key, LIKE), Columns.of(chip, key, LIKE)) for key in _keys(1000)]
    gain = np.stack([of_weights.columns.numpy() for of_weights, _ in drawn])
    assert gain.shape == (1000, 2, 16, 3)
    offset, inl = (np.stack([getattr(columns, name).numpy() for _, columns in drawn]) for name in ("offset", "inl"))
    assert offset.shape == inl.shape == (1000, 2, 1, 3, 16)
    _close(gain.ravel(), 1.0, 0.1)
    _close(offset.ravel(), 0.0, 1.5)
    _close(inl.ravel(), 0.0, 1.0)
    pairs = np.stack([gain[:, 0, 0, 0], gain[:, 1, 0, 0], gain[:, 0, 1, 0], gain[:, 0, 0, 1], offset[:, 0, 0, 0, 0]])
    assert np.abs(np.corrcoef(pairs) - np.eye(5)).max() < 5 / math.sqrt(1000)


def _stuck_counts(**faults) -> tuple[np.ndarray, np.ndarray]:
    """Cells stuck low and high, where that is seen, in each of 10^4 tiles of 64 pairs."""
    chip, weight = _chip(faults=faults), torch.full((800, 800), 0.5)
    weight[0, 0] = 1.0  # full scale, so that the others' cells stand in the middle of the range
    held = Programming.of(weight, chip, 0.0).held(weight, KEY).view(100, 8, 100, 8)
    return tuple(counts.sum(dim=(1, 3)).flatten().numpy() for counts in (held < 0.45, held > 0.55))


def test_stuck_cells_of_a_tile_are_negative_binomial():
    """Counts: mean n p; variance n p (1 - p) + n (n - 1) p^2 / alpha, that of a binomial whose rate is Gamma."""
    rate, cells, none = 0.02, 64, {}
    for clustering in (0.0, 0.5, 2.0):
        low, _ = _stuck_counts(stuck_low_rate=rate, clustering=clustering)
        variance = cells * rate * (1 - rate) + cells * (cells - 1) * rate**2 * clustering
        _close(low, cells * rate, math.sqrt(variance))
        none[clustering] = (low == 0).mean()
        if clustering:
            negative_binomial = (1 + cells * rate * clustering) ** (-1 / clustering)  # share of tiles without one
            assert none[clustering] == pytest.approx(negative_binomial, abs=0.02)
    assert none[2.0] > none[0.5] > none[0.0]


def test_clusters_differ_from_chip_to_chip_and_hold_low_and_high_cells_of_both_sides():
    chip = _chip(faults={"stuck_low_rate": 0.02, "clustering": 0.8})
    factors = np.stack([stuck_rates(chip, key, LIKE)[0, ::8].flatten().numpy() for key in _keys()])
    _close(factors.ravel(), 1.0, math.sqrt(0.8))
    assert np.abs(np.corrcoef(factors.T) - np.eye(6)).max() < 5 / math.sqrt(CHIPS)
    low, high = _stuck_counts(stuck_low_rate=0.02, stuck_high_rate=0.01, stuck_high_us=80.0, clustering=1.0)
    # Low is a cell of the full side stuck low or one of the idle side stuck high; the latter of the same tile's factor.
    expected = 64 * 64 * 0.03 * 0.01 * 1.0 - 64 * 0.03 * 0.01 * 2.0
    assert np.cov(low, high)[0, 1] == pytest.approx(expected, rel=0.15)


def test_temperature_scales_pairs_and_thermal_noise():
    temperature = {"kelvin": 350.0, "low_per_k": 0.004, "high_per_k": -0.002}
    chip = _chip(temperature=temperature, read={"thermal": True})
    low, high = 1.0 * 1.2, 40.0 * 0.9
    gain = (high - low) / 39.0
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(programmed_weight(weight, chip, KEY, 0.0), weight * gain)
    cells = at_temperature(torch.tensor([1.0, 20.5, 40.0]), chip)
    torch.testing.assert_close(cells, torch.tensor([low, (low + high) / 2, high]))
    cold = _chip(read={"thermal": True})
    alone = _chip(temperature={"kelvin": 350.0}, read={"thermal": True})
    ratio = read_noise(weight, alone).fresh.inputs / read_noise(weight, cold).fresh.inputs
    torch.testing.assert_close(ratio, torch.full_like(ratio, 350 / 300))
    warm = read_noise(weight, chip).fresh.inputs.sum() / read_noise(weight, alone).fresh.inputs.sum()
    stored = (weight / weight.abs().max()).abs().mean().item()
    assert warm.item() == pytest.approx((2 * low + (high - low) * stored) / (2 * 1.0 + 39.0 * stored), rel=1e-4)


@pytest.mark.parametrize("compensation", ["global", "column"])
def test_drift_compensation_undoes_what_temperature_does_to_all_weights(compensation):
    weight, noise = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), {"sigma": 0.05}
    hot = {"temperature": {"kelvin": 400.0, "high_per_k": -0.002}}
    warm, undone, cool = (
        programmed_weight(weight, _chip(noise=noise, **sections), KEY, 0.05)
        for sections in (hot, {**hot, "retention": {"compensation": compensation}}, {})
    )
    assert (warm - cool).norm() > 0.1 * cool.norm()
    torch.testing.assert_close(undone, cool)


def test_a_temperature_at_which_nothing_conducts_is_refused_by_name():
    with pytest.raises(ValidationError, match="temperature: at 400 K cells would conduct 1 to -40 uS"):
        _chip(temperature={"kelvin": 400.0, "high_per_k": -0.02})


# Calibration.


@pytest.mark.parametrize(("reads", "noise_steps"), [(1, 0.0), (16, 0.5), (64, 2.0)])
def test_calibration_leaves_what_its_own_reads_err_by(reads, noise_steps):
    """Conversions of zero and of full scale, averaged: the oracle carries them out on columns that err."""
    adc = {"lossless": False, "bits": 8, "calibration_reads": reads, "noise_steps": noise_steps}
    spread = ColumnSpread.of(_chip(**VARIED, adc=adc))
    generator = torch.Generator().manual_seed(1)
    gain, offset = (torch.randn(20_000, generator=generator) for _ in range(2))
    gain, offset, top = 1 + 0.05 * gain, 1.5 * offset, 127

    def measured(level: float) -> torch.Tensor:
        total = torch.zeros(20_000)
        for _ in range(reads):
            between = torch.rand(20_000, generator=generator) - 0.5
            seen = gain * (level + between) + offset + noise_steps * torch.randn(20_000, generator=generator)
            total += seen.round() - between
        return total / reads

    none = measured(0.0)
    left_of_gain = (measured(top) - none) / top - gain
    assert (none - offset).std().item() == pytest.approx(spread.offset_steps, rel=0.03)
    assert left_of_gain.std().item() == pytest.approx(spread.gain, rel=0.03)
    assert spread.inl_steps == 1.0


def test_what_calibration_leaves_is_drawn_at_every_programming_and_the_rest_once_a_chip():
    for reads, same in ((0, True), (4, False)):
        chip = _chip(**VARIED, adc={"lossless": False, "calibration_reads": reads})
        first, again = (Columns.of(chip, replace(KEY, draw=draw), LIKE) for draw in (0, 1))
        assert torch.equal(first.offset, again.offset) == same
        assert torch.equal(first.inl, again.inl)


def test_calibration_is_priced_by_its_conversions_in_energy_and_time():
    shape = named_shapes()["llama-3.2-1b"]

    def priced(reads: int, **sections):
        setting = {"preset": "halora-2026", "adc": {"calibration_reads": reads}, **sections}
        return energy_per_token(shape, load_chip(setting), rank=0, context_tokens=64)

    none, some = priced(0), priced(16)
    conversions_uj = none.components_uj["adc"] + none.components_uj["shift_add"]  # one conversion of every column
    tokens = 86400 * 100.0
    assert some.components_uj["calibration"] == pytest.approx(32 * conversions_uj / tokens)
    assert "calibration" not in none.components_uj
    converted_ns = 64 * 1000 / 1280  # columns of a tile in turn, ISAAC's rate
    added_us = 32 * converted_ns * 1e-3 / tokens
    assert some.latency.components_us["calibration"] == pytest.approx(added_us, rel=1e-3)
    assert some.latency.interval_us - none.latency.interval_us == pytest.approx(added_us, rel=1e-3)
    hourly = priced(16, retention={"refresh_interval_s": 3600})
    assert hourly.components_uj["calibration"] == pytest.approx(24 * some.components_uj["calibration"])


# Products.


@pytest.fixture(scope="module")
def layer() -> dict[str, torch.Tensor]:
    """A layer whose last tile is not full, with calibration and fresh tokens."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-0.5, 0.5, 300)
    return {
        "weight": torch.randn(128, 300, generator=generator) * 0.05,
        "calibration": torch.randn(128, 300, generator=generator) * sizes,
        "fresh": torch.randn(300, 300, generator=generator) * sizes,
    }


def _converting(bits: int, **sections):
    return load_chip({"preset": "ideal", "adc": {"bits": bits, "lossless": False}, **sections})


def test_every_conversion_has_its_column_s_gain_offset_and_non_linearity(layer):
    """A loop over cycles, replicas, tiles and outputs."""
    dac = {"input_bits": 8, "bits": 4, "lossless": False}
    chip = _converting(6, **VARIED, dac=dac, coding={"replicas": 2}, tile={"rows": 128})
    chip = chip.model_copy(update={"variation": chip.variation.model_copy(update={"conductance": 0, "gradient": 0})})
    x, weight = layer["fresh"][:2], layer["weight"]
    converters = full_scale(layer["calibration"], weight, chip)
    gain, columns = WeightGain.of(chip, KEY, weight), Columns.of(chip, KEY, weight)
    copies = Programming.of(weight, chip, 0.0).copies(weight, KEY)
    product = tilewise_product(x, copies, chip, converters, columns)
    for token in range(2):
        scale = x[token].abs().max()
        codes = (x[token] / scale * 127).round().long()
        for output in (0, 77):
            total = 0.0
            for cycle in range(2):
                digits = codes.sign() * (codes.abs() >> (4 * cycle)).remainder(16)
                for replica in range(2):
                    for tile, start in enumerate(range(0, 300, 128)):
                        step = float(converters.steps(chip, 128)[cycle, 0, tile, output])
                        partial = float((digits[start : start + 128] / 15) @ weight[output, start : start + 128]) / step
                        seen = float(gain.columns[replica, output, tile]) * partial
                        seen += float(columns.offset[replica, 0, tile, output])
                        u = max(-1.0, min(1.0, seen / 31))
                        seen += float(columns.inl[replica, 0, tile, output]) * 1.5 * math.sqrt(3) * (u - u**3)
                        total += 15 / 127 * 16**cycle * max(-31, min(31, round(seen))) * step / 2
            assert product[token, output].item() == pytest.approx(total * float(scale), rel=1e-3, abs=1e-4)


def test_the_non_linearity_is_one_step_at_most_and_none_at_zero_and_full_scale():
    u = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    shape = cubic(u)
    assert shape.abs().max().item() == pytest.approx(1, abs=1e-6)
    assert u[shape.argmax()].item() == pytest.approx(1 / math.sqrt(3), abs=1e-4)
    torch.testing.assert_close(cubic(torch.tensor([-1.0, 0.0, 1.0])), torch.zeros(3), rtol=0, atol=1e-6)


WAYS = {
    "plain": {},
    "cycles": {"dac": {"lossless": False, "bits": 1}},
    "slices": {"coding": {"slices": 2}, "cells": {"levels": 4}},
    "replicas": {"coding": {"replicas": 3}, "noise": {"sigma": 0.05}},
}
CAUSES = {
    "gain": {"adc_gain": 0.1},
    "offset": {"adc_offset_steps": 1.0},
    "inl": {"adc_inl_steps": 2.0},
    "all": {"adc_gain": 0.05, "adc_offset_steps": 1.0, "adc_inl_steps": 1.0},
}


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("way", WAYS)
def test_statistical_model_has_the_columns_errors_of_the_exact_path(layer, way, bits):
    """Within the 5 % that both paths are held to without variation; the mean of each output, chip by chip, besides."""
    x, weight = layer["fresh"], layer["weight"]
    for cause, spreads in CAUSES.items():
        chip = _converting(bits, variation=spreads, **WAYS[way])
        programming, model = (
            Programming.of(weight, chip, chip.noise.level),
            fit_converters(layer["calibration"], weight, chip),
        )
        exact_power = modelled_power = 0.0
        shifts = []
        for key in _keys(4):
            held, copies = programming.held(weight, key), programming.copies(weight, key)
            columns = Columns.of(chip, key, weight)
            exact = tilewise_product(x, copies, chip, model.converters, columns) - x @ weight.T
            driven = model.drive(x, columns)
            product = driven.inputs @ held.T
            unit = torch.randn(product.shape, generator=torch.Generator().manual_seed(key.chip_seed))
            modelled = model.read(product, driven, unit) - x @ weight.T
            exact_power += exact.square().mean().item()
            modelled_power += modelled.square().mean().item()
            shifts.append((exact.mean(dim=0), modelled.mean(dim=0)))
        assert math.sqrt(modelled_power / exact_power) == pytest.approx(1, abs=0.05), cause
        if "adc_offset_steps" in spreads:
            of_exact, of_model = (torch.cat(each) for each in zip(*shifts, strict=True))
            assert torch.corrcoef(torch.stack([of_exact, of_model]))[0, 1] > 0.95, cause


def test_gradients_pass_the_columns_errors():
    chip = _converting(6, **VARIED)
    weight, x = torch.randn(16, 64), torch.randn(4, 64, requires_grad=True)
    model, columns = fit_converters(torch.randn(64, 64), weight, chip), Columns.of(chip, KEY, weight)
    driven = model.drive(x, columns)
    model.read(driven.inputs @ weight.T, driven, torch.zeros(4, 16)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


def test_copies_add_up_to_what_is_held_under_every_variation():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 70, generator=generator)
    coding = {"slices": 2, "replicas": 2}
    for noise in ({"kind": "wan-2022"}, {"kind": "gaussian", "sigma": 0.05, "reference": "tensor_max"}):
        for extra in ({}, {"retention": {"compensation": "global"}}, {"adc": {"calibration_reads": 0}}):
            chip = load_chip({"preset": "rram-variation", "noise": noise, "coding": coding, "tile": TILE, **extra})
            programming = Programming.of(weight, chip, chip.noise.level)
            held, copies = programming.held(weight, KEY), programming.copies(weight, KEY)
            shares = torch.tensor([1.0, 1 / chip.coding.slice_ratio])
            torch.testing.assert_close(torch.einsum("rsoi,s->oi", copies, shares) / 2, held, rtol=1e-4, atol=1e-4)


# Addresses.


def test_nothing_differs_unless_a_chip_says_so_and_one_cause_leaves_the_others_draws_alone(layer):
    weight = layer["weight"]
    plain = load_chip("halora-2026")
    assert differences(plain) == []
    assert Columns.of(plain, KEY, weight) is None
    assert WeightGain.of(plain, KEY, weight) is None
    assert stuck_rates(plain, KEY, weight) is None
    assert ChipInstance(plain, KEY, 0.01).level_at("layer") == 0.01
    held = programmed_weight(weight, plain, KEY, 0.01)
    others = load_chip({"preset": "halora-2026", "variation": {"adc_offset_steps": 1.0, "strength": 0.5}})
    assert torch.equal(programmed_weight(weight, others, KEY, 0.01), held)
    faulty = {"stuck_low_rate": 0.05}
    one, both = (
        load_chip({"preset": "halora-2026", "faults": faulty, "variation": spreads, "coding": {"replicas": replicas}})
        for spreads, replicas in (({"adc_inl_steps": 1.0}, 1), (VARIED["variation"], 3))
    )
    first, later = Columns.of(one, KEY, weight), Columns.of(both, KEY, weight)
    torch.testing.assert_close(first.inl[0], later.inl[0])  # more replicas and other causes besides
    assert not torch.allclose(later.inl[0], later.inl[1])


def test_a_chip_s_own_draws_are_the_same_in_every_layer_and_programming_and_its_columns_are_not():
    chip = _chip(**VARIED)
    elsewhere, later, other = replace(KEY, module="other"), replace(KEY, draw=3), replace(KEY, chip_seed=1)
    for factor in (strength_factor, conductance_factor):
        assert factor(chip, KEY) == factor(chip, elsewhere) == factor(chip, later) != factor(chip, other)
    assert strength_factor(chip, KEY) != conductance_factor(chip, KEY)
    offsets = {key: Columns.of(chip, key, LIKE).offset for key in (KEY, elsewhere, later, other)}
    assert torch.equal(offsets[KEY], offsets[later])
    assert not torch.equal(offsets[KEY], offsets[elsewhere])
    assert not torch.equal(offsets[KEY], offsets[other])


# Certificates.


def _accuracies(spread: float, chips: int, first: int = 0) -> np.ndarray:
    """Share of 200 comparisons that each chip gets right: the sign of products under noise of weights."""
    chip = _chip(variation={"strength": spread}, noise={"sigma": 0.3, "reference": "std"})
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(8, 24, generator=generator), torch.randn(200, 24, generator=generator)
    signs = (x @ weight.T).sign()
    found = []
    for seed in range(first, first + chips):
        key = replace(KEY, chip_seed=seed, role=Role.CERTIFY)
        held = programmed_weight(weight, chip, key, ChipInstance(chip, key, 0.3).level_at("layer"))
        found.append(((x @ held.T).sign() == signs).float().mean().item())
    return np.array(found)


def test_a_spread_between_chips_lowers_the_yield_that_is_certified_and_the_bound_keeps_its_confidence():
    """A spec that all but a few chips alike meet: some chips of a line that spreads are noisier and miss it."""
    alike, spread = _accuracies(0.0, 2000), _accuracies(0.5, 2000)
    spec = np.quantile(alike, 0.03)
    yields = [(accuracies >= spec).mean() for accuracies in (alike, spread)]
    assert yields[0] > 0.95
    assert yields[1] < yields[0] - 0.1
    bounds = [yield_lower_bound(59, int((accuracies[:59] < spec).sum()), 0.05) for accuracies in (alike, spread)]
    assert bounds[1] < bounds[0] - 0.05
    chips, error = 40, 0.1
    for accuracies, true in zip((alike, spread), yields, strict=True):
        failures = (accuracies.reshape(-1, chips) < spec).sum(axis=1)
        held = np.mean([yield_lower_bound(chips, int(k), error) <= true for k in failures])
        assert held >= 1 - error - 3 * math.sqrt(error * (1 - error) / len(failures))


def test_differences_are_named_only_where_they_act():
    varied = load_chip("rram-variation")
    said = "; ".join(differences(varied))
    for words in (
        "strength of the noise",
        "mean conductance",
        "gradient",
        "ADC gain",
        "ADC offset",
        "ADC INL",
        "stuck",
    ):
        assert words in said
    assert "trimmed by 16 reads" in said
    lossless = load_chip({"preset": "rram-variation", "adc": {"lossless": True}, "noise": {"sigma": 0.0}})
    assert not any(words in "; ".join(differences(lossless)) for words in ("ADC", "strength"))
    assert Columns.of(lossless, KEY, LIKE) is None


def test_exact_reads_take_the_columns_of_the_chip_instance(layer):
    chip = _converting(6, variation={"adc_offset_steps": 4.0})
    reads = ExactReads.calibrated(layer["calibration"], layer["weight"], chip)
    x, weight = layer["fresh"], layer["weight"][None, None]
    plain, columns = reads.product(x, weight, torch.randn_like), Columns.of(chip, KEY, layer["weight"])
    moved = reads.product(x, weight, torch.randn_like, columns)
    assert (moved - plain).mean(dim=0).std() > 2 * (plain - x @ layer["weight"].T).std()
