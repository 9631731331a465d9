"""DAC and tile-wise ADC quantisation: the exact path, and the statistical model fitted to it.

A matrix product of d inputs is cut into tiles of `rows` inputs. Inputs are scaled digitally, rounded to the DAC's
resolution and driven in one or more cycles of a few magnitude bits each (sign by polarity). In every cycle each tile's
partial sum is converted by a b-bit ADC; the codes are added digitally. The ADC's full scale is fixed per tile: the one
with the least squared error on calibration tokens, clipping included.

The statistical model is Bussgang's decomposition of that quantiser (Bussgang 1952): a partial sum p with standard
deviation s_p becomes `g p + d`, with d zero-mean and uncorrelated with p. For Gaussian p, g and the variance of d are
functions of s_p / step alone, dead zone and clipping included. s_p follows from the token's inputs in the tile and the
mean square of the weights they meet. Real sums are not Gaussian and s_p differs between outputs, so g and d are brought
to the exact path's by one factor each per output, fitted on the calibration tokens. The model costs a scaling of the
inputs per token and tile (by g) and one draw per output; d lasts one read and is addressed by example and position. The
noise of reads and of the ADC's input is added to the same draw.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from halora.hardware.chip import Chip, Dac
from halora.hardware.noise import read_noise_power
from halora.hardware.noise_models import largest_magnitude

_TABLE_LOG2 = (-8.0, 10.0)
_RANGE_FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
_TOKENS = 128  # converted at a time, so that a tile's sums stay in the cache
_INPUT_FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25)


_Cycles = list[tuple[float, Tensor]]
"""Significance of a read cycle and its row inputs in [-1, 1], `(..., d_in)`."""


@dataclass(frozen=True)
class Converters:
    """Ranges of one layer's converters, set on calibration tokens.

    Attributes:
        input_range: Full scale of the DAC in input units, a scalar; none where each token has its own scale.
        adc_range: Full scale of the ADC of every tile, `(tiles,)`, in units of weight times scaled input.
    """

    input_range: Tensor | None
    adc_range: Tensor


def full_scale(x: Tensor, weight: Tensor, chip: Chip) -> Converters:
    """The ranges of a layer's converters: of fixed fractions of the largest value, those with the least squared error.

    Args:
        x: Inputs of the layer on calibration tokens, `(N, d_in)`.
        weight: Clean weight, `(d_out, d_in)`.
        chip: DAC, ADC and tile height.
    """
    input_range = None
    if chip.dac.range == "calibrated" and not chip.dac.lossless:
        ranges = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny) * x.new_tensor(_INPUT_FRACTIONS)
        errors = [(_quantise(x, chip.dac.input_bits, r) - x).square().mean() for r in ranges]
        input_range = ranges[torch.stack(errors).argmin()]
    _, cycles = _drive(x, chip.dac, input_range)
    inputs = torch.cat([driven for _, driven in cycles])
    tiles = zip(torch.split(inputs, chip.tile.rows, 1), torch.split(weight, chip.tile.rows, 1), strict=True)
    return Converters(input_range, torch.stack([_tile_range(F.linear(i, w), chip.adc.bits) for i, w in tiles]))


def _tile_range(sums: Tensor, bits: int) -> Tensor:
    """Full scale of the ADC for a tile's sums on calibration tokens, a scalar."""
    largest = largest_magnitude(sums).clamp_min(torch.finfo(sums.dtype).tiny)
    ranges = largest * largest.new_tensor(_RANGE_FRACTIONS)
    errors = torch.stack([_quantise(sums, bits, limit).sub_(sums).norm() for limit in ranges])
    return ranges[errors.argmin()]


def tilewise_product(x: Tensor, weight: Tensor, chip: Chip, converters: Converters) -> Tensor:
    """x W^T through the converters, exactly: x (N, d_in), weight (d_out, d_in) -> (N, d_out)."""
    scale, cycles = _drive(x, chip.dac, converters.input_range)
    return _converted(cycles, weight, chip, converters) * scale


def _converted(cycles: _Cycles, weight: Tensor, chip: Chip, converters: Converters) -> Tensor:
    """The products of all cycles of driven inputs (N, d_in), converted tile by tile and added up, (N, d_out)."""
    if chip.adc.lossless:
        return F.linear(_sum(cycles), weight)
    rows, top = chip.tile.rows, _top_code(chip.adc.bits)
    steps = (converters.adc_range / top).unbind()
    tiles = [tile.T.contiguous() for tile in torch.split(weight, rows, 1)]
    total = weight.new_zeros(cycles[0][1].shape[0], weight.shape[0])
    for significance, driven in cycles:
        for tokens, sums in zip(torch.split(driven, _TOKENS), torch.split(total, _TOKENS), strict=True):
            for inputs, weights, step in zip(torch.split(tokens, rows, 1), tiles, steps, strict=True):
                codes = torch.mm(inputs / step, weights).round_().clamp_(-top, top)
                sums.addcmul_(codes, significance * step)
    return total


