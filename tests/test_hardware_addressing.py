"""Oracles: determinism across processes and argument orders; the normal distribution's moments, tails and quantiles;
independence over every shift, with a recycled pool of noise as the generator that must fail.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from normality import (
    INDEPENDENT,
    assert_moments_are_normal,
    assert_normal_out_to_four_sigma,
    kolmogorov_smirnov,
    largest_correlation,
)

from halora.hardware.addressing import NoiseKey, Role, canonical_name, derive_seed

KEY = NoiseKey(role=Role.SEARCH, chip_seed=3, module="layers.0.q_proj", purpose="adc", draw=2, example="row-7")
_PRINT_DRAWS = """
from halora.hardware.addressing import NoiseKey, Role, derive_seed
key = NoiseKey(role=Role.SEARCH, chip_seed=3, module="layers.0.q_proj", purpose="adc", draw=2, example="row-7")
draws = (key.standard_normal((3, 5)), key.uniform_bytes((2, 9)), key.uniform((2, 3)))
print(*(d.tobytes().hex() for d in draws), derive_seed("a", 1))
"""


def test_same_key_gives_the_same_draws_whatever_was_drawn_before():
    first = KEY.standard_normal((4, 6))
    replace(KEY, draw=99).standard_normal((1000,))
    np.testing.assert_array_equal(KEY.standard_normal((4, 6)), first)
    np.testing.assert_array_equal(KEY.uniform_bytes((4, 6)), KEY.uniform_bytes((4, 6)))


def test_draws_are_equal_in_separate_processes():
    def draws(hash_seed: str) -> str:
        command = [sys.executable, "-c", _PRINT_DRAWS]
        return subprocess.run(
            command, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout

    drawn = (KEY.standard_normal((3, 5)), KEY.uniform_bytes((2, 9)), KEY.uniform((2, 3)))
    here = [draw.tobytes().hex() for draw in drawn]
    assert draws("1").split() == draws("2").split() == [*here, str(derive_seed("a", 1))]


@pytest.mark.parametrize(
    "change",
    [
        {"role": Role.CERTIFY},
        {"series": "another"},
        {"role": Role.TRAIN},
        {"chip_seed": 4},
        {"module": "layers.0.k_proj"},
        {"purpose": "programming"},
        {"draw": 3},
        {"example": "row-8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_address_gives_independent_draws(change):
    here, there = KEY.standard_normal((20_000,)), replace(KEY, **change).standard_normal((20_000,))
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.03  # 4 standard errors
    assert not np.array_equal(KEY.uniform_bytes((64,)), replace(KEY, **change).uniform_bytes((64,)))


def test_the_whole_address_is_hashed_not_its_concatenation():
    here, there = replace(KEY, module="ab", purpose="c"), replace(KEY, module="a", purpose="bc")
    assert not np.array_equal(here.standard_normal((8,)), there.standard_normal((8,)))
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed("a", "b") != derive_seed("b", "a")


def test_at_moves_the_key_within_the_same_chip():
    moved = KEY.at(module="m", purpose="p", example="e")
    assert moved == NoiseKey(role=Role.SEARCH, chip_seed=3, module="m", purpose="p", draw=2, example="e")


def test_standard_normal_has_its_moments():
    draws = KEY.standard_normal((400, 500))
    assert draws.dtype == np.float32
    assert draws.shape == (400, 500)
    assert abs(draws.mean()) < 0.01
    assert draws.std() == pytest.approx(1, abs=0.01)
    assert np.mean(np.abs(draws) > 1.959964) == pytest.approx(0.05, abs=0.002)


def test_uniform_bytes_cover_all_levels_evenly():
    counts = np.bincount(KEY.uniform_bytes((1000, 256)).ravel(), minlength=256)
    chi_square = np.square(counts - 1000).sum() / 1000
    assert 160 < chi_square < 360  # 255 degrees of freedom, +-4.5 standard deviations


def test_longer_uniform_bytes_continue_shorter_ones():
    long = KEY.uniform_bytes((50, 7))
    for tokens in (1, 3, 49):
        np.testing.assert_array_equal(KEY.uniform_bytes((tokens, 7)), long[:tokens])


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.layers.1.mlp.up_proj",
        "base_model.model.layers.1.mlp.up_proj",
        "module.model.layers.1.mlp.up_proj.base_layer",
        "_orig_mod.model.layers.1.mlp.up_proj",
        "causal_lm.model.layers.1.mlp.up_proj",
    ],
)
def test_canonical_name_drops_wrappers(wrapped):
    assert canonical_name(wrapped) == "model.layers.1.mlp.up_proj"


def test_uniform_draws_are_finer_than_bytes_and_even():
    draws = KEY.uniform((1000, 1000))
    assert draws.dtype == np.float32
    assert 0 <= draws.min() < 1e-5
    assert 1 - 1e-5 < draws.max() < 1
    assert len(np.unique(draws)) > 900_000
    counts = np.histogram(draws, bins=1000, range=(0, 1))[0]
    assert 780 < np.square(counts - 1000).sum() / 1000 < 1220  # 999 degrees of freedom, +-5 standard deviations


def test_parts_and_lasting_draws_have_addresses_of_their_own():
    assert KEY.part("slice 0").purpose == "adc/slice 0"
    assert KEY.part("slice 0").draw == 2
    assert KEY.part("read", draw=5) == replace(KEY, purpose="adc/read", draw=5)
    assert KEY.lasting() == replace(KEY, draw=0, example="") == replace(KEY, draw=9, example="x").lasting()


# The generator.

_LENGTH = 1 << 16


def _draws(**change) -> np.ndarray:
    return replace(KEY, **change).standard_normal((_LENGTH,))


@pytest.mark.parametrize(
    "change",
    [{"module": "layers.1.q_proj"}, {"draw": 3}, {"chip_seed": 4}, {"role": Role.CERTIFY}, {"example": "row-8"}],
    ids=lambda change: next(iter(change)),
)
def test_no_window_of_one_draw_overlaps_another(change):
    assert largest_correlation(_draws(), _draws(**change)) < INDEPENDENT


def test_a_draw_does_not_repeat_itself():
    draws = _draws()
    assert largest_correlation(draws[: _LENGTH // 2], draws[_LENGTH // 2 :]) < INDEPENDENT


def test_a_recycled_pool_of_noise_fails_the_window_test():
    """The cheap trick of taking windows at random offsets of one pool, used as it is."""
    pool = KEY.standard_normal((4 * _LENGTH,))
    offsets = [derive_seed(layer) % (3 * _LENGTH) for layer in range(4)]
    windows = [pool[start : start + _LENGTH] for start in offsets]
    largest = max(largest_correlation(windows[i], windows[j]) for i in range(4) for j in range(i))
    assert largest > 10 * INDEPENDENT


def test_many_short_draws_are_uncorrelated():
    draws = np.stack([replace(KEY, module=f"l{i % 16}", draw=i // 16).standard_normal((4000,)) for i in range(128)])
    correlation = np.corrcoef(draws)[np.triu_indices(128, k=1)]
    assert np.abs(correlation).max() < 5.5 / np.sqrt(4000)  # of 8128 pairs
    assert correlation.std() == pytest.approx(1 / np.sqrt(4000), rel=0.05)


def test_four_moments_are_those_of_a_standard_normal():
    assert_moments_are_normal(KEY.part("moments").standard_normal((4_000_000,)))


def test_distribution_is_normal_out_to_four_sigma():
    assert_normal_out_to_four_sigma(np.concatenate([KEY.part(str(i)).standard_normal((1_000_000,)) for i in range(4)]))


def test_the_distribution_test_sees_a_wrong_tail():
    draws = np.sort(KEY.part("0").standard_normal((1_000_000,)).clip(-3.5, 3.5))
    tail = draws[draws > 3.0]
    assert kolmogorov_smirnov(tail, 3.0) > 1.95
