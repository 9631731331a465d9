"""Trials as a front shows them: the report, the page, the front's files and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from halora.analysis.front import front, hypervolume_history, knee
from halora.analysis.trials import DEFAULT_OBJECTIVES, OTHER_ACCURACY, Groups, Objective, RecordedTrial, grouped
from halora.analysis.uncertainty import front_probability


@dataclass(frozen=True)
class FrontView:
    """Trials apart by how they stand, and the front of the feasible ones.

    Attributes:
        objectives: What the front is drawn over.
        groups: All trials.
        members: The front, from the best to the worst in the last objective.
        probability: Of being on the front given what the scores rest on, by number, for every feasible trial.
        knee: The member beyond the plane through the front's extremes.
    """

    objectives: tuple[Objective, ...]
    groups: Groups
    members: list[RecordedTrial]
    probability: dict[int, float]
    knee: RecordedTrial | None

    def rows(self) -> list[dict[str, Any]]:
        """Every trial that has all objectives, by number, in plain values; what is not a number becomes none."""
        members = {point.number for point in self.members}
        ranked = sorted(self.groups.scored, key=lambda point: point.number)
        columns = _columns(self.objectives, ranked)
        return [
            {
                "number": point.number,
                **{name: _plain(point.metrics.get(name)) for name in columns},
                "on_front": point.number in members,
                "front_probability": self.probability.get(point.number, 0.0),
                "knee": point is self.knee,
                "violated": point.violated,
                "labels": dict(point.labels),
                "params": dict(point.params),
            }
            for point in ranked
        ]


def view_front(points: Sequence[RecordedTrial], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> FrontView:
    """The front over any two or three recorded metrics, and how sure each trial's place on it is."""
    groups = grouped(points, objectives)
    members = front(groups.feasible, objectives)
    shares = front_probability(groups.feasible, objectives)
    probability = {point.number: float(share) for point, share in zip(groups.feasible, shares, strict=True)}
    return FrontView(tuple(objectives), groups, members, probability, knee(members, objectives))


def narrowed(view: FrontView, points: Sequence[RecordedTrial]) -> FrontView:
    """The front of some of a view's trials; their probabilities stay those among all."""
    groups = grouped(points, view.objectives)
    members = front(groups.feasible, view.objectives)
    return FrontView(view.objectives, groups, members, view.probability, knee(members, view.objectives))


def volumes(view: FrontView, reference: Sequence[float]) -> list[float]:
    """The hypervolume after each feasible trial, in the order they ended."""
    ended = sorted(view.groups.feasible, key=lambda point: (point.ended_ms, point.number))
    return list(hypervolume_history(ended, reference, view.objectives))


def _columns(objectives: Sequence[Objective], points: Sequence[RecordedTrial]) -> list[str]:
    usual = ["energy_uj_per_token", "accuracy", "accuracy_low", "accuracy_high", "margin", "clean_accuracy", "noise_db"]
    usual += [name for name in OTHER_ACCURACY if any(name in point.metrics for point in points)]
    return list(dict.fromkeys([*(each.metric for each in objectives), *usual]))


def _plain(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
