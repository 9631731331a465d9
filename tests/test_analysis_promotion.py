"""Oracles: brute force over all pairs and subsets, closed forms for two trials, a simulation of many noisy sweeps."""

import itertools
from math import erf

import numpy as np
import pytest

from halora.analysis.front import ranks
from halora.analysis.promotion import promotion_order
from halora.analysis.racing import chip_estimates, front_probabilities, value_of_a_chip
from halora.analysis.trials import DEFAULT_OBJECTIVES


def _beats(a, b):
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def _ranks(points):
    ranks, left, rank = {}, dict(enumerate(points)), 0
    while left:
        front = [i for i, p in left.items() if not any(_beats(q, p) for q in left.values())]
        for i in front:
            ranks[i] = rank
            del left[i]
        rank += 1
    return [ranks[i] for i in range(len(points))]


def _area(points, reference):
    """Area between points and the reference, counted on a grid of all their coordinates."""
    accuracies = sorted({reference[0], *(a for a, _ in points)})
    energies = sorted({reference[1], *(e for _, e in points)})
    area = 0.0
    for (low, high), (left, right) in itertools.product(itertools.pairwise(accuracies), itertools.pairwise(energies)):
        if any(a >= high and e <= left for a, e in points):
            area += (high - low) * (right - left)
    return area


@pytest.mark.parametrize("seed", range(8))
def test_ranks_are_those_of_taking_fronts_away_one_by_one(seed):
    rng = np.random.default_rng(seed)
    points = [tuple(map(float, p)) for p in rng.integers(0, 6, (25, 2))]  # with ties
    assert ranks(np.array(points)).tolist() == _ranks(points)


@pytest.mark.parametrize("seed", range(4))
def test_promotion_goes_by_rank_then_by_hypervolume_and_junk_comes_last(seed):
    rng = np.random.default_rng(seed)
    accuracy, energy = rng.uniform(0, 1, 20), rng.uniform(1, 5, 20)
    reference = (0.3, 6.0)
    table = np.column_stack([accuracy, energy])
    order = promotion_order(table, DEFAULT_OBJECTIVES, reference, most=20)
    assert all(promotion_order(table, DEFAULT_OBJECTIVES, reference, most=k) == order[:k] for k in range(20))
    assert sorted(order) == list(range(20))
    useful = [i for i in order if accuracy[i] > 0.3]
    assert order[: len(useful)] == useful
    assert [accuracy[i] for i in order[len(useful) :]] == sorted((a for a in accuracy if a <= 0.3), reverse=True)
    rank_of = dict(zip(sorted(useful), _ranks([(accuracy[i], energy[i]) for i in sorted(useful)]), strict=True))
    assert [rank_of[i] for i in useful] == sorted(rank_of.values())
    front = [i for i in useful if rank_of[i] == 0]
    for k, i in enumerate(front):
        kept = [(accuracy[j], energy[j]) for j in front[:k]]
        gains = {j: _area([*kept, (accuracy[j], energy[j])], reference) for j in front[k:]}
        assert gains[i] == pytest.approx(max(gains.values()))
    junk_first = np.array([[0.25, 0.1], [0.6, 2.0], [0.7, 3.0]])
    cheapest_junk = promotion_order(junk_first, DEFAULT_OBJECTIVES, reference, most=3)
    assert cheapest_junk[-1] == 0


def test_the_probability_of_two_trials_is_that_of_a_difference_of_normals():
    accuracy, error, energy = np.array([0.60, 0.63]), np.array([0.02, 0.03]), np.array([[1.0], [2.0]])
    cheap, dear = front_probabilities(accuracy, error, energy)
    assert cheap == 1.0
    z = 0.03 / (0.02**2 + 0.03**2) ** 0.5
    assert dear == pytest.approx(0.5 * (1 + erf(z / 2**0.5)), abs=0.03)
    same = front_probabilities(np.array([0.5, 0.5]), np.array([0.01, 0.01]), np.array([[1.0], [1.0]]))
    assert same == pytest.approx([0.5, 0.5], abs=0.04)
    sure = front_probabilities(np.array([0.5, 0.4, 0.6]), np.zeros(3), np.array([[1.0], [2.0], [3.0]]))
    assert sure.tolist() == [1.0, 0.0, 1.0]


