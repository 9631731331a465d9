"""Oracles: the harness's own `HFLM` on the same model, our own scores of the same rows on the same chip instances.

Tasks are local files; nothing is looked up in a network.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halora.errors import UserError
from halora.evaluation.chips import evaluate
from halora.evaluation.harness import _harness_model, check_tasks, harness_scores
from halora.hardware.chip import load_chip
from halora.settings.evaluation import EvaluationSettings
from halora.training.models import load_base
from halora.training.rram import install
from halora.training.tasks import load_rows

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'halora-sweep[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

CONTEXTS = ("Question: What melts ice?\nAnswer:", "The sky is", "")
TEXTS = (" salt", " a cold day", " green")
WORDS = "All that glitters is not gold, said the miner to his mule at the end of a long day. " * 3


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No look-up of a data set, and a cache of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def _requests(kind, *arguments):
    return [Instance(kind, {}, each, 0, metadata=("made-up", i, 1)) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_requests_are_answered_as_by_the_harness_s_own_model(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    ours = _harness_model()(base, install(base.causal_lm), 4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[architecture])
    theirs = HFLM(plain, tokenizer=tokenizer, batch_size=1, device="cpu")

    pairs = [(context, text) for context in CONTEXTS for text in TEXTS] + [(WORDS * 20, " the end")]
    likely = tokenizer.decode(plain.generate(**tokenizer(CONTEXTS[0], return_tensors="pt"), max_new_tokens=2)[0, -2:])
    requests = _requests("loglikelihood", *pairs, (CONTEXTS[0], likely))
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]

    requests = _requests("loglikelihood_rolling", (WORDS,), (WORDS * 20,))
    assert ours.loglikelihood_rolling(requests) == pytest.approx(
        theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5
    )

    asked = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    stop = ours.generate_until(_requests("generate_until", (CONTEXTS[0], asked)))[0][3:6]
    requests = _requests(
        "generate_until", *((context, asked) for context in CONTEXTS[:2]), (CONTEXTS[0], asked | {"until": [stop]})
    )
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    with pytest.raises(UserError, match="samples; a chip is scored by greedy decoding"):
        ours.generate_until(_requests("generate_until", ("a", {"do_sample": True})))


def _task(folder, rows):
    """A task of the harness made of our rows."""
    lines = [
        {"id": r.row_id, "context": r.prompt, "choices": [text[1:] for text in r.options], "answer": r.answer}
        for r in rows
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "ours.yaml"
    path.write_text(
        "task: ours\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, "
        "{metric: acc_bytes, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    return str(path)


def test_a_task_of_our_rows_gives_our_scores_on_every_chip(tiny_models, offline, tmp_path):
    rows, training = load_rows("arc-easy", "validation", 12), load_rows("arc-easy", "train", 8)
    base, chip = load_base(tiny_models["llama"], "fp32"), load_chip("halora-2026")
    array = install(base.causal_lm)
    settings = EvaluationSettings(chip_instances=3, batch_size=4, calibration_tokens=32)
    ours = evaluate(base, array, chip, rows, training, settings, first_chip=1)
    said = []
    found = harness_scores(
        base, array, chip, training, settings, [_task(tmp_path, rows)], first_chip=1, say=said.append
    )
    scores = {score.metric: score for score in found}
    assert scores.keys() == {"acc", "acc_bytes"}
    assert scores["acc"].documents == 12
    assert scores["acc"].clean == pytest.approx(sum(ours.clean_correct) / 12)
    assert scores["acc"].by_chip == pytest.approx(ours.accuracy_by_chip)
    assert len(set(ours.accuracy_by_chip)) > 1
    summary = ours.summary()
    assert (scores["acc"].mean, scores["acc"].low, scores["acc"].high) == pytest.approx(
        (summary["accuracy"], summary["accuracy_low"], summary["accuracy_high"])
    )
    assert scores["acc_bytes"].mean == pytest.approx(summary["accuracy_per_byte"])
    assert [line.rpartition(": ")[2] for line in said] == ["clean", *(f"chip instance {i}" for i in (1, 2, 3))]


def test_a_task_that_generates_runs_on_a_local_file(tiny_models, tiny_task, offline, tmp_path, halora_json):
    """The form of GSM8K: an answer after `####`, found by a filter."""
    lines = [
        {"question": f"What is {i} and {i}?", "answer": f"{i} and {i} make {2 * i}.\n#### {2 * i}"} for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: 'Question: {{question}}\\nAnswer:'\n"
        "doc_to_target: \"{{answer.split('####')[-1].strip()}}\"\n"
        "generation_kwargs: {until: ['Question:'], do_sample: false, max_gen_toks: 4}\n"
        "filter_list:\n- name: strict-match\n  filter:\n"
        "  - {function: regex, regex_pattern: '#### (-?[0-9]+)'}\n  - {function: take_first}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    trial = {"model": tiny_models["llama"], "task": tiny_task, "chip": "halora-2026", "training": {"steps": 1}}
    (tmp_path / "trial.yaml").write_text(json.dumps(trial))
    told = halora_json(
        f"evaluate {tmp_path / 'trial.yaml'} --base --lm-eval {tmp_path / 'sums.yaml'} --chips 2 --rows 2"
    )
    assert [(row["task"], row["metric"], row["documents"], len(row["by_chip"])) for row in told] == [
        ("sums", "exact_match, strict-match", 2, 2)
    ]


def test_tasks_that_do_not_exist_are_told_at_once():
    with pytest.raises(UserError) as told:
        check_tasks(["arc_eazy", "nowhere.yaml"])
    assert "did you mean 'arc_easy'" in told.value.problems[0]
    assert "'nowhere.yaml'" in told.value.problems[1]
