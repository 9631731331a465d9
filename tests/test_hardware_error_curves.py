"""Oracles: the polynomials published for CMO cells (arXiv 2502.04524), the variance of a product of independent draws,
the closed form of Gaussian noise over slices and replicas, and the programmed weight that the same cells make up.
"""

from math import exp, expm1, log, sqrt

import pytest
import torch

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import cells_err, write_verify_factor
from halora.hardware.chip import load_chip
from halora.hardware.error_curves import (
    drawn_cell_error,
    drawn_weight_error,
    moment_s,
    ramp,
    stated_cell_error,
    stated_weight_error,
)
from halora.hardware.noise import programmed_weight

KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="programming")


def _cmo(**sections):
    return load_chip({"preset": "cmo-hfox", "wires": {"resistance_ohm": 0.0}, **sections})


def test_stated_errors_of_cmo_cells_are_the_published_ones():
    chip = _cmo(retention={"refresh_interval_s": 3600.0})
    conductance = torch.linspace(9.0, 88.2, 7)
    start, end = (stated_cell_error(chip, conductance, moment) for moment in ("start", "end"))
    programming = [0.0112185391 + 0.01129027418 * g for g in start.target]
    assert start.std == pytest.approx(programming, rel=1e-5)
    assert start.mean == pytest.approx([0.0] * 7, abs=1e-9)
    assert end.std == pytest.approx(
        [sqrt(s**2 + (0.04201137 * log(3600) + 0.41183342) ** 2) for s in programming], rel=1e-5
    )
    assert end.mean == pytest.approx([-0.08900206 * log(3600)] * 7)
    assert (moment_s(chip, "start"), moment_s(chip, "end")) == (0.0, 3600.0)


def test_write_verify_narrows_the_stated_error():
    conductance = torch.linspace(9.0, 88.2, 3)
    few, many = (
        stated_cell_error(_cmo(write_verify={"pulses": pulses}), conductance, "start").std for pulses in (2.0, 40.0)
    )
    ratio = write_verify_factor(40.0) / write_verify_factor(2.0)
    assert many == pytest.approx([ratio * std for std in few])


def test_drift_multiplies_what_was_programmed():
    nu, spread, time_s = 0.1, 0.05, 1e4
    ageing = {"kind": "power-law", "nu_mean": nu, "nu_std": spread}
    chip = _cmo(retention={"ageing": ageing, "refresh_interval_s": time_s})
    curve = stated_cell_error(chip, torch.tensor([10.0, 80.0]), "end")
    width = spread * log(time_s)
    mean = exp(-nu * log(time_s) + width**2 / 2)
    variance = mean**2 * expm1(width**2)
    for target, found_mean, found_std in zip(curve.target, curve.mean, curve.std, strict=True):
        programming = 0.0112185391 + 0.01129027418 * target
        expected = (programming**2 + target**2) * (variance + mean**2) - (target * mean) ** 2
        assert found_mean == pytest.approx(target * (mean - 1), rel=1e-6)
        assert found_std == pytest.approx(sqrt(expected), rel=1e-6)


@pytest.mark.parametrize("preset", ["cmo-hfox", "neurram-2022"])
@pytest.mark.parametrize("moment", ["start", "end"])
def test_drawn_cells_follow_what_is_stated(preset, moment):
    chip = load_chip(preset)
    drawn = drawn_cell_error(ramp(), chip, KEY, moment)
    stated = stated_cell_error(chip, torch.tensor(drawn.target), moment)
    largest = max(stated.std)
    kept = [i for i, target in enumerate(drawn.target) if target > 3 * largest]  # the rest are cut off at 0
    assert len(kept) > 15
    for i in kept:
        assert drawn.std[i] == pytest.approx(stated.std[i], rel=0.05)
        assert drawn.mean[i] == pytest.approx(stated.mean[i], abs=0.05 * largest)


def test_drawn_cells_are_those_the_programmed_weight_is_made_of():
    states = [
        {"conductance_us": g, "mean_us": g, "std_us": g / 20, "time_s": 1.0} for g in (0.0, 40.0)
    ]  # a cell at 0 has no error, so of positive weights all comes from the positive side
    noise, fresh = {"kind": "measured", "states": states}, {"refresh_interval_s": 1.0}
    chip = load_chip({"preset": "ideal", "cells": {"g_min_us": 0.0}, "noise": noise, "retention": fresh})
    weight = torch.rand(40, 300, generator=torch.Generator().manual_seed(0))
    drawn = drawn_cell_error(weight, chip, KEY, "end", bins=1)
    error_us = (programmed_weight(weight, chip, KEY, 1.0) - weight).double() * 40.0 / weight.max()
    mean = error_us.sum() / (2 * weight.numel())
    std = (error_us.square().sum() / (2 * weight.numel()) - mean**2).sqrt()
    assert drawn.mean == pytest.approx([mean.item()], rel=1e-3)
    assert drawn.std == pytest.approx([std.item()], rel=1e-4)


@pytest.mark.parametrize("reference", ["tensor_max", "channel_max"])
def test_drawn_weights_follow_what_is_stated(reference):
    chip = load_chip(
        {
            "preset": "ideal",
            "noise": {"sigma": 0.02, "reference": reference},
            "coding": {"slices": 2, "slice_ratio": 4.0, "replicas": 4},
        }
    )
    weight = ramp(1024) * torch.linspace(0.5, 1, 1024)[:, None]
    stated, drawn = stated_weight_error(weight, chip), drawn_weight_error(weight, chip, KEY)
    assert drawn.target == stated.target
    assert drawn.std == pytest.approx(stated.std, rel=0.03)
    assert drawn.mean == pytest.approx(stated.mean, abs=2e-4)
    if reference == "tensor_max":
        assert stated.std == pytest.approx([0.02 / 4 / 2] * len(stated.std), rel=1e-6)
    else:
        assert stated.std[12] < 0.8 * stated.std[0]  # large weights are in large outputs


def test_the_ramp_brings_every_value_to_every_row_of_a_tile():
    weight = ramp()
    assert weight.shape == (128, 2048)
    assert torch.equal(weight.sort(dim=1).values, torch.linspace(-1, 1, 2048).expand(128, -1))
    inputs = (weight == weight[0, 5]).nonzero()[:, 1]
    assert set((inputs % 64).tolist()) == set(range(64))


@pytest.mark.parametrize(
    ("preset", "sections", "err"),
    [
        ("halora-2026", {}, False),
        ("halora-2026", {"retention": {"ageing": {"kind": "power-law", "nu_mean": 0.05}}}, True),
        ("cmo-hfox", {}, True),
        ("cmo-hfox", {"noise": {"strength": 0.0}, "retention": {"ageing": None}}, False),
    ],
)
def test_chips_whose_cells_err(preset, sections, err):
    chip = load_chip({"preset": preset, **sections})
    assert cells_err(chip, chip.noise) == err
