"""What differs from chip to chip, drawn: each once per chip instance, by an address of its own.

    strength        s = exp(v z)                        of a chip's programming error; z ~ N(0, 1), one of every cause
    conductance     c = exp(v z)                        of every weight of a chip
    gradient        1 + v (z_1 x + z_2 y)               over a tile; x, y from -1 to 1 along its rows and columns
    ADC             code = round(q + v_l z_l L(q / t)), q = (1 + v_g z_g) p + v_o z_o, p the column's sum in steps
                    L(u) = 3 sqrt(3) / 2 (u - u^3)      largest 1, none at 0 and at full scale; t the largest code
    stuck cells     rates x f, f ~ Gamma(1 / c, c)      of a tile, mean 1 and variance c

A gain of what a column sums is that of its weights, so it is applied to them, in either model of the converters.

With n calibration reads of nothing and n of a full input, every column's offset and gain are trimmed as they are
measured: v_o^2 = (1 / 12 + noise^2) / n steps^2 is left of the offset, and 2 v_o^2 / t^2 of the gain's square, drawn
anew at every programming; test inputs fall anywhere between two codes. INL is left as it is.
"""

from dataclasses import dataclass
from math import exp, sqrt

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey
from halora.hardware.chip import Chip
from halora.hardware.regions import at_rows
from halora.hardware.rounding import top_code

_CUBIC = 1.5 * sqrt(3)


def strength_factor(chip: Chip, key: NoiseKey) -> float:
    """What the strength of the chip's noise model is multiplied by on one chip instance."""
    return _of_chip(chip.variation.strength, key, "strength")


def conductance_factor(chip: Chip, key: NoiseKey) -> float:
    """What all conductances of one chip instance are multiplied by."""
    return _of_chip(chip.variation.conductance, key, "conductance")


def _of_chip(spread: float, key: NoiseKey, cause: str) -> float:
    if spread == 0:
        return 1.0
    return exp(spread * float(key.at(module="", purpose=f"chip/{cause}").lasting().standard_normal((1,))[0]))


