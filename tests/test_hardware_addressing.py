"""Oracles: determinism across processes and argument orders; moments of a standard normal."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from halora.hardware.addressing import NoiseKey, Role, canonical_name, derive_seed

KEY = NoiseKey(role=Role.SEARCH, chip_seed=3, module="layers.0.q_proj", purpose="adc", draw=2, example="row-7")
_PRINT_DRAWS = """
from halora.hardware.addressing import NoiseKey, Role, derive_seed
key = NoiseKey(role=Role.SEARCH, chip_seed=3, module="layers.0.q_proj", purpose="adc", draw=2, example="row-7")
print(key.standard_normal((3, 5)).tobytes().hex(), key.uniform_bytes((2, 9)).tobytes().hex(), derive_seed("a", 1))
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

    here = [KEY.standard_normal((3, 5)).tobytes().hex(), KEY.uniform_bytes((2, 9)).tobytes().hex()]
    assert draws("1").split() == draws("2").split() == [*here, str(derive_seed("a", 1))]


@pytest.mark.parametrize(
    "change",
    [
        {"role": Role.CERTIFY},
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
