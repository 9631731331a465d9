"""Oracles: the normal interval of a mean, and coverage on matrices with a known mean."""

import numpy as np
import pytest

from halora.evaluation.intervals import crossed_bootstrap


def _crossed(rng: np.random.Generator, chips: int, rows: int) -> np.ndarray:
    """Chip effect + row effect + noise, with mean 0."""
    noise = rng.normal(size=(chips, rows))
    return 0.3 * rng.normal(size=(chips, 1)) + rng.normal(size=(1, rows)) + noise


def test_the_mean_is_the_mean_and_lies_inside():
    values = np.random.default_rng(0).random((5, 80))
    interval = crossed_bootstrap(values)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low < interval.mean < interval.high


def test_identical_values_have_no_width():
    interval = crossed_bootstrap(np.full((4, 30), 0.7))
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0.7, 0.7, 0.7))


@pytest.mark.parametrize("axis", ["rows", "chips"])
def test_width_is_the_normal_one_when_a_single_axis_varies(axis):
    effects = np.random.default_rng(1).normal(size=200)
    values = np.tile(effects, (40, 1)) if axis == "rows" else np.tile(effects[:, None], (1, 40))
    interval = crossed_bootstrap(values)
    expected = 2 * 1.959964 * effects.std() / np.sqrt(200)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.15)


def test_more_chips_alone_do_not_remove_the_uncertainty_of_the_rows():
    effects = np.random.default_rng(2).normal(size=50)
    few, many = (crossed_bootstrap(np.tile(effects, (chips, 1))) for chips in (2, 100))
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1)


def test_it_is_the_same_every_time_for_the_same_seed():
    values = np.random.default_rng(3).random((5, 80))
    assert crossed_bootstrap(values) == crossed_bootstrap(values)
    assert crossed_bootstrap(values, seed=1) != crossed_bootstrap(values)


@pytest.mark.parametrize("chips", [5, 20])
def test_it_covers_a_known_mean_about_as_often_as_it_says(chips):
    rng = np.random.default_rng(4)
    intervals = [crossed_bootstrap(_crossed(rng, chips, 60), seed) for seed in range(300)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.91 < covered <= 0.99  # 95 %, three standard errors each way
