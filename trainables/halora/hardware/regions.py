"""Parts of a weight matrix that have one full scale each: the whole matrix, an output channel, or a tile.

What is known per part is kept small: a scalar, `(d_out, 1)`, or for tiles `(d_out, row tiles)`, equal over the outputs
of a tile. `at_rows` and `widened` make it broadcast over the weights.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Region = Literal["tensor_max", "channel_max", "tile_max"]
"""What the largest weight is taken of: the matrix, each output channel, or each tile."""


def largest_magnitude(weight: Tensor, region: Region, rows: int, columns: int) -> Tensor:
    """max |W| of every region of (d_out, d_in), without a copy of the matrix; in its dtype.

    Args:
        weight: `(d_out, d_in)`.
        region: What the largest is taken of.
        rows: Inputs of a tile.
        columns: Outputs of a tile.
    """
    if region == "tile_max":
        return _by_tile(weight, columns, lambda band: in_tiles(_largest(band, 0), rows).amax(dim=-1))
    return _largest(weight, None if region == "tensor_max" else 1)


def standard_deviation(weight: Tensor, region: Region, rows: int, columns: int) -> Tensor:
    """Standard deviation of the weights of every region, as `largest_magnitude`; float32, 0 for a single weight."""

    def of_band(band: Tensor) -> Tensor:
        values = band.float()
        count = in_tiles(torch.ones_like(values[0]), rows).sum(dim=-1) * len(values)
        total, power = (in_tiles(part.sum(dim=0), rows).sum(dim=-1) for part in (values, values.square()))
        return ((power - total.square() / count) / (count - 1).clamp_min(1)).clamp_min(0).sqrt()

    match region:
        case "tile_max":
            return _by_tile(weight, columns, of_band)
        case "channel_max":
            return weight.float().std(dim=1, keepdim=True, correction=min(1, weight.shape[1] - 1))
        case "tensor_max":
            return weight.float().std(correction=min(1, weight.numel() - 1))


def at_rows(values: Tensor, rows: slice, in_features: int, tile_rows: int) -> Tensor:
    """Some outputs of what is known per region or weight, broadcasting over their weights (rows, in_features)."""
    of_rows = values if values.ndim < 2 or values.shape[0] == 1 else values[rows]
    return widened(of_rows, in_features, tile_rows)


def widened(values: Tensor, in_features: int, tile_rows: int) -> Tensor:
    """What is known per row tile, `(..., row tiles)`, for every input of it; other values as they are."""
    if values.ndim < 2 or values.shape[-1] in (1, in_features):
        return values
    return values.repeat_interleave(tile_rows, dim=-1)[..., :in_features]


def in_tiles(values: Tensor, rows: int) -> Tensor:
    """Cut the last axis into tiles, the last one padded with zeros: (..., d_in) -> (..., tiles, rows)."""
    padded = F.pad(values, (0, -values.shape[-1] % rows))
    return padded.reshape(*values.shape[:-1], -1, rows)


def _by_tile(weight: Tensor, columns: int, of_band: Callable[[Tensor], Tensor]) -> Tensor:
    """(d_out, row tiles): what `of_band` says of the outputs of every column of tiles, (row tiles,)."""
    bands = torch.split(weight, columns)
    return torch.cat([of_band(band).expand(len(band), -1) for band in bands])


def _largest(values: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        low, high = values.aminmax()
    else:  # ten times as fast as `aminmax` along an axis
        low, high = values.amin(dim, keepdim=dim > 0), values.amax(dim, keepdim=dim > 0)
    return (-low).maximum(high)
