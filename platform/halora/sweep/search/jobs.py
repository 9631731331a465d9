"""What the decision core hands out, and what it makes of a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from halora.hardware.energy import ENERGY
from halora.settings.trial import Goal


class Decision(StrEnum):
    """What to do with a trial after a report."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Stop it at its checkpoint; a resume starts from there."""


@dataclass(frozen=True)
class Job:
    """A trial to bring to a goal.

    Attributes:
        number: The trial.
        values: Its searched values by dotted path.
        costs: Energy, time and what else is known before it is trained, by metric.
        goal: What to bring it to.
        final: Whether its training ends there.
        name: Tells it from the trial's other jobs.
        halvings: How often the trial's micro-batch is halved, as it ran out of memory.
        cut_short: Whether somebody ended its training where the goal is.
        clone_of: The trial that somebody had it begun like; none for a point of the search's own.
    """

    number: int
    values: Mapping[str, Any]
    costs: Mapping[str, float]
    goal: Goal
    final: bool
    name: str
    halvings: int = 0
    cut_short: bool = False
    clone_of: int | None = None

    @property
    def energy_uj_per_token(self) -> float:
        """Its energy per token in microjoule."""
        return self.costs[ENERGY]
