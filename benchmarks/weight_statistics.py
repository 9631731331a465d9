"""Writes the statistics of a model's weights that `halora.hardware.fill` estimates fills from.

python -m benchmarks.weight_statistics smollm2-135m-instruct > statistics.yaml
"""

import sys

import numpy as np
import torch
from torch import Tensor

from halora.hardware.families import LINEAR_NAMES
from halora.hardware.mapping import LM_HEAD
from halora.training.models import plain_base

MAGNITUDES, PEAKS, MOST = 24, 6, 2**22


def units(weight: Tensor, name: str) -> Tensor:
    """The groups of weights with a scale of their own, `(groups, weights)`; parts of tiles are left out."""
    if name == "tensor_max":
        return weight.reshape(1, -1)
    if name == "channel_max":
        return weight
    side = int(name.partition(" ")[2])
    rows, columns = (size // side * side for size in weight.shape)
    tiles = weight[:rows, :columns].reshape(rows // side, side, columns // side, side)
    return tiles.transpose(1, 2).reshape(-1, side * side)


def bin_means(values: np.ndarray, count: int) -> list[float]:
    """Means of so many equal parts of the values in their order."""
    return [float(f"{part.mean():.4g}") for part in np.array_split(np.sort(values), count)]


def main(model: str) -> None:
    """Print the statistics as YAML, a line per kind and scale."""
    by_kind: dict[str, list[Tensor]] = {}
    for name, module in plain_base(model, "fp32").causal_lm.named_modules():
        kind = name.rpartition(".")[2]
        if kind in (*LINEAR_NAMES, LM_HEAD):
            by_kind.setdefault(kind, []).append(module.weight.detach())
    for kind, weights in by_kind.items():
        print(f"    {kind}:")
        for scale in ("tensor_max", "channel_max", "tile_max 64", "tile_max 128", "tile_max 256"):
            groups = [units(weight, scale) for weight in weights]
            if any(group.numel() == 0 for group in groups):
                continue
            spreads = [group.std(dim=1, keepdim=True).clamp_min(1e-12) for group in groups]
            ratios = [group.abs() / spread for group, spread in zip(groups, spreads, strict=True)]
            step = max(sum(ratio.numel() for ratio in ratios) // MOST, 1)
            magnitudes = torch.cat([ratio.flatten()[::step] for ratio in ratios]).numpy()
            peaks = torch.cat([ratio.amax(dim=1) for ratio in ratios]).numpy()
            print(f"      {scale}:")
            print(f"        magnitudes: {bin_means(magnitudes, MAGNITUDES)}")
            print(f"        peaks: {bin_means(peaks, min(PEAKS, len(peaks)))}")


if __name__ == "__main__":
    main(sys.argv[1])
