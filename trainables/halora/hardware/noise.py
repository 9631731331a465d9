"""What a chip instance does to a weight matrix, in physical order.

Clip, scale, slices of differential pairs, finite levels, programming error, stuck cells and ageing move conductances;
back in weights come the programming error of models in the weight domain, drift compensation and IR drop. All of this
is static until the cells are programmed again: drawn or computed once, the same for every read. Read noise is fresh
for every product and given by its variance. The frozen weight is never written; the functions return a new tensor.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from math import exp, inf, isinf, log10, pi, sqrt

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey
from halora.hardware.cells import (
    clip_limit,
    clipped,
    target_conductance,
    weight_scale,
    white_read_variance,
    with_faults,
)
from halora.hardware.chip import Chip
from halora.hardware.draws import normal_rows, standard_normal
from halora.hardware.fill import layer_fill
from halora.hardware.noise_models import NoiseModel, WeightNoise

_BLOCK = 2**19  # weights worked on at a time, about, so that memory stays that of the result


def programmed_weight(weight: Tensor, chip: Chip, key: NoiseKey, level: float) -> Tensor:
    """The weight as one chip instance holds it, see `Programming`; in `weight`'s dtype.

    Args:
        weight: Frozen weight `(d_out, d_in)`, left unchanged.
        chip: Everything that moves it.
        key: Address of the chip instance at this module.
        level: Strength of the chip's noise model, as the noise schedule sets it (`chip.noise.level`: the chip's own).
    """
    return Programming.of(weight, chip, level).held(weight, key)


@dataclass(frozen=True)
class Programming:
    """How one weight matrix is programmed, before anything is drawn: the same for all instances of a chip.

    Attributes:
        chip: Everything that moves the weight.
        noise: The chip's noise model at the strength asked for.
        limit: Where the weight is clipped, see `clip_limit`.
        scale: See `weight_scale`; none where nothing happens to single cells.
        spread: Standard deviation of what is added to weights, broadcasting over (d_out, d_in); none for nothing.
        row_gain: See `ir_drop_gain`; none without wires.
    """

    chip: Chip
    noise: NoiseModel
    limit: Tensor | None
    scale: Tensor | None
    spread: Tensor | None
    row_gain: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, chip: Chip, level: float) -> "Programming":
        """The programming of a weight (d_out, d_in) at a level of the chip's noise model."""
        noise = chip.noise.with_level(level)
        limit = clip_limit(weight, chip.coding)
        whole = weight if limit is None else clipped(weight, limit)
        return cls(
            chip,
            noise,
            limit,
            scale=weight_scale(whole, chip.coding) if cells_act(chip, noise) else None,
            spread=_added_spread(whole, chip, noise),
            row_gain=ir_drop_gain(weight, chip) if chip.wires.resistance_ohm > 0 else None,
        )

    @property
    def is_small(self) -> bool:
        """Whether it is worth keeping: the spread of `block_max` noise takes as much memory as the weight."""
        return self.spread is None or self.spread.ndim < 2 or self.spread.shape[1] == 1

    @property
    def only_adds(self) -> bool:
        """Whether the weights get an error added and nothing else happens to them."""
        return self.spread is not None and all(part is None for part in (self.limit, self.scale, self.row_gain))

    def held(
        self, weight: Tensor, key: NoiseKey, dtype: torch.dtype | None = None, into: Tensor | None = None
    ) -> Tensor:
        """The weight as one chip instance holds it at the end of its refresh interval and reads it.

        Args:
            weight: The weight this was made of.
            key: Address of the chip instance at this module.
            dtype: Of the result; the weight's when left out.
            into: An earlier result whose memory is free.

        Returns:
            A new tensor; `weight` itself, in `dtype`, when nothing moves it.
        """
        dtype, chip = dtype or weight.dtype, self.chip
        if all(part is None for part in (self.limit, self.scale, self.spread, self.row_gain)):
            return weight.to(dtype)
        compensation = chip.retention.compensation
        held = into
        if held is None or compensation == "global":
            held = torch.empty_like(weight, dtype=torch.float32 if compensation == "global" else dtype)
        units = normal_rows(_address(key, self.noise), held, block_rows(weight))
        if self.only_adds and self.spread is not None:
            for rows in _row_blocks(weight):
                unit, signs = next(units)
                torch.addcmul(weight[rows], unit, (_at(self.spread, rows) * signs).to(unit.dtype), out=held[rows])
            return held.to(dtype)
        before = after = torch.zeros((), device=weight.device)
        for rows in _row_blocks(weight):
            block = held[rows] if held.dtype == torch.float32 else None
            fresh = aged = _clipped_rows(weight, self.limit, rows)
            if self.scale is not None:
                at_rows = key.part(f"rows {rows.start}")
                fresh, aged = _through_cells(fresh, _at(self.scale, rows), chip, self.noise, at_rows)
            ages = aged is not fresh
            if self.spread is not None:
                unit, signs = next(units)
                deviation = _at(self.spread, rows) * signs
                fresh = torch.addcmul(fresh, unit, deviation) if ages else aged
                aged = torch.addcmul(aged, unit, deviation, out=block)
            if ages and compensation == "column":
                aged = aged * _gain(fresh.abs().mean(dim=1, keepdim=True), aged.abs().mean(dim=1, keepdim=True))
            if ages and compensation == "global":
                before, after = before + fresh.abs().sum(), after + aged.abs().sum()
            if self.row_gain is not None:
                aged = torch.mul(aged, self.row_gain, out=block)
            if aged is not block:
                held[rows] = aged
        if after > 0:
            held.mul_(_gain(before, after))
        return held.to(dtype)


