"""The error of cells and weights over what was aimed at: as the noise models state it, and as a chip instance shows it.

What is stated holds before conductances are kept from falling below 0 and without stuck cells; what is drawn has both.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey
from halora.hardware.cell_arrays import cell_arrays, write_verify_ratio
from halora.hardware.cells import mapped
from halora.hardware.chip import Chip
from halora.hardware.manufactured import strength_factor, stuck_rates
from halora.hardware.noise import added_spread, block_rows, programmed_weight
from halora.hardware.noise_models import quadrature
from halora.hardware.regions import at_rows, widened

Moment = Literal["start", "end"]
"""Of the refresh interval."""

_FEWEST_DRAWS = 30  # in a bin; of fewer no standard deviation is given
_SIDES = 2  # of a pair


@dataclass(frozen=True)
class ErrorCurve:
    """Mean and standard deviation of an error over the value aimed at, all in one unit.

    Attributes:
        target: Values aimed at, rising.
        mean: Mean error at each.
        std: Standard deviation of the error at each.
    """

    target: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def moment_s(chip: Chip, moment: Moment) -> float:
    """Seconds after programming; the start is the earliest time the noise model knows, 0 where it knows no time."""
    end_s = chip.retention.refresh_interval_s
    return end_s if moment == "end" else min(chip.noise.first_s or 0.0, end_s)


def stated_cell_error(chip: Chip, conductance: Tensor, moment: Moment) -> ErrorCurve:
    """Error of cells by the chip's noise models, write-verify and ageing included; in microsiemens.

    By Gauss-Hermite quadrature of the models over both draws, exact where the error is a polynomial of them.

    Args:
        chip: Its programming error, write-verify and retention.
        conductance: Conductances aimed at, `(n,)`, in microsiemens.
        moment: Start or end of the refresh interval.
    """
    target = conductance.double()
    draws = quadrature()
    ageing = chip.retention.ageing if moment == "end" else None
    time_s = moment_s(chip, moment)
    in_cells = chip.noise.domain == "conductance"
    held, shares = [], []
    for unit, share in draws if in_cells else [(0.0, 1.0)]:
        programmed = target
        if in_cells:
            programmed = chip.noise.apply(target, torch.full_like(target, unit * write_verify_ratio(chip)), time_s)
        for later_unit, later_share in draws if ageing else [(0.0, 1.0)]:
            unit_tensor = torch.full_like(target, later_unit)
            held.append(ageing.apply(programmed, unit_tensor, time_s) if ageing else programmed)
            shares.append(share * later_share)
    error, share_of = torch.stack(held) - target, target.new_tensor(shares)
    mean = share_of @ error
    return _curve(target, mean, (share_of @ (error - mean).square()).sqrt())


def drawn_cell_error(weight: Tensor, chip: Chip, key: NoiseKey, moment: Moment, bins: int = 24) -> ErrorCurve:
    """Error of the cells that a chip instance gives a layer: first replica and slice, the first outputs; microsiemens.

    Args:
        weight: Weight of the layer, `(d_out, d_in)`.
        chip: The chip.
        key: Address of the chip instance at the layer, for programming.
        moment: Start or end of the refresh interval.
        bins: Equal parts of the cells' range over which draws are gathered; those with few draws are left out.
    """
    first = slice(0, block_rows(weight))
    coded, scale = mapped(weight, chip.coding, chip.tile)
    stored = coded[first] / at_rows(scale, first, weight.shape[1], chip.tile.rows)
    noise, rates = chip.noise.with_level(_level(chip, key)), stuck_rates(chip, key, weight)
    real = cell_arrays(stored, chip, noise, key.part("rows 0"), None if rates is None else rates[:, first])
    wanted = cell_arrays(stored, chip, None, None)
    targets, errors = [], []
    for cells, aim in islice(zip(real, wanted, strict=True), _SIDES):
        targets.append(aim.fresh.flatten())
        errors.append((cells.fresh if moment == "start" else cells.aged).flatten() - targets[-1])
    low, high = chip.cells.g_min_us, chip.cells.g_max_us
    return _binned(torch.cat(targets), torch.cat(errors), low, high, bins)


def stated_weight_error(weight: Tensor, chip: Chip, bins: int = 24) -> ErrorCurve:
    """Error that a noise model of the weight domain adds to a layer, over the weight; both relative to max|W|.

    Args:
        weight: `(d_out, d_in)`.
        chip: Its noise model, write-verify and coding.
        bins: Equal parts of -1 to 1, in which the mean variance is taken.
    """
    values = weight.float()
    largest = values.abs().max()
    spread = added_spread(values, chip, chip.noise)
    deviation = torch.zeros(()) if spread is None else widened(spread / largest, weight.shape[1], chip.tile.rows)
    target = (values / largest).flatten()
    power = deviation.square().expand(weight.shape).flatten()
    found = _binned(target, power, -1.0, 1.0, bins)
    return ErrorCurve(found.target, (0.0,) * len(found.target), tuple(mean**0.5 for mean in found.mean))


def drawn_weight_error(weight: Tensor, chip: Chip, key: NoiseKey, bins: int = 24) -> ErrorCurve:
    """Error of the weights as a chip instance reads them, from every cause; relative to max|W|.

    Args:
        weight: `(d_out, d_in)`.
        chip: The chip.
        key: Address of the chip instance at the layer, for programming.
        bins: Equal parts of -1 to 1 over which draws are gathered; those with few draws are left out.
    """
    largest = weight.float().abs().max()
    error = (programmed_weight(weight, chip, key, _level(chip, key)).float() - weight.float()) / largest
    return _binned((weight.float() / largest).flatten(), error.flatten(), -1.0, 1.0, bins)


def _level(chip: Chip, key: NoiseKey) -> float:
    """Strength of the noise on the chip instance at that address."""
    return chip.noise.level * strength_factor(chip, key)


def ramp(outputs: int = 128, inputs: int = 2048) -> Tensor:
    """A test weight that holds all values from -1 to 1 in every output, each at other inputs; `(outputs, inputs)`."""
    places = torch.arange(inputs) + 17 * torch.arange(outputs)[:, None]  # odd, so that it meets every row of a tile
    return torch.linspace(-1, 1, inputs)[places % inputs]


def _binned(target: Tensor, error: Tensor, low: float, high: float, bins: int) -> ErrorCurve:
    """Mean target, mean error and its standard deviation in every bin with enough draws."""
    index = ((target - low) / (high - low) * bins).long().clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins)

    def means(values: Tensor) -> Tensor:
        return torch.bincount(index, weights=values.double(), minlength=bins) / count.clamp_min(1)

    mean = means(error)
    std = means((error - mean[index]).square()).sqrt()
    enough = count >= _FEWEST_DRAWS
    return _curve(means(target)[enough], mean[enough], std[enough])


def _curve(target: Tensor, mean: Tensor, std: Tensor) -> ErrorCurve:
    return ErrorCurve(tuple(target.tolist()), tuple(mean.tolist()), tuple(std.tolist()))
