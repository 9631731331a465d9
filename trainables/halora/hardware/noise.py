"""What a chip instance does to a weight matrix, in physical order.

Clip, scale, slices of differential pairs, finite levels, programming error, stuck cells and ageing move conductances;
back in weights come the programming error of models in the weight domain, drift compensation and IR drop. All of this
is static until the cells are programmed again: drawn or computed once, the same for every read. So is what temperature
makes of conductances, and what is a gain of weights from chip to chip (`halora.hardware.manufactured`). Read noise is
fresh for every product, given by its variance. The frozen weight is never written; the functions return a new tensor.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import inf, log10, sqrt

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey
from halora.hardware.cell_arrays import address_of, cell_arrays, cells_act, write_verify_ratio
from halora.hardware.cells import clip_limit, clipped, weight_scale
from halora.hardware.chip import Chip
from halora.hardware.draws import normal_rows, standard_normal
from halora.hardware.fill import layer_fill
from halora.hardware.manufactured import WeightGain, stuck_rates
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
        others = (self.limit, self.scale, self.row_gain)
        return self.spread is not None and all(part is None for part in others) and self.warmth == 1

    @property
    def changes_nothing(self) -> bool:
        """Whether the weight is held as it is."""
        return all(part is None for part in (self.limit, self.scale, self.spread, self.row_gain)) and self.warmth == 1

    @property
    def warmth(self) -> float:
        """What weights are read as at the chip's temperature over what they were programmed as."""
        return self.chip.temperature.gain(self.chip.cells.g_min_us, self.chip.cells.g_max_us)

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
        gain = WeightGain.of(chip, key, weight)
        if self.changes_nothing and gain is None and copies is None:
            return weight.to(dtype)
        compensation = chip.retention.compensation
        held = into
        if held is None or compensation == "global":
            held = torch.empty_like(weight, dtype=torch.float32 if compensation == "global" else dtype)
        units = normal_rows(address_of(key, self.noise), held, block_rows(weight))
        if self.only_adds and self.spread is not None and gain is None and copies is None:
            for rows in _row_blocks(weight):
                unit, signs = next(units)
                deviation = (self._at(self.spread, rows) * signs).to(unit.dtype)
                torch.addcmul(weight[rows], unit, deviation, out=held[rows])
            return held.to(dtype)
        before = after = torch.zeros((), device=weight.device)
        rates = stuck_rates(chip, key, weight)
        of_copies = gain is not None and gain.columns is not None and chip.coding.copies > 1
        for rows in _row_blocks(weight):
            block = held[rows] if held.dtype == torch.float32 else None
            fresh = aged = clipped(weight[rows], None if self.limit is None else self._at(self.limit, rows), chip.tile)
            block_key, parts = key.part(f"rows {rows.start}"), None if copies is None else copies[:, rows]
            if parts is None and of_copies:
                parts = fresh.new_empty(chip.coding.copies, *fresh.shape)
            if parts is not None:
                parts.zero_()[:: chip.coding.slices] = fresh if self.scale is None else 0
            if self.scale is not None:
                stuck = None if rates is None else rates[:, rows]
                scale = self._at(self.scale, rows)
                fresh, aged = _through_cells(fresh, scale, chip, self.noise, block_key, parts, stuck)
            ages = aged is not fresh
            if self.spread is not None:
                unit, signs = next(units)
                deviation = self._at(self.spread, rows) * signs
                fresh = torch.addcmul(fresh, unit, deviation) if ages else aged
                aged = torch.addcmul(aged, unit, deviation, out=block)
                if parts is not None:
                    _share_out(
                        parts, unit * deviation, self._at(self.spread, rows), chip, address_of(block_key, self.noise)
                    )
            if self.warmth != 1:
                fresh, aged, ages = fresh if ages else aged, aged * self.warmth, True
                if parts is not None:
                    parts.mul_(self.warmth)
            if ages and compensation == "column":
                undoing = _undoing(fresh.abs().mean(dim=1, keepdim=True), aged.abs().mean(dim=1, keepdim=True))
                aged = aged * undoing
                if parts is not None:
                    parts.mul_(undoing)
            if ages and compensation == "global":
                before, after = before + fresh.abs().sum(), after + aged.abs().sum()
            if self.row_gain is not None:
                aged = torch.mul(aged, self.row_gain, out=block)
                if parts is not None:
                    parts.mul_(self.row_gain)
            if gain is not None:
                aged = _with_gain(aged, gain, rows, chip, parts)
            if aged is not block:
                held[rows] = aged
        if after > 0:
            undoing = _undoing(before, after)
            held.mul_(undoing)
            if copies is not None:
                copies.mul_(undoing)
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


def _undoing(before: Tensor, after: Tensor) -> Tensor:
    """Digital gain that brings the mean |W| back to that right after programming."""
    return before / after.clamp_min(torch.finfo(after.dtype).tiny)


def _through_cells(
    coded: Tensor,
    scale: Tensor,
    chip: Chip,
    noise: NoiseModel,
    key: NoiseKey,
    parts: Tensor | None,
    stuck: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights that the cells hold after programming and at the end; the same tensor when nothing ages.

    `parts`, zeros (copies, d_out, d_in), gets what each slice of each replica holds at the end; `stuck` is what
    `stuck_rates` gives for these outputs.
    """
    fresh = torch.zeros_like(coded)
    aged: Tensor | None = None
    for array in cell_arrays(coded / scale, chip, noise, key, stuck):
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


def _with_gain(held: Tensor, gain: WeightGain, rows: slice, chip: Chip, parts: Tensor | None) -> Tensor:
    """Weights (rows, d_in) as one chip instance reads them; `parts`, each copy's, likewise, in place.

    The gains of columns differ between copies, so where there are several the weights are the sum of their parts.
    """
    of_cells = gain.of_cells(rows)
    if parts is not None:
        parts.mul_(of_cells)
    if gain.columns is None or parts is None:
        held = held * of_cells
        return held if gain.columns is None else held.mul_(gain.of_columns(0, rows))
    coding, total = chip.coding, torch.zeros_like(held)
    for copy, part in enumerate(parts):
        part.mul_(gain.of_columns(copy, rows))
        total.add_(part, alpha=coding.slice_ratio ** -(copy % coding.slices) / coding.replicas)
    return total


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
    mean_s = chip.warm_cells.mean_us(layer_fill(weight, chip)) * 1e-6
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
