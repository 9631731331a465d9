"""What a search has spent of its budget, counted in its study, so that a resume goes on counting."""

from collections.abc import Callable

from halora.spaces.search import Budget
from halora.sweep.search.study import SweepStudy

_COUNTED_S = 60.0  # how much of a job's time a driver that is killed may leave uncounted


class Spending:
    """Counts hours and GPU hours by a clock.

    GPU hours are those of jobs: from when one is handed out until it ends, times the GPUs set aside for it, whether it
    uses them or waits for its model. Nothing else counts: no probe of a base, no closing comparison.

    Args:
        budget: What may be spent.
        study: Where it is counted.
        clock_s: Seconds since some moment.

    Attributes:
        gpus: GPUs set aside for one job.
    """

    def __init__(self, budget: Budget, study: SweepStudy, clock_s: Callable[[], float]) -> None:
        self._budget, self._study, self._clock_s = budget, study, clock_s
        self._looked_s = clock_s()
        self.gpus = 0.0

    @property
    def gpu_hours(self) -> float:
        """GPU hours counted so far, of a sweep that has a budget of them."""
        return self._study.gpu_hours

    def count(self, jobs: int, *, at_least_s: float = 0.0) -> None:
        """Count the time since the last count.

        Args:
            jobs: Number of jobs in hand all that time.
            at_least_s: Leave a shorter time for the next count.
        """
        now_s = self._clock_s()
        hours = (now_s - self._looked_s) / 3600
        if not (self._budget.hours or self._budget.gpu_hours) or 3600 * hours < at_least_s:
            return
        if self._budget.hours:
            self._study.spend(self._study.hours + hours)
        if self._budget.gpu_hours and jobs:
            self._study.spend_gpus(self._study.gpu_hours + hours * jobs * self.gpus)
        self._looked_s = now_s

    def count_running(self, jobs: int) -> None:
        """Count now and then while jobs run, so that a driver that is killed leaves little uncounted."""
        if self._budget.gpu_hours:
            self.count(jobs, at_least_s=_COUNTED_S)

    def over(self, steps: int) -> str:
        """What is spent, given the optimiser steps taken; empty while there is something left of all."""
        budget, spent = self._budget, ""
        if budget.steps and steps >= budget.steps:
            spent = f"the budget of {budget.steps} steps is spent"
        if budget.hours and self._study.hours >= budget.hours:
            spent = f"the budget of {budget.hours:g} hours is spent"
        if budget.gpu_hours and self._study.gpu_hours >= budget.gpu_hours:
            spent = f"the budget of {budget.gpu_hours:g} GPU hours is spent"
        return spent
