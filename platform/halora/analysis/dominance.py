"""Who dominates whom in accuracy and energy: ranks, an order to promote by, and how sure a place on the front is."""

from collections.abc import Sequence

import numpy as np

_DRAWS = 2000
_PRIOR_CHIPS = 4  # how many chips the pooled variance counts for, in that of one trial


def front_ranks(accuracy: np.ndarray, energy: np.ndarray, most: int | None = None) -> np.ndarray:
    """Front each point lies on: 0 for those nothing dominates, 1 once they are taken away, and so on.

    Args:
        accuracy: Larger is better, (points,).
        energy: Smaller is better, (points,).
        most: Rank no further once so many points have a rank; the others share the next one.
    """
    ranks = np.full(len(accuracy), -1)
    left = np.lexsort((-accuracy, energy))
    rank = ranked = 0
    while len(left) and (most is None or ranked < most):
        best_before = np.concatenate(([-np.inf], np.maximum.accumulate(accuracy[left])[:-1]))
        on_front = accuracy[left] > best_before
        # Of equal points, which stand side by side, all are kept.
        for i in np.flatnonzero((np.diff(accuracy[left]) == 0) & (np.diff(energy[left]) == 0)):
            on_front[i + 1] = on_front[i]
        ranks[left[on_front]] = rank
        ranked += int(on_front.sum())
        left = left[~on_front]
        rank += 1
    ranks[left] = rank
    return ranks


def promotion_order(accuracy: np.ndarray, energy: np.ndarray, reference: tuple[float, float], most: int) -> list[int]:
    """The points to keep, best first: by rank, and within a rank by the hypervolume each adds to those before it.

    Points no better than the reference in accuracy come last, by falling accuracy: the cheapest would never be
    dominated, however useless.

    Args:
        accuracy: Larger is better, (points,).
        energy: Smaller is better, (points,).
        reference: Accuracy and energy that hypervolumes are measured from.
        most: How many to keep.
    """
    worst_energy = max(reference[1], float(energy.max(initial=0.0)) * 1.01)
    useful = np.flatnonzero(accuracy > reference[0])
    ranks = front_ranks(accuracy[useful], energy[useful], most)
    order: list[int] = []
    for rank in range(ranks.max(initial=-1) + 1):
        if len(order) >= most:
            break
        order += _by_gain(useful[ranks == rank], accuracy, energy, (reference[0], worst_energy))
    useless = np.flatnonzero(accuracy <= reference[0])
    return (order + [int(i) for i in useless[np.argsort(-accuracy[useless], kind="stable")]])[:most]


def _by_gain(
    members: np.ndarray, accuracy: np.ndarray, energy: np.ndarray, reference: tuple[float, float]
) -> list[int]:
    """Members of one front, each next one the one that adds the largest area to those chosen."""
    left = [int(i) for i in members[np.argsort(energy[members], kind="stable")]]
    chosen: list[int] = []  # by rising energy, so by rising accuracy
    order: list[int] = []
    while left:

        def gain(i: int) -> float:
            below = [accuracy[j] for j in chosen if energy[j] <= energy[i]]
            above = [energy[j] for j in chosen if energy[j] > energy[i]]
            height = accuracy[i] - max(below, default=reference[0])
            return float(height * (min(above, default=reference[1]) - energy[i]))

        best = max(left, key=gain)
        left.remove(best)
        chosen.append(best)
        order.append(best)
    return order


def chip_estimates(accuracy_by_chip: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracy of every trial and its standard error, for trials scored on chips 0 .. n-1 with n their own.

    What a chip does to all trials alike cancels out of a comparison (common random numbers): accuracies are fitted as
    trial plus chip, and the error is that of the residuals, each trial's variance drawn towards the pooled one. The
    rows are taken as given.

    Args:
        accuracy_by_chip: Accuracies of each trial on chips 0 .. n-1, at least two for one of them.

    Returns:
        Means and standard errors, (trials,) each.
    """
    counts = np.array([len(values) for values in accuracy_by_chip])
    table = np.full((len(counts), counts.max(initial=1)), np.nan)
    for row, values in zip(table, accuracy_by_chip, strict=True):
        row[: len(values)] = values
    scored = ~np.isnan(table)
    chips = np.zeros(table.shape[1])
    for _ in range(50):  # least squares by turns
        means = np.nanmean(table - chips, axis=1)
        chips = np.nanmean(table - means[:, None], axis=0)
        chips -= chips.mean()
    squares = np.nansum((table - means[:, None] - chips) ** 2, axis=1)
    freedom = max(int(scored.sum()) - len(means) - (table.shape[1] - 1), 1)
    variances = (squares + _PRIOR_CHIPS * squares.sum() / freedom) / (counts - 1 + _PRIOR_CHIPS)
    return means, np.sqrt(variances / counts)


def front_probabilities(accuracy: np.ndarray, error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Probability that no other trial beats each in energy and accuracy, where accuracies are normal around theirs.

    Args:
        accuracy: Estimated accuracies, (trials,).
        error: Their standard errors, (trials,).
        energy: Energies, exact, (trials,).

    Returns:
        Probabilities by 2,000 draws, the same at every call, (trials,).
    """
    order = np.argsort(energy, kind="stable")
    draws = _draws(accuracy[order], error[order])
    best_so_far = np.maximum.accumulate(draws, axis=1)
    last_as_cheap = np.searchsorted(energy[order], energy[order], side="right") - 1
    probabilities = np.empty(len(order))
    probabilities[order] = (draws >= best_so_far[:, last_as_cheap]).mean(axis=0)
    return probabilities


def value_of_a_chip(accuracy: np.ndarray, error: np.ndarray, energy: np.ndarray, chips: np.ndarray) -> np.ndarray:
    """How much scoring each trial on one more chip may decide about the front.

    A trial's place is undecided by p (1 - p). It rests on its own accuracy and on that of its rival, the most accurate
    trial that takes less energy; one more chip takes error^2 / (chips + 1) off a variance. Larger is better; no unit.

    Args:
        accuracy: Estimated accuracies, (trials,).
        error: Their standard errors, (trials,).
        energy: Energies, exact, (trials,).
        chips: Chips each was scored on, (trials,).
    """
    probability = front_probabilities(accuracy, error, energy)
    undecided = probability * (1 - probability)
    order = np.argsort(energy, kind="stable")
    draws = _draws(accuracy[order], error[order])
    leads = draws >= np.maximum.accumulate(draws, axis=1)
    leader = np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0), axis=1)
    at_stake = undecided.copy()
    for place in range(1, len(order)):
        shares = np.bincount(leader[:, place - 1], minlength=len(order)) / _DRAWS
        at_stake[order] += shares * undecided[order[place]]
    value: np.ndarray = at_stake * error**2 / (chips + 1)
    return value


def _draws(accuracy: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Accuracies as they may be, (draws, trials)."""
    draws: np.ndarray = np.random.default_rng(0).standard_normal((_DRAWS, len(accuracy))) * error + accuracy
    return draws
