"""How full the cells are: the mean conductance of a layer's cells, on which the array's energy and the IR drop depend.

The fill of a layer is the mean over its pairs of cells, all slices alike, of what a pair holds over the most it can
hold: mean |weight| over the scale for a single slice of continuous cells. Cells are taken where programming aims them,
so later slices of cells without levels, which hold programming errors only, count as empty.

Where the weights are at hand it is measured on them. Elsewhere it follows from `weight_statistics.yaml`: for every kind
of layer, magnitudes over the standard deviation, and largest magnitudes over it, of a matrix, an output channel or a
tile. Taking the two as independent leaves an error of a few percent. Pricing and simulation both call `mean_fill`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from halora.hardware.chip import Cells, Chip, Coding
from halora.hardware.families import parts_of

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2**19  # weights looked at together, about

LayerFill = Callable[[str, Chip], float]
"""Fill of a layer, by its canonical name, on the chip that it meets, whose cells state none."""


def mean_fill(stored: Tensor | np.ndarray, cells: Cells, coding: Coding) -> float:
    """Mean fill of the pairs of cells that hold weights over their scale, any shape, in [-1, 1]."""
    left: Any = abs(stored)
    total = 0.0
    for index in range(coding.slices):
        held = left.clip(0, 1)
        if cells.levels is not None:
            held = (held * (cells.levels - 1)).round() / (cells.levels - 1)
        total += float(held.mean())
        if cells.levels is None or index + 1 == coding.slices:
            break
        left = abs(left - held) * coding.slice_ratio
    return total / coding.slices


def layer_fill(weight: Tensor, chip: Chip) -> float:
    """Fill of a layer on a chip: what its cells state, else that of the weight `(d_out, d_in)`."""
    from halora.hardware.cells import clip_limit, clipped, weight_scale
    from halora.hardware.regions import at_rows

    if chip.cells.mean_fill is not None:
        return chip.cells.mean_fill
    limit = clip_limit(weight, chip.coding, chip.tile)
    scale = weight_scale(clipped(weight, limit, chip.tile), chip.coding, chip.tile)
    inputs = weight.shape[1]
    total, step = 0.0, max(_BLOCK // inputs, 1)  # so that memory stays that of the weight
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        cut = None if limit is None else at_rows(limit, rows, inputs, chip.tile.rows)
        stored = clipped(weight[rows], cut, chip.tile) / at_rows(scale, rows, inputs, chip.tile.rows)
        total += mean_fill(stored, chip.cells, chip.coding) * stored.numel()
    return total / weight.numel()


def estimated_fill(source: str) -> LayerFill:
    """Fills by the statistics of a source in `weight_statistics.yaml`: `smollm2`, or `qwen2.5`."""

    def fill(layer: str, chip: Chip) -> float:
        return _estimate(source, layer, chip)

    return fill


def _estimate(source: str, layer: str, chip: Chip) -> float:
    """Of a fused layer the mean over its parts."""
    return fmean(_kind_estimate(source, kind, chip) for kind in parts_of(layer.rpartition(".")[2]))


def _kind_estimate(source: str, kind: str, chip: Chip) -> float:
    coding, entry = chip.coding, _statistics()[source]
    factors = entry.get("peaks_over", {})
    layers: dict[str, Any] = _statistics()[factors.get("source", source)]["layers"]
    name: str = coding.scale
    if name == "tile_max":
        name = _nearest_tile(chip, layers[kind])
    magnitudes = np.array(layers[kind][name]["magnitudes"])
    peaks = np.array(layers[kind][name]["peaks"]) * factors.get(name.partition(" ")[0], {}).get(kind, 1.0)
    limit = np.inf if coding.clip_std is None else coding.clip_std
    outliers = chip.mapping.outliers
    if outliers.by in ("weight", "tile") and outliers.share:
        peaks = _without_largest(magnitudes, peaks, outliers.share)
    stored = np.minimum(magnitudes, limit)[None] / np.minimum(peaks, limit)[:, None]
    return mean_fill(stored.clip(0, 1), chip.cells, coding)


def _without_largest(magnitudes: np.ndarray, peaks: np.ndarray, share: float) -> np.ndarray:
    """Largest magnitudes once a share is taken out, between those of the last part and the peaks.

    Linear in the logarithm of the share above, which is half a part at the one and a millionth at the other.
    """
    last = 0.5 / len(magnitudes)
    if share >= last:
        middles = (np.arange(len(magnitudes)) + 0.5) / len(magnitudes)
        return np.full_like(peaks, np.interp(1 - share, middles, magnitudes))
    reached = min(float(np.log(last / share) / np.log(last / 1e-6)), 1.0)
    left: np.ndarray = magnitudes[-1] + np.maximum(peaks - magnitudes[-1], 0.0) * reached
    return left


def _nearest_tile(chip: Chip, known: dict[str, Any]) -> str:
    """The measured tile that is nearest in its number of cells."""
    sizes = {int(name.partition(" ")[2]): name for name in known if name.startswith("tile_max")}
    size = np.log(chip.tile.rows * chip.tile.columns) / 2
    return sizes[min(sizes, key=lambda side: abs(float(np.log(side) - size)))]


@cache
def _statistics() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((files("halora.hardware") / "weight_statistics.yaml").read_text(encoding="utf-8")))
