"""Oracles: scipy's t intervals and tests, variances in closed form, and how many simulated means are covered."""

import numpy as np
import pytest
import scipy.stats

from benchmarks.coverage import crossed_coverage, different, share_coverage
from halora.evaluation.intervals import Estimate, crossed, gain, seeded, share, share_gain, wilson


def test_one_chip_is_the_t_interval_of_its_rows():
    values = np.random.default_rng(0).normal(size=(1, 30))
    found = crossed(values)
    expected = scipy.stats.t.interval(0.95, 29, values.mean(), scipy.stats.sem(values[0]))
    assert (found.mean, found.freedom) == (pytest.approx(values.mean()), 29)
    assert (found.interval().low, found.interval().high) == pytest.approx(expected)


def test_chips_that_decide_everything_leave_their_own_degrees_of_freedom():
    effects = np.random.default_rng(1).normal(size=4)
    found = crossed(np.tile(effects[:, None], (1, 50)))
    low, high = scipy.stats.t.interval(0.95, 3, effects.mean(), scipy.stats.sem(effects))
    assert (found.interval().low, found.interval().high) == pytest.approx((low, high))
    assert crossed(np.tile(effects, (40, 1))).error == pytest.approx(scipy.stats.sem(effects))  # rows that decide it


def test_the_variance_of_a_crossed_mean_is_unbiased():
    """In closed form: chips / C + rows / R + rest / (C R)."""
    rng, chips, rows = np.random.default_rng(2), 4, 12
    tables = rng.normal(0, 0.5, (4000, chips, 1)) + rng.normal(0, 1.2, (4000, 1, rows)) + rng.normal(size=(4000, 4, 12))
    expected = 0.5**2 / chips + 1.2**2 / rows + 1 / (chips * rows)
    assert np.mean([crossed(table).error ** 2 for table in tables]) == pytest.approx(expected, rel=0.03)


def test_the_variance_of_a_gain_counts_every_factor_once():
    """Effects of chips, rows and seeds and of each two of them, in closed form; the chips' and rows' own cancel."""
    rng = np.random.default_rng(3)
    seeds, chips, rows = (3, 2), 4, 10

    def table(count):
        return (
            rng.normal(0, 0.4, (count, 1, 1))
            + rng.normal(0, 0.3, (1, chips, 1))
            + rng.normal(0, 0.6, (1, 1, rows))
            + rng.normal(0, 0.5, (count, chips, 1))
            + rng.normal(0, 0.8, (count, 1, rows))
            + rng.normal(0, 0.7, (1, chips, rows))
            + rng.normal(0, 1.0, (count, chips, rows))
        )

    found = [gain(table(seeds[0]), table(seeds[1])) for _ in range(4000)]
    each = [
        (0.4**2 + 0.5**2 / chips + 0.8**2 / rows + 1.0 / (chips * rows)) / count
        + 0.3**2 / chips
        + 0.6**2 / rows
        + 0.7**2 / (chips * rows)
        for count in seeds
    ]
    assert np.var([one.mean for one in found]) == pytest.approx(sum(each), rel=0.08)
    assert np.mean([one.error**2 for one in found]) == pytest.approx(sum(each), rel=0.04)


def test_seeds_that_decide_everything_are_welchs_test():
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(size=5), rng.normal(size=4)
    tables = [np.tile(values[:, None, None], (1, 3, 20)) for values in (ours, theirs)]
    found = gain(*tables)
    welch = scipy.stats.ttest_ind(ours, theirs, equal_var=False)
    assert found.error == pytest.approx(np.hypot(scipy.stats.sem(ours), scipy.stats.sem(theirs)))
    assert (found.p_different, found.freedom) == pytest.approx((welch.pvalue, welch.df))
    alone = seeded(tables[0])
    assert (alone.error, alone.freedom) == (pytest.approx(scipy.stats.sem(ours)), 4)


def test_p_values_are_scipys():
    values = np.random.default_rng(5).normal(0.3, 1, 25)
    found = crossed(values[None])
    assert found.p_different == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    lower = scipy.stats.ttest_1samp(values, -0.9, alternative="greater").pvalue
    upper = scipy.stats.ttest_1samp(values, 0.9, alternative="less").pvalue
    assert found.p_equivalent(0.9) == pytest.approx(max(lower, upper))
    within = found.interval(0.9)
    edge = max(-within.low, within.high)
    assert found.p_equivalent(edge) == pytest.approx(0.05)
    assert (Estimate(0.0, 0.0, 9).p_different, Estimate(0.1, 0.0, 9).p_different) == (1.0, 0.0)
    assert (Estimate(0.0, 0.0, 9).p_equivalent(0.1), Estimate(0.2, 0.0, 9).p_equivalent(0.1)) == (0.0, 1.0)


def test_a_share_of_independent_answers_is_wilsons():
    """scipy's Wilson interval, which takes the normal quantile where ours takes Student's."""
    right = np.zeros((1, 4000))
    right[:, :900] = 1
    expected = scipy.stats.binomtest(900, 4000).proportion_ci(method="wilson")
    found = share(right)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-4), pytest.approx(expected.high, abs=1e-4))
    assert wilson(900 / 4000, 4000) == found


@pytest.mark.parametrize("chips", [1, 3, 40])
def test_answers_that_are_all_alike_still_leave_the_rows_uncertain(chips):
    expected = scipy.stats.binomtest(16, 16).proportion_ci(method="wilson")
    found = share(np.ones((chips, 16)))
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(expected.low)
    assert share(np.zeros((chips, 16))).high == pytest.approx(1 - expected.low)
    assert share_gain(np.ones((1, chips, 16)), np.ones((1, chips, 16))).error > 0.05


def test_a_share_stays_within_its_bounds():
    rng = np.random.default_rng(6)
    for _ in range(300):
        right = rng.random((int(rng.integers(1, 6)), int(rng.integers(2, 20)))) < rng.random()
        found = share(right)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert found.mean == pytest.approx(right.mean())


@pytest.mark.parametrize("chips", [2, 3, 5])
@pytest.mark.parametrize("part", [0.1, 0.9])
def test_intervals_cover_as_often_as_they_say(chips, part):
    """600 simulations each: three standard errors are 0.027."""
    assert crossed_coverage(chips, 48, part, 600) == pytest.approx(0.95, abs=0.02 + 0.0135)


@pytest.mark.parametrize(("accuracy", "rows"), [(0.3, 48), (0.5, 100), (0.9, 100)])
def test_shares_are_covered_as_often_as_they_say(accuracy, rows):
    assert share_coverage(3, rows, accuracy, 0.3, 600) == pytest.approx(0.95, abs=0.02 + 0.0135)


@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_methods_are_seldom_called_different(seeds):
    """A spread of 0.2 nats between training seeds; one adapter each is called different in 15 % and more."""
    assert different(seeds, 0.2, 400) <= 0.06 + 0.02
