"""Which finished trial gets more chips: the one whose accuracy on them may decide most about the front."""

from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import numpy as np

from halora.analysis.racing import chip_estimates, front_probabilities, value_of_a_chip
from halora.settings.trial import Goal
from halora.sweep.search.problem import Problem
from halora.sweep.search.study import State, Trial

_DECIDED = 0.01  # a place on the front is decided when its probability is this close to 0 or 1


class Race:
    """The race as some trials stand; finished ones that break no constraint take part.

    Args:
        problem: What is searched.
        trials: All trials.
        last_goal: Where the training of a trial ended.
    """

    def __init__(self, problem: Problem, trials: Sequence[Trial], last_goal: Callable[[Trial], Goal]) -> None:
        self._problem, self._last_goal = problem, last_goal
        self._racers = [trial for trial in trials if trial.state is State.FINISHED and trial.violation <= 0]

    def next_goal(self, excluded: Container[int]) -> tuple[Trial, Goal] | None:
        """The trial to score on more chips, and on which; none where nothing is left to decide or to spend.

        Args:
            excluded: Numbers of trials that cannot be scored again.
        """
        racing, finished = self._problem.racing, self._racers
        if racing is None or not finished:
            return None
        spent = sum(_chips(trial) - self._last_goal(trial).chip_instances for trial in finished)
        means, errors = chip_estimates([trial.scores[-1].accuracy_by_chip for trial in finished])
        signs = [-1 if each.maximise else 1 for each in self._problem.objectives]
        besides = [i for i, each in enumerate(self._problem.objectives) if each.metric != "accuracy"]
        losses = (objectives_of(self._problem, finished) * signs)[:, besides]
        chances = front_probabilities(means, errors, losses)
        if spent >= racing.extra or (np.minimum(chances, 1 - chances) < _DECIDED).all():
            return None
        values = value_of_a_chip(means, errors, losses, np.array([_chips(trial) for trial in finished]))
        racers = {
            i: values[i]
            for i, trial in enumerate(finished)
            if values[i] > 0 and _chips(trial) < racing.most and trial.number not in excluded
        }
        if not racers:
            return None
        trial = finished[max(racers, key=racers.__getitem__)]
        chips = min(_chips(trial) + racing.at_once, racing.most, _chips(trial) + racing.extra - spent)
        return trial, replace(self._last_goal(trial), chip_instances=chips, first_chip=_chips(trial))

    def estimates(self) -> dict[int, float]:
        """Accuracies of the trials as the race compares them, by number; none where nothing raced.

        What chips that only some of the trials met do to all alike is taken out, see `chip_estimates`.
        """
        by_chip = [trial.scores[-1].accuracy_by_chip for trial in self._racers]
        if len(set(map(len, by_chip))) < 2:
            return {}
        means, _ = chip_estimates(by_chip)
        return {trial.number: float(mean) for trial, mean in zip(self._racers, means, strict=True)}


def objectives_of(problem: Problem, trials: Sequence[Trial]) -> np.ndarray:
    """Objectives at the last level that each trial reached, (trials, objectives)."""
    rows = [[trial.metrics[each.metric] for each in problem.objectives] for trial in trials]
    return np.array(rows, dtype=float)


def _chips(trial: Trial) -> int:
    return len(trial.scores[-1].accuracy_by_chip)
