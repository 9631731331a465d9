"""Distributions over the fields of a trial, addressed by dotted path (`training.mu`), some only under a condition."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from math import sqrt
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from halora.errors import UserError
from halora.strict_model import StrictModel

Value = str | int | float | bool
"""A value a search can choose."""


class _Distribution(StrictModel):
    when: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Only searched when every named field has one of the given values; otherwise the trial's default stands."""

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the conditions hold for the values chosen so far."""
        return all(_among(allowed, chosen.get(name)) is not None for name, allowed in self.when.items())

    def condition(self, space: "Mapping[str, Distribution]") -> dict[str, Any]:
        """Values under which it is searched: the first allowed one of each named field, and what those need."""
        values: dict[str, Any] = {}
        for name, allowed in self.when.items():
            if name in space:
                before = dict(takewhile(lambda item: item[0] != name, space.items()))  # noqa: B023
                values |= space[name].condition(before)
            values[name] = allowed[0]
        return values


class Categorical(_Distribution):
    """One of a list."""

    choices: tuple[Value, ...] = Field(min_length=1)

    @field_validator("choices")
    @classmethod
    def _each_once(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        for i, choice in enumerate(choices):
            if _among(choices[:i], choice) is not None:
                raise ValueError(f"{choice!r} is given twice")
        return choices

    def contains(self, value: Any) -> bool:
        """Whether the search could choose `value`."""
        return self.own(value) is not None

    def own(self, value: Any) -> Value | None:
        """The choice that equals `value`; numbers are equal as numbers. None where there is none."""
        return _among(self.choices, value)

    def named(self, value: Any) -> Value | None:
        """The choice that equals `value`, or is written so; none where there is none."""
        return next((choice for choice in self.choices if _same(choice, value) or str(choice) == value), None)

    def nearest(self, value: Any) -> Value | None:
        """The choice nearest to `value`: itself, or among numbers the closest; none where there is no such thing."""
        if (own := self.own(value)) is not None or not _numeric(value, *self.choices):
            return own
        return min(self.choices, key=lambda choice: abs(choice - value))

    @property
    def values(self) -> Sequence[Value] | None:
        """All it can be."""
        return self.choices

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values whose validity implies that of all."""
        return self.choices


class Range(_Distribution):
    """Every number between two."""

    low: float
    high: float
    log: bool = False
    kind: Literal["float", "int"] = "float"

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, got {self.low}")
        if self.kind == "int" and (self.low % 1 or self.high % 1):
            raise ValueError(f"an int range needs whole limits, got {self.low} and {self.high}")
        return self

    def contains(self, value: Any) -> bool:
        """Whether the search could choose `value`."""
        return _numeric(value) and self.low <= value <= self.high and (self.kind == "float" or value == int(value))

    def own(self, value: Any) -> Value | None:
        """The value of the range that equals `value`; none where there is none."""
        return (int(value) if self.kind == "int" else float(value)) if self.contains(value) else None

    def nearest(self, value: Any) -> Value | None:
        """The value of the range nearest to `value`; none where that is not a number."""
        if not _numeric(value):
            return None
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.kind == "int" else float(inside)

    @property
    def values(self) -> Sequence[Value] | None:
        """All it can be; none for floats, which cannot be counted."""
        return range(int(self.low), int(self.high) + 1) if self.kind == "int" else None

    @property
    def probes(self) -> tuple[Any, ...]:
        """Both ends, and of floats one inside that is not whole: what a field of whole numbers refuses of the rest."""
        if self.kind == "int":
            return int(self.low), int(self.high)
        return self.low, self.low + (self.high - self.low) * (sqrt(5) - 1) / 2, self.high


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _among(values: Sequence[Value], value: Any) -> Value | None:
    return next((each for each in values if _same(each, value)), None)


def _numeric(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _kind(given: Any) -> str | None:
    if isinstance(given, _Distribution):
        return type(given).__name__
    keys = given.keys() if isinstance(given, Mapping) else set()
    return "Categorical" if "choice" in keys or "choices" in keys else "Range" if keys & {"low", "high"} else None


Distribution = Annotated[
    Annotated[Categorical, Tag("Categorical")] | Annotated[Range, Tag("Range")],
    Discriminator(
        _kind,
        custom_error_type="distribution",
        custom_error_message="A distribution is `choices: [...]`, or `low` and `high`, with `log` and `kind`",
    ),
]
"""What a field may be searched over; `choices`, or `low` and `high`."""


def chosen_values(space: Mapping[str, "Distribution"], choose: Callable[[str, "Distribution"], Any]) -> dict[str, Any]:
    """A value by `choose` for every field whose condition holds, in the order of the space."""
    values: dict[str, Any] = {}
    for path, distribution in space.items():
        if distribution.applies(values):
            values[path] = choose(path, distribution)
    return values


def size(space: Mapping[str, "Distribution"]) -> int | None:
    """Number of configurations, conditions heeded; none where a field that can be searched is a float."""
    asked = {name for distribution in space.values() for name in distribution.when}
    counts: dict[frozenset[tuple[str, Any]], int] = {frozenset(): 1}  # by the values that conditions ask for
    for path, distribution in space.items():
        after: dict[frozenset[tuple[str, Any]], int] = {}
        for state, count in counts.items():
            values = distribution.values if distribution.applies(dict(state)) else (None,)
            if values is None:
                return None
            if path not in asked:
                after[state] = after.get(state, 0) + count * len(values)
                continue
            for value in values:
                key = state if value is None else state | {(path, value)}
                after[key] = after.get(key, 0) + count
        counts = after
    return sum(counts.values())


def grid(space: Mapping[str, "Distribution"]) -> Iterator[dict[str, Any]]:
    """Every configuration of a space of a known size, the last field changing fastest."""
    points: Iterator[dict[str, Any]] = iter(({},))
    for path, distribution in space.items():
        points = _extended(points, path, distribution)
    return points


def _extended(points: Iterator[dict[str, Any]], path: str, distribution: "Distribution") -> Iterator[dict[str, Any]]:
    for point in points:
        if not distribution.applies(point):
            yield point
        else:
            assert distribution.values is not None
            yield from ({**point, path: value} for value in distribution.values)


def with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted paths set; a chip's name on the way becomes its preset.

    Raises:
        UserError: A path goes through a value that has no keys.
    """
    result = dict(base)
    for path, value in values.items():
        node, rest = result, path
        while True:
            # Keys of a search space hold dots themselves.
            fitting = [key for key in node if rest == key or rest.startswith(f"{key}.")]
            key = max(fitting, key=len, default=rest.partition(".")[0])
            rest = rest[len(key) + 1 :]
            if not rest:
                node[key] = value
                break
            child = node.get(key, {})
            if not isinstance(child, Mapping | str):
                raise UserError(f"{path}: '{key}' is a {type(child).__name__}, which has no keys")
            node[key] = {"preset": child} if isinstance(child, str) else dict(child)
            node = node[key]
    return result