def block_rows(weight: Tensor) -> int:
    """Outputs of (d_out, d_in) worked on at a time; part of the address of the cells' draws."""
    return max(_BLOCK // weight.shape[1], 1)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    rows = block_rows(weight)
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def _at(values: Tensor, rows: slice) -> Tensor:
    """The rows of what broadcasts over the weight."""
    return values if values.ndim == 0 else values[rows]


def _clipped_rows(weight: Tensor, limit: Tensor | None, rows: slice) -> Tensor:
    return clipped(weight[rows], None if limit is None else _at(limit, rows))


def _added_spread(weight: Tensor, chip: Chip, noise: NoiseModel) -> Tensor | None:
    """Standard deviation of the error that is added to weights, broadcasting over (d_out, d_in); none without one."""
    if noise.level == 0 or not isinstance(noise, WeightNoise):
        return None
    return noise.std(weight, chip.retention.refresh_interval_s) * weight_error_factor(chip)


def _gain(before: Tensor, after: Tensor) -> Tensor:
    """Digital gain that brings the mean |W| back to that right after programming."""
    return before / after.clamp_min(torch.finfo(after.dtype).tiny)


def cells_act(chip: Chip, noise: NoiseModel) -> bool:
    """Whether anything happens to single cells, so that conductances have to be computed."""
    return cells_err(chip, noise) or chip.cells.levels is not None or chip.faults.occur


def cells_err(chip: Chip, noise: NoiseModel) -> bool:
    """Whether a model moves single cells: the programming error, or the chip's ageing."""
    ageing = chip.retention.ageing
    return (noise.domain == "conductance" and noise.level > 0) or (ageing is not None and ageing.level > 0)


@dataclass(frozen=True)
class CellArray:
    """The cells of one side of one slice of one replica.

    Attributes:
        share: What one microsiemens adds to weight over scale; negative on the negative side of the pairs.
        fresh: Conductances right after programming, `(d_out, d_in)`, in microsiemens.
        aged: At the end of the refresh interval; the same tensor when nothing ages.
        name: Tells this array from the others of the layer.
    """

    share: float
    fresh: Tensor
    aged: Tensor
    name: str


def cell_arrays(stored: Tensor, chip: Chip, noise: NoiseModel | None, key: NoiseKey | None) -> Iterator[CellArray]:
    """All cell arrays of a layer, made one at a time.

    Args:
        stored: Weights over scale, `(d_out, d_in)` in [-1, 1]; left unchanged.
        chip: Coding, cells, faults and retention.
        noise: Programming error.
        key: Address of the chip instance; without one the cells are as wanted: no error, no fault, no ageing.
    """
    coding, span = chip.coding, chip.cells.g_max_us - chip.cells.g_min_us
    for replica in range(coding.replicas):
        left = stored
        for index in range(coding.slices):
            share = coding.slice_ratio**-index / (span * coding.replicas)
            wanted, held = left.clamp(-1, 1), torch.zeros_like(stored)
            for sign in (1, -1):
                name = f"replica {replica}, slice {index}, side {sign}"
                target = target_conductance(wanted, sign, chip.cells)
                fresh = aged = target
                if noise is not None and key is not None:
                    fresh, aged = _programmed(target, chip, noise, key.part(name))
                held.add_(fresh, alpha=sign / span)
                yield CellArray(sign * share, fresh, aged, name)
            left = (left - held).mul_(coding.slice_ratio)


def _programmed(target: Tensor, chip: Chip, noise: NoiseModel, key: NoiseKey) -> tuple[Tensor, Tensor]:
    """Conductances right after programming and at the end of the refresh interval, (d_out, d_in) in microsiemens."""
    faults, ageing, time_s = chip.faults, chip.retention.ageing, chip.retention.refresh_interval_s
    uniform = None
    if faults.occur:
        draws = key.part("faults").lasting().uniform(tuple(target.shape))
        uniform = torch.from_numpy(draws).to(target.device)
    fresh = later = target
    if noise.domain == "conductance" and noise.level > 0:
        unit = _unit(key, noise, target).mul_(write_verify_ratio(chip))
        first_s = time_s if noise.first_s is None else min(noise.first_s, time_s)
        fresh = later = noise.apply(target, unit, first_s)
        if first_s < time_s:
            later = with_faults(noise.apply(target, unit, time_s), faults, uniform)
    fresh = with_faults(fresh, faults, uniform)
    if ageing is not None and ageing.level > 0:
        unit = _unit(key.part("ageing"), ageing, target)
        later = with_faults(ageing.apply(later, unit, time_s), faults, uniform)
    return fresh, later


def _address(key: NoiseKey, model: NoiseModel) -> NoiseKey:
    """The address of draws that last as long as the model says."""
    return key.lasting() if model.lifetime == "chip" else key


def _unit(key: NoiseKey, model: NoiseModel, like: Tensor) -> Tensor:
    return standard_normal(_address(key, model), like)


def _through_cells(coded: Tensor, scale: Tensor, chip: Chip, noise: NoiseModel, key: NoiseKey) -> tuple[Tensor, Tensor]:
    """Weights that the cells hold after programming and at the end; the same tensor when nothing ages."""
    fresh = torch.zeros_like(coded)
    aged: Tensor | None = None
    for array in cell_arrays(coded / scale, chip, noise, key):
        if array.aged is not array.fresh and aged is None:
            aged = torch.zeros_like(coded)
        fresh.add_(array.fresh, alpha=array.share)
        if aged is not None:
            aged.add_(array.aged, alpha=array.share)
    fresh.mul_(scale)
    return fresh, fresh if aged is None else aged.mul_(scale)


@cache
def write_verify_factor(pulses: float) -> float:
    """Standard deviation of the programming error over that of a single pulse, for a mean number of pulses per cell.

    Each pulse is an independent try x ~ N(0, 1) that is kept once |x| < a. The number of tries is geometric with mean
    n = 1 / P(|x| < a), which sets a; what is kept is a truncated normal of variance 1 - 2 a phi(a) / P(|x| < a).
    """
    window = sqrt(2) * float(torch.erfinv(torch.tensor(1 / pulses, dtype=torch.float64)))
    if isinf(window):
        return 1.0
    return sqrt(1 - 2 * window * exp(-(window**2) / 2) / sqrt(2 * pi) * pulses)


def write_verify_ratio(chip: Chip) -> float:
    """Programming error at the chip's pulses over what its noise model states, which is for the reference pulses."""
    effort = chip.write_verify
    return write_verify_factor(effort.pulses) / write_verify_factor(effort.reference_pulses)


def weight_error_factor(chip: Chip) -> float:
    """Error of a weight over what a noise model of the weight domain states for one pair of cells.

    Write-verify narrows it, later slices make up for the errors of those before, and replicas are averaged.
    """
    coding = chip.coding
    return write_verify_ratio(chip) * coding.slice_ratio ** (1 - coding.slices) / sqrt(coding.replicas)


def ir_drop_gain(weight: Tensor, chip: Chip) -> Tensor:
    """Relative signal of each input row of a weight (d_out, d_in) after the voltage lost along its tile column, mean 1.

    First order, for equal cells: the current of all cells flows through the shared wire, so the cell k segments from
    the converter loses r G (k R - k^2 / 2) of its read voltage. The mean loss is taken out by the digital scale.

    Returns:
        `(d_in,)`, float32; ones without wires.
    """
    rows, inputs = chip.tile.rows, weight.shape[1]
    if chip.wires.resistance_ohm == 0:
        return torch.ones(inputs, device=weight.device)
    mean_s = chip.cells.mean_us(layer_fill(weight, chip)) * 1e-6
    position = torch.arange(inputs, dtype=torch.float32, device=weight.device) % rows + 1
    loss = chip.wires.resistance_ohm * mean_s * (position * rows - position.square() / 2)
    gain = 1 / (1 + loss)
    return gain / gain.mean()


def read_noise_power(weight: Tensor, chip: Chip) -> Tensor:
    """Mean over the outputs of the variance that read noise gives the effective weight in one product.

    White and thermal noise fall with the reads averaged, 1/f noise does not; cells of a pair, slices and replicas are
    independent. Cells are taken where programming aims them.

    Args:
        weight: `(d_out, d_in)`.
        chip: Read noise, cells and coding.

    Returns:
        `(d_in,)`, in squared weight units; the variance of an output is the sum over inputs of x^2 times it.
    """
    read = chip.read
    power = torch.zeros(weight.shape[1], device=weight.device)
    if not read.noisy:
        return power
    limit = clip_limit(weight, chip.coding)
    scale = weight_scale(weight if limit is None else clipped(weight, limit), chip.coding)
    for rows in _row_blocks(weight):
        block_scale = _at(scale, rows)
        for array in cell_arrays(_clipped_rows(weight, limit, rows) / block_scale, chip, None, None):
            variance = white_read_variance(array.aged, chip.cells, read.white_us, read.thermal).div_(read.averaged)
            variance.add_((read.flicker * array.aged).square_())
            power.add_(variance.mul_((array.share * block_scale).square()).sum(dim=0))
    return power.div_(weight.shape[0]).mul_(ir_drop_gain(weight, chip).to(power).square_())


def sampled_read_error(weight: Tensor, chip: Chip, key: NoiseKey) -> Tensor:
    """Error of the effective weight in one product, drawn cell by cell and read by read: what the variance stands for.

    Args:
        weight: `(d_out, d_in)`.
        chip: Read noise, cells and coding.
        key: Address of the product; its K reads are draws of their own.

    Returns:
        `(d_out, d_in)`, in weight units.
    """
    values, read = clipped(weight, clip_limit(weight, chip.coding)), chip.read
    scale = weight_scale(values, chip.coding)
    total = torch.zeros_like(values)
    for array in cell_arrays(values / scale, chip, None, None):
        white = white_read_variance(array.aged, chip.cells, read.white_us, read.thermal).sqrt_()
        slow = torch.from_numpy(key.part(f"{array.name}, 1/f").standard_normal(tuple(white.shape))).to(white)
        total.add_(slow.mul_(array.aged), alpha=array.share * read.flicker)
        for index in range(read.averaged):
            unit = torch.from_numpy(key.part(array.name, draw=index).standard_normal(tuple(white.shape))).to(white)
            total.add_(unit.mul_(white), alpha=array.share / read.averaged)
    return total.mul_(scale) * ir_drop_gain(weight, chip).to(total)


def noise_to_signal_db(weight: Tensor, programmed: Tensor) -> float:
    """Power of the weight error over the power of the weight, 10 log10(|W* - W|^2 / |W|^2); -inf without error."""
    error = (programmed.float() - weight.float()).square().sum()
    return float(10 * torch.log10(error / weight.float().square().sum()))


def mean_db(ratios_db: Collection[float]) -> float:
    """Mean of noise-to-signal power ratios, in dB; -inf without error or without ratios."""
    power = sum(10 ** (ratio / 10) for ratio in ratios_db) / max(len(ratios_db), 1)
    return 10 * log10(power) if power > 0 else -inf
