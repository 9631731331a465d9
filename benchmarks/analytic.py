"""Analytic problems with known fronts, for searchers and rungs: learning curves and noisy chips over test functions.

Energy stands for the first objective of the function, accuracy for one less the second, so that both read as in a real
sweep. Modelled: curves that saturate, curves that cross (the better the end, the slower the start), chips that shift
all trials alike and chips that shift each on its own. Not modelled: rows, failures, different speeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, exp, pi, sin, sqrt
from typing import Any, Literal

import numpy as np

from halora.hardware.addressing import derive_seed
from halora.settings.trial import Goal
from halora.spaces.language import Distribution, Range
from halora.spaces.search import Constraint, SearchSettings
from halora.sweep.search.problem import Problem

_Point = tuple[float, ...]


@dataclass(frozen=True)
class TestFunction:
    """Two objectives to be made small, over a box.

    Attributes:
        box: Range of each variable.
        objectives: Both objectives of a point.
        reference: Values of the objectives that hypervolumes are measured from.
        constraints: Values that must not be above 0, by the metric that carries their negative.
    """

    __test__ = False  # no test of pytest's

    box: tuple[tuple[float, float], ...]
    objectives: Callable[[_Point], tuple[float, float]]
    reference: tuple[float, float]
    constraints: Mapping[str, Callable[[_Point], float]]


def _zdt1(x: _Point) -> tuple[float, float]:
    """Zitzler, Deb, Thiele, Evolutionary Computation 2000, eq. 7."""
    g = 1 + 9 * sum(x[1:]) / (len(x) - 1)
    return x[0], g * (1 - sqrt(x[0] / g))


def _dtlz2(x: _Point) -> tuple[float, float]:
    """Deb et al., CEC 2002, two objectives."""
    g = sum((xi - 0.5) ** 2 for xi in x[1:])
    return (1 + g) * cos(x[0] * pi / 2), (1 + g) * sin(x[0] * pi / 2)


def _bnh(x: _Point) -> tuple[float, float]:
    """Binh and Korn, 1997, the second objective scaled to 0 .. 1."""
    return 4 * x[0] ** 2 + 4 * x[1] ** 2, ((x[0] - 5) ** 2 + (x[1] - 5) ** 2) / 50


FUNCTIONS: Mapping[str, TestFunction] = {
    "zdt1": TestFunction(((0.0, 1.0),) * 5, _zdt1, (1.1, 4.0), {}),
    "dtlz2": TestFunction(((0.0, 1.0),) * 5, _dtlz2, (1.5, 1.5), {}),
    "bnh": TestFunction(
        ((0.0, 5.0), (0.0, 3.0)),
        _bnh,
        (140.0, 1.0),
        {
            "clean_accuracy": lambda x: (x[0] - 5) ** 2 + x[1] ** 2 - 25,
            "clean_margin": lambda x: 7.7 - (x[0] - 8) ** 2 - (x[1] + 3) ** 2,
        },
    ),
}


@dataclass(frozen=True)
class AnalyticCurves:
    """A test function as something to train.

    Attributes:
        function: The function at the end of training.
        steps: Steps of a whole training.
        curve: `flat`: as good at once as in the end. `saturating`: the gap closes alike for all. `crossing`: the better
            the end, the slower.
        gap: Accuracy lacking at the start.
        chip_std: Standard deviation of accuracy over chips, half its variance shared by all trials.
        seed: Seed of the chips.
    """

    function: TestFunction
    steps: int = 27
    curve: Literal["flat", "saturating", "crossing"] = "flat"
    gap: float = 1.0
    chip_std: float = 0.0
    seed: int = 0

    def problem(self, name: str, *, trials: int, chip_instances: int = 1, seed: int = 0, **changes: Any) -> Problem:
        """The search over it; `changes` are further fields of the problem."""
        space: dict[str, Distribution] = {
            f"x{i}": Range(low=low, high=high) for i, (low, high) in enumerate(self.function.box)
        }
        energy, loss = self.function.reference
        settings = {
            "goals": lambda values: [Goal(self.steps, chip_instances)],
            "settings": SearchSettings(skip_unreachable=False),
            "accuracy_floor": 1 - loss - self.gap,
            "constraints": [Constraint.model_validate(f"{metric} >= 0") for metric in self.function.constraints],
            **changes,
        }
        return Problem(
            name=name,
            seed=seed,
            trials=trials,
            space=space,
            energy=lambda values: self.function.objectives(_point(values))[0],
            reference=(1 - loss, energy),
            **settings,
        )

    def true_objectives(self, values: Mapping[str, Any]) -> tuple[float, float]:
        """Accuracy without noise after the whole training, and energy."""
        energy, loss = self.function.objectives(_point(values))
        return 1 - loss, energy

    def step_s(self, values: Mapping[str, Any]) -> float:
        """One second."""
        return 1.0

    def chip_s(self, values: Mapping[str, Any]) -> float:
        """Nothing."""
        return 0.0

    def report(self, values: Mapping[str, Any], step: int) -> dict[str, float]:
        """The loss."""
        return {"train_loss": 1 - self._mean(values, step)}

    def accuracy(self, values: Mapping[str, Any], step: int, chip: int) -> float:
        """One less the second objective, less what training has not made good yet, with the chip's noise."""
        if not self.chip_std:
            return self._mean(values, step)
        shared = _normal(self.seed, chip)
        own = _normal(self.seed, chip, *(f"{x:.9g}" for x in _point(values)))
        return self._mean(values, step) + self.chip_std * (shared + own) / sqrt(2)

    def clean(self, values: Mapping[str, Any], step: int) -> dict[str, float]:
        """Constraints, as metrics that must not be below 0."""
        point = _point(values)
        kept = {metric: -constraint(point) for metric, constraint in self.function.constraints.items()}
        return {"clean_accuracy": self._mean(values, step), **kept}

    def _mean(self, values: Mapping[str, Any], step: int) -> float:
        end = 1 - self.function.objectives(_point(values))[1]
        if self.curve == "flat":
            return end
        rate = 4.0
        if self.curve == "crossing":
            worst = 1 - self.function.reference[1]
            quality = min(max((end - worst) / (1 - worst), 0.0), 1.0)
            rate = 12.0 * (1 - quality) + 2.0 * quality
        return end - self.gap * (exp(-rate * step / self.steps) - exp(-rate))


def _point(values: Mapping[str, Any]) -> _Point:
    return tuple(float(values[f"x{i}"]) for i in range(len(values)))


def _normal(*address: object) -> float:
    return float(np.random.default_rng(derive_seed("chip", *address)).standard_normal())
