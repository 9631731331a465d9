"""Programming error and ageing of real cells, as published or as measured by a chip team.

Published coefficients are in `coefficients.yaml`, each with its unit, source and confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import exp, expm1, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from halora.errors import UserError
from halora.hardware.measured_states import MeasuredState, StateCurve, read_states, table_problems
from halora.hardware.noise_models import CellNoise, FittedNoise

if TYPE_CHECKING:
    from torch import Tensor


CMO_US = (9.0, 88.2)
"""Conductances of CMO/HfOx cells that were measured."""


@cache
def coefficients(name: str) -> Any:
    """The published coefficients of that name."""
    return yaml.safe_load((files("halora.hardware") / "coefficients.yaml").read_text(encoding="utf-8"))[name]["value"]


class Wan2022Noise(FittedNoise):
    """Conductance error of the NeuRRAM chip's HfOx cells, relaxation included (Wan et al., Nature 2022, Ext. Fig. 3d).

    The standard deviation is a polynomial in g / g_max at 1 s, 1 day and 2 days; between them it is linear in ln t.
    """

    kind: Literal["wan-2022"] = "wan-2022"
    g_max_us: float = Field(default=40.0, gt=0, le=1000)
    """Largest conductance of the cell. At another than the 40 uS measured, the error is scaled along:
    sigma(g) = g_max / 40 sigma_40(40 g / g_max), so that it stays the same share of the range."""

    @property
    def measured_us(self) -> tuple[float, float]:
        """The whole range of the cell."""
        return 0.0, self.g_max_us

    @property
    def measured_s(self) -> tuple[float, float]:
        """1 s to 2 days."""
        times = sorted(coefficients("wan-2022"))
        return times[0], times[-1]

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """The polynomials of the two neighbouring times, interpolated in ln t."""
        self._check_time(time_s)
        fits = coefficients("wan-2022")
        before, after, share = _neighbours(sorted(fits), time_s)
        fit = [(1 - share) * a + share * b for a, b in zip(fits[before], fits[after], strict=True)]
        return polynomial(values / self.g_max_us, fit).mul_(self.strength * self.g_max_us / 40.0)


class MiloNoise(FittedNoise):
    """Programming error of HfO2 cells under IGVVA-100 (Milo et al., IRPS 2021, Fig. 4)."""

    kind: Literal["milo"] = "milo"

    @property
    def measured_us(self) -> tuple[float, float]:
        """50 to 225 uS."""
        return 50.0, 225.0

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Falls with the conductance."""
        return polynomial(values, coefficients("milo")).mul_(self.strength)


class CmoNoise(FittedNoise):
    """Programming error of CMO/HfOx cells, by the window a cell is accepted in (Falcone et al., arXiv 2502.04524)."""

    kind: Literal["cmo"] = "cmo"
    acceptance_percent: float = 2.0
    """Accepted window, in percent of the target conductance: 0.2 or 2."""

    @field_validator("acceptance_percent")
    @classmethod
    def _measured_window(cls, acceptance_percent: float) -> float:
        if acceptance_percent not in coefficients("cmo-programming"):
            raise ValueError(f"acceptance_percent {acceptance_percent:g} was not measured; choose 0.2 or 2")
        return acceptance_percent

    @property
    def measured_us(self) -> tuple[float, float]:
        """9 to 88.2 uS."""
        return CMO_US

    @property
    def effort(self) -> float:
        """A window ten times as narrow is met by one pulse in ten."""
        return 2.0 / self.acceptance_percent

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Grows with the conductance."""
        return polynomial(values, coefficients("cmo-programming")[self.acceptance_percent]).mul_(self.strength)


class MeasuredNoise(FittedNoise):
    """Mean and standard deviation as a chip team measured them, linear in conductance and in ln t between the states.

    Given as `path` of a CSV file (columns conductance_us, mean_us, std_us, time_s; relative to the working directory).
    The states are read into the model, so that a chip's hash covers them and its record needs no file.
    """

    kind: Literal["measured"] = "measured"
    states: tuple[MeasuredState, ...]
    """What cells programmed to a conductance held at a time."""

    @model_validator(mode="before")
    @classmethod
    def _read_the_file(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "path" not in given:
            return given
        if "states" in given:
            raise UserError("give either path or states, not both")
        return cls.with_states(given)

    @staticmethod
    def with_states(given: dict[str, Any]) -> dict[str, Any]:
        """A model's description with the states in place of the `path` of their file.

        Raises:
            UserError: See `read_states`.
        """
        rest = {key: value for key, value in given.items() if key != "path"}
        return rest | {"states": [state.model_dump(mode="json") for state in read_states(Path(str(given["path"])))]}

    @field_validator("states")
    @classmethod
    def _states_make_curves(cls, states: tuple[MeasuredState, ...]) -> tuple[MeasuredState, ...]:
        if problems := table_problems(states, [f"row {i}" for i in range(1, len(states) + 1)]):
            raise UserError(problems)
        return states

    @property
    def measured_us(self) -> tuple[float, float]:
        """Conductances that every time has."""
        ranges = [curve.range_us for curve in self._curves().values()]
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    @property
    def measured_s(self) -> tuple[float, float]:
        """First and last time of the table."""
        times = [state.time_s for state in self.states]
        return min(times), max(times)

    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Move the mean as well."""
        mean, std = self._moments(values, time_s)
        return values + self.strength * (mean - values + std * unit)

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Interpolated between the measured states."""
        return self.strength * self._moments(values, time_s)[1]

    def _curves(self) -> dict[float, StateCurve]:
        return {time: StateCurve.at(time, self.states) for time in sorted({state.time_s for state in self.states})}

    def _moments(self, values: Tensor, time_s: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in microsiemens, shaped like `values`."""
        self._check_time(time_s)
        curves = self._curves()
        before, after, share = _neighbours(list(curves), time_s)
        mean, std = curves[before].moments(values)
        if share:
            later_mean, later_std = curves[after].moments(values)
            mean, std = mean.lerp(later_mean, share), std.lerp(later_std, share)
        return mean, std.clamp_min(0)


