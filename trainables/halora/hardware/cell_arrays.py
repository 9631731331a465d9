"""The cells of a layer: what programming, faults and ageing make of their conductances."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import exp, isinf, pi, sqrt

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey
from halora.hardware.cells import target_conductance, with_faults
from halora.hardware.chip import Chip
from halora.hardware.draws import standard_normal
from halora.hardware.noise_models import NoiseModel
from halora.hardware.regions import widened


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


def cell_arrays(
    stored: Tensor,
    chip: Chip,
    noise: NoiseModel | None,
    key: NoiseKey | None,
    stuck_rates: Tensor | None = None,
) -> Iterator[CellArray]:
    """All cell arrays of a layer, made one at a time.

    Args:
        stored: Weights over scale, `(d_out, d_in)` in [-1, 1]; left unchanged.
        chip: Coding, cells, faults and retention.
        noise: Programming error.
        key: Address of the chip instance; without one the cells are as wanted: no error, no fault, no ageing.
        stuck_rates: Those of these outputs, `(copies, d_out, row tiles)`, see `manufactured.stuck_rates`.
    """
    coding, span = chip.coding, chip.cells.g_max_us - chip.cells.g_min_us
    for replica in range(coding.replicas):
        left = stored
        for index in range(coding.slices):
            copy, significance = replica * coding.slices + index, coding.slice_ratio**-index / coding.replicas
            wanted, held = left.clamp(-1, 1), torch.zeros_like(stored)
            rates = 1.0 if stuck_rates is None else widened(stuck_rates[copy], stored.shape[1], chip.tile.rows)
            for sign in (1, -1):
                name = f"replica {replica}, slice {index}, side {sign}"
                target = target_conductance(wanted, sign, chip.cells)
                fresh = aged = target
                if noise is not None and key is not None:
                    fresh, aged = _programmed(target, chip, noise, key.part(name), rates)
                held.add_(fresh, alpha=sign / span)
                yield CellArray(copy, sign / span, significance, fresh, aged, name)
            left = (left - held).mul_(coding.slice_ratio)


def _programmed(
    target: Tensor, chip: Chip, noise: NoiseModel, key: NoiseKey, rates: Tensor | float
) -> tuple[Tensor, Tensor]:
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
            later = with_faults(noise.apply(target, unit, time_s), faults, uniform, rates)
    fresh = with_faults(fresh, faults, uniform, rates)
    if ageing is not None and ageing.level > 0:
        unit = _unit(key.part("ageing"), ageing, target)
        later = with_faults(ageing.apply(later, unit, time_s), faults, uniform, rates)
    return fresh, later


def address_of(key: NoiseKey, model: NoiseModel) -> NoiseKey:
    """The address of draws that last as long as the model says."""
    return key.lasting() if model.lifetime == "chip" else key


def _unit(key: NoiseKey, model: NoiseModel, like: Tensor) -> Tensor:
    return standard_normal(address_of(key, model), like)


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
