"""Noise of reads: fresh for every product, so known by its variance and drawn with the product.

White and thermal noise are drawn anew in every read pulse, so they fall with the reads that are averaged and with the
cycles that a product is driven in. 1/f noise is slow against a product: it is the same in all its reads and cycles.
Cells of a pair, slices and replicas are independent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halora.hardware.cell_arrays import cell_arrays
from halora.hardware.cell_models import cmo_read_noise_us
from halora.hardware.cells import mapped
from halora.hardware.chip import Chip
from halora.hardware.noise import block_rows, ir_drop_gain
from halora.hardware.pcm_models import pcm_read_noise_us
from halora.hardware.regions import at_rows, in_tiles

BOLTZMANN_J_PER_K = 1.380649e-23


@dataclass(frozen=True)
class ReadPower:
    """Variance of the weights in one product; in every row tile that of an input times that of an output.

    Attributes:
        inputs: Mean over the outputs, `(d_in,)`, in squared weight units.
        outputs: Mean over a row tile's inputs, relative to that of all outputs, `(row tiles, d_out)`.
        rows: Inputs of a tile.
    """

    inputs: Tensor
    outputs: Tensor
    rows: int

    def of_product(self, power: Tensor) -> Tensor:
        """Variance of a product by the squares of its inputs: (..., d_in) -> (..., d_out)."""
        return in_tiles(power * self.inputs, self.rows).sum(dim=-1) @ self.outputs


@dataclass(frozen=True)
class ReadNoise:
    """Read noise of one layer.

    Attributes:
        fresh: Of one cycle, white and thermal noise, `read.averaged` reads averaged.
        lasting: The same in all cycles of a product, 1/f noise; none without.
    """

    fresh: ReadPower
    lasting: ReadPower | None


def read_noise(weight: Tensor, chip: Chip) -> ReadNoise | None:
    """The read noise of a layer (d_out, d_in), of cells where programming aims them; none on a chip without.

    Args:
        weight: Clean weight, `(d_out, d_in)`.
        chip: Read noise, cells, coding and age.
    """
    if not chip.read.noisy:
        return None
    whole, scale = mapped(weight, chip.coding, chip.tile)
    d_out, d_in = weight.shape
    tiles, kinds = -(-d_in // chip.tile.rows), 1 + chip.read.lasting
    by_input = torch.zeros(kinds, d_in, device=weight.device)
    by_output = torch.zeros(kinds, tiles, d_out, device=weight.device)
    step = block_rows(weight)
    for start in range(0, d_out, step):
        rows = slice(start, start + step)
        block_scale = at_rows(scale, rows, d_in, chip.tile.rows)
        for array in cell_arrays(whole[rows] / block_scale, chip, None, None):
            warm = at_temperature(array.aged, chip)
            variances = [white_variance_us2(warm, chip).div_(chip.read.averaged)]
            if chip.read.lasting:
                variances.append(slow_deviation_us(warm, chip).square_())
            for kind, variance in enumerate(variances):
                power = variance.mul_((array.share * block_scale).square())
                by_input[kind] += power.sum(dim=0)
                by_output[kind, :, rows] += in_tiles(power, chip.tile.rows).sum(dim=-1).T
    by_input = by_input.div_(d_out).mul_(ir_drop_gain(weight, chip).to(by_input).square_())
    mean = by_output.mean(dim=2, keepdim=True)
    relative = torch.where(mean > 0, by_output / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
    fresh, *lasting = (ReadPower(by_input[kind], relative[kind], chip.tile.rows) for kind in range(kinds))
    return ReadNoise(fresh, lasting[0] if lasting else None)


def at_temperature(conductance: Tensor, chip: Chip) -> Tensor:
    """What cells conduct at the chip's temperature that conduct so when they are programmed, in microsiemens."""
    cells, warm = chip.cells, chip.warm_cells
    if warm == cells:
        return conductance
    return (conductance - cells.g_min_us) * chip.temperature.gain(cells.g_min_us, cells.g_max_us) + warm.g_min_us


def white_variance_us2(conductance: Tensor, chip: Chip) -> Tensor:
    """Variance of one read of a cell that averaging reduces, in squared microsiemens, shaped like `conductance`.

    White noise of the read-out, and the thermal noise of the read pulse: (sigma_G / G)^2 = 2 k T / E with
    E = V^2 G t of that cell, hence sigma_G^2 = 2 k T G / (V^2 t).
    """
    read, cells = chip.read, chip.cells
    variance = torch.full_like(conductance, read.white_us**2)
    if read.thermal:
        energy_per_us_j = cells.read_voltage_v**2 * cells.read_time_ns * 1e-9 * 1e-6
        variance.add_(conductance, alpha=2 * BOLTZMANN_J_PER_K * chip.temperature.kelvin / energy_per_us_j)
    return variance


def slow_deviation_us(conductance: Tensor, chip: Chip) -> Tensor:
    """Standard deviation of the 1/f noise of a cell at the end of the refresh interval, in microsiemens.

    A share of the conductance, and the published law if the chip names one; as independent causes.
    """
    share = conductance * chip.read.flicker
    slow, time_s = chip.read.slow, chip.retention.refresh_interval_s
    if slow == "none":
        return share
    law = cmo_read_noise_us(conductance, time_s) if slow == "cmo" else pcm_read_noise_us(conductance, slow, time_s)
    return torch.hypot(share, law)
