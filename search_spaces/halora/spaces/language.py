"""Distributions over the fields of a trial, addressed by dotted path (`training.mu`), some only under a condition."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from halora.errors import UserError
from halora.hardware.description import Frozen

Value = str | int | float | bool
"""A value a search can choose."""


class _Distribution(Frozen):
    when: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    """Only searched when every named field has one of the given values; otherwise the trial's default stands."""

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the conditions hold for the values chosen so far."""
        return all(chosen.get(name) in allowed for name, allowed in self.when.items())

    @property
    def condition(self) -> dict[str, Any]:
        """Values under which it is searched: the first allowed one of each named field."""
        return {name: allowed[0] for name, allowed in self.when.items()}


class Categorical(_Distribution):
    """One of a list."""

    choices: tuple[Value, ...] = Field(min_length=1)

    def contains(self, value: Any) -> bool:
        """Whether the search could choose `value`."""
        return value in self.choices

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
        whole = self.kind == "float" or isinstance(value, int)
        return isinstance(value, int | float) and whole and self.low <= value <= self.high

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values whose validity implies that of all."""
        return tuple(int(v) if self.kind == "int" else v for v in (self.low, self.high))


def _kind(given: Any) -> str:
    listed = isinstance(given, Categorical) or (isinstance(given, Mapping) and "choices" in given)
    return "Categorical" if listed else "Range"


Distribution = Annotated[
    Annotated[Categorical, Tag("Categorical")] | Annotated[Range, Tag("Range")],
    Discriminator(_kind),
]
"""What a field may be searched over; `choices`, or `low` and `high`."""


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
