"""Oracles: `generate` and one plain forward of `transformers` on clean weights; one long read on a noisy chip."""

import json

import pytest
import torch
from pydantic import ValidationError
from tiny_families import FEWER
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.evaluation.generation import (
    check_scorable,
    generate,
    greedy_tokens,
    parsed_answer,
    reference_scores,
    same_answer,
)
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.settings.evaluation import EvaluationSettings
from halora.training.batches import PackedRow, lay_out
from halora.training.calibration import calibrate
from halora.training.models import load_base
from halora.training.rram import install
from halora.training.tasks import Row
from halora.trial_folder import adapter_folder
from halora.trial_runner import TrialRunner

NUMBER = EvaluationSettings().answer_pattern
ROWS = [
    Row(
        f"sum-{i}",
        f"Question: A basket of {i} apples gains {i + 3}.{' Then?' * i}\nAnswer:",
        (f" It is {2 * i + 3}",),
        0,
    )
    for i in range(5)
]
NEW = 7


@pytest.mark.parametrize("architecture", FEWER)
def test_clean_texts_are_those_of_plain_transformers(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    texts = generate(base, install(base.causal_lm), ROWS, batch_size=2, max_new_tokens=NEW)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32).eval()
    for row, text in zip(ROWS, texts, strict=True):
        ids = base.tokenizer(row.prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        whole = plain.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert text == base.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(texts)) > 1


def test_an_end_token_ends_a_text(tiny_models):
    base = load_base(tiny_models["llama"], "fp32")
    array = install(base.causal_lm)
    (text,) = generate(base, array, ROWS[:1], 1, NEW)
    third = base.tokenizer(text).input_ids[2]
    base.causal_lm.generation_config.eos_token_id = [2, third]
    (shorter,) = generate(base, array, ROWS[:1], 1, NEW)
    assert text.startswith(shorter)
    assert len(base.tokenizer(shorter).input_ids) <= 3 < len(base.tokenizer(text).input_ids)


@torch.no_grad()
def test_the_margin_is_the_mean_log_likelihood_per_token_of_the_completion(tiny_models):
    base = load_base(tiny_models["llama"], "fp32")
    scores = reference_scores(base, install(base.causal_lm), ROWS, batch_size=2)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()
    for row, score in zip(ROWS, scores, strict=True):
        prompt = base.tokenizer(row.prompt).input_ids
        completion = [*base.tokenizer(row.options[0]).input_ids, base.tokenizer.eos_token_id]
        logits = plain(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.double().log_softmax(dim=-1)[range(len(completion)), completion]
        assert score == pytest.approx(chosen.mean().item(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("converters", ["exact", "statistical"])
def test_on_a_noisy_chip_every_token_is_the_one_of_a_single_long_read(tiny_models, converters):
    chip = load_chip({"preset": "halora-2026", "adc": {"bits": 6}, "noise": {"sigma": 0.05}, "read": {"white_us": 0.4}})
    base = load_base(tiny_models["llama"], "fp32")
    array = install(base.causal_lm)
    clean = greedy_tokens(base, array, ROWS, 5, NEW)
    reads = calibrate(base, array, chip, ROWS, 128, converters)
    array.program(ChipInstance(chip, NoiseKey(role=Role.SEARCH, chip_seed=0), 0.05), reads)
    written = greedy_tokens(base, array, ROWS, 5, NEW)
    assert written != clean
    assert greedy_tokens(base, array, ROWS, 2, NEW) == written
    assert greedy_tokens(base, array, ROWS[::-1], 1, NEW) == written[::-1]
    for row, tokens in zip(ROWS, written, strict=True):
        whole = base.tokenizer(row.prompt).input_ids + tokens
        sources = list(range(len(whole) - len(tokens) - 1, len(whole) - 1))
        batch = lay_out([PackedRow(row.row_id, whole, [0] * len(whole), list(range(len(whole))), sources, 0)])
        with array.reading(batch.rows):
            assert batch.logits(base.causal_lm).argmax(dim=-1).tolist() == tokens


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("3 and 4 make 7.", NUMBER, "7"),
        ("It costs $1,250.50 in all.", NUMBER, "1,250.50"),
        ("It is -5", NUMBER, "-5"),
        ("none", NUMBER, None),
        ("9 #### 12 or 13", r"#### (-?[\d,.]+)", "12"),
        ("the correct answer is true, not false", r"answer is (true|false)", "true"),
    ],
)
def test_the_answer_is_the_last_match_or_its_group(text, pattern, answer):
    assert parsed_answer(text, pattern) == answer


def test_answers_are_compared_as_numbers_where_they_are():
    assert same_answer("18", "18.0")
    assert same_answer("1,800", "1800")
    assert same_answer("True ", "true")
    assert not same_answer("18", "81")
    assert not same_answer(None, "18")
    assert not same_answer("18", "eighteen")


@pytest.mark.parametrize(("pattern", "problem"), [("(", "not a regular expression"), (r"(\d)(\d)", "has 2 groups")])
def test_a_bad_pattern_is_refused(pattern, problem):
    with pytest.raises(ValidationError, match=problem):
        EvaluationSettings(answer_pattern=pattern)


def test_rows_that_cannot_be_scored_are_refused():
    options = Row("o", "Which?", (" stone", " apple"), 1, "fruits")
    completion = Row("c", "Why?", (" Because.",), 0, "reasons")
    check_scorable([options], "options", NUMBER)
    check_scorable([*ROWS, Row("r", "Why?", (" Because.",), 0, "reasons", "18")], "generation", NUMBER)
    with pytest.raises(UserError, match="rows of task reasons have one completion, nothing to choose from"):
        check_scorable([options, completion], "options", NUMBER)
    with pytest.raises(UserError, match=r"row 'o' of task 'fruits': no answer in 'apple'; row 'c' of .*answer_pattern"):
        check_scorable([options, completion], "generation", NUMBER)


@pytest.fixture
def counting(tmp_path) -> str:
    """A folder of completions that all end in the same number, which a few steps can teach."""
    folder = tmp_path / "counting"
    folder.mkdir()
    rows = [{"prompt": f"Question: How many is item {i}?\nAnswer:", "completion": " 7"} for i in range(24)]
    for name, part in (("train", rows[:16]), ("validation", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder)


def test_a_trial_trains_on_completions_and_is_scored_by_what_it_generates(tiny_trial, counting, tmp_path):
    evaluation = {"scoring": "generation", "max_new_tokens": 3, "chip_instances": 2}
    trial = tiny_trial(steps=12, report_every=12, batch_size=8, learning_rate=5e-2, evaluation=evaluation)
    config = trial.model_copy(update={"task": counting})
    runner = TrialRunner()
    before = runner.evaluate(config, None)
    training = runner.train(config, tmp_path / "trial")
    training.advance()
    training.close()
    after = runner.evaluate(config, adapter_folder(tmp_path / "trial"))
    assert before.summary()["clean_accuracy"] == 0
    assert after.summary()["clean_accuracy"] == 1
    assert max(before.clean) < min(after.clean) <= 0
    assert len(after.noisy_correct) == 2
    by_options = config.model_copy(update={"evaluation": EvaluationSettings()})
    with pytest.raises(UserError, match="nothing to choose from"):  # before anything is trained
        runner.train(by_options, tmp_path / "other")
