"""Tile-wise ADC quantisation: the exact path, and the statistical model fitted to it.

A matrix product of d inputs is cut into tiles of `rows` inputs. The digital side scales each token's inputs by their
largest magnitude, every tile's partial sum is converted by a b-bit ADC, and the codes are added digitally. The ADC's
full scale is fixed per tile: the one with the least squared error on calibration tokens, clipping included.

The statistical model is Bussgang's decomposition of that quantiser (Bussgang 1952): a partial sum p with standard
deviation s_p becomes `g p + d`, with d zero-mean and uncorrelated with p. For Gaussian p, g and the variance of d are
functions of s_p / step alone, dead zone and clipping included. s_p follows from the token's inputs in the tile and the
mean square of the weights they meet. So the model costs a scaling of the inputs per token and tile (by g) and one draw
per output; d lasts one read and is addressed by example and position. It ignores that s_p differs between outputs.
"""

from dataclasses import dataclass
from functools import cache
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from halora.hardware.chip import Chip

_TABLE_LOG2 = (-8.0, 10.0)
_RANGE_FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)


def token_scale(x: Tensor) -> Tensor:
    """Largest input magnitude per token, `(..., 1)`: the digital scale in front of the converters."""
    return x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _in_tiles(values: Tensor, rows: int) -> Tensor:
    """Cut the last axis into tiles, the last one padded with zeros: (..., d_in) -> (..., tiles, rows)."""
    padded = F.pad(values, (0, -values.shape[-1] % rows))
    return padded.reshape(*values.shape[:-1], -1, rows)


def _partial_sums(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Partial sums per tile of scaled tokens; x (N, d_in), weight (d_out, d_in) -> (tiles, N, d_out)."""
    x_tiles = _in_tiles(x, rows).permute(1, 0, 2)  # (tiles, N, rows)
    w_tiles = _in_tiles(weight, rows).permute(1, 2, 0)  # (tiles, rows, d_out)
    return torch.bmm(x_tiles, w_tiles)


def _quantise(partial: Tensor, bits: int, full_scale: Tensor) -> Tensor:
    """Mid-tread ADC with 2^bits - 1 symmetric codes over +-full_scale."""
    top = 2 ** (bits - 1) - 1
    step: Tensor = full_scale / top
    return (partial / step).round().clamp(-top, top).mul(step)


def full_scale(x: Tensor, weight: Tensor, chip: Chip) -> Tensor:
    """The ADC range of every tile of a layer, (tiles, 1, 1), in units of weight times scaled input.

    Of fixed fractions of the tile's largest partial sum on calibration tokens x (N, d_in), the one with the least
    squared error.
    """
    partial = _partial_sums(x / token_scale(x), weight, chip.tile.rows)
    largest = partial.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    ranges = torch.stack([largest * fraction for fraction in _RANGE_FRACTIONS])
    errors = [(_quantise(partial, chip.adc.bits, r) - partial).square().mean(dim=(1, 2), keepdim=True) for r in ranges]
    return ranges.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]


def tilewise_product(x: Tensor, weight: Tensor, chip: Chip, adc_range: Tensor) -> Tensor:
    """x W^T through the tiles' converters, exactly: x (N, d_in), weight (d_out, d_in) -> (N, d_out)."""
    scale = token_scale(x)
    partial = _partial_sums(x / scale, weight, chip.tile.rows)
    return _quantise(partial, chip.adc.bits, adc_range).sum(dim=0) * scale


@dataclass(frozen=True)
class ConverterModel:
    """The statistical model of one layer's converters.

    Attributes:
        step: ADC step of every tile, `(tiles,)`, in units of weight times scaled input.
        weight_power: Mean square over outputs of the weights each input meets, `(d_in,)`.
        rows: Inputs per tile.
        bits: ADC resolution.
    """

    step: Tensor
    weight_power: Tensor
    rows: int
    bits: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs scaled by each tile's gain, and the standard deviation of the error per token.

        Args:
            x: `(..., d_in)`.

        Returns:
            Scaled inputs `(..., d_in)` and error `(..., 1)`; the product is `scaled @ W.T + error * unit_noise`.
        """
        scale = token_scale(x)
        power = (x / scale).square() * self.weight_power
        spread = _in_tiles(power, self.rows).sum(dim=-1).sqrt()  # (..., tiles)
        gain, error_power = _gaussian_response(spread / self.step, self.bits)
        error = (error_power * self.step.square()).sum(dim=-1, keepdim=True).sqrt() * scale
        return x * gain.repeat_interleave(self.rows, dim=-1)[..., : x.shape[-1]], error


def fit_converters(x: Tensor, weight: Tensor, chip: Chip) -> ConverterModel:
    """The statistical model of a layer, its ADC ranges set on calibration tokens.

    Args:
        x: Inputs of the layer, `(N, d_in)`.
        weight: Clean weight, `(d_out, d_in)`.
        chip: ADC resolution and tile height.
    """
    adc_range = full_scale(x, weight, chip)[:, 0, 0]
    step = adc_range / (2 ** (chip.adc.bits - 1) - 1)
    return ConverterModel(step, weight.square().mean(dim=0), chip.tile.rows, chip.adc.bits)


def _gaussian_response(spread: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gain and error variance (in steps squared) of the ADC for Gaussian sums of standard deviation `spread` steps."""
    gains, errors = _response_table(bits)
    low, high = _TABLE_LOG2
    place = (spread.clamp_min(2.0**low).log2() - low) / (high - low) * (len(gains) - 1)
    index = place.round().long().clamp(0, len(gains) - 1)
    return gains.to(spread)[index], errors.to(spread)[index]


@cache
def _response_table(bits: int) -> tuple[Tensor, Tensor]:
    """Bussgang gain and error variance on a logarithmic grid of spreads, from the thresholds of the quantiser."""
    spread = torch.logspace(*_TABLE_LOG2, 4096, base=2, dtype=torch.float64)[:, None]
    code = torch.arange(1, 2 ** (bits - 1), dtype=torch.float64)
    threshold = (code - 0.5) / spread
    gain = (2 * torch.exp(-threshold.square() / 2) / (spread * sqrt(2 * pi))).sum(dim=1)
    power = ((2 * code - 1) * torch.erfc(threshold / sqrt(2))).sum(dim=1)
    return gain, (power - gain.square() * spread[:, 0].square()).clamp_min(0)