@dataclass(frozen=True)
class ColumnSpread:
    """Standard deviations over the columns of a chip, after calibration where there is one; 0 for lossless ADCs.

    Attributes:
        gain: Relative.
        offset_steps: In steps of the ADC.
        inl_steps: Of the largest non-linearity, in steps.
        trimmed: Whether gain and offset are what calibration leaves, drawn at every programming.
    """

    gain: float
    offset_steps: float
    inl_steps: float
    trimmed: bool

    @classmethod
    def of(cls, chip: Chip) -> "ColumnSpread":
        """Those of a chip."""
        adc, variation = chip.adc, chip.variation
        if adc.lossless:
            return cls(0.0, 0.0, 0.0, trimmed=False)
        if not adc.calibration_reads:
            return cls(variation.adc_gain, variation.adc_offset_steps, variation.adc_inl_steps, trimmed=False)
        left = sqrt((1 / 12 + adc.noise_steps**2) / adc.calibration_reads)
        return cls(sqrt(2) * left / top_code(adc.bits), left, variation.adc_inl_steps, trimmed=True)

    def draws(self, chip: Chip, key: NoiseKey, shape: torch.Size, cause: str) -> Tensor:
        """Standard normal draws of one cause for all columns of a layer, `(replicas, slices, row tiles, d_out)`."""
        coding, (d_out, d_in) = chip.coding, shape
        address = key.at(module=key.module, purpose=f"columns/{cause}")
        address = address.part("trimmed") if self.trimmed and cause != "inl" else address.lasting()
        tiles = -(-d_in // chip.tile.rows)
        return torch.from_numpy(address.standard_normal((coding.replicas, coding.slices, tiles, d_out)))


@dataclass(frozen=True)
class WeightGain:
    """What one chip instance multiplies the weights of a layer by when they are read.

    Attributes:
        chip: Its tiles.
        in_features: d_in of the layer.
        conductance: Of all weights.
        slope: Of every tile along its inputs and along its outputs, `(2, d_out, row tiles)`; none without a gradient.
        columns: Gain of the columns, `(copies, d_out, row tiles)`; none if all are 1.
    """

    chip: Chip
    in_features: int
    conductance: float
    slope: Tensor | None
    columns: Tensor | None

    @classmethod
    def of(cls, chip: Chip, key: NoiseKey, like: Tensor) -> "WeightGain | None":
        """That of a layer (d_out, d_in); none where chips are alike.

        Args:
            chip: Its variation.
            key: Address of the chip instance at the layer.
            like: A weight of the layer; its shape and device are taken.
        """
        spread, variation = ColumnSpread.of(chip), chip.variation
        if not (variation.conductance or variation.gradient or spread.gain):
            return None
        slope = columns = None
        if variation.gradient:
            slope = (_by_tile(chip, key, like, "gradient", 2) * variation.gradient).to(like.device)
        if spread.gain:
            draws = spread.draws(chip, key, like.shape, "gain").flatten(0, 1).mT
            columns = (1 + spread.gain * draws).to(like.device)
        return cls(chip, like.shape[1], conductance_factor(chip, key), slope, columns)

    def of_cells(self, rows: slice) -> Tensor | float:
        """Gain of some outputs' weights from conductance and gradient, `(rows, d_in)`, or of all of them."""
        if self.slope is None:
            return self.conductance
        tile, (_, d_out, _), device = self.chip.tile, self.slope.shape, self.slope.device
        along_inputs, along_outputs = (at_rows(slope, rows, self.in_features, tile.rows) for slope in self.slope)
        x = _place(torch.arange(self.in_features, device=device), tile.rows)
        y = _place(torch.arange(d_out, device=device)[rows], tile.columns)[:, None]
        return self.conductance * (1 + along_inputs * x + along_outputs * y)

    def of_columns(self, copy: int, rows: slice) -> Tensor:
        """Gain of the columns of some outputs in a slice of a replica, `(rows, d_in)`."""
        assert self.columns is not None
        return at_rows(self.columns[copy], rows, self.in_features, self.chip.tile.rows)


@dataclass(frozen=True)
class Columns:
    """What the ADCs of one layer's columns add on one chip instance besides their gain.

    Attributes:
        offset: In steps, `(replicas, slices, row tiles, d_out)`; none without.
        inl: Largest non-linearity in steps, signed, of the same shape; none without.
    """

    offset: Tensor | None
    inl: Tensor | None

    @classmethod
    def of(cls, chip: Chip, key: NoiseKey, like: Tensor) -> "Columns | None":
        """Those of a layer (d_out, d_in), see `WeightGain.of`; none where ADCs are alike."""
        spread = ColumnSpread.of(chip)
        if not (spread.offset_steps or spread.inl_steps):
            return None
        offset, inl = (
            (deviation * spread.draws(chip, key, like.shape, cause)).to(like.device) if deviation else None
            for cause, deviation in (("offset", spread.offset_steps), ("inl", spread.inl_steps))
        )
        return cls(offset, inl)

    def move(self, sums: Tensor, place: tuple[int, int, int], top: int) -> None:
        """What the columns of a tile make of their sums in steps (tokens, d_out), in place, before they are rounded.

        Args:
            sums: Of the tile.
            place: Its replica, slice and row of tiles.
            top: Largest code.
        """
        if self.offset is not None:
            sums.add_(self.offset[place])
        if self.inl is not None:
            sums.addcmul_(self.inl[place], cubic((sums / top).clamp_(-1, 1)))


def cubic(u: Tensor) -> Tensor:
    """The shape of the non-linearity over sums relative to full scale, within -1 and 1; largest 1."""
    return _CUBIC * (u - u**3)


def stuck_rates(chip: Chip, key: NoiseKey, like: Tensor) -> Tensor | None:
    """What the rates of stuck cells are multiplied by, `(copies, d_out, row tiles)`; none where they are the same.

    Args:
        chip: Its faults, tiles and coding.
        key: Address of the chip instance at the layer.
        like: A weight of the layer, `(d_out, d_in)`; its shape and device are taken.
    """
    faults = chip.faults
    if not (faults.occur and faults.clustering):
        return None
    address, shape = key.at(module=key.module, purpose="stuck cells/clusters").lasting(), _tiles(chip, like.shape)
    drawn = address.generator().standard_gamma(1 / faults.clustering, (chip.coding.copies, *shape)) * faults.clustering
    most = 1 / (faults.stuck_low_rate + faults.stuck_high_rate)
    factors = torch.from_numpy(drawn).float().clamp_(max=most)
    return _of_outputs(factors, chip, like.shape[0]).to(like.device)


def _by_tile(chip: Chip, key: NoiseKey, like: Tensor, cause: str, count: int) -> Tensor:
    """Standard normal draws of every tile, `(count, d_out, row tiles)`."""
    address = key.at(module=key.module, purpose=f"tiles/{cause}").lasting()
    draws = torch.from_numpy(address.standard_normal((count, *_tiles(chip, like.shape))))
    return _of_outputs(draws, chip, like.shape[0])


def _tiles(chip: Chip, shape: torch.Size) -> tuple[int, int]:
    """Columns of tiles and rows of tiles of a layer (d_out, d_in)."""
    return -(-shape[0] // chip.tile.columns), -(-shape[1] // chip.tile.rows)


def _of_outputs(of_tiles: Tensor, chip: Chip, d_out: int) -> Tensor:
    """What tiles have, for each of their outputs: (n, column tiles, row tiles) -> (n, d_out, row tiles)."""
    return of_tiles.repeat_interleave(chip.tile.columns, dim=1)[:, :d_out]


def _place(index: Tensor, size: int) -> Tensor:
    """Places in a tile, from -1 at its first row or column to 1 at its last."""
    return (index % size) * (2 / (size - 1)) - 1
