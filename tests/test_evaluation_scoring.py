"""Oracle: one plain `transformers` forward per option."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halora.evaluation.scoring import margin, option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.training.batches import pack
from halora.training.models import load_base
from halora.training.reads import calibrate
from halora.training.rram import install
from halora.training.tasks import Row, load_rows


@torch.no_grad()
def _plain_scores(model, tokenizer, row: Row) -> list[float]:
    prompt = tokenizer(row.prompt).input_ids
    scores = []
    for option in row.options:
        tokens = tokenizer(option).input_ids
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.double().log_softmax(dim=-1)[range(len(tokens)), tokens]
        scores.append(chosen.sum().item())
    return scores


def _uneven_rows(tiny_task: str) -> list[Row]:
    long = Row("long", "Question: Why?\nAnswer:", (" because of the weather in spring", " so", " 1234567"), 0)
    return [*load_rows(tiny_task, "validation")[:9], long]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_one_pass_scores_every_option_as_a_sequence_of_its_own(tiny_models, tiny_task, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    rows = _uneven_rows(tiny_task)
    packed = [pack(row, base.tokenizer) for row in rows]
    scores = option_scores(base.causal_lm, install(base.causal_lm), packed, batch_size=4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[architecture])
    for row, row_scores in zip(rows, scores, strict=True):
        assert row_scores == pytest.approx(_plain_scores(plain, tokenizer, row), abs=1e-4)


@pytest.mark.parametrize("converters", ["exact", "statistical"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_scores_on_a_chip_do_not_depend_on_the_batch(tiny_models, tiny_task, architecture, converters):
    chip = load_chip({"preset": "halora-2026", "adc": {"bits": 6}, "noise": {"sigma": 0.05}, "read": {"white_us": 0.4}})
    base = load_base(tiny_models[architecture], "fp32")
    array = install(base.causal_lm)
    packed = [pack(row, base.tokenizer) for row in _uneven_rows(tiny_task)]
    clean = option_scores(base.causal_lm, array, packed, batch_size=4)
    reads = calibrate(base, array, chip, load_rows(tiny_task, "train"), 128, converters)
    array.program(ChipInstance(chip, NoiseKey(role=Role.SEARCH, chip_seed=0), 0.05), reads)
    alone = option_scores(base.causal_lm, array, packed, batch_size=1)
    assert max(abs(a - c) for row in zip(alone, clean, strict=True) for a, c in zip(*row, strict=True)) > 0.1
    for batch_size in (3, 10):
        together = option_scores(base.causal_lm, array, packed, batch_size)
        for one, other in zip(alone, together, strict=True):
            assert other == pytest.approx(one, abs=1e-4)
    reversed_rows = option_scores(base.causal_lm, array, packed[::-1], batch_size=3)[::-1]
    assert [score for row in reversed_rows for score in row] == pytest.approx(
        [score for row in alone for score in row], abs=1e-4
    )


def test_a_packed_row_lays_options_behind_the_prompt(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    row = Row("a", "Question: Which?\nAnswer:", (" red apples", " green"), 1)
    packed = pack(row, tokenizer)
    prompt, options = tokenizer(row.prompt).input_ids, [tokenizer(option).input_ids for option in row.options]
    n = len(prompt)
    assert [len(option) for option in options] == [2, 1]
    assert packed.tokens == prompt + options[0] + options[1]
    assert packed.segments == [0] * n + [1, 1, 2]
    assert packed.positions == [*range(n), n, n + 1, n]
    assert packed.sources == [n - 1, n, n - 1]  # each option's first token is predicted by the prompt's last
    assert packed.prompt_length == n


def test_margin_is_positive_exactly_when_the_answer_is_the_best_option():
    assert margin([-1.0, -3.0, -2.5], 0) == pytest.approx(1.5)
    assert margin([-1.0, -3.0, -2.5], 2) == pytest.approx(-1.5)
    assert margin([-1.0, -1.0], 0) == 0
