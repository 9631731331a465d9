"""Noise models: how one cause moves what a cell, or a weight, holds.

A model turns values and standard normal draws into moved values; it never draws. So every draw is addressed in one
place (`halora.hardware.noise`), and the same cell keeps its draw while time goes on: it ages, it is not drawn again.

The models of real cells are in `halora.hardware.cell_models`; `halora.hardware.noise_settings` says how a chip names
one and how a plug-in adds another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self, assert_never, final

from numpy.polynomial.hermite_e import hermegauss
from pydantic import Field

from halora.errors import UserError
from halora.strict_model import StrictModel

if TYPE_CHECKING:  # a chip is described, checked and priced without loading torch
    from torch import Tensor

Lifetime = Literal["chip", "programming", "read"]
"""How long one draw lasts: a chip instance, until the cell is programmed again, or one read."""

Domain = Literal["weight", "conductance"]
"""What a model moves: weights in their own units, or conductances of single cells in microsiemens."""


class NoiseModel(StrictModel, ABC):
    """One cause of error, of conductances unless it is a `WeightNoise`."""

    domain: ClassVar[Domain] = "conductance"
    lifetime: ClassVar[Lifetime]
    ages: ClassVar[bool] = False
    """Whether it tells what happens after programming (an entry of `retention`) or by it."""

    kind: str

    @abstractmethod
    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Values after this cause, before any clamping.

        Args:
            values: Conductances of any shape in microsiemens, each moved by itself, or whole weights `(d_out, d_in)`;
                left unchanged.
            unit: Standard normal draws of the same shape.
            time_s: Seconds since programming.
        """

    @abstractmethod
    def with_level(self, level: float) -> Self:
        """The same model at another strength, as a noise schedule sets it."""

    @property
    @abstractmethod
    def level(self) -> float:
        """Strength of the model in its own measure; 0 switches it off."""

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Standard deviation of `apply` over the draws, in the units of `values` and broadcasting over them.

        Here by Gauss-Hermite quadrature of `apply`; the shipped models have closed forms.
        """
        mean, square = values.new_zeros(()), values.new_zeros(())
        for draw, share in quadrature():
            shift = self.apply(values, values.new_full(values.shape, draw), time_s) - values
            mean, square = mean + share * shift, square + share * shift.square()
        return (square - mean.square()).clamp_min(0).sqrt()

    @property
    def effort(self) -> float:
        """Programming pulses it takes, relative to the model's default setting."""
        return 1.0

    @property
    def first_s(self) -> float | None:
        """Earliest time its figures hold at, in seconds after programming; none when they do not change with time."""
        return None

    def problems(self, g_min_us: float, g_max_us: float, time_s: float) -> list[str]:
        """Why the model says nothing about these conductances and this time; empty when it does."""
        return []


class WeightNoise(NoiseModel):
    """Error added to weights as a whole, for chips described above the level of their cells."""

    domain: ClassVar[Domain] = "weight"
    lifetime: ClassVar[Lifetime] = "programming"

    @final
    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Add an error of the model's standard deviation."""
        return values.addcmul(unit, self.std(values, time_s))

    @abstractmethod
    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Standard deviation for the whole matrix (d_out, d_in), in weight units and broadcasting over it."""

    def std_in_tiles(self, values: Tensor, time_s: float, rows: int, columns: int) -> Tensor:
        """The standard deviation on tiles of `rows` inputs and `columns` outputs; `std`, where they do not matter.

        Broadcasting over the matrix, or one value per output and row tile, `(d_out, row tiles)`.
        """
        return self.std(values, time_s)


class GaussianNoise(WeightNoise):
    """Independent Gaussian error of every programmed weight (HaLoRA: W* = W0 + N)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: float = Field(ge=0, le=100)
    """Standard deviation in units of `reference`."""
    reference: Literal["absolute", "tensor_max", "channel_max", "tile_max", "std"]
    """What sigma is relative to: weight units; max|W| of the tensor, the output channel or the tile; the std of W."""

    @property
    def level(self) -> float:
        """Sigma."""
        return self.sigma

    def with_level(self, level: float) -> Self:
        """Another sigma."""
        return self.model_copy(update={"sigma": level})

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Sigma times the reference; the whole matrix is one tile."""
        return self.std_in_tiles(values, time_s, values.shape[1], values.shape[0])

    def std_in_tiles(self, values: Tensor, time_s: float, rows: int, columns: int) -> Tensor:
        """Sigma times the reference, at least in float32."""
        import torch

        from halora.hardware.regions import largest_magnitude

        dtype = torch.promote_types(values.dtype, torch.float32)
        match self.reference:
            case "absolute":
                return values.new_full((), self.sigma, dtype=dtype)
            case "std":
                return self.sigma * values.to(dtype).std()
            case "tensor_max" | "channel_max" | "tile_max" as region:
                return self.sigma * largest_magnitude(values, region, rows, columns).to(dtype)
            case unknown:
                assert_never(unknown)


def quadrature() -> list[tuple[float, float]]:
    """Draws that stand for all standard normal ones, each with its share (Gauss-Hermite)."""
    nodes, weights = hermegauss(32)
    return list(zip(nodes.tolist(), (weights / weights.sum()).tolist(), strict=True))


class CellNoise(NoiseModel):
    """Error of single cells, in microsiemens."""

    lifetime: ClassVar[Lifetime] = "programming"

    strength: float = Field(default=1.0, ge=0, le=100)
    """Multiple of the model's figures; 1 is the cell as described."""

    @property
    def level(self) -> float:
        """Strength."""
        return self.strength

    def with_level(self, level: float) -> Self:
        """Another strength."""
        return self.model_copy(update={"strength": level})

    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Add an error of the model's standard deviation."""
        return values.addcmul(unit, self.std(values, time_s))


class FittedNoise(CellNoise):
    """Error of cells known from measurements, over a range of conductances and times."""

    extrapolate: bool = False
    """Compute outside the measured conductances and times as well; otherwise such a chip is refused."""

    @property
    @abstractmethod
    def measured_us(self) -> tuple[float, float]:
        """Lowest and highest conductance measured, in microsiemens."""

    @property
    def measured_s(self) -> tuple[float, float] | None:
        """Earliest and latest time measured, in seconds; none when the figures do not change with time."""
        return None

    @property
    def first_s(self) -> float | None:
        """Earliest time measured."""
        return self.measured_s and self.measured_s[0]

    def problems(self, g_min_us: float, g_max_us: float, time_s: float) -> list[str]:
        """Conductances and times that were not measured, unless `extrapolate` allows them."""
        if self.extrapolate:
            return []
        problems = [self._time_problem(time_s)]
        low, high = self.measured_us
        if g_min_us < low or g_max_us > high:
            problems.append(
                f"{self.kind} was measured from {low:g} to {high:g} uS, the cells use {g_min_us:g} to {g_max_us:g} uS; "
                "change the cells or allow it with extrapolate: true"
            )
        return [problem for problem in problems if problem]

    def _time_problem(self, time_s: float) -> str:
        if self.extrapolate or self.measured_s is None or self.measured_s[0] <= time_s <= self.measured_s[1]:
            return ""
        low, high = self.measured_s
        return (
            f"{self.kind} was measured from {low:g} to {high:g} s after programming, not at {time_s:g} s; "
            "change the time or allow it with extrapolate: true"
        )

    def _check_time(self, time_s: float) -> None:
        if problem := self._time_problem(time_s):
            raise UserError(problem)