class PowerLawDrift(CellNoise):
    """Drift g (t / t0)^-nu after t0, with an exponent of its own for every cell."""

    ages: ClassVar[bool] = True

    kind: Literal["power-law"] = "power-law"
    nu_mean: float = Field(ge=-1, le=1)
    """Mean exponent; positive where conductance falls."""
    nu_std: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation of the exponent between cells."""
    t0_s: float = Field(default=1.0, gt=0, le=1e9)
    """Time the drift is counted from, in seconds after programming; nothing drifts before it."""

    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Multiply by (t / t0)^-nu."""
        return values * (self.nu_mean + self.nu_std * unit).mul_(-self._log_time(time_s)).exp_()

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """That of a log-normal factor."""
        log_time = self._log_time(time_s)
        spread = (self.nu_std * log_time) ** 2
        return values * (exp(spread / 2 - self.nu_mean * log_time) * sqrt(expm1(spread)))

    def _log_time(self, time_s: float) -> float:
        return self.strength * log(max(time_s / self.t0_s, 1.0))


class CmoRelaxation(FittedNoise):
    """Relaxation of CMO/HfOx cells, the same at every conductance (Falcone et al., arXiv 2502.04524)."""

    ages: ClassVar[bool] = True

    kind: Literal["cmo-relaxation"] = "cmo-relaxation"

    @property
    def measured_us(self) -> tuple[float, float]:
        """9 to 88.2 uS."""
        return CMO_US

    @property
    def measured_s(self) -> tuple[float, float]:
        """1 s to 10 years, for which the authors give results."""
        return 1.0, 10 * 365.25 * 86400

    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Shift the mean as well."""
        mean, std = self._moments(time_s)
        return values + (unit * std).add_(mean)

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """Grows with ln t."""
        return values.new_tensor(self._moments(time_s)[1])

    def _moments(self, time_s: float) -> tuple[float, float]:
        self._check_time(time_s)
        fit = coefficients("cmo-relaxation")
        mean, std = (fit[moment][0] + fit[moment][1] * log(time_s) for moment in ("mean", "std"))
        return self.strength * mean, self.strength * max(std, 0.0)


def cmo_read_noise_us(conductance_us: Tensor, time_s: float) -> Tensor:
    """1/f noise of a read of CMO/HfOx cells (Falcone et al., arXiv 2502.04524), a standard deviation in microsiemens.

    a log10(G) sqrt(ln((t + t_r) / (2 t_r))) at t seconds after programming with read pulses of t_r; 0 below 1 uS.
    """
    fit = coefficients("cmo-read")
    age = log((time_s + fit["read_s"]) / (2 * fit["read_s"]))
    return conductance_us.clamp_min(1.0).log10().mul_(fit["factor"] * sqrt(max(age, 0.0)))


def polynomial(x: Tensor, fit: Sequence[float]) -> Tensor:
    """fit[0] + fit[1] x + ..., never below 0."""
    total = x.new_full(x.shape, fit[-1])
    for coefficient in reversed(fit[:-1]):
        total.mul_(x).add_(coefficient)
    return total.clamp_min_(0)


def _neighbours(times: Sequence[float], time_s: float) -> tuple[float, float, float]:
    """The two of the sorted `times` to interpolate or extrapolate from, and the share of the second, linear in ln t."""
    if len(times) == 1 or time_s == times[0]:
        return times[0], times[0], 0.0
    before, after = next((pair for pair in pairwise(times) if time_s <= pair[1]), (times[-2], times[-1]))
    return before, after, log(time_s / before) / log(after / before)
