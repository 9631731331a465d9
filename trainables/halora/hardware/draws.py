"""Standard normal draws: true ones for chips that are scored, recycled ones for chips that are trained on, and coarse
ones for reads.

A chip of the training pool lasts a few steps and is met by one training only, so its draws may be cheap: a stretch of
one table of true draws, from a random place, every row of it with a random sign, which come from a table of their own.
The signs matter: without them two stretches that overlap would hold the same noise, and the mean of the table would be
found in every chip. Both places are the address's, so that recycled draws are as reproducible as true ones.

Reads need one draw per output of every token. Those are quantiles of the normal distribution at 65,536 equally likely
levels: variance 1, kurtosis 2.999, none beyond 4.33, at half the time of true draws.
"""

from collections.abc import Iterator
from functools import cache
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey, Role

_TABLE, _SIGNS = 2**24, 2**20
_TABLE_KEY = NoiseKey(role=Role.TRAIN, chip_seed=0, purpose="table")


def normal_rows(key: NoiseKey, like: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws in the shape of a matrix, at most `rows` rows at a time, each with the signs they are to be given.

    Args:
        key: Their address.
        like: `(d_out, d_in)`; its shape and device are taken, and by recycled draws its dtype.
        rows: Rows of a block; the draws do not depend on it.

    Yields:
        Draws `(rows, d_in)`, not to be written to, and their signs, `(rows, 1)` or a scalar; true draws in float32.
    """
    starts = range(0, like.shape[0], rows)
    if key.role is Role.TRAIN:
        draws, signs = _recycled(key, like)
        yield from ((draws[start : start + rows], signs[start : start + rows]) for start in starts)
        return
    generator, sign = key.generator(), torch.ones((), device=like.device)
    for start in starts:
        shape = (min(rows, like.shape[0] - start), like.shape[1])
        yield torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(like.device), sign


def standard_normal(key: NoiseKey, like: Tensor) -> Tensor:
    """Draws in the shape of `(d_out, d_in)`, float32, on its device."""
    ((draws, signs),) = normal_rows(key, like, like.shape[0])
    return draws * signs if key.role is Role.TRAIN else draws


def coarse_normal(key: NoiseKey, shape: tuple[int, int]) -> np.ndarray:
    """Standard normal draws in 65,536 levels, float32; a longer first axis continues a shorter one."""
    levels = key.uniform_bytes((shape[0], 2 * shape[1])).view(np.uint16)
    return np.take(_quantiles(), levels)


@cache
def _quantiles() -> np.ndarray:
    """The normal distribution's quantiles at the middles of equal shares of it, scaled to variance 1."""
    share = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.erfinv(2 * share - 1) * sqrt(2)
    return (quantiles / quantiles.square().mean().sqrt()).float().numpy()


def _recycled(key: NoiseKey, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of the matrix's shape, and a sign for each of its rows, `(d_out, 1)`."""
    rows, count, place = like.shape[0], like.numel(), key.seed()
    table = _table(like.device, like.dtype, max(_TABLE, 2 * count))
    signs = _signs(like.device, like.dtype, max(_SIGNS, 2 * rows))
    start, first = (place >> 64) % (len(table) - count + 1), place % (len(signs) - rows + 1)
    return table[start : start + count].view(like.shape), signs[first : first + rows]


@cache
def _table(device: torch.device, dtype: torch.dtype, length: int) -> Tensor:
    return torch.from_numpy(_TABLE_KEY.standard_normal((length,))).to(device, dtype)


@cache
def _signs(device: torch.device, dtype: torch.dtype, length: int) -> Tensor:
    bits = _TABLE_KEY.part("signs").uniform_bytes((length, 1)) & 1
    return torch.from_numpy(bits).to(device, dtype).mul_(2).sub_(1)
