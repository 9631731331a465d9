"""What more chips would decide about the front, for the rows as they are."""

from collections.abc import Sequence

import numpy as np

from halora.analysis.uncertainty import share_on_front

_DRAWS = 2000
_PRIOR_CHIPS = 4  # how many chips the pooled variance counts for, in that of one trial


def chip_estimates(accuracy_by_chip: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracy of every trial and its standard error, for trials scored on chips 0 .. n-1 with n their own.

    What a chip does to all trials alike cancels out of a comparison (common random numbers): accuracies are fitted as
    trial plus chip by least squares, and the error is that of the residuals, each trial's variance drawn towards the
    pooled one. The rows are taken as given. Chips are measured from the mean of those that every trial has, so that a
    trial on these alone keeps its plain mean.

    Args:
        accuracy_by_chip: Accuracies of each trial on chips 0 .. n-1, at least two for one of them.

    Returns:
        Means and standard errors, (trials,) each.
    """
    counts = np.array([len(own) for own in accuracy_by_chip])
    table = np.full((len(counts), counts.max(initial=1)), np.nan)
    for row, own in zip(table, accuracy_by_chip, strict=True):
        row[: len(own)] = own
    scored = ~np.isnan(table)
    plain = np.nanmean(table, axis=1)
    shared = scored / counts[:, None]  # (trials, chips)
    laplacian = np.diag(scored.sum(axis=0)) - scored.T.astype(float) @ shared
    chips = np.linalg.lstsq(laplacian, np.nansum(table - plain[:, None], axis=0), rcond=None)[0]
    chips -= chips[scored.all(axis=0)].mean() if len(counts) else 0.0
    means = plain - shared @ chips
    squares = np.nansum((table - means[:, None] - chips) ** 2, axis=1)
    freedom = max(int(scored.sum()) - len(means) - (table.shape[1] - 1), 1)
    variances = (squares + _PRIOR_CHIPS * squares.sum() / freedom) / (counts - 1 + _PRIOR_CHIPS)
    return means, np.sqrt(variances / counts)


def front_probabilities(accuracy: np.ndarray, error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Probability that each trial is on the Pareto front; accuracies are normal around theirs, energies exact.

    Args:
        accuracy: Estimated accuracies, (trials,).
        error: Their standard errors, (trials,).
        energy: Energies, exact, (trials,).

    Returns:
        Probabilities by 2,000 draws, the same at every call, (trials,).
    """
    draws = _draws(accuracy, error)
    return share_on_front(np.stack([draws, np.broadcast_to(energy, draws.shape)], axis=2))


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