@dataclass(frozen=True)
class ExactReads:
    """One layer's reads, every conversion of every tile carried out.

    Attributes:
        chip: Its converters, tile height and read noise.
        converters: Ranges of the converters.
        read_power: Mean variance over outputs of the weights each input meets, from read to read, `(d_in,)`.
    """

    chip: Chip
    converters: Converters
    read_power: Tensor

    def product(self, x: Tensor, weight: Tensor, unit_noise: Callable[[Tensor], Tensor]) -> Tensor:
        """x W^T as it is read.

        Args:
            x: `(..., d_in)`.
            weight: Programmed weight, `(d_out, d_in)`.
            unit_noise: Zero-mean unit-variance draws shaped like its argument; asked only if reads are noisy.
        """
        scale, cycles = _drive(x.flatten(0, -2), self.chip.dac, self.converters.input_range)
        product = (_converted(cycles, weight, self.chip, self.converters) * scale).reshape(*x.shape[:-1], -1)
        if not _noisy(self.chip):
            return product
        power = _read_variance(x.flatten(0, -2), self.read_power, scale, cycles, self.chip, self.converters)
        return torch.addcmul(product, unit_noise(product), power.sqrt().reshape(*x.shape[:-1], 1))


@dataclass(frozen=True)
class Driven:
    """What the converters make of a batch of inputs, before the analog product.

    Attributes:
        inputs: Inputs as the product sees them, `(..., d_in)`.
        converter_power: Predicted variance of the error of one slice's converters per token, `(..., 1)`.
        noise_power: Variance of the noise of reads per token, `(..., 1)`.
    """

    inputs: Tensor
    converter_power: Tensor
    noise_power: Tensor


