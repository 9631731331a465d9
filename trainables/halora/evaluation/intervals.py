"""Intervals that account for both samples an accuracy rests on: the rows asked and the chips they were asked on.

Rows and chips are crossed (every chip answers every row), so both are resampled, independently: the pigeonhole
bootstrap (Owen, Annals of Applied Statistics 2007), which is slightly wide rather than too narrow.
"""

from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def crossed_bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of `values` (chips, rows) with the central 95 % of its bootstrap over chips and rows."""
    rng = np.random.default_rng(seed)
    chips, rows = values.shape
    chip_weights = rng.multinomial(chips, np.full(chips, 1 / chips), size=_RESAMPLES) / chips
    row_weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES) / rows
    means = np.einsum("sc,cr,sr->s", chip_weights, values, row_weights, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
