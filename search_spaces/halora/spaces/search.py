"""How a sweep searches: sampler, constraints, early stopping, racing, budget."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from halora.errors import nearest
from halora.hardware.energy import COSTS
from halora.strict_model import StrictModel

METRICS = (
    *COSTS,
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_std_chips",
    "accuracy_worst",
    "drop_low",
    "drop_high",
    "clean_accuracy",
    "clean_accuracy_low",
    "clean_accuracy_high",
    "clean_margin",
    "margin",
    "margin_low",
    "margin_high",
    "noise_db",
)
"""What a constraint can bound; costs are exact, and known before training."""

Sampler = Literal["tpe", "gp", "nsga2", "nsga3", "random", "qmc"]
"""`tpe`, `gp`, `nsga2` and `nsga3` are Optuna's; `random` and `qmc`, a scrambled Sobol sequence, see no results."""

_CONSTRAINT = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([-+\d.eE]+)\s*")


class Constraint(StrictModel):
    """A bound on a metric of finished trials, written `energy_uj_per_token <= 5` or `clean_accuracy >= 0.6`."""

    metric: str
    comparison: Literal["<=", ">="]
    bound: float

    @model_validator(mode="before")
    @classmethod
    def _parsed(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        matched = _CONSTRAINT.fullmatch(given)
        if matched is None:
            raise ValueError(f"write `METRIC <= NUMBER` or `METRIC >= NUMBER`, got '{given}'")
        metric, comparison, bound = matched.groups()
        if metric not in METRICS:
            raise ValueError(f"no metric '{metric}'{nearest(metric, METRICS)} (known: {', '.join(METRICS)})")
        return {"metric": metric, "comparison": comparison, "bound": bound}

    @model_serializer
    def _written(self) -> str:
        return f"{self.metric} {self.comparison} {repr(self.bound).removesuffix('.0')}"  # read back bit for bit

    def __str__(self) -> str:
        return self._written()

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far the metrics are beyond the bound; 0 or less where they keep it."""
        excess = metrics[self.metric] - self.bound
        return excess if self.comparison == "<=" else -excess


def total_violation(violations: Iterable[float]) -> float:
    """Sum by which constraints are broken; what is kept counts nothing."""
    return sum(max(violation, 0.0) for violation in violations)


class SearchSettings(StrictModel):
    """Who suggests configurations, and what they see."""

    sampler: Sampler = "tpe"
    history: int = Field(default=200, ge=20)
    """Earlier trials the sampler looks at: the best and the latest. Bounds the time of a suggestion."""
    skip_unreachable: bool = True
    """Do not train a configuration whose energy leaves it dominated even at the best clean accuracy seen."""
    warm_start: tuple[str, ...] = ()
    """Sweeps of the store whose trials, as they are at the launch, the sampler sees from the start, where they fit."""
    surrogate: Literal["nearest", "forest"] = "nearest"
    """What answers for a configuration that the table of a simulated sweep lacks: its nearest trial, or a forest."""


class Rung(StrictModel):
    """Steps, rows and chips at which trials are compared."""

    steps: int = Field(ge=1)
    """Optimiser steps taken by then."""
    rows: int | None = Field(default=None, ge=2)
    """Validation rows scored there; those of the trial when left out."""
    chip_instances: int | None = Field(default=None, ge=1)
    """Chip instances scored there; those of the trial when left out."""


class EarlyStopping(StrictModel):
    """Trials pause at every rung; the best by non-dominated rank of accuracy and energy are promoted."""

    rungs: tuple[Rung, ...] = Field(min_length=1)
    reduction_factor: float = Field(default=3, gt=1)
    """A rung promotes one in so many of its trials."""
    accuracy_floor: float | None = Field(default=None, ge=0, le=1)
    """Trials below it at a rung rank last; the reference point's accuracy when left out."""

    @field_validator("rungs")
    @classmethod
    def _growing(cls, rungs: tuple[Rung, ...]) -> tuple[Rung, ...]:
        steps = [rung.steps for rung in rungs]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"every rung needs more steps than the one before it, got {', '.join(map(str, steps))}")
        return rungs


class Racing(StrictModel):
    """Chip instances beyond the trial's own, for the trials whose place on the front is undecided."""

    extra: int = Field(ge=1)
    """Evaluations on one more chip instance, over all trials."""
    most: int = Field(ge=2)
    """Most chip instances of one trial."""
    at_once: int = Field(default=2, ge=1)
    """Chip instances added to a trial before the front is looked at again."""


class Budget(StrictModel):
    """What the search may spend beside its number of trials; trials that run when it is spent are finished."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps over all trials."""
    hours: float | None = Field(default=None, gt=0)
    """Hours the sweep has run, resumed runs together."""
    gpu_hours: float | None = Field(default=None, gt=0)
    """Hours of its trials times the GPUs that Ray sets aside for each, resumed runs together; needs GPUs."""
