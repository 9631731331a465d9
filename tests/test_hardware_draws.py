"""Oracles: true draws are those of the address; recycled ones pass the same tests of the normal distribution, and where
stretches of the table overlap, random signs of the rows cut their correlation as the root of the number of rows.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from normality import (
    INDEPENDENT,
    assert_moments_are_normal,
    assert_normal_out_to_four_sigma,
    kolmogorov_smirnov,
    largest_correlation,
    upper_tail,
)

from halora.hardware import draws
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.draws import coarse_normal, normal_rows, standard_normal

TRUE = NoiseKey(role=Role.SEARCH, chip_seed=3, module="layers.0.q_proj", purpose="programming")
RECYCLED = replace(TRUE, role=Role.TRAIN)


def _recycled(shape: tuple[int, int], **change) -> np.ndarray:
    return standard_normal(replace(RECYCLED, **change), torch.empty(shape)).numpy().ravel()


@pytest.mark.parametrize("rows", [1, 7, 50, 64])
def test_true_rows_drawn_some_at_a_time_are_the_same_draws(rows):
    parts = [part * signs for part, signs in normal_rows(TRUE, torch.empty(50, 7), rows)]
    assert all(len(part) <= rows for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), TRUE.standard_normal((50, 7)))


@pytest.mark.parametrize("role", [Role.SEARCH, Role.CERTIFY])
def test_chips_that_are_scored_get_true_draws(role):
    key = replace(TRUE, role=role)
    np.testing.assert_array_equal(standard_normal(key, torch.empty(9, 5)).numpy(), key.standard_normal((9, 5)))


def test_recycled_draws_are_a_function_of_their_address():
    first = _recycled((40, 30))
    assert not np.array_equal(_recycled((40, 30), chip_seed=4), first)
    np.testing.assert_array_equal(_recycled((40, 30)), first)


def test_recycled_draws_are_normal():
    assert_moments_are_normal(_recycled((4000, 1000)))
    assert_normal_out_to_four_sigma(np.concatenate([_recycled((1000, 1000), module=f"l{i}") for i in range(4)]))


@pytest.mark.parametrize("change", [{"module": "layers.1.q_proj"}, {"chip_seed": 4}, {"draw": 1}])
def test_no_window_of_recycled_draws_overlaps_another(change):
    assert largest_correlation(_recycled((64, 1024)), _recycled((64, 1024), **change)) < INDEPENDENT


def test_recycled_draws_that_do_overlap_are_told_apart_by_their_signs(monkeypatch):
    """A table of four times the draws: windows of it, used as they are, fail by a factor of ten (see the addresses)."""
    monkeypatch.setattr(draws, "_TABLE", 2**18)
    windows = [_recycled((1024, 64), module=f"layer {i}") for i in range(4)]
    largest = max(largest_correlation(windows[i], windows[j]) for i in range(4) for j in range(i))
    assert largest < INDEPENDENT * 64**0.5
    flat = [np.abs(window) - np.sqrt(2 / np.pi) for window in windows]  # without their signs they do overlap
    assert max(largest_correlation(flat[i], flat[j]) for i in range(4) for j in range(i)) > 5 * INDEPENDENT


def test_coarse_draws_are_normal_of_their_address_and_a_longer_read_continues_a_shorter_one():
    many = coarse_normal(TRUE, (1000, 2000))
    assert_moments_are_normal(many.ravel())
    ordered = np.sort(many.ravel())
    assert kolmogorov_smirnov(ordered, -np.inf) < 1.95
    for edge in (2.0, 3.0):  # beyond 4 there are two levels left
        tail = ordered[ordered > edge]
        assert abs(len(tail) - len(ordered) * upper_tail(edge)) < 4.5 * np.sqrt(len(tail))
        assert kolmogorov_smirnov(tail, edge) < 1.95
    assert 4.2 < np.abs(many).max() < 4.33
    assert many.dtype == np.float32
    np.testing.assert_array_equal(coarse_normal(TRUE, (30, 2000)), many[:30])
    assert not np.array_equal(coarse_normal(replace(TRUE, example="other"), (30, 2000)), many[:30])
