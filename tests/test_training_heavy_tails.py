"""Oracles: closed forms of the tails, the model before it was rescaled, tails measured on Qwen2.5-0.5B weights."""

import copy
from statistics import median

import pytest
import torch

from halora.evaluation.scoring import option_scores
from halora.training.batches import pack
from halora.training.heavy_tails import Spread, Tails, add_outliers
from halora.training.models import load_base, plain_base
from halora.training.rram import install
from halora.trial_runner import task_rows

MODEL = "smollm2-135m-instruct"
# Largest |w| and rms of block maxima in standard deviations of the tensor, and mean |w| over the largest; medians.
QWEN_MEDIANS = {
    "down_proj": (54, 8.7, 0.014),
    "q_proj": (22, 8.4, 0.031),
    "gate_proj": (26, 7.8, 0.030),
    "up_proj": (21, 5.5, 0.036),
}
QWEN_RANGES = ((12, 19), (5, 12), (0.034, 0.062))  # of the medians of k_proj, v_proj and o_proj


def test_tails_of_a_matrix_with_known_ones():
    weight = torch.zeros(128, 100)  # four blocks, two of them narrower
    weight[:, 0::2], weight[:, 1::2] = 1.0, -1.0
    weight[0, 0], weight[70, 99] = 10.0, -6.0
    std = weight.std().item()
    tails = Tails.of(weight)
    assert tails.peak == pytest.approx(10 / std)
    assert tails.block == pytest.approx(((100 + 1 + 1 + 36) / 4) ** 0.5 / std)
    assert tails.fill == pytest.approx((12798 + 16) / 12800 / 10)


def test_a_spread_is_log_normal():
    spread = Spread(peak=(20, 40), block=(5, 10))
    assert spread.at(0.5) == pytest.approx((20, 5))
    assert spread.at(0.9) == pytest.approx((40, 10))
    assert spread.at(0.1) == pytest.approx((10, 2.5))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_every_family_computes_the_same_to_the_last_bit(tiny_models, architecture, dtype):
    causal_lm = plain_base(tiny_models[architecture], dtype).causal_lm
    before = copy.deepcopy(causal_lm)
    add_outliers(causal_lm)
    tokens = torch.arange(100, 148).reshape(2, 24)
    assert torch.equal(causal_lm(input_ids=tokens).logits, before(input_ids=tokens).logits)
    changed = {
        name.split(".")[-2]
        for (name, new), old in zip(causal_lm.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == linears | {"input_layernorm", "post_attention_layernorm"}
    for name in sorted(linears):
        old, new = (
            median(Tails.of(weight).peak for key, weight in model.named_parameters() if key.endswith(f"{name}.weight"))
            for model in (before, causal_lm)
        )
        assert new > old


@torch.no_grad()
def test_the_embedded_twin_scores_as_smollm2_does():
    rows = task_rows("arc-easy", "validation", 8)
    scores = []
    for name in (MODEL, f"{MODEL}-outliers"):
        base = load_base(name, "fp32")
        packed = [pack(row, base.tokenizer) for row in rows]
        scores.append(option_scores(base.causal_lm, install(base.causal_lm), packed, batch_size=8))
    for plain, twin in zip(*scores, strict=True):
        assert twin == pytest.approx(plain, abs=1e-3)


def test_the_embedded_twin_has_the_tails_of_a_qwen():
    causal_lm = plain_base(f"{MODEL}-outliers", "fp32").causal_lm
    tails: dict[str, list[Tails]] = {}
    for name, weight in causal_lm.named_parameters():
        if name.endswith("_proj.weight"):
            tails.setdefault(name.split(".")[-2], []).append(Tails.of(weight))
    medians = {
        name: tuple(median(getattr(each, figure) for each in of_kind) for figure in ("peak", "block", "fill"))
        for name, of_kind in tails.items()
    }
    for name, expected in QWEN_MEDIANS.items():
        assert medians.pop(name) == pytest.approx(expected, rel=0.2), name
    assert set(medians) == {"k_proj", "v_proj", "o_proj"}
    for name, found in medians.items():
        for value, (low, high) in zip(found, QWEN_RANGES, strict=True):
            assert 0.8 * low <= value <= 1.2 * high, name


def test_outliers_do_not_take_over_a_matrix():
    """Noise relative to a weight that nothing is multiplied by would bury all others: the bulk keeps its power."""
    plain, twin = (
        {
            name: Tails.of(weight)
            for name, weight in plain_base(model, "fp32").causal_lm.named_parameters()
            if name.endswith("_proj.weight")
        }
        for model in (MODEL, f"{MODEL}-outliers")
    )
    for name, before in plain.items():
        assert twin[name].fill * twin[name].peak > 0.8 * before.fill * before.peak, name  # of mean |w| over the std
