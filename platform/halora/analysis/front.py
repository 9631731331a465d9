"""The front: trials that no other trial beats in every objective; its ranks, hypervolume and knee, by moocore."""

from collections.abc import Iterator, Sequence

import moocore
import numpy as np

from halora.analysis.trials import DEFAULT_OBJECTIVES, Objective, RecordedTrial

_SAME = 1e-9
"""Difference of two gains that is one of rounding."""


def values(points: Sequence[RecordedTrial], objectives: Sequence[Objective]) -> np.ndarray:
    """Objectives of the points, in the shape (points, objectives)."""
    rows = [[point.metrics[each.metric] for each in objectives] for point in points]
    return np.array(rows, dtype=float).reshape(-1, len(objectives))


def non_dominated(table: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Which rows of `table` (points, objectives) no other row matches or beats everywhere and beats somewhere.

    Of equal rows all count. O(n log n) for up to three objectives.
    """
    if not len(table):
        return np.zeros(0, dtype=bool)
    chosen = moocore.is_nondominated(table, maximise=[each.maximise for each in objectives], keep_weakly=True)
    return np.asarray(chosen, dtype=bool)


def ranks(table: np.ndarray, objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> np.ndarray:
    """Front each row of `table` (points, objectives) lies on: 0 for the front, 1 once that is taken away, and so on."""
    if not len(table):
        return np.zeros(0, dtype=int)
    return np.asarray(moocore.pareto_rank(table, maximise=[each.maximise for each in objectives]), dtype=int)


def front(points: Sequence[RecordedTrial], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> list[RecordedTrial]:
    """The non-dominated points, from the best to the worst in the last objective."""
    chosen = non_dominated(values(points, objectives), objectives)
    members = [point for point, kept in zip(points, chosen, strict=True) if kept]
    last, first = objectives[-1], objectives[0]
    return sorted(members, key=lambda p: (last.loss(p), first.loss(p), p.number))


def hypervolume(
    points: Sequence[RecordedTrial], reference: Sequence[float], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES
) -> float:
    """Area or volume between the points' front and a reference point, see `volume`."""
    return volume(values(points, objectives), reference, objectives)


def volume(
    table: np.ndarray, reference: Sequence[float], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES
) -> float:
    """Area or volume between rows of `table` (points, objectives) and a reference, in the product of their units.

    Points no better than the reference in every objective add nothing.
    """
    if not len(table):
        return 0.0
    return float(moocore.hypervolume(table, ref=reference, maximise=[each.maximise for each in objectives]))


def hypervolume_history(
    points: Sequence[RecordedTrial], reference: Sequence[float], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES
) -> Iterator[float]:
    """The hypervolume after each of the points, in their order; a point that is dominated costs no new one."""
    archive = np.zeros((0, len(objectives)))
    found = 0.0
    signs = np.array([1 if each.maximise else -1 for each in objectives])
    for row in values(points, objectives):
        if not ((archive - row) * signs >= 0).all(axis=1).any():
            archive = np.vstack([archive, row])
            archive = archive[non_dominated(archive, objectives)]
            found = volume(archive, reference, objectives)
        yield found


def knee(
    members: Sequence[RecordedTrial], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES
) -> RecordedTrial | None:
    """The member of a front furthest beyond the plane through its extremes (Das, Structural Optimization 1999).

    With objectives scaled to the front's own range that is the one with the largest sum of gains. None where fewer
    than three different points leave nothing between the extremes, or where of two objectives nothing lies beyond the
    line: each extreme has a gain of 1.
    """
    if len(np.unique(values(members, objectives), axis=0)) < 3:
        return None
    gains = knee_gains(members, objectives)
    if len(objectives) == 2 and gains.max() <= 1 + _SAME:
        return None
    return members[int(gains.argmax())]


def knee_gains(members: Sequence[RecordedTrial], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> np.ndarray:
    """What each member of a front gains over its worst in every objective, scaled to the front's range and summed."""
    losses = values(members, objectives) * [-1 if each.maximise else 1 for each in objectives]
    span = np.ptp(losses, axis=0)
    gains: np.ndarray = ((losses.max(axis=0) - losses) / np.where(span > 0, span, 1)).sum(axis=1)
    return gains


def best(points: Sequence[RecordedTrial]) -> RecordedTrial | None:
    """The most accurate point; the larger mean margin decides a tie, where it is recorded."""
    return max(points, key=lambda p: (p.accuracy, p.metrics.get("margin", 0.0)), default=None)
