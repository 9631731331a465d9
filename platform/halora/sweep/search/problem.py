"""What the decision core searches: a space, energies known beforehand, and the goals a trial is brought to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from halora.errors import UserError
from halora.pricing import trial_energy
from halora.settings.trial import Goal, TrialConfig
from halora.spaces.language import Distribution
from halora.spaces.mistakes import describe
from halora.spaces.recipes import first_points
from halora.spaces.search import Budget, Constraint, Racing, SearchSettings
from halora.spaces.sweep import SweepConfig


@dataclass(frozen=True)
class Problem:
    """A search over two objectives: accuracy, which takes training, and energy, which is computed before it.

    Attributes:
        name: Name of the sweep.
        seed: Its seed.
        trials: Configurations to try.
        space: Searched fields by path.
        energy: Energy per token in microjoule of the values of a point; raises `UserError` for one that no trial can
            have.
        goals: Goals a point is brought to in turn, the last one its whole training.
        reference: Accuracy and energy that hypervolumes are measured from.
        first: Points to try first.
        settings: Sampler and what it sees.
        reduction_factor: A rung promotes one in so many of its trials.
        accuracy_floor: Trials at or below it rank last at a rung.
        constraints: Bounds a trial has to keep.
        racing: Extra chip instances, if any.
        budget: What may be spent.
    """

    name: str
    seed: int
    trials: int
    space: Mapping[str, Distribution]
    energy: Callable[[Mapping[str, Any]], float]
    goals: Callable[[Mapping[str, Any]], Sequence[Goal]]
    reference: tuple[float, float]
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
    point = sweep.reference_point
    floor = stopping.accuracy_floor if stopping else None

    def energy(values: Mapping[str, Any]) -> float:
        try:
            return trial_energy(sweep.resolve(values)).total_uj_per_token
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
        energy=energy,
        goals=goals,
        reference=(point.accuracy, point.energy_uj_per_token),
        first=first_points(sweep),
        settings=sweep.search,
        reduction_factor=stopping.reduction_factor if stopping else 1.0,
        accuracy_floor=point.accuracy if floor is None else floor,
        constraints=sweep.constraints,
        racing=sweep.racing,
        budget=sweep.budget,
    )


def free_knobs(sweep: SweepConfig) -> list[str]:
    """Searched settings of the chip that change no energy the chip counts, so that the search takes them for free."""
    free = []
    for path, distribution in sweep.space.items():
        if not path.startswith("chip."):
            continue
        condition = distribution.condition(sweep.space)
        trials = [sweep.resolve({**condition, path: value}) for value in distribution.probes]
        if len({trial_energy(trial, estimated=True).total_uj_per_token for trial in trials}) == 1:
            free.append(path)
    return free
