"""Phase-change memory: programming error, drift and 1/f noise of reads by IBM's fits to measured devices.

With x = g / g_max at programming, t seconds after it and t0 the time of the fit's first read:

    programming    sigma(x) = c_0 + c_1 x + c_2 x^2 + ...                             in microsiemens
    drift          g ((t + t0) / t0)^-nu, nu = |m(x) + s(x) z|                        z ~ N(0, 1) of a cell
    read           sigma / g = q(x) sqrt(ln((t + t0 + t_read) / (2 t_read)))          the same in all cycles

Coefficients, sources and the shapes of m, s and q are in `coefficients.yaml`.
"""

from __future__ import annotations

from math import log, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from halora.hardware.cell_models import coefficients, polynomial
from halora.hardware.noise_models import FittedNoise

if TYPE_CHECKING:
    from torch import Tensor

PcmFit = Literal["pcm-like", "hermes-1", "hermes-2"]
"""Devices that were measured: a generic one, and those of the HERMES chip with one or two of them a side."""

_LEAST = 1e-7  # share of g_max below which a conductance counts as that


def pcm_range_us(fit: PcmFit) -> tuple[float, float]:
    """Conductances that a fit covers, in microsiemens."""
    return 0.0, float(coefficients("pcm")[fit]["g_max_us"])


class _PcmModel(FittedNoise):
    """What the two causes of a PCM cell have in common."""

    fit: PcmFit = "pcm-like"
    """Devices that were measured."""
    g_max_us: float | None = Field(default=None, gt=0, le=1000)
    """Largest conductance of the cell; that of the fit when left out. Errors stay the same share of the range."""

    @property
    def measured_us(self) -> tuple[float, float]:
        """The whole range of the cell."""
        return 0.0, self._largest_us

    @property
    def _coefficients(self) -> dict[str, Any]:
        return dict(coefficients("pcm")[self.fit])

    @property
    def _largest_us(self) -> float:
        return pcm_range_us(self.fit)[1] if self.g_max_us is None else self.g_max_us

    def _relative(self, values: Tensor) -> Tensor:
        return (values / self._largest_us).clamp_min(_LEAST)


class PcmNoise(_PcmModel):
    """Programming error of phase-change cells."""

    kind: Literal["pcm"] = "pcm"

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """The fit's polynomial."""
        scale = self.strength * self._largest_us / pcm_range_us(self.fit)[1]
        return polynomial(values / self._largest_us, self._coefficients["programming"]).mul_(scale)


class PcmDrift(_PcmModel):
    """Drift of phase-change cells, with an exponent of its own for every cell, by what it conducts when programmed."""

    ages: ClassVar[bool] = True

    kind: Literal["pcm-drift"] = "pcm-drift"

    def apply(self, values: Tensor, unit: Tensor, time_s: float) -> Tensor:
        """Multiply by ((t + t0) / t0)^-nu."""
        mean, spread = self._exponent(values)
        return values * (mean + spread * unit).abs_().mul_(-self._log_time(time_s)).exp_()

    def std(self, values: Tensor, time_s: float) -> Tensor:
        """That of exp(-L |m + s z|), whose mean is e^(L^2 s^2 / 2) (e^-Lm P(z < m/s - Ls) + e^Lm P(z < -m/s - Ls))."""
        mean, spread = self._exponent(values.double())  # the difference of two moments that are nearly the same

        def moment(log_time: float) -> Tensor:
            sides = [
                (sign * log_time * mean).exp() * ((sign * mean / spread + log_time * spread) / sqrt(2)).erfc() / 2
                for sign in (-1, 1)
            ]
            return (log_time**2 * spread.square() / 2).exp() * (sides[0] + sides[1])

        log_time = self._log_time(time_s)
        return values * (moment(2 * log_time) - moment(log_time).square()).clamp_min(0).sqrt().to(values)

    def _exponent(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of nu, before it is folded at 0."""
        relative, fit = self._relative(values), self._coefficients
        return _shape(relative, fit["nu_mean"]), _shape(relative, fit["nu_std"])

    def _log_time(self, time_s: float) -> float:
        first_s = self._coefficients["t0_s"]
        return self.strength * log((time_s + first_s) / first_s)


def pcm_read_noise_us(conductance_us: Tensor, fit: PcmFit, time_s: float) -> Tensor:
    """1/f noise of a read, a standard deviation in microsiemens, at `time_s` seconds after programming."""
    known = coefficients("pcm")[fit]
    age = log((time_s + known["t0_s"] + known["read_s"]) / (2 * known["read_s"]))
    relative = (conductance_us / known["g_max_us"]).clamp_min(_LEAST)
    return _shape(relative, known["read"]).mul_(conductance_us).mul_(sqrt(age))


def _shape(x: Tensor, fit: dict[str, Any]) -> Tensor:
    """What a fit says over conductance relative to the largest."""
    low, high = fit["bounds"]
    if "power" in fit:
        factor, exponent = fit["power"]
        return (factor * x**exponent).clamp_(low, high)
    slope, constant = fit["log"]
    below = (slope * x.log() + constant).clamp_(low, high)
    if "below" not in fit:
        return below
    return below.where(x < fit["below"], polynomial(x, fit["above"]))
