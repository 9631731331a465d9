"""The statistical model of the converters, fitted to the exact path.

It is Bussgang's decomposition of the quantiser (Bussgang 1952): a partial sum p with standard deviation s_p becomes
`g p + d`, with d zero-mean and uncorrelated with p. For Gaussian p, g and the variance of d are functions of s_p / step
alone, dead zone and clipping included. s_p follows from the token's inputs in the tile and the mean square of the
weights they meet, in steps. Real sums are not Gaussian and s_p differs between outputs, so g and d are brought to the
exact path's by one factor each per output, fitted on the calibration tokens; later slices have the gain of the first.

What the columns' ADCs of a chip instance err by is known and goes the same way. An offset o shifts the mean code by
o + sum_k (-1)^k / (pi k) exp(-2 (pi k s_p)^2) sin(2 pi k o) in steps (the mean of a rounded normal value; clipping left
out). A non-linearity of third order is a gain of each tile's sums and a remainder; gains that differ between the tiles
of an output are one gain and a further remainder, as if the tiles' sums were independent. Both remainders are in d.

d is drawn as one normal value per output and read, with the noise of reads and of the ADC's input in it: it is a sum
over tiles, cycles, slices and replicas of errors that are about uniform, of kurtosis 3 - 1.2 / n for n equal ones.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from halora.hardware.chip import Chip
from halora.hardware.converters import (
    Converters,
    Cycles,
    calibration_copies,
    drive,
    full_scale,
    noise_power,
    slice_power,
    tilewise_product,
    whole,
)
from halora.hardware.manufactured import Columns, cubic
from halora.hardware.read_noise import ReadNoise, read_noise
from halora.hardware.regions import in_tiles, widened
from halora.hardware.rounding import top_code

_TABLE_LOG2 = (-8.0, 10.0)
_HARMONICS = 3  # of the rounding's mean over the offset, beyond which sums of a quarter of a step leave nothing


@dataclass(frozen=True)
class Driven:
    """What the converters make of a batch of inputs, before the analog product.

    Attributes:
        inputs: Inputs as the product sees them, `(..., d_in)`, in their dtype.
        converter_power: Predicted variance of the converters' error, `(..., d_out)`, float32; 0 for lossless ones.
        noise_power: Variance of the noise of reads, broadcasting over `(..., d_out)`, float32; none without.
        columns: What the columns' ADCs err by; none where they are alike.
    """

    inputs: Tensor
    converter_power: Tensor
    noise_power: Tensor | None
    columns: "ColumnEffect | None" = None


@dataclass(frozen=True)
class ColumnEffect:
    """What the columns' ADCs of a chip instance do to products, each broadcasting over `(..., d_out)`, float32.

    Attributes:
        shift: Is added.
        gain: Is added to the gain.
        power: Variance of the rest.
    """

    shift: Tensor
    gain: Tensor
    power: Tensor


class _ColumnSums:
    """A `ColumnEffect` in the making, over the tiles of every cycle and slice."""

    def __init__(self, columns: Columns, chip: Chip, cycles: Cycles) -> None:
        self._columns, self._bits = columns, chip.adc.bits
        self._shift = self._signal = self._first = self._second = cycles[0][1].new_zeros(())
        self._together: Tensor | float = 1.0  # power of the cycles' sum over the sum of theirs, as they share a sign
        if len(cycles) > 1:
            apart = whole([(significance**2, driven.square()) for significance, driven in cycles])
            of_sum, of_each = (in_tiles(power, chip.tile.rows).sum(dim=-1) for power in (whole(cycles).square(), apart))
            self._together = of_sum / of_each.clamp_min(torch.finfo(torch.float32).tiny)

    def add(self, spread: Tensor, steps: Tensor, index: int) -> None:
        """Tiles of one cycle and slice.

        Args:
            spread: Standard deviation of their sums in steps, `(..., row tiles)`.
            steps: What a step counts in the product, `(row tiles, d_out)`.
            index: The slice.
        """
        if self._columns.offset is not None:
            offset = self._columns.offset[:, index]
            self._shift = self._shift + (offset.mean(dim=0) * steps).sum(dim=0)
            for k in range(1, _HARMONICS + 1):
                wave = (2 * pi * k * offset).sin().mean(dim=0) * steps
                self._shift = self._shift + (-2 * (pi * k * spread).square()).exp() @ wave * ((-1) ** k / (pi * k))
        if self._columns.inl is not None:
            largest, squares, signal = (
                self._columns.inl[:, index].mean(dim=0),
                steps.square(),
                spread.square() * self._together,
            )
            gain, rest = _looked_up(_cubic_table(self._bits), spread)
            self._signal = self._signal + signal @ squares
            self._first = self._first + (gain * signal) @ (largest * squares)
            self._second = self._second + (gain.square() * signal + rest) @ (largest.square() * squares)

    def effect(self, scale: Tensor) -> ColumnEffect:
        """What it comes to, for tokens of a scale (..., 1)."""
        gain = self._first / self._signal.clamp_min(torch.finfo(torch.float32).tiny)
        rest = (self._second - self._first * gain).clamp_min(0)
        return ColumnEffect(self._shift * scale, gain, rest * scale.square())


@dataclass(frozen=True)
class ConverterModel:
    """The statistical model of one layer's reads.

    Attributes:
        chip: Its converters, tiles and read noise.
        converters: Ranges of the converters.
        weight_power: Mean square over outputs of the weights each input meets, in steps, `(cycles, slices, d_in)`.
        noise: Read noise of the layer, if any.
        output_gain: Gain of the exact path over the Gaussian prediction, `(d_out,)`.
        error_factor: Error of the exact path over the Gaussian prediction, `(d_out,)`.
    """

    chip: Chip
    converters: Converters
    weight_power: Tensor
    noise: ReadNoise | None
    output_gain: Tensor
    error_factor: Tensor

    @torch.no_grad()
    def _through(self, x: Tensor, columns: Columns | None) -> Driven:
        """What `drive` gives, its inputs in float32."""
        chip, d_out = self.chip, len(self.output_gain)
        scale, cycles = drive(x, chip.dac, self.converters.input_range)
        noise = noise_power(scale, cycles, d_out, chip, self.converters, self.noise)
        if chip.adc.lossless:
            return Driven(whole(cycles) * scale, scale.new_zeros(()), noise)
        own_steps, shares = self.converters.steps(chip, d_out), slice_power(chip, scale) / chip.coding.replicas
        steps, sums = own_steps.square(), None if columns is None else _ColumnSums(columns, chip, cycles)
        seen, power = torch.zeros_like(cycles[0][1]), scale.new_zeros(*x.shape[:-1], d_out)
        for cycle, (significance, driven) in enumerate(cycles):
            squares = driven.square()
            for index, share in enumerate(shares.tolist()):
                met = in_tiles(squares * self.weight_power[cycle, index], chip.tile.rows).sum(dim=-1)
                spread = met.sqrt_()
                gain, error = _looked_up(_response_table(chip.adc.bits), spread)  # (..., row tiles)
                if sums is not None:
                    sums.add(spread, own_steps[cycle, index] * (significance * chip.coding.slice_ratio**-index), index)
                power += (error * (significance**2 * share)) @ steps[cycle, index]
                if index == 0:
                    of_inputs = gain.repeat_interleave(chip.tile.rows, dim=-1)[..., : x.shape[-1]]
                    seen.addcmul_(driven, of_inputs, value=significance)
        effect = None if sums is None else sums.effect(scale)
        return Driven(seen * scale, power.mul_(scale.square()), noise, effect)

    def drive(self, x: Tensor, columns: Columns | None = None) -> Driven:
        """Pass inputs `(..., d_in)` through the converters; gradients pass straight through.

        Args:
            x: The inputs.
            columns: What the columns' ADCs of the chip instance err by besides their gain, which is in its weights.
        """
        driven = self._through(x, columns)
        return replace(driven, inputs=x + (driven.inputs - x).detach().to(x.dtype))

    def read(self, product: Tensor, driven: Driven, unit: Tensor) -> Tensor:
        """The product `driven.inputs @ W.T` as it is read, with standard normal draws `unit` of its shape; float32."""
        power = driven.converter_power * self.error_factor.square()
        if driven.noise_power is not None:
            power = power + driven.noise_power
        gain, columns = self.output_gain, driven.columns
        if columns is None:
            return torch.addcmul(product * gain, unit, power.sqrt())
        return torch.addcmul(product * (gain + columns.gain), unit, (power + columns.power).sqrt()) + columns.shift


def fit_converters(x: Tensor, weight: Tensor, chip: Chip) -> ConverterModel:
    """The statistical model of a layer, its ranges, gains and error factors set on calibration tokens.

    Args:
        x: Inputs of the layer, `(N, d_in)`.
        weight: Clean weight, `(d_out, d_in)`.
        chip: Converters, tiles, read noise, and what programming makes of the weight.
    """
    x, weight = x.float(), weight.float()
    d_out, d_in = weight.shape
    copies = calibration_copies(weight, chip)
    converters = full_scale(x, weight, chip, copies)
    steps = converters.steps(chip, d_out)
    power = torch.stack(
        [
            torch.stack(
                [
                    (of_slice / widened(step.T, d_in, chip.tile.rows)).square().mean(dim=0)
                    for of_slice, step in zip(copies[0], of_cycle, strict=True)
                ]
            )
            for of_cycle in steps
        ]
    )
    ones = x.new_ones(d_out)
    unfitted = ConverterModel(chip, converters, power, read_noise(weight, chip), ones, ones)
    if chip.adc.lossless:
        return unfitted
    driven = unfitted.drive(x)
    held = torch.einsum("rsoi,s->oi", copies, slice_power(chip, x).sqrt() / chip.coding.replicas)
    tiny = torch.finfo(x.dtype).tiny
    size = F.linear(x, held).square().mean(dim=1, keepdim=True)  # so that every token counts alike
    counts = torch.where(size > 0, size.clamp_min(tiny).rsqrt(), 0.0)
    exact = tilewise_product(x, copies, chip, converters) * counts
    predicted = F.linear(driven.inputs, held) * counts
    signal = predicted.square().sum(dim=0)
    gain = torch.where(signal > 0, (exact * predicted).sum(dim=0) / signal.clamp_min(tiny), 1.0)
    error = (exact - gain * predicted).square().mean(dim=0)
    expected = (driven.converter_power * counts.square()).mean(dim=0)
    factor = torch.where(expected > 0, error / expected.clamp_min(tiny), 1.0).sqrt()
    return replace(unfitted, output_gain=gain, error_factor=factor)


def _looked_up(table: tuple[Tensor, Tensor], spread: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and error variance (in steps squared) for Gaussian sums of standard deviation `spread` steps."""
    gains, errors = table
    low, high = _TABLE_LOG2
    place = (spread.clamp_min(2.0**low).log2() - low) / (high - low) * (len(gains) - 1)
    index = place.round().long().clamp(0, len(gains) - 1)
    return gains.to(spread)[index], errors.to(spread)[index]