def test_what_a_chip_does_to_all_alike_is_no_uncertainty():
    rng = np.random.default_rng(0)
    means, chips = np.array([0.5, 0.6, 0.7]), rng.normal(0, 0.1, 4)
    table = means[:, None] + chips
    estimated, error = chip_estimates(table.tolist())
    assert estimated - estimated[0] == pytest.approx(means - means[0])
    assert error == pytest.approx([0, 0, 0], abs=1e-9)
    uneven = [table[0].tolist(), table[1, :2].tolist(), table[2, :3].tolist()]  # a raced trial met more chips
    estimated, _ = chip_estimates(uneven)
    assert estimated - estimated[0] == pytest.approx(means - means[0], abs=1e-6)


def test_the_front_of_a_race_is_made_of_its_own_estimates():
    """Two chips that only raced trials met are easier by 0.16; a fit by hand gives 0.42 and 0.44, plain means 0.50."""
    raced, cheaper, other = [0.42, 0.42, 0.58, 0.58], [0.44, 0.44], [0.60, 0.60, 0.76, 0.76]
    means, _ = chip_estimates([raced, cheaper, other])
    assert means == pytest.approx([0.42, 0.44, 0.60], abs=1e-9)
    assert np.mean(raced) > 0.44 > means[0]


@pytest.mark.parametrize("seed", range(5))
def test_estimates_are_the_least_squares_fit_and_those_on_the_shared_chips_keep_their_means(seed):
    rng = np.random.default_rng(seed)
    tables = [rng.random(int(count)).tolist() for count in rng.choice([2, 2, 2, 4, 5], 7)] + [rng.random(2).tolist()]
    most = max(map(len, tables))
    rows = [(i, chip, value) for i, own in enumerate(tables) for chip, value in enumerate(own)]
    design = np.zeros((len(rows) + 1, len(tables) + most))
    for place, (i, chip, _) in enumerate(rows):
        design[place, i] = design[place, len(tables) + chip] = 1
    design[-1, len(tables) : len(tables) + 2] = 1e6  # chips 0 and 1, which all have, add up to nothing
    fit = np.linalg.lstsq(design, np.array([*(value for _, _, value in rows), 0.0]), rcond=None)[0]
    means, _ = chip_estimates(tables)
    if len([own for own in tables if len(own) == most]) > 1:  # else a chip of one trial alone says nothing of it
        assert means == pytest.approx(fit[: len(tables)], abs=1e-5)
    for own, mean in zip(tables, means, strict=True):
        if len(own) == 2:
            assert mean == pytest.approx(np.mean(own))


def test_standard_errors_are_those_of_many_repetitions():
    rng = np.random.default_rng(1)
    true, std = np.linspace(0.4, 0.6, 12), 0.05
    estimates, errors = [], []
    for _ in range(200):
        table = true[:, None] + rng.normal(0, 0.1, 6) + rng.normal(0, std, (12, 6))
        means, error = chip_estimates(table.tolist())
        estimates.append(means - means.mean())
        errors.append(error)
    spread = np.std(np.array(estimates) - (true - true.mean()), axis=0).mean()
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)
    assert np.mean(errors) == pytest.approx(std / 6**0.5, rel=0.1)


def test_a_chip_is_worth_most_where_it_decides_a_place_or_that_of_another():
    accuracy = np.array([0.60, 0.61, 0.30, 0.90])  # by rising energy: a rival, an undecided, a hopeless, a sure one
    energy, chips = np.array([[1.0], [2.0], [3.0], [4.0]]), np.full(4, 4)
    rival, undecided, hopeless, sure = value_of_a_chip(accuracy, np.full(4, 0.02), energy, chips)
    assert rival == pytest.approx(undecided, rel=0.1)  # the comparison rests on both alike
    assert max(hopeless, sure) < 0.01 * rival
    rival, undecided, *_ = value_of_a_chip(accuracy, np.array([0.04, 0.01, 0.02, 0.02]), energy, chips)
    assert rival > 10 * undecided
    before = value_of_a_chip(accuracy, np.full(4, 0.02), energy, chips)
    after = value_of_a_chip(accuracy, np.full(4, 0.02), energy, np.array([9, 4, 4, 4]))
    assert after[0] == pytest.approx(before[0] / 2)
    assert value_of_a_chip(accuracy, np.zeros(4), energy, chips).tolist() == [0, 0, 0, 0]
