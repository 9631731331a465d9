"""Noise of reads drawn cell by cell and read by read: what `halora.hardware.read_noise` states the variance of."""

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey
from halora.hardware.cell_arrays import cell_arrays
from halora.hardware.cells import mapped
from halora.hardware.chip import Chip
from halora.hardware.noise import ir_drop_gain
from halora.hardware.read_noise import slow_deviation_us, white_variance_us2
from halora.hardware.regions import widened


def sampled_read_error(weight: Tensor, chip: Chip, key: NoiseKey, cycles: int = 1) -> Tensor:
    """Error of the effective weight in the cycles of one product, drawn cell by cell and read by read.

    Args:
        weight: `(d_out, d_in)`.
        chip: Read noise, cells, coding and age.
        key: Address of the product; its K reads and its cycles are draws of their own.
        cycles: Cycles the product is driven in.

    Returns:
        `(cycles, d_out, d_in)`, in weight units.
    """
    whole, scale = mapped(weight, chip.coding, chip.tile)
    scale = widened(scale, weight.shape[1], chip.tile.rows)
    total = whole.new_zeros(cycles, *whole.shape)
    for array in cell_arrays(whole / scale, chip, None, None):
        white, slow = white_variance_us2(array.aged, chip).sqrt_(), slow_deviation_us(array.aged, chip)
        total += _normal(key.part(f"{array.name}, 1/f"), slow) * slow * array.share
        for index in range(cycles * chip.read.averaged):
            unit = _normal(key.part(array.name, draw=index), white)
            total[index % cycles].add_(unit * white, alpha=array.share / chip.read.averaged)
    return total.mul_(scale) * ir_drop_gain(weight, chip).to(total)


def _normal(key: NoiseKey, like: Tensor) -> Tensor:
    return torch.from_numpy(key.standard_normal(tuple(like.shape))).to(like)
