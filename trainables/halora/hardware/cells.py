"""Weights as conductances: clipping, scale, differential pairs, finite levels and stuck cells.

A weight w is stored as v = w / scale in [-1, 1] by the difference of two cells, v = (g+ - g-) / (g_max - g_min), of
which one stands at g_min. With several slices the first holds v; each later one holds what the read-back of those
before left over, at a significance `slice_ratio` times smaller. Replicas hold the same and are averaged.
"""

import torch
from torch import Tensor

from halora.hardware.chip import Cells, Coding, Faults, Tile
from halora.hardware.regions import largest_magnitude, standard_deviation, widened


def clip_limit(weight: Tensor, coding: Coding, tile: Tile) -> Tensor | None:
    """Where weights (d_out, d_in) are clipped, in float32: nowhere, or per region of the digital scale."""
    if coding.clip_std is None:
        return None
    return coding.clip_std * standard_deviation(weight, coding.scale, tile.rows, tile.columns)


def clipped(weight: Tensor, limit: Tensor | None, tile: Tile) -> Tensor:
    """Weights (d_out, d_in) in float32 (`weight` itself where it is that already), cut at their `clip_limit`."""
    values = weight.float()
    if limit is None:
        return values
    limit = widened(limit, weight.shape[1], tile.rows)
    return torch.minimum(torch.maximum(values, -limit), limit)


def weight_scale(weight: Tensor, coding: Coding, tile: Tile) -> Tensor:
    """The weight (d_out, d_in) that maps to the largest conductance, per region of the digital scale; float32.

    1 where all weights are zero.
    """
    largest = largest_magnitude(weight, coding.scale, tile.rows, tile.columns).float()
    return torch.where(largest > 0, largest, 1.0)


def mapped(weight: Tensor, coding: Coding, tile: Tile) -> tuple[Tensor, Tensor]:
    """Weights (d_out, d_in) as they are mapped: clipped, see `clipped`, and their `weight_scale`."""
    values = clipped(weight, clip_limit(weight, coding, tile), tile)
    return values, weight_scale(values, coding, tile)


def target_conductance(stored: Tensor, sign: int, cells: Cells) -> Tensor:
    """What the positive (sign 1) or negative (-1) cells of the pairs are to hold, in microsiemens.

    Args:
        stored: Values in [-1, 1], any shape.
        sign: Side of the pairs.
        cells: Range and levels; with levels, the nearest of them.
    """
    conductance = (stored * sign).clamp_min_(0).mul_(cells.g_max_us - cells.g_min_us)
    if cells.levels is not None:
        step = (cells.g_max_us - cells.g_min_us) / (cells.levels - 1)
        conductance.div_(step).round_().mul_(step)
    return conductance.add_(cells.g_min_us)


def with_faults(conductance: Tensor, faults: Faults, uniform: Tensor | None, rates: Tensor | float = 1.0) -> Tensor:
    """Conductances that are not negative, in place, and those of stuck cells where `uniform` draws over [0, 1) say so.

    Args:
        conductance: In microsiemens; overwritten.
        faults: Rates and conductances of stuck cells.
        uniform: One draw per cell; none when no cell can be stuck.
        rates: What the rates are multiplied by, broadcasting over the cells.
    """
    conductance.clamp_min_(0)
    if uniform is not None:
        conductance.masked_fill_(uniform < rates * faults.stuck_low_rate, faults.stuck_low_us)
        conductance.masked_fill_(uniform >= 1 - rates * faults.stuck_high_rate, faults.stuck_high_us)
    return conductance
