"""A chip team's table of measured states: read from CSV, checked whole, and interpolated in conductance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, ValidationError

from halora.errors import UserError, nearest
from halora.reading import read_csv
from halora.strict_model import StrictModel

if TYPE_CHECKING:
    from torch import Tensor


class MeasuredState(StrictModel):
    """What cells programmed to one conductance held some time later."""

    conductance_us: float = Field(ge=0)
    """Conductance they were programmed to, in microsiemens."""
    mean_us: float = Field(ge=0)
    """Mean conductance found."""
    std_us: float = Field(ge=0)
    """Standard deviation between cells."""
    time_s: float = Field(gt=0)
    """Seconds after programming."""


COLUMNS = tuple(MeasuredState.model_fields)


@dataclass(frozen=True)
class StateCurve:
    """All states of one time, by conductance."""

    states: tuple[MeasuredState, ...]

    @classmethod
    def at(cls, time_s: float, states: Sequence[MeasuredState]) -> Self:
        """The curve of one time of a table."""
        chosen = [state for state in states if state.time_s == time_s]
        return cls(tuple(sorted(chosen, key=lambda state: state.conductance_us)))

    @property
    def range_us(self) -> tuple[float, float]:
        """Lowest and highest conductance."""
        return self.states[0].conductance_us, self.states[-1].conductance_us

    def moments(self, conductance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in microsiemens, linear between the states; the outer pieces go on beyond."""
        known, mean, std = (
            conductance.new_tensor([getattr(state, name) for state in self.states])
            for name in ("conductance_us", "mean_us", "std_us")
        )
        import torch

        after = torch.searchsorted(known, conductance.contiguous()).clamp_(1, len(known) - 1)
        before = after - 1
        share = (conductance - known[before]) / (known[after] - known[before])
        return mean[before].lerp(mean[after], share), std[before].lerp(std[after], share)


def read_states(path: Path) -> tuple[MeasuredState, ...]:
    """The states of a CSV file with the columns conductance_us, mean_us, std_us and time_s.

    Raises:
        UserError: With every mistake: the file, the line, the column, what is wrong and the value given.
    """
    lines = read_csv(path, str(path))
    header = [name.strip() for name in lines[0]] if lines else []
    problems = [f"{path}, line 1: column {name} is missing" for name in COLUMNS if name not in header]
    problems += [
        f"{path}, line 1: unknown column '{name}'{nearest(name, COLUMNS)}" for name in header if name not in COLUMNS
    ]
    problems += [f"{path}, line 1: column {name} stands twice" for name in COLUMNS if header.count(name) > 1]
    states: list[MeasuredState] = []
    places: list[str] = []
    for number, line in enumerate(lines[1:], start=2):
        place = f"{path}, line {number}"
        if not any(field.strip() for field in line):
            continue
        if len(line) != len(header):
            problems.append(f"{place}: {len(line)} fields, the header has {len(header)}")
            continue
        given = {name: field.strip() for name, field in zip(header, line, strict=True) if name in COLUMNS}
        try:
            states.append(MeasuredState.model_validate(given))
            places.append(place)
        except ValidationError as error:
            problems += [
                f"{place}, column {item['loc'][0]}: {item['msg'].removeprefix('Input ')}, got '{item['input']}'"
                for item in error.errors()
                if item["type"] != "missing"
            ]
    if not problems:
        problems = [f"{path}: no states"] if not states else table_problems(states, places)
    if problems:
        raise UserError(problems)
    return tuple(states)


def table_problems(states: Sequence[MeasuredState], places: Sequence[str]) -> list[str]:
    """Why the states make no curves; `places` says where each stands."""
    problems = []
    first: dict[tuple[float, float], str] = {}
    for state, place in zip(states, places, strict=True):
        key = (state.time_s, state.conductance_us)
        if key in first:
            problems.append(f"{place}: {state.conductance_us:g} uS at {state.time_s:g} s is in {first[key]} already")
        first.setdefault(key, place)
    for time in sorted({state.time_s for state in states}):
        if sum(at == time for at, _ in first) < 2:
            problems.append(f"at {time:g} s there is one conductance only; two are needed to interpolate")
    return problems or ([] if states else ["there are no states"])
