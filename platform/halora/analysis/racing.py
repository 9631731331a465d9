"""What more chips would decide about the front, for the rows as they are."""

from collections.abc import Sequence

import numpy as np

from halora.analysis.trials import ACCURACY, Objective
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


def front_probabilities(accuracy: np.ndarray, error: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Probability that each trial is on the Pareto front; accuracies are normal around theirs, all else is exact.

    Args:
        accuracy: Estimated accuracies, (trials,).
        error: Their standard errors, (trials,).
        losses: The other objectives, exact and smaller the better, (trials, objectives).

    Returns:
        Probabilities by 2,000 draws, the same at every call, (trials,).
    """
    draws = _draws(accuracy, error)
    exact = np.broadcast_to(losses, (len(draws), *losses.shape))
    aims = [ACCURACY, *(Objective(str(i), maximise=False) for i in range(losses.shape[1]))]
    return share_on_front(np.concatenate([draws[:, :, None], exact], axis=2), aims)


def value_of_a_chip(accuracy: np.ndarray, error: np.ndarray, losses: np.ndarray, chips: np.ndarray) -> np.ndarray:
    """How much scoring each trial on one more chip may decide about the front.

    A trial's place is undecided by p (1 - p). It rests on its own accuracy and on that of its rival, the most accurate
    trial that is no worse in anything else; one more chip takes error^2 / (chips + 1) off a variance. Larger is
    better; no unit.

    Args:
        accuracy: Estimated accuracies, (trials,).
        error: Their standard errors, (trials,).
        losses: The other objectives, exact and smaller the better, (trials, objectives).
        chips: Chips each was scored on, (trials,).
    """
    probability = front_probabilities(accuracy, error, losses)
    undecided = probability * (1 - probability)
    draws = _draws(accuracy, error)
    at_stake = undecided.copy()
    for trial in np.flatnonzero(undecided):
        no_worse = (losses <= losses[trial]).all(axis=1)
        equal = (losses == losses[trial]).all(axis=1)
        rivals = np.flatnonzero(no_worse & ~(equal & (np.arange(len(losses)) >= trial)))  # of equals the first one
        if len(rivals):
            leaders = rivals[draws[:, rivals].argmax(axis=1)]
            at_stake += undecided[trial] * np.bincount(leaders, minlength=len(losses)) / _DRAWS
    value: np.ndarray = at_stake * error**2 / (chips + 1)
    return value


def _draws(accuracy: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Accuracies as they may be, (draws, trials)."""
    draws: np.ndarray = np.random.default_rng(0).standard_normal((_DRAWS, len(accuracy))) * error + accuracy
    return draws
