"""Weights as conductances: clipping, scale, differential pairs, finite levels and stuck cells.

A weight w is stored as v = w / scale in [-1, 1] by the difference of two cells, v = (g+ - g-) / (g_max - g_min), of
which one stands at g_min. With several slices the first holds v; each later one holds what the read-back of those
before left over, at a significance `slice_ratio` times smaller. Replicas hold the same and are averaged.
"""

import torch
from torch import Tensor

from halora.hardware.chip import Cells, Coding, Faults
from halora.hardware.noise_models import largest_magnitude

BOLTZMANN_J_PER_K = 1.380649e-23
TEMPERATURE_K = 300.0


def clip_limit(weight: Tensor, coding: Coding) -> Tensor | None:
    """Where weights (d_out, d_in) are clipped, in float32: nowhere, a scalar, or (d_out, 1) for `channel_max`."""
    if coding.clip_std is None:
        return None
    values = weight.float()
    spread = values.std() if coding.scale == "tensor_max" else values.std(dim=1, keepdim=True)
    return coding.clip_std * spread


def clipped(weight: Tensor, limit: Tensor | None) -> Tensor:
    """Weights in float32 (`weight` itself where it is that already), cut at the limit if there is one."""
    values = weight.float()
    return values if limit is None else torch.minimum(torch.maximum(values, -limit), limit)


def weight_scale(weight: Tensor, coding: Coding) -> Tensor:
    """The weight that maps to the largest conductance: a scalar, or (d_out, 1) for `channel_max`; float32."""
    largest = largest_magnitude(weight, per_output=coding.scale == "channel_max").float()
    return largest.clamp_min(torch.finfo(torch.float32).tiny)


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


def with_faults(conductance: Tensor, faults: Faults, uniform: Tensor | None) -> Tensor:
    """Conductances that are not negative, in place, and those of stuck cells where `uniform` draws over [0, 1) say so.

    Args:
        conductance: In microsiemens; overwritten.
        faults: Rates and conductances of stuck cells.
        uniform: One draw per cell; none when no cell can be stuck.
    """
    conductance.clamp_min_(0)
    if uniform is not None:
        conductance.masked_fill_(uniform < faults.stuck_low_rate, faults.stuck_low_us)
        conductance.masked_fill_(uniform >= 1 - faults.stuck_high_rate, faults.stuck_high_us)
    return conductance


def white_read_variance(conductance: Tensor, cells: Cells, white_us: float, thermal: bool) -> Tensor:
    """Variance of one read of a cell that averaging reduces, in microsiemens squared, shaped like `conductance`.

    White noise of the read-out, and the thermal noise of the read pulse: (sigma_G / G)^2 = 2 k T / E with
    E = V^2 G t of that cell, hence sigma_G^2 = 2 k T G / (V^2 t).
    """
    variance = torch.full_like(conductance, white_us**2)
    if thermal:
        energy_per_us_j = cells.read_voltage_v**2 * cells.read_time_ns * 1e-9 * 1e-6
        variance.add_(conductance, alpha=2 * BOLTZMANN_J_PER_K * TEMPERATURE_K / energy_per_us_j)
    return variance
