"""Oracles: the totals published for HaLoRA (arXiv 2502.19747), and a brute-force count of conversions."""

from itertools import product

import pytest

from halora.hardware.chip import load_chip
from halora.hardware.energy import LinearShape, ModelShape, energy_constants, energy_per_token

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def _llama(hidden: int, heads: int, head_dim: int, layers: int) -> ModelShape:
    return ModelShape.from_config(
        {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "intermediate_size": 8192,
            "num_hidden_layers": layers,
            "vocab_size": 128256,
        }
    )


LLAMA_1B, LLAMA_3B = _llama(2048, 32, 64, 16), _llama(3072, 24, 128, 28)


def _chip(**overrides):
    return load_chip({"preset": "halora-2026", **overrides})


@pytest.mark.parametrize(
    ("shape", "chip_mj", "gpu_mj"), [(LLAMA_1B, 18.1, 550.5), (LLAMA_3B, 51.3, 1666.8)], ids=["1B", "3B"]
)
def test_totals_of_the_paper(shape, chip_mj, gpu_mj):
    energy = energy_per_token(shape, _chip(), rank=4, targets=PAPER_TARGETS)
    total_mj = energy.total_uj_per_token * 512 / 1000
    assert total_mj == pytest.approx(chip_mj, rel=0.05)
    assert 0.030 < total_mj / gpu_mj < 0.035
    assert 0.004 < energy.components_uj["lora_sram"] / energy.total_uj_per_token < 0.006


def test_counts_agree_with_brute_force():
    linear = LinearShape("q_proj", 100, 70)
    shape = ModelShape(layers=3, hidden=100, heads=2, head_dim=5, vocabulary=9, linears=(linear,))
    chip = _chip(tile={"rows": 32, "columns": 16}, adc={"bits": 6})
    conversions = driven = cells = 0
    for _, first_row, first_column in product(range(3), range(0, 100, 32), range(0, 70, 16)):
        rows, columns = min(32, 100 - first_row), min(16, 70 - first_column)
        conversions += columns  # every column of a tile ends in one conversion
        driven += rows
        cells += 2 * rows * columns
    c = energy_constants()
    components = energy_per_token(shape, chip, rank=2, targets=("q_proj",), context_tokens=11).components_uj
    assert components["adc"] == pytest.approx(conversions * c["adc_conversion_pj"][6] * 1e-6)
    assert components["shift_add"] == pytest.approx(conversions * c["shift_add_pj"] * 1e-6)
    assert components["dac"] == pytest.approx(driven * c["dac_conversion_pj"] * 1e-6)
    assert components["array"] == pytest.approx(cells * c["cell_read_fj"] * 1e-9)
    assert components["lora_sram"] == pytest.approx(3 * 2 * (100 + 70) * c["sram_mac_fj"] * 1e-9)
    attention_macs = 3 * 2 * 11 * 5 * 2  # layers, heads, context, head dimension, scores and values
    assert components["attention"] == pytest.approx(attention_macs * c["attention_mac_fj"] * 1e-9)
    assert components["softmax"] == pytest.approx(3 * 2 * 11 * c["softmax_element_pj"] * 1e-6)


def _total(rank: int = 4, targets: tuple[str, ...] = PAPER_TARGETS, **chip) -> float:
    return energy_per_token(LLAMA_1B, _chip(**chip), rank=rank, targets=targets).total_uj_per_token


def test_energy_moves_the_right_way():
    by_bits = [_total(adc={"bits": bits}) for bits in range(4, 11)]
    assert by_bits == sorted(set(by_bits))
    by_rows = [_total(tile={"rows": rows}) for rows in (256, 128, 64, 32)]
    assert by_rows == sorted(set(by_rows))
    assert _total(rank=16) > _total(rank=4) > _total(rank=1)
    assert _total(targets=("q_proj",)) < _total()
    assert _total(lora_weight_bits=4) < _total()


def test_boundary_adds_and_drops_components():
    without = energy_per_token(
        LLAMA_1B, _chip(boundary={"attention": False, "lm_head": False}), rank=4, targets=PAPER_TARGETS
    )
    assert {"attention", "softmax"}.isdisjoint(without.components_uj)
    assert "attention" not in without.boundary
    with_head = energy_per_token(
        LLAMA_1B, _chip(boundary={"attention": False, "lm_head": True}), rank=4, targets=PAPER_TARGETS
    )
    conversions = 128256 * 2048 // 64
    expected = without.components_uj["adc"] + conversions * energy_constants()["adc_conversion_pj"][8] * 1e-6
    assert with_head.components_uj["adc"] == pytest.approx(expected)


def test_shape_falls_back_where_a_config_is_silent():
    shape = ModelShape.from_config(
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "vocab_size": 10,
            "head_dim": None,
        }
    )
    assert shape.head_dim == 16
    assert {linear.name: (linear.in_features, linear.out_features) for linear in shape.linears} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (64, 64)),
        **dict.fromkeys(("gate_proj", "up_proj"), (64, 96)),
        "down_proj": (96, 64),
    }
