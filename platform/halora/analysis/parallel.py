"""Parallel coordinates: a line for every trial over the fields that were searched, and its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10
from typing import Any

from halora.analysis.trials import Objective, RecordedTrial

_DECADES = 100
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
ABSENT = -0.06
"""Where a line passes an axis whose field the trial does not have: below its lower end."""


@dataclass(frozen=True)
class Axis:
    """One field.

    Attributes:
        field: Its name: a searched field's dotted path, or a metric.
        label: The last part of it.
        choices: What it can be, as texts, where it is not a number; then the places are evenly spaced.
        low: Smallest number seen.
        high: Largest number seen.
        log: Whether numbers are placed by their logarithm.
        whole: Whether all numbers are whole.
    """

    field: str
    label: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False

    def place(self, value: Any) -> float:
        """Place of a value between 0 and 1; `ABSENT` for none."""
        if value is None:
            return ABSENT
        if self.choices:
            return self.choices.index(str(value)) / max(len(self.choices) - 1, 1)
        if not isfinite(value):
            return ABSENT
        if self.low == self.high:
            return 0.5
        if self.log:
            return log10(value / self.low) / log10(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts to write beside the axis."""
        if self.choices:
            return [(self.place(choice), choice) for choice in self.choices[:24]]
        return [(self.place(value), f"{value:.3g}") for value in dict.fromkeys((self.low, self.high))]


def parallel_axes(points: Sequence[RecordedTrial], objectives: Sequence[Objective], most: int = 12) -> list[Axis]:
    """The searched fields that vary, and the objectives after them; of more than `most` fields the first."""
    columns: dict[str, list[Any]] = {}
    for point in points:
        for path, value in point.params.items():
            columns.setdefault(path, []).append(value)
    axes = [_axis(path, values) for path, values in columns.items() if len(set(map(repr, values))) > 1][:most]
    for each in objectives:
        values = [value for point in points if isfinite(value := point.metrics.get(each.metric, float("nan")))]
        if values:
            axes.append(_axis(each.metric, values))
    return axes


def line_places(point: RecordedTrial, axes: Sequence[Axis]) -> list[float]:
    """Where a trial's line crosses each axis."""
    fields: Mapping[str, Any] = {**point.metrics, **point.params}
    return [axis.place(fields.get(axis.field)) for axis in axes]


def _axis(field: str, values: Sequence[Any]) -> Axis:
    label = field.rpartition(".")[2]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Axis(field, label, choices=tuple(sorted({str(value) for value in values})))
    low, high = min(values), max(values)
    log = low > 0 and high / low >= _DECADES
    return Axis(field, label, (), float(low), float(high), log, all(isinstance(value, int) for value in values))
