"""Standard normal draws as tensors: true ones for chips that are scored, recycled ones for chips that are trained on.

A chip of the training pool lasts a few steps and is met by one training only, so its draws may be cheap: a stretch of
one table of true draws, from a random place, every row of it with a random sign. The signs matter: without them two
stretches that overlap would hold the same noise, and the mean of the table would be found in every chip. Place and
signs are drawn from the address, so that recycled draws are as reproducible as true ones.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey, Role

_TABLE = 2**24
_TABLE_KEY = NoiseKey(role=Role.TRAIN, chip_seed=0, purpose="table")


def normal_rows(key: NoiseKey, like: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws in the shape of a matrix, at most `rows` rows at a time, each with the signs they are to be given.

    Args:
        key: Their address.
        like: `(d_out, d_in)`; its shape and device are taken, and by recycled draws its dtype.
        rows: Rows of a block; true draws do not depend on it, recycled ones do.

    Yields:
        Draws `(rows, d_in)`, not to be written to, and their signs, `(rows, 1)` or a scalar; true draws in float32.
    """
    generator, columns = key.generator(), like.shape[1]
    for start in range(0, like.shape[0], rows):
        shape = (min(rows, like.shape[0] - start), columns)
        if key.role is Role.TRAIN:
            yield _recycled(generator, shape, like)
        else:
            draws = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
            yield draws.to(like.device), torch.ones((), device=like.device)


def standard_normal(key: NoiseKey, like: Tensor) -> Tensor:
    """Draws in the shape of `(d_out, d_in)`, float32, on its device."""
    ((draws, signs),) = normal_rows(key, like, like.shape[0])
    return draws * signs if key.role is Role.TRAIN else draws


def _recycled(generator: np.random.Generator, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    count = rows * columns
    table = _table(like.device, like.dtype, max(_TABLE, 2 * count))
    start = int(generator.integers(len(table) - count + 1))
    signs = torch.from_numpy(generator.integers(0, 2, (rows, 1)).astype(np.float32)).mul_(2).sub_(1)
    return table[start : start + count].view(shape), signs.to(table)


@cache
def _table(device: torch.device, dtype: torch.dtype, length: int) -> Tensor:
    return torch.from_numpy(_TABLE_KEY.standard_normal((length,))).to(device, dtype)
