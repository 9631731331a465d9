"""Outliers kept in SRAM: the few weights that set a matrix's full scale, split off before the rest goes into RRAM.

The noise of a cell goes with the full scale it is programmed on, and the full scale with the largest weights. A chip
with SRAM beside its arrays can hold those: W = R + S, where R, the rest, is programmed into RRAM on its own, smaller
full scale, and S, the side matrix, is multiplied in SRAM without noise. Both follow from the weights and the chip's
description alone, so neither is ever stored.

S is rounded to its precision first, and R is what W then lacks, so that rounding costs nothing as long as R stays
within its full scale. The largest weights, of the matrix or of each tile, leave about their threshold behind in RRAM;
only their excess over it, rounded up, goes to SRAM: a cell that stood at 0 instead would carry the same noise. Columns
(whole inputs) and the leading singular part leave nothing behind but what rounding took.

Near it in the literature: QMC (arXiv 2601.14549; inliers in ReRAM, outliers in MRAM), HPD (arXiv 2508.11935; singular
part in digital logic), SpQR and SqueezeLLM (quantisation), PiSSA (arXiv 2404.02948; singular part in the LoRA branch).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halora.hardware.chip import Chip, Tile
from halora.hardware.mapping import Outliers, outlier_count
from halora.hardware.rounding import AS_IT_IS, rounded


class SideMatrix(ABC):
    """The part of a weight matrix (d_out, d_in) that is held in SRAM and multiplied without noise."""

    @abstractmethod
    def add_to(self, weight: Tensor) -> None:
        """Add it to a weight `(d_out, d_in)`, in place."""

    def rest_of(self, weight: Tensor) -> Tensor:
        """What is programmed into RRAM of a weight `(d_out, d_in)`: what it has beyond this; float32, a new tensor."""
        rest = weight.float().neg()
        self.add_to(rest)
        return rest.neg_()

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x S^T: `(..., d_in)` -> `(..., d_out)`, in the dtype of `x`."""


