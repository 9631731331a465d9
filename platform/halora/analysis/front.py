"""The front of accuracy under noise against energy: non-dominated trials and their hypervolume."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """A finished trial as the front sees it.

    Attributes:
        number: Number of the trial in its sweep.
        accuracy: Mean accuracy over chip instances, with its 95 % interval over rows and chips.
        margin: Mean log-likelihood margin of the right option over chips and rows, in nats.
        clean_accuracy: Accuracy on clean weights.
        energy_uj_per_token: Energy per token in microjoule.
        params: Searched values by dotted path.
        feasible: Whether it keeps the sweep's constraints; only then can it lie on the front.
    """

    number: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    margin: float
    clean_accuracy: float
    energy_uj_per_token: float
    params: dict[str, Any]
    feasible: bool = True


def front(points: Sequence[TrialPoint]) -> list[TrialPoint]:
    """Feasible points that no other matches or beats in both objectives and beats in one, by rising energy.

    Of points equal in both objectives all are kept. O(n log n).
    """
    kept: list[TrialPoint] = []
    for point in sorted((p for p in points if p.feasible), key=lambda p: (p.energy_uj_per_token, -p.accuracy)):
        last = kept[-1] if kept else None
        if last is None or point.accuracy > last.accuracy or _objectives(point) == _objectives(last):
            kept.append(point)
    return kept


def hypervolume(points: Sequence[TrialPoint], *, accuracy: float, energy_uj_per_token: float) -> float:
    """Area between the points' front and a reference point, in accuracy times microjoule.

    Points no better than the reference in both objectives add nothing. Computed by Optuna.
    """
    from optuna._hypervolume import compute_hypervolume  # the public API only plots it

    losses = np.array([(p.energy_uj_per_token, -p.accuracy) for p in points if p.feasible]).reshape(-1, 2)
    reference = np.array([energy_uj_per_token, -accuracy])
    inside = losses[(losses < reference).all(axis=1)]
    return float(compute_hypervolume(inside, reference)) if len(inside) else 0.0


def best(points: Sequence[TrialPoint]) -> TrialPoint | None:
    """The front's most accurate point; the larger mean margin decides a tie."""
    return max((p for p in points if p.feasible), key=lambda p: (p.accuracy, p.margin), default=None)


def _objectives(point: TrialPoint) -> tuple[float, float]:
    return point.accuracy, point.energy_uj_per_token
