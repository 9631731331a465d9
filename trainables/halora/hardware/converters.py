"""DAC and tile-wise ADC quantisation, every conversion carried out.

A weight matrix is cut into tiles of `rows` inputs and `columns` outputs, each slice of each replica into tiles of its
own. Inputs are scaled digitally, rounded to the DAC's resolution and driven in one or more cycles of a few magnitude
bits each (sign by polarity). In every cycle the partial sum of every column of a tile is converted by a b-bit ADC; the
codes are added digitally, with the significance of cycle and slice and the scale of the weights. All of it is float32,
whatever the model's dtype.

A tile's ADC has a full scale of its own for each cycle and slice, that of least squared error on calibration tokens,
clipping included. With one for all cycles the low-order digits, which are large everywhere, would set the step of the
high-order ones, which are mostly zero and count most (docs/decisions/010).

Noise of reads and of the ADC's input is added after the conversions, as one normal draw per output. What the ADCs of a
chip instance's columns err by is in every conversion (`halora.hardware.manufactured`); ranges are set without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cells import mapped
from halora.hardware.chip import Chip, Dac, Retention
from halora.hardware.manufactured import Columns
from halora.hardware.noise import Programming
from halora.hardware.read_noise import ReadNoise, read_noise
from halora.hardware.regions import in_tiles, widened
from halora.hardware.rounding import top_code
from halora.hardware.variation import Temperature, Variation

_SMALLER, _LARGER = (
    (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08),
    (1.2, 1.4, 1.7, 2.0, 2.8),
)  # ranges tried, of the largest sum
_TOKENS = 128  # converted at a time, so that a tile's sums stay in the cache
_INPUT_FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25)
_CALIBRATION = NoiseKey(role=Role.TRAIN, chip_seed=0, purpose="calibration")

Cycles = list[tuple[float, Tensor]]
"""Significance of a read cycle and its row inputs in [-1, 1], `(..., d_in)`; least significant first."""


@dataclass(frozen=True)
class Converters:
    """Ranges of one layer's converters, set on calibration tokens.

    Attributes:
        input_range: Full scale of the DAC in input units, a scalar; none where each token has its own scale.
        adc_range: Full scale of the ADCs, `(cycles, slices, row tiles, column tiles)`, in units of weight over scale
            times row input.
        scale: Digital scale of the weights, as `weight_scale` gives it.
    """

    input_range: Tensor | None
    adc_range: Tensor
    scale: Tensor

    def steps(self, chip: Chip, d_out: int) -> Tensor:
        """Step of the ADCs in weight units, `(cycles, slices, row tiles, d_out)`."""
        steps = (self.adc_range / top_code(chip.adc.bits)).repeat_interleave(chip.tile.columns, dim=-1)[..., :d_out]
        return steps * (self.scale.T if self.scale.ndim else self.scale)


def calibration_copies(weight: Tensor, chip: Chip) -> Tensor:
    """What converters are set on: slices and replicas of a weight (d_out, d_in), as `Programming.copies` has them.

    A matrix that is held once is taken as it is meant, so that its converters serve at every strength of the noise and
    every age. Slices hold what those before got wrong, and replicas differ by their errors: they are those of a chip
    instance that no adapter meets, right after programming, at the chip's own noise, alike in all else.
    """
    if chip.coding.copies == 1:
        return mapped(weight, chip.coding, chip.tile)[0][None, None]
    fresh = chip.model_copy(
        update={
            "adc": chip.adc.model_copy(update={"calibration_reads": 0}),
            "retention": Retention(refresh_interval_s=chip.noise.first_s or 1.0),
            "variation": Variation(),
            "temperature": Temperature(),
        }
    )
    return Programming.of(weight, fresh, chip.noise.level).copies(weight, _CALIBRATION)


def full_scale(x: Tensor, weight: Tensor, chip: Chip, copies: Tensor | None = None) -> Converters:
    """The ranges of a layer's converters: of fixed multiples of the largest value, those with the least squared error.

    Args:
        x: Inputs of the layer on calibration tokens, `(N, d_in)`.
        weight: Clean weight, `(d_out, d_in)`.
        chip: Converters, tiles, and what programming makes of the weight.
        copies: What `calibration_copies` gives, if it is there already.
    """
    x, weight = x.float(), weight.float()
    input_range = None
    if chip.dac.range == "calibrated" and not chip.dac.lossless:
        ranges = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny) * x.new_tensor(_INPUT_FRACTIONS)
        errors = [(_quantise(x, chip.dac.input_bits, r) - x).square().mean() for r in ranges]
        input_range = ranges[torch.stack(errors).argmin()]
    _, cycles = drive(x, chip.dac, input_range)
    _, scale = mapped(weight, chip.coding, chip.tile)
    copies = calibration_copies(weight, chip) if copies is None else copies
    stored = copies[0] / widened(scale, weight.shape[1], chip.tile.rows)
    row_tiles = in_tiles(stored, chip.tile.rows).transpose(1, 2)  # (slices, row tiles, d_out, rows)
    adc_range = []
    for _, driven in cycles:
        inputs = in_tiles(driven, chip.tile.rows).transpose(0, 1)  # (row tiles, N, rows)
        adc_range.append(torch.stack([_tile_ranges(inputs @ tiles.mT, chip) for tiles in row_tiles]))
    return Converters(input_range, torch.stack(adc_range), scale)


def _tile_ranges(sums: Tensor, chip: Chip) -> Tensor:
    """Full scale of the ADC of every tile by its sums on calibration tokens: (row tiles, N, d_out) -> (rows, columns).

    A multiple of the root mean square of the tile's own sums, the same one for a row of tiles, so that the rare sums
    of all of them tell where clipping begins (docs/decisions/010): that of least squared error, which is taken to be at
    least that of normal sums, as those of other tokens may be larger. Where all sums of a tile are zero, its full scale
    is that of one input driven fully at the largest weight.
    """
    columns, d_out, top = chip.tile.columns, sums.shape[2], top_code(chip.adc.bits)
    count = in_tiles(torch.full_like(sums[:1, 0], sums.shape[1]), columns).sum(dim=-1)
    deviation = (in_tiles(sums.square().sum(dim=1), columns).sum(dim=-1) / count).sqrt()  # (row tiles, column tiles)
    active = deviation > 0
    largest_sum = in_tiles(sums.abs().amax(dim=1), columns).amax(dim=-1)
    crest = torch.where(active, largest_sum / deviation, 0).amax(dim=-1)  # of every row of tiles
    largest = torch.where(active, deviation * crest[:, None], 1.0)
    by_output = largest.repeat_interleave(columns, dim=-1)[:, None, :d_out]
    power = sums.square().sum(dim=(1, 2))

    def error(fraction: float) -> Tensor:
        measured = _quantise(sums, chip.adc.bits, by_output * fraction).sub_(sums).square_().sum(dim=(1, 2))
        limit = crest * fraction
        return measured.maximum(power * (limit.square() / (12 * top**2) + _clipped_power(limit)))

    best = torch.ones_like(crest)
    least = error(1.0)
    going = torch.ones_like(best, dtype=torch.bool)
    for fractions in (_SMALLER, _LARGER):
        for fraction in fractions:
            if not going.any():
                break
            found = error(fraction)
            going &= found < least
            best, least = torch.where(going, fraction, best), torch.where(going, found, least)
        going = best == 1.0  # no smaller range is better
    return torch.where(active, largest * best[:, None], 1.0)


def _clipped_power(limit: Tensor) -> Tensor:
    """Mean square of what a standard normal value has beyond +-limit."""
    beyond, density = torch.erfc(limit / sqrt(2)), torch.exp(-limit.square() / 2) * sqrt(2 / pi)
    return ((1 + limit.square()) * beyond - limit * density).clamp_min(0)


def tilewise_product(
    x: Tensor, weight: Tensor, chip: Chip, converters: Converters, columns: Columns | None = None
) -> Tensor:
    """x W^T through the converters, exactly, in float32.

    Args:
        x: `(N, d_in)`.
        weight: What slices and replicas hold, `(replicas, slices, d_out, d_in)`, or `(d_out, d_in)` where there is one.
        chip: Its converters, tiles and coding.
        converters: Their ranges.
        columns: What the columns' ADCs err by besides their gain, which is in the weights; none where they are alike.
    """
    scale, cycles = drive(x, chip.dac, converters.input_range)
    return _converted(cycles, weight, chip, converters, columns).mul_(scale)


def _converted(cycles: Cycles, weight: Tensor, chip: Chip, converters: Converters, columns: Columns | None) -> Tensor:
    """The products of all cycles of driven inputs (N, d_in), converted tile by tile and added up, (N, d_out)."""
    copies = weight if weight.ndim == 4 else weight[None, None]
    replicas, slices, d_out, _ = copies.shape
    assert replicas * slices == chip.coding.copies, "the weights of all slices and replicas are converted one by one"
    shares = [chip.coding.slice_ratio**-index / replicas for index in range(slices)]
    if chip.adc.lossless:
        held = torch.einsum("rsoi,s->oi", copies.float(), torch.tensor(shares, device=copies.device))
        return F.linear(whole(cycles), held)
    rows, top = chip.tile.rows, top_code(chip.adc.bits)
    steps = converters.steps(chip, d_out)
    total = steps.new_zeros(cycles[0][1].shape[0], d_out)
    for cycle, (significance, driven) in enumerate(cycles):
        for index, share in enumerate(shares):
            of_codes = (steps[cycle, index] * (significance * share)).unbind()
            for replica, of_replica in enumerate(copies[:, index]):
                tiles = [
                    tile.T / step
                    for tile, step in zip(torch.split(of_replica, rows, 1), steps[cycle, index], strict=True)
                ]
                for tokens, sums in zip(torch.split(driven, _TOKENS), torch.split(total, _TOKENS), strict=True):
                    each = zip(torch.split(tokens, rows, 1), tiles, of_codes, strict=True)
                    for tile, (inputs, weights, of_code) in enumerate(each):
                        seen = torch.mm(inputs, weights)
                        if columns is not None:
                            columns.move(seen, (replica, index, tile), top)
                        sums.addcmul_(seen.round_().clamp_(-top, top), of_code)
    return total


@dataclass(frozen=True)
class ExactReads:
    """One layer's reads, every conversion of every tile carried out.

    Attributes:
        chip: Its converters, tiles and read noise.
        converters: Ranges of the converters.
        noise: Read noise of the layer, if any.
    """

    chip: Chip
    converters: Converters
    noise: ReadNoise | None

    @classmethod
    def calibrated(cls, x: Tensor, weight: Tensor, chip: Chip) -> "ExactReads":
        """The reads of a layer, see `full_scale`."""
        return cls(chip, full_scale(x, weight, chip), read_noise(weight, chip))

    def product(
        self, x: Tensor, weight: Tensor, unit_noise: Callable[[Tensor], Tensor], columns: Columns | None = None
    ) -> Tensor:
        """x W^T as it is read, in float32.

        Args:
            x: `(..., d_in)`.
            weight: What the chip instance holds, as `tilewise_product` takes it.
            unit_noise: Standard normal draws shaped like its argument; asked only if reads are noisy.
            columns: Those of the chip instance, see `tilewise_product`.
        """
        scale, cycles = drive(x.flatten(0, -2), self.chip.dac, self.converters.input_range)
        product = _converted(cycles, weight, self.chip, self.converters, columns).mul_(scale).view(*x.shape[:-1], -1)
        power = noise_power(scale, cycles, weight.shape[-2], self.chip, self.converters, self.noise)
        if power is None:
            return product
        return product.addcmul_(unit_noise(product), power.sqrt_().view(*x.shape[:-1], -1))


def noise_power(
    scale: Tensor, cycles: Cycles, d_out: int, chip: Chip, converters: Converters, noise: ReadNoise | None
) -> Tensor | None:
    """Variance of a product from read to read, `(..., d_out)` or `(..., 1)`: its cells' and the ADCs'; none without.

    What is drawn anew in every conversion is averaged by cycles and slices, by their significance, reads and replicas.
    """
    parts: list[Tensor] = []
    if noise is not None:
        fresh = whole([(significance**2, driven.square()) for significance, driven in cycles])
        parts.append(noise.fresh.of_product(fresh))
        if noise.lasting is not None:
            parts.append(noise.lasting.of_product(whole(cycles).square()))
    if chip.adc.noise_steps and not chip.adc.lossless:
        steps = converters.steps(chip, d_out).square()
        of_cycles = steps.new_tensor([significance**2 for significance, _ in cycles])
        conversions = torch.einsum("cstd,c,s->d", steps, of_cycles, slice_power(chip, steps))
        averaged = chip.read.averaged * chip.coding.replicas
        parts.append(conversions.mul_(chip.adc.noise_steps**2 / averaged))
    if not parts:
        return None
    return sum(parts[1:], parts[0]) * scale.square()


def slice_power(chip: Chip, like: Tensor) -> Tensor:
    """Power that an error of each slice has in the product, `(slices,)`."""
    return like.new_tensor([chip.coding.slice_ratio ** (-2 * index) for index in range(chip.coding.slices)])


def reads_are_exact(chip: Chip) -> bool:
    """Whether reading this chip adds nothing to the product of its programmed weights."""
    noisy = chip.read.noisy or bool(chip.adc.noise_steps and not chip.adc.lossless)
    return chip.adc.lossless and chip.dac.lossless and not noisy


def drive(x: Tensor, dac: Dac, input_range: Tensor | None) -> tuple[Tensor, Cycles]:
    """Scale (..., 1) of inputs (..., d_in), and per read cycle its significance and the row inputs; float32."""
    x = x.float()
    tiny = torch.finfo(x.dtype).tiny
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(tiny) if input_range is None else input_range
    scale = scale.expand(*x.shape[:-1], 1)
    if dac.lossless:
        return scale, [(1.0, x / scale)]
    top = top_code(dac.input_bits)
    codes = (x / scale).mul_(top).round_().clamp_(-top, top)
    if dac.cycles == 1:
        return scale, [(1.0, codes.div_(top))]
    base = 2**dac.bits
    left, sign, cycles = codes.abs(), codes.sign(), []
    for cycle in range(dac.cycles):
        digit = left.remainder(base)
        left = (left - digit) / base
        cycles.append((base**cycle * (base - 1) / top, sign * digit / (base - 1)))
    return scale, cycles


def whole(cycles: Cycles) -> Tensor:
    """The inputs that the cycles add up to."""
    (significance, driven), *others = cycles
    total = driven * significance
    for significance, driven in others:
        total.add_(driven, alpha=significance)
    return total


def _quantise(values: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Mid-tread converter with symmetric codes over +-scale, which broadcasts over the values."""
    top = top_code(bits)
    step = scale / top
    return (values / step).round_().clamp_(-top, top).mul_(step)