@cache
def _response_table(bits: int) -> tuple[Tensor, Tensor]:
    """Bussgang gain and error variance on a logarithmic grid of spreads, from the thresholds of the quantiser."""
    spread = torch.logspace(*_TABLE_LOG2, 4096, base=2, dtype=torch.float64)[:, None]
    code = torch.arange(1, top_code(bits) + 1, dtype=torch.float64)
    threshold = (code - 0.5) / spread
    gain = (2 * torch.exp(-threshold.square() / 2) / (spread * sqrt(2 * pi))).sum(dim=1)
    power = ((2 * code - 1) * torch.erfc(threshold / sqrt(2))).sum(dim=1)
    return gain, (power - gain.square() * spread[:, 0].square()).clamp_min(0)


@cache
def _cubic_table(bits: int) -> tuple[Tensor, Tensor]:
    """Gain and variance of the rest of a non-linearity of one step at most, on the grid of `_response_table`."""
    spread = torch.logspace(*_TABLE_LOG2, 4096, base=2, dtype=torch.float64)
    draw = torch.linspace(-6, 6, 301, dtype=torch.float64)
    share = torch.exp(-draw.square() / 2)
    share /= share.sum()
    moved = cubic((spread[:, None] * draw / top_code(bits)).clamp(-1, 1))
    gain = (moved * draw) @ share / spread
    return gain, (moved.square() @ share - (gain * spread).square()).clamp_min(0)
