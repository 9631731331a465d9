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
from halora.hardware.cells import clip_limit, clipped, target_conductance, weight_scale, with_faults
from halora.hardware.chip import Chip
from halora.hardware.draws import normal_rows, standard_normal
from halora.hardware.fill import layer_fill
from halora.hardware.noise_models import NoiseModel, WeightNoise
from halora.hardware.regions import at_rows

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
        in_features: d_in of the weight.
        limit: Where the weight is clipped, see `clip_limit`.
        scale: See `weight_scale`; none where nothing happens to single cells.
        spread: See `added_spread`.
        row_gain: See `ir_drop_gain`; none without wires.
    """

    chip: Chip
    noise: NoiseModel
    in_features: int
    limit: Tensor | None
    scale: Tensor | None
    spread: Tensor | None
    row_gain: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, chip: Chip, level: float) -> "Programming":
        """The programming of a weight (d_out, d_in) at a level of the chip's noise model."""
        noise = chip.noise.with_level(level)
        limit = clip_limit(weight, chip.coding, chip.tile)
        whole = weight if limit is None else clipped(weight, limit, chip.tile)
        return cls(
            chip,
            noise,
            weight.shape[1],
            limit,
            scale=weight_scale(whole, chip.coding, chip.tile) if cells_act(chip, noise) else None,
            spread=added_spread(whole, chip, noise),
            row_gain=ir_drop_gain(weight, chip) if chip.wires.resistance_ohm > 0 else None,
        )

    @property
    def only_adds(self) -> bool:
        """Whether the weights get an error added and nothing else happens to them."""
        return self.spread is not None and all(part is None for part in (self.limit, self.scale, self.row_gain))

    @property
    def changes_nothing(self) -> bool:
        """Whether the weight is held as it is."""
        return all(part is None for part in (self.limit, self.scale, self.spread, self.row_gain))

    def held(
        self,
        weight: Tensor,
        key: NoiseKey,
        dtype: torch.dtype | None = None,
        into: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> Tensor:
        """The weight as one chip instance holds it at the end of its refresh interval and reads it.

        Args:
            weight: The weight this was made of.
            key: Address of the chip instance at this module.
            dtype: Of the result; the weight's when left out.
            into: An earlier result whose memory is free.
            copies: Filled with what `copies` returns, `(replicas * slices, d_out, d_in)`.

        Returns:
            A new tensor; `weight` itself, in `dtype`, when nothing moves it.
        """
        dtype, chip = dtype or weight.dtype, self.chip
        if self.changes_nothing and copies is None:
            return weight.to(dtype)
        compensation = chip.retention.compensation
        held = into
        if held is None or compensation == "global":
            held = torch.empty_like(weight, dtype=torch.float32 if compensation == "global" else dtype)
        units = normal_rows(_address(key, self.noise), held, block_rows(weight))
        if self.only_adds and self.spread is not None and copies is None:
            for rows in _row_blocks(weight):
                unit, signs = next(units)
                deviation = (self._at(self.spread, rows) * signs).to(unit.dtype)
                torch.addcmul(weight[rows], unit, deviation, out=held[rows])
            return held.to(dtype)
        before = after = torch.zeros((), device=weight.device)
        for rows in _row_blocks(weight):
            block = held[rows] if held.dtype == torch.float32 else None
            fresh = aged = clipped(weight[rows], None if self.limit is None else self._at(self.limit, rows), chip.tile)
            block_key, parts = key.part(f"rows {rows.start}"), None if copies is None else copies[:, rows]
            if parts is not None:
                parts.zero_()[:: chip.coding.slices] = fresh if self.scale is None else 0
            if self.scale is not None:
                fresh, aged = _through_cells(fresh, self._at(self.scale, rows), chip, self.noise, block_key, parts)
            ages = aged is not fresh
            if self.spread is not None:
                unit, signs = next(units)
                deviation = self._at(self.spread, rows) * signs
                fresh = torch.addcmul(fresh, unit, deviation) if ages else aged
                aged = torch.addcmul(aged, unit, deviation, out=block)
                if parts is not None:
                    _share_out(
                        parts, unit * deviation, self._at(self.spread, rows), chip, _address(block_key, self.noise)
                    )
            if ages and compensation == "column":
                gain = _gain(fresh.abs().mean(dim=1, keepdim=True), aged.abs().mean(dim=1, keepdim=True))
                aged = aged * gain
                if parts is not None:
                    parts.mul_(gain)
            if ages and compensation == "global":
                before, after = before + fresh.abs().sum(), after + aged.abs().sum()
            if self.row_gain is not None:
                aged = torch.mul(aged, self.row_gain, out=block)
                if parts is not None:
                    parts.mul_(self.row_gain)
            if aged is not block:
                held[rows] = aged
        if after > 0:
            gain = _gain(before, after)
            held.mul_(gain)
            if copies is not None:
                copies.mul_(gain)
        return held.to(dtype)

    def copies(self, weight: Tensor, key: NoiseKey) -> Tensor:
        """What the cells of each slice of each replica hold, which are converted one by one.

        Args:
            weight: The weight this was made of.
            key: Address of the chip instance at this module.

        Returns:
            `(replicas, slices, d_out, d_in)`, float32, in weight units at the significance of the first slice: the mean
            over replicas of the slices, each over `slice_ratio` to the power of its index, adds up to `held`.
        """
        coding = self.chip.coding
        if coding.copies == 1:
            return self.held(weight, key, torch.float32)[None, None]
        copies = torch.empty((coding.copies, *weight.shape), device=weight.device)
        self.held(weight, key, torch.float32, copies=copies)
        return copies.view(coding.replicas, coding.slices, *weight.shape)

    def _at(self, values: Tensor, rows: slice) -> Tensor:
        """Of what is known per region, that of some outputs, broadcasting over their weights."""
        return at_rows(values, rows, self.in_features, self.chip.tile.rows)


def block_rows(weight: Tensor) -> int:
    """Outputs of (d_out, d_in) worked on at a time; part of the address of the cells' draws."""
    return max(_BLOCK // weight.shape[1], 1)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    rows = block_rows(weight)
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def added_spread(weight: Tensor, chip: Chip, noise: NoiseModel) -> Tensor | None:
    """Standard deviation of the error that is added to weights (d_out, d_in); none without one.

    Broadcasting over the weight, or per output and row tile, `(d_out, row tiles)`.
    """
    if noise.level == 0 or not isinstance(noise, WeightNoise):
        return None
    stated = noise.std_in_tiles(weight, chip.retention.refresh_interval_s, chip.tile.rows, chip.tile.columns)
    return stated * weight_error_factor(chip)


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
        copy: Number of the slice of the replica: replica times slices, plus slice.
        weight_per_us: What one microsiemens is of weight over scale; negative on the negative side of the pairs.
        significance: What that counts for in the product of all slices and replicas.
        fresh: Conductances right after programming, `(d_out, d_in)`, in microsiemens.
        aged: At the end of the refresh interval; the same tensor when nothing ages.
        name: Tells this array from the others of the layer.
    """

    copy: int
    weight_per_us: float
    significance: float
    fresh: Tensor
    aged: Tensor
    name: str

    @property
    def share(self) -> float:
        """What one microsiemens adds to weight over scale, all slices and replicas together."""
        return self.weight_per_us * self.significance


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
            copy, significance = replica * coding.slices + index, coding.slice_ratio**-index / coding.replicas
            wanted, held = left.clamp(-1, 1), torch.zeros_like(stored)
            for sign in (1, -1):
                name = f"replica {replica}, slice {index}, side {sign}"
                target = target_conductance(wanted, sign, chip.cells)
                fresh = aged = target
                if noise is not None and key is not None:
                    fresh, aged = _programmed(target, chip, noise, key.part(name))
                held.add_(fresh, alpha=sign / span)
                yield CellArray(copy, sign / span, significance, fresh, aged, name)
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


def _through_cells(
    coded: Tensor, scale: Tensor, chip: Chip, noise: NoiseModel, key: NoiseKey, parts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights that the cells hold after programming and at the end; the same tensor when nothing ages.

    `parts`, zeros (copies, d_out, d_in), gets what each slice of each replica holds at the end.
    """
    fresh = torch.zeros_like(coded)
    aged: Tensor | None = None
    for array in cell_arrays(coded / scale, chip, noise, key):
        if array.aged is not array.fresh and aged is None:
            aged = torch.zeros_like(coded)
        fresh.add_(array.fresh, alpha=array.share)
        if aged is not None:
            aged.add_(array.aged, alpha=array.share)
        if parts is not None:
            parts[array.copy].add_(array.aged, alpha=array.weight_per_us)
    fresh.mul_(scale)
    if parts is not None:
        parts.mul_(scale)
    return fresh, fresh if aged is None else aged.mul_(scale)


def _share_out(parts: Tensor, error: Tensor, spread: Tensor, chip: Chip, key: NoiseKey) -> None:
    """Add to slices and replicas (copies, d_out, d_in) errors of their own that come to `error` together.

    Every pair of cells errs independently, and a slice holds what undoes the error of the one before. So the error of
    the whole is the mean over replicas of that of the last slice: the last slices' errors are drawn given their mean.

    Args:
        parts: What slices and replicas are to hold, changed in place.
        error: Of the whole weight, `(d_out, d_in)`.
        spread: Standard deviation it was drawn with, broadcasting over it.
        chip: Its coding.
        key: Address of the errors.
    """
    coding = chip.coding
    last = coding.slice_ratio ** (coding.slices - 1)
    of_pair = spread * last * sqrt(coding.replicas)
    errors = torch.stack([standard_normal(key.part(f"copy {copy}"), error) for copy in range(coding.copies)])
    errors = errors.mul_(of_pair).view(coding.replicas, coding.slices, *error.shape)
    errors[:, -1] += error * last - errors[:, -1].mean(dim=0)
    copies = parts.view(errors.shape)
    copies += errors
    copies[:, 1:] -= errors[:, :-1] * coding.slice_ratio


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


def noise_to_signal_db(weight: Tensor, programmed: Tensor) -> float:
    """Power of the weight error over the power of the weight, 10 log10(|W* - W|^2 / |W|^2).

    -inf without error, whatever the weight; +inf for an error of weights that are all zero.
    """
    error, signal = ((values.float().square().sum().item()) for values in (programmed.float() - weight.float(), weight))
    return ratio_db(error, signal)


def ratio_db(power: float, reference: float) -> float:
    """A ratio of powers in dB; -inf for no power, +inf for power over nothing."""
    if power == 0:
        return -inf
    return 10 * log10(power / reference) if reference > 0 else inf


def mean_db(ratios_db: Collection[float]) -> float:
    """Mean of noise-to-signal power ratios, in dB; -inf without error or without ratios."""
    power = sum(10 ** (ratio / 10) for ratio in ratios_db) / max(len(ratios_db), 1)
    return 10 * log10(power) if power > 0 else -inf
