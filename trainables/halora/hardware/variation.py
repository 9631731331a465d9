"""What differs from chip to chip besides the draws of cells, and the temperature a chip works at: as a chip states it.

Drawn, it is in `halora.hardware.manufactured`. All of it is off unless a chip says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from halora.strict_model import StrictModel

if TYPE_CHECKING:
    from halora.hardware.chip import Chip

PROGRAMMED_K = 300.0
"""Temperature at which cells are programmed and noise models hold, in kelvin."""


class Variation(StrictModel):
    """Spreads of what is drawn once per chip instance. A model that takes several dies has dies that are alike."""

    strength: float = Field(default=0.0, ge=0, le=2)
    """Spread of the programming error's strength from chip to chip: standard deviation of its logarithm, median 1."""
    conductance: float = Field(default=0.0, ge=0, le=0.5)
    """Spread of the mean conductance from chip to chip: standard deviation of its logarithm, median 1."""
    gradient: float = Field(default=0.0, ge=0, le=0.2)
    """Gradient over an array: relative change of conductance from the middle of a tile to its edge, along its rows and
    along its columns, a standard deviation over tiles. Slices and replicas of a tile lie side by side and share it."""
    adc_gain: float = Field(default=0.0, ge=0, le=0.5)
    """Relative gain error of a column's ADC, a standard deviation over columns."""
    adc_offset_steps: float = Field(default=0.0, ge=0, le=64)
    """Offset of a column's ADC in its steps, a standard deviation over columns."""
    adc_inl_steps: float = Field(default=0.0, ge=0, le=64)
    """Largest integral non-linearity of a column's ADC in its steps, third order, a standard deviation over columns."""


class Temperature(StrictModel):
    """The temperature of a chip at work. Conductances between the two ends of their range change in proportion."""

    kelvin: float = Field(default=PROGRAMMED_K, ge=200, le=450)
    """Temperature of all reads; cells are programmed at 300 K. Thermal noise goes with it."""
    low_per_k: float = Field(default=0.0, ge=-0.05, le=0.05)
    """Relative change of the lowest conductance used per kelvin above 300."""
    high_per_k: float = Field(default=0.0, ge=-0.05, le=0.05)
    """Relative change of the largest conductance used per kelvin above 300."""

    def of_range(self, g_min_us: float, g_max_us: float) -> tuple[float, float]:
        """The ends of a range of conductances at this temperature, in microsiemens."""
        warmer = self.kelvin - PROGRAMMED_K
        return g_min_us * (1 + self.low_per_k * warmer), g_max_us * (1 + self.high_per_k * warmer)

    def gain(self, g_min_us: float, g_max_us: float) -> float:
        """What a pair of cells is read as at this temperature over what it was programmed as."""
        low_us, high_us = self.of_range(g_min_us, g_max_us)
        return (high_us - low_us) / (g_max_us - g_min_us)

    def problems(self, g_min_us: float, g_max_us: float) -> list[str]:
        """Why no cell can conduct so; empty when one can."""
        low_us, high_us = self.of_range(g_min_us, g_max_us)
        if 0 <= low_us < high_us:
            return []
        return [
            f"temperature: at {self.kelvin:g} K cells would conduct {low_us:g} to {high_us:g} uS; change kelvin, "
            "low_per_k or high_per_k"
        ]


def differences(chip: Chip) -> list[str]:
    """What differs between the instances of a chip besides their cells and reads, a few words each."""
    variation, adc = chip.variation, chip.adc
    converts = not adc.lossless
    trimmed = f", trimmed by {adc.calibration_reads} reads" if adc.calibration_reads else ""
    said = {
        f"strength of the noise (spread {variation.strength:g})": variation.strength and chip.noise.level,
        f"mean conductance (spread {variation.conductance:g})": variation.conductance,
        f"gradient over a tile ({variation.gradient:g})": variation.gradient,
        f"ADC gain of a column ({variation.adc_gain:g}{trimmed})": converts and variation.adc_gain,
        f"ADC offset of a column ({variation.adc_offset_steps:g} steps{trimmed})": (
            converts and variation.adc_offset_steps
        ),
        f"ADC INL of a column ({variation.adc_inl_steps:g} steps)": converts and variation.adc_inl_steps,
        f"clusters of stuck cells ({chip.faults.clustering:g})": chip.faults.occur and chip.faults.clustering,
    }
    return [words for words, acts in said.items() if acts]