@dataclass(frozen=True)
class SparseSide(SideMatrix):
    """Single weights, by place.

    Attributes:
        places: Flat index of every value in the matrix, ascending.
        values: In float32.
        shape: `(d_out, d_in)`.
    """

    places: Tensor
    values: Tensor
    shape: torch.Size

    def add_to(self, weight: Tensor) -> None:
        """Add the values at their places."""
        flat = weight.view(-1)
        flat[self.places] = (flat[self.places].float() + self.values).to(weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Sum, for every output, of its few values times their inputs, in float32."""
        d_in = self.shape[1]
        places = torch.stack([self.places // d_in, self.places % d_in])
        matrix = torch.sparse_coo_tensor(places, self.values, self.shape, check_invariants=False)
        return (matrix @ x.flatten(0, -2).float().T).T.reshape(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True)
class ColumnSide(SideMatrix):
    """Whole columns, that is, all weights of a few inputs.

    Attributes:
        inputs: Their numbers, ascending.
        values: Their weights `(d_out, inputs)`, in float32.
    """

    inputs: Tensor
    values: Tensor

    def add_to(self, weight: Tensor) -> None:
        """Add the columns at their places."""
        weight[:, self.inputs] = (weight[:, self.inputs].float() + self.values).to(weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        """The product of those inputs alone."""
        return F.linear(x[..., self.inputs], self.values.to(x.dtype))


@dataclass(frozen=True)
class LowRankSide(SideMatrix):
    """The leading singular part as two thin factors.

    Attributes:
        down: `(rank, d_in)`, in float32.
        up: `(d_out, rank)`, in float32.
    """

    down: Tensor
    up: Tensor

    def add_to(self, weight: Tensor) -> None:
        """Add the product of the factors."""
        weight.copy_(weight.float().addmm_(self.up, self.down))

    def product(self, x: Tensor) -> Tensor:
        """Two thin products, as the LoRA branch's."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def side_matrix(weight: Tensor, outliers: Outliers, tile: Tile) -> SideMatrix | None:
    """What a chip keeps in SRAM of a weight matrix; none where it keeps nothing.

    Args:
        weight: `(d_out, d_in)`; left unchanged.
        outliers: Share of this matrix, below 1, what is taken out, and the precision in SRAM.
        tile: Its size; read where every tile gives its own share.
    """
    share, bits = outliers.share, outliers.weight_bits
    d_out, d_in = weight.shape
    count = outlier_count(d_in, d_out, share, outliers.by, (tile.rows, tile.columns))
    if count == 0:
        return None
    values = weight.detach().float()
    magnitudes = values.abs()
    match outliers.by:
        case "weight":
            return _excess(values, magnitudes, _threshold(magnitudes.flatten(), count), bits)
        case "tile":
            return _excess(values, magnitudes, _tile_thresholds(magnitudes, share, tile.rows, tile.columns), bits)
        case "column":
            inputs = magnitudes.amax(dim=0).topk(count).indices.sort().values
            return ColumnSide(inputs, rounded(values[:, inputs], bits, dim=1))
        case "singular":
            return _leading(values, count, bits)
        case unknown:
            assert_never(unknown)


def in_rram(weight: Tensor, chip: Chip) -> tuple[Tensor, SideMatrix | None]:
    """What a chip programs into RRAM of a layer's weight (d_out, d_in), and what it keeps of it in SRAM.

    Args:
        weight: `(d_out, d_in)`; left unchanged, and returned where SRAM keeps nothing.
        chip: Its outliers and its tile, as the layer meets them.
    """
    side = side_matrix(weight, chip.mapping.outliers, chip.tile)
    return (weight, None) if side is None else (side.rest_of(weight), side)


def _excess(values: Tensor, magnitudes: Tensor, threshold: Tensor, bits: int) -> SparseSide:
    """What single weights have over a threshold, which broadcasts over (d_out, d_in); a scale for every output.

    Rounded up, so that the rest stays under the threshold, unless a step of rounding is more than twice that.
    """
    at = outputs, inputs = (magnitudes > threshold).nonzero(as_tuple=True)
    excess = (magnitudes[at] - threshold.expand_as(values)[at]).copysign_(values[at])
    if bits < AS_IT_IS and excess.numel():
        largest = values.new_zeros(values.shape[0]).scatter_reduce_(0, outputs, excess.abs(), "amax")
        step = (largest / (2 ** (bits - 1) - 1))[outputs]
        excess = (excess.abs() / step * (1 - 1e-6)).ceil_().mul_(step).copysign(excess)
    return SparseSide(outputs * values.shape[1] + inputs, excess, values.shape)


def _threshold(magnitudes: Tensor, count: int) -> Tensor:
    """The largest magnitude that stays when `count` are taken out, a scalar; 0 when none stays."""
    if count >= magnitudes.numel():
        return magnitudes.new_zeros(())
    kept = magnitudes.numel() - count
    if magnitudes.device.type != "cpu":
        return magnitudes.kthvalue(kept).values
    return torch.from_numpy(np.partition(magnitudes.numpy(), kept - 1))[kept - 1]  # twelve times as fast there


def _tile_thresholds(magnitudes: Tensor, share: float, rows: int, columns: int) -> Tensor:
    """`_threshold` of every tile, each by its own number of weights, expanded to (d_out, d_in)."""
    d_out, d_in = magnitudes.shape
    thresholds = torch.empty_like(magnitudes)
    for out in range(0, d_out, columns):
        for first in range(0, d_in, rows):
            block = magnitudes[out : out + columns, first : first + rows]
            limit = _threshold(block.flatten(), round(share * block.numel()))
            thresholds[out : out + columns, first : first + rows] = limit
    return thresholds


def _leading(values: Tensor, rank: int, bits: int) -> LowRankSide:
    """The leading singular part of that rank, by the eigenvectors of the smaller Gram matrix in float64."""
    wide = values.double()
    tall = values.shape[0] > values.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, gram.shape[0] - rank :]  # ascending eigenvalues
    down, up = (vectors.T, wide @ vectors) if tall else (vectors.T @ wide, vectors)
    return LowRankSide(rounded(down.float(), bits, dim=1), rounded(up.float(), bits, dim=0))
