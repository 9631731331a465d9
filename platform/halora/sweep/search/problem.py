"""What the decision core searches: a space, costs known beforehand, and the goals a trial is brought to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from halora.analysis.trials import DEFAULT_OBJECTIVES, Objective, sweep_objectives
from halora.errors import UserError
from halora.hardware.energy import COSTS, ENERGY
from halora.pricing import trial_energy
from halora.settings.trial import Goal, TrialConfig
from halora.spaces.language import Distribution
from halora.spaces.mistakes import describe
from halora.spaces.recipes import first_points
from halora.spaces.search import Budget, Constraint, Racing, SearchSettings
from halora.spaces.sweep import SweepConfig


@dataclass(frozen=True)
class Problem:
    """A search over two or three objectives: scores, which take training, and costs, which are computed before it.

    Attributes:
        name: Name of the sweep.
        seed: Its seed.
        trials: Configurations to try.
        space: Searched fields by path.
        costs: What the values of a point take, by the names of `COSTS`; raises `UserError` for one that no trial can
            have.
        goals: Goals a point is brought to in turn, the last one its whole training.
        reference: Objectives that hypervolumes are measured from.
        objectives: What trials are compared by, one score at least.
        first: Points to try first.
        settings: Sampler and what it sees.
        reduction_factor: A rung promotes one in so many of its trials.
        accuracy_floor: Trials whose first score is at or below it rank last at a rung.
        constraints: Bounds a trial has to keep.
        racing: Extra chip instances, if any.
        budget: What may be spent.
    """

    name: str
    seed: int
    trials: int
    space: Mapping[str, Distribution]
    costs: Callable[[Mapping[str, Any]], Mapping[str, float]]
    goals: Callable[[Mapping[str, Any]], Sequence[Goal]]
    reference: tuple[float, ...]
    objectives: tuple[Objective, ...] = DEFAULT_OBJECTIVES
    first: Sequence[Mapping[str, Any]] = ()
    settings: SearchSettings = field(default_factory=SearchSettings)
    reduction_factor: float = 1.0
    accuracy_floor: float = 0.0
    constraints: Sequence[Constraint] = ()
    racing: Racing | None = None
    budget: Budget = field(default_factory=Budget)


def problem_of(sweep: SweepConfig) -> Problem:
    """The search that a sweep file describes."""
    stopping = sweep.early_stopping
    objectives = sweep_objectives(sweep)
    worst = worst_scores(objectives, sweep.reference)
    floor = stopping.accuracy_floor if stopping else None

    def costs(values: Mapping[str, Any]) -> Mapping[str, float]:
        try:
            return trial_energy(sweep.resolve(values)).metrics
        except ValidationError as error:
            raise UserError(describe(error, TrialConfig)) from None

    def goals(values: Mapping[str, Any]) -> list[Goal]:
        config = sweep.resolve(values)
        own = config.evaluation
        rungs = [
            Goal(rung.steps, rung.chip_instances or own.chip_instances, rung.rows or own.rows)
            for rung in (stopping.rungs if stopping else ())
        ]
        return [*rungs, Goal(config.training.steps, own.chip_instances, own.rows)]

    return Problem(
        name=sweep.name,
        seed=sweep.seed,
        trials=sweep.trials,
        space=sweep.space,
        costs=costs,
        goals=goals,
        reference=sweep.reference,
        objectives=objectives,
        first=first_points(sweep),
        settings=sweep.search,
        reduction_factor=stopping.reduction_factor if stopping else 1.0,
        accuracy_floor=next(iter(worst.values())) if floor is None else floor,
        constraints=sweep.constraints,
        racing=sweep.racing,
        budget=sweep.budget,
    )


def worst_scores(objectives: Sequence[Objective], reference: Sequence[float]) -> dict[str, float]:
    """The reference's values of the objectives that take training, by metric, in their order."""
    at = zip(objectives, reference, strict=True)
    return {each.metric: value for each, value in at if each.metric not in COSTS}


def free_knobs(sweep: SweepConfig) -> list[str]:
    """Searched settings of the chip that change no cost among the objectives: the search takes them for free."""
    free = []
    aims = [str(name) for name in sweep.objectives if name in COSTS] or [ENERGY]
    for path, distribution in sweep.space.items():
        if not path.startswith("chip."):
            continue
        condition = distribution.condition(sweep.space)
        trials = [sweep.resolve({**condition, path: value}) for value in distribution.probes]
        costs = (trial_energy(trial, estimated=True).metrics for trial in trials)
        if len({tuple(each[name] for name in aims) for each in costs}) == 1:
            free.append(path)
    return free
