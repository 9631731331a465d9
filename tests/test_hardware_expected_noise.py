"""Oracles: closed forms of Gaussian noise and of rounding, and reads drawn cell by cell."""

from itertools import pairwise
from math import inf, log10

import pytest
import torch
from sampled_reads import sampled_read_error

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.chip_files import preset_names
from halora.hardware.expected_noise import expected_noise


def test_an_ideal_chip_has_no_noise():
    found = expected_noise(load_chip("ideal"))
    assert (found.weights_db, found.reads_db, found.converters_db, found.product_db) == (-inf, -inf, -inf, -inf)


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_noise_relative_to_the_spread_of_weights_is_20_log10_sigma_in_weights_and_products(sigma):
    noise = {"kind": "gaussian", "sigma": sigma, "reference": "std"}
    found = expected_noise(load_chip({"preset": "ideal", "noise": noise}), tokens=256)
    assert found.weights_db == pytest.approx(20 * log10(sigma), abs=0.1)
    assert found.product_db == pytest.approx(found.weights_db, abs=0.2)
    assert found.converters_db == found.reads_db == -inf


def test_a_bit_of_the_converter_is_worth_about_six_decibel():
    by_bits = [
        expected_noise(load_chip({"preset": "halora-2026", "adc": {"bits": bits}, "dac": {"lossless": True}}))
        for bits in (5, 6, 7, 8)
    ]
    steps = [one.converters_db - other.converters_db for one, other in pairwise(by_bits)]
    assert all(4 < step < 7 for step in steps)


def test_read_noise_is_that_of_reads_drawn_cell_by_cell():
    chip = load_chip({"preset": "ideal", "read": {"white_us": 2.0, "averaged": 2}, "cells": {"g_max_us": 40.0}})
    found = expected_noise(chip, inputs=512, outputs=64)
    key = NoiseKey(role=Role.SEARCH, chip_seed=0, module="stand-in")  # of the same weight, whose largest sets the scale
    weight = torch.from_numpy(key.part("weight").standard_normal((64, 512)))
    x = torch.from_numpy(key.part("x").standard_normal((128, 512)))
    power = torch.stack(
        [(x @ sampled_read_error(weight, chip, key.part(f"{i}"))[0].T).square().sum() for i in range(4)]
    )
    drawn_db = 10 * log10(float(power.mean() / (x @ weight.T).square().sum()))
    assert found.reads_db == pytest.approx(drawn_db, abs=0.2)
    assert found.product_db == pytest.approx(found.reads_db, abs=0.5)


@pytest.mark.parametrize("name", preset_names())
def test_parts_add_up_in_power_and_the_same_chip_says_the_same(name):
    chip = load_chip(name)
    found = expected_noise(chip)
    assert found == expected_noise(chip)
    parts = sum(10 ** (part / 10) for part in (found.weights_db, found.reads_db, found.converters_db))
    if parts:
        assert found.product_db == pytest.approx(10 * log10(parts), abs=0.7)
