"""Which trials of a sweep may be certified, in the order they are preferred, and why the others may not. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from halora.analysis.front import front, knee_gains
from halora.analysis.gates import Gate, search_gates
from halora.analysis.trials import DEFAULT_OBJECTIVES, Objective, RecordedTrial, grouped
from halora.spaces.gates import Gates

Preference = Literal["knee", "accuracy", "energy"]


@dataclass(frozen=True)
class Standing:
    """How a trial stands before certification.

    Attributes:
        point: The trial.
        gates: What the search can say; none for a trial that has no score.
        reasons: Why it is not a candidate; none for a candidate.
    """

    point: RecordedTrial
    gates: tuple[Gate, ...]
    reasons: tuple[str, ...]

    @property
    def qualifies(self) -> bool:
        """Whether it may be certified."""
        return not self.reasons


def standings(
    points: Sequence[RecordedTrial],
    gates: Gates,
    prefer: Preference = "knee",
    objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
) -> list[Standing]:
    """All trials: candidates first, the preferred ones first among them, then the others by number.

    A trial that another candidate beats in all objectives is a candidate like any other, but comes after those
    of the front. `knee` prefers what lies furthest beyond the line through the front's extremes (see
    `halora.analysis.front.knee`) and, where nothing lies beyond it, the most accurate; `accuracy` the most accurate,
    `energy` the cheapest.
    """
    found = _standings(points, gates, objectives)
    chosen = [each.point for each in found.values() if each.qualifies]
    others = sorted(number for number, each in found.items() if not each.qualifies)
    return [found[point.number] for point in _ordered(chosen, prefer, objectives)] + [found[n] for n in others]


def preferred(
    points: Sequence[RecordedTrial], gates: Gates, objectives: Sequence[Objective] = DEFAULT_OBJECTIVES
) -> tuple[RecordedTrial | None, dict[int, Standing]]:
    """The candidate that `standings` has first where the knee is preferred, and how all trials stand, by number."""
    found = _standings(points, gates, objectives)
    chosen = [each.point for each in found.values() if each.qualifies]
    return next(_ordered(chosen, "knee", objectives), None), found


def _standings(points: Sequence[RecordedTrial], gates: Gates, objectives: Sequence[Objective]) -> dict[int, Standing]:
    feasible = {point.number for point in grouped(points, objectives).feasible}
    return {point.number: _standing(point, gates, point.number in feasible) for point in points}


def _ordered(
    chosen: Sequence[RecordedTrial], prefer: Preference, objectives: Sequence[Objective]
) -> Iterator[RecordedTrial]:
    """Candidates from the most preferred to the least, front after front."""
    rest = list(chosen)
    while rest:
        members = front(rest, objectives)
        match prefer:
            case "accuracy":
                members = sorted(members, key=lambda point: -point.accuracy)
            case "knee":
                found = knee_gains(members, objectives).round(9)
                gains = {point.number: gain for point, gain in zip(members, found, strict=True)}
                members = sorted(members, key=lambda point: (-gains[point.number], -point.accuracy))
            case "energy":
                members = sorted(members, key=lambda point: point.energy_uj_per_token)
        yield from members
        taken = {point.number for point in members}
        rest = [point for point in rest if point.number not in taken]


def _standing(point: RecordedTrial, gates: Gates, feasible: bool) -> Standing:
    if point.state != "finished":
        return Standing(point, (), (f"it is {point.state}" + (f": {point.cause}" if point.cause else ""),))
    found = tuple(search_gates(point, gates))
    reasons = [str(gate) for gate in found if not gate.passed]
    reasons += [f"violates {name} by {by:.3g}" for name, by in point.violated.items()]
    if not feasible and not reasons:
        reasons.append("it has no score")
    return Standing(point, found, tuple(reasons))