@dataclass(frozen=True)
class ConverterModel:
    """The statistical model of one layer's reads.

    Attributes:
        chip: Its converters, tile height and read noise.
        converters: Ranges of the converters.
        weight_power: Mean square over outputs of the weights each input meets, `(d_in,)`.
        read_power: Mean variance over outputs of those weights from read to read, `(d_in,)`.
        output_gain: Gain of the exact path over the Gaussian prediction, `(d_out,)`.
        error_factor: Error of the exact path over the Gaussian prediction, `(d_out,)`.
    """

    chip: Chip
    converters: Converters
    weight_power: Tensor
    read_power: Tensor
    output_gain: Tensor
    error_factor: Tensor

    def drive(self, x: Tensor) -> Driven:
        """Pass inputs `(..., d_in)` through the converters; gradients pass straight through."""
        with torch.no_grad():
            scale, cycles = _drive(x, self.chip.dac, self.converters.input_range)
            seen, power = torch.zeros_like(x), torch.zeros_like(scale)
            for significance, driven in cycles:
                gain, error_power = self._convert(driven)
                seen += significance * gain * driven
                power += significance**2 * error_power
            noise_power = _read_variance(x, self.read_power, scale, cycles, self.chip, self.converters)
        return Driven(x + (seen * scale - x).detach(), power * scale.square(), noise_power)

    def read(self, product: Tensor, driven: Driven, unit: Tensor) -> Tensor:
        """The product `driven.inputs @ W.T` as it is read, with zero-mean unit-variance draws `unit` of its shape."""
        factor = _slice_factor(self.chip) * self.error_factor.square()
        power = driven.converter_power * factor + driven.noise_power
        return torch.addcmul(product * self.output_gain, unit, power.sqrt())

    def _convert(self, driven: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Gain per input, and variance of the quantisation error per token, for one slice."""
        adc, rows = self.chip.adc, self.chip.tile.rows
        if adc.lossless:
            return 1.0, 0.0
        step = self.converters.adc_range / _top_code(adc.bits)
        spread = _in_tiles(driven.square() * self.weight_power, rows).sum(dim=-1).sqrt()  # (..., tiles)
        gain, error_power = _gaussian_response(spread / step, adc.bits)
        gain = gain.repeat_interleave(rows, dim=-1)[..., : driven.shape[-1]]
        return gain, (error_power * step.square()).sum(dim=-1, keepdim=True)


def fit_converters(x: Tensor, weight: Tensor, chip: Chip) -> ConverterModel:
    """The statistical model of a layer, its ranges, gains and error factors set on calibration tokens.

    Args:
        x: Inputs of the layer, `(N, d_in)`.
        weight: Clean weight, `(d_out, d_in)`.
        chip: Converters, tile height and read noise.
    """
    converters = full_scale(x, weight, chip)
    tiny, ones = torch.finfo(x.dtype).tiny, x.new_ones(weight.shape[0])
    unfitted = ConverterModel(chip, converters, weight.square().mean(dim=0), read_noise_power(weight, chip), ones, ones)
    if chip.adc.lossless:
        return unfitted
    driven = unfitted.drive(x)
    size = F.linear(x, weight).square().mean(dim=1, keepdim=True).clamp_min(tiny)  # so that every token counts alike
    exact = tilewise_product(x, weight, chip, converters) / size.sqrt()
    predicted = F.linear(driven.inputs, weight) / size.sqrt()
    gain = (exact * predicted).sum(dim=0) / predicted.square().sum(dim=0).clamp_min(tiny)
    error = (exact - gain * predicted).square().mean(dim=0)
    expected = (driven.converter_power / size).mean().clamp_min(tiny)
    return replace(unfitted, output_gain=gain, error_factor=(error / expected).sqrt())


def _slice_factor(chip: Chip) -> float:
    """Error power of all slices' converters over that of the first's; the ranges shrink with the significance."""
    return sum(chip.coding.slice_ratio ** (-2 * index) for index in range(chip.coding.slices))


def _read_variance(
    x: Tensor, read_power: Tensor, scale: Tensor, cycles: _Cycles, chip: Chip, converters: Converters
) -> Tensor:
    """Variance of a product of inputs x (..., d_in) from read to read, (..., 1): cells', and the ADCs' own noise."""
    variance = (x.square() * read_power).sum(dim=-1, keepdim=True)
    if chip.adc.lossless or not chip.adc.noise_steps:
        return variance
    step = converters.adc_range / _top_code(chip.adc.bits)
    in_one_cycle = _slice_factor(chip) * chip.adc.noise_steps**2 / chip.read.averaged * step.square().sum()
    return variance + sum(significance**2 for significance, _ in cycles) * in_one_cycle * scale.square()


def reads_are_exact(chip: Chip) -> bool:
    """Whether reading this chip adds nothing to the product of its programmed weights."""
    return chip.adc.lossless and chip.dac.lossless and not _noisy(chip)


def _noisy(chip: Chip) -> bool:
    """Whether a product differs from read to read."""
    return chip.read.noisy or bool(chip.adc.noise_steps and not chip.adc.lossless)


def _drive(x: Tensor, dac: Dac, input_range: Tensor | None) -> tuple[Tensor, _Cycles]:
    """Scale (..., 1), and per read cycle its significance and the row inputs in [-1, 1]; least significant first."""
    tiny = torch.finfo(x.dtype).tiny
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(tiny) if input_range is None else input_range
    scale = scale.expand(*x.shape[:-1], 1)
    if dac.lossless:
        return scale, [(1.0, x / scale)]
    top = _top_code(dac.input_bits)
    codes = (x / scale * top).round().clamp(-top, top)
    if dac.cycles == 1:
        return scale, [(1.0, codes / top)]
    base = 2**dac.bits
    left, sign, cycles = codes.abs(), codes.sign(), []
    for cycle in range(dac.cycles):
        digit = left.remainder(base)
        left = (left - digit) / base
        cycles.append((base**cycle * (base - 1) / top, sign * digit / (base - 1)))
    return scale, cycles


def _sum(cycles: _Cycles) -> Tensor:
    """The inputs that the cycles add up to."""
    total = torch.zeros_like(cycles[0][1])
    for significance, driven in cycles:
        total += significance * driven
    return total


def _in_tiles(values: Tensor, rows: int) -> Tensor:
    """Cut the last axis into tiles, the last one padded with zeros: (..., d_in) -> (..., tiles, rows)."""
    padded = F.pad(values, (0, -values.shape[-1] % rows))
    return padded.reshape(*values.shape[:-1], -1, rows)


def _top_code(bits: int) -> int:
    """Largest code of a signed mid-tread converter with 2^bits - 1 codes; one bit tells the sign alone."""
    return max((1 << (bits - 1)) - 1, 1)


def _quantise(values: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Mid-tread converter with symmetric codes over +-scale."""
    top = _top_code(bits)
    step: Tensor = scale / top
    return (values / step).round_().clamp_(-top, top).mul_(step)


def _gaussian_response(spread: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gain and error variance (in steps squared) of the ADC for Gaussian sums of standard deviation `spread` steps."""
    gains, errors = _response_table(bits)
    low, high = _TABLE_LOG2
    place = (spread.clamp_min(2.0**low).log2() - low) / (high - low) * (len(gains) - 1)
    index = place.round().long().clamp(0, len(gains) - 1)
    return gains.to(spread)[index], errors.to(spread)[index]


@cache
def _response_table(bits: int) -> tuple[Tensor, Tensor]:
    """Bussgang gain and error variance on a logarithmic grid of spreads, from the thresholds of the quantiser."""
    spread = torch.logspace(*_TABLE_LOG2, 4096, base=2, dtype=torch.float64)[:, None]
    code = torch.arange(1, _top_code(bits) + 1, dtype=torch.float64)
    threshold = (code - 0.5) / spread
    gain = (2 * torch.exp(-threshold.square() / 2) / (spread * sqrt(2 * pi))).sum(dim=1)
    power = ((2 * code - 1) * torch.erfc(threshold / sqrt(2))).sum(dim=1)
    return gain, (power - gain.square() * spread[:, 0].square()).clamp_min(0)
