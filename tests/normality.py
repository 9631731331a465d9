"""What draws that claim to be independent and standard normal have to pass."""

from math import erfc, sqrt

import numpy as np
import torch

INDEPENDENT = 6.0
"""Of `largest_correlation` over 2^16 draws: the largest of 1.1e5 standard normals is above with probability 2e-4."""


def largest_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Largest correlation of `a` with `b` over every shift, on overlaps of at least an eighth of their length.

    A shift's value is the sum of products over the root of the overlap: standard normal for independent draws.
    """
    size = 2 * len(a)
    products = np.fft.irfft(np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size)), size)
    shifts = np.arange(size)
    overlap = len(a) - np.minimum(shifts, size - shifts)
    wide = overlap >= len(a) // 8
    return float(np.max(np.abs(products[wide]) / np.sqrt(overlap[wide])))


def assert_moments_are_normal(draws: np.ndarray) -> None:
    """The first four moments, each within 4.5 standard errors."""
    draws = draws.astype(np.float64)
    errors = [1, np.sqrt(2), np.sqrt(15), np.sqrt(96)]  # standard deviations of x, x^2, x^3, x^4
    for power, (expected, error) in enumerate(zip((0, 1, 0, 3), errors, strict=True), start=1):
        assert abs(np.mean(draws**power) - expected) < 4.5 * error / np.sqrt(len(draws))


def assert_normal_out_to_four_sigma(draws: np.ndarray) -> None:
    """Kolmogorov-Smirnov over all draws, then over the tails alone, rescaled to themselves; and their counts."""
    draws = np.sort(draws)
    critical = 1.95  # of sqrt(n) D, at a probability of 0.001
    assert kolmogorov_smirnov(draws, -np.inf) < critical
    for edge in (2.0, 3.0, 4.0):
        for tail in (draws[draws > edge], -draws[draws < -edge][::-1]):
            expected = len(draws) * upper_tail(edge)
            assert abs(len(tail) - expected) < 4.5 * np.sqrt(expected)
            assert kolmogorov_smirnov(tail, edge) < critical


def upper_tail(x: float) -> float:
    return 0.5 * erfc(x / sqrt(2))


def kolmogorov_smirnov(ordered: np.ndarray, edge: float) -> float:
    """sqrt(n) times the largest distance from the normal distribution above `edge`."""
    above = torch.special.erfc(torch.from_numpy(ordered.astype(np.float64)) / sqrt(2)).numpy() / 2
    expected = 1 - above / upper_tail(edge)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.max(expected - steps[:-1]), np.max(steps[1:] - expected))
    return float(distance * np.sqrt(len(ordered)))
