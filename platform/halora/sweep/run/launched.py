"""What a sweep is launched with, beyond what its file says: an identity, and its models and tasks as they are then."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from halora.errors import UserError
from halora.files import sha256_of
from halora.settings.names import as_sum, task_weights
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import SweepConfig
from halora.training.models import estimated_shape

_SUFFIXES = (".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja")
"""Of the files that a model or a task is read from."""


def as_launched(sweep: SweepConfig) -> SweepConfig:
    """The sweep as one launch has it: an identity of its own, and what its models and its folders are now."""
    models = list(map(str, sweep.values_of("model")))
    tasks = [part for task in sweep.values_of("task") for part in task_weights(as_sum(task))]
    shapes: dict[str, dict[str, Any]] = {}
    for model in models:
        with suppress(UserError):  # a simulation needs no model
            shapes[model] = dict(estimated_shape(model).dimensions)
    paths = [path for path in map(Path, dict.fromkeys([*models, *tasks])) if path.is_absolute() and path.is_dir()]
    folders = {str(path): _digest(path) for path in paths}
    return sweep.model_copy(update={"launch": uuid4().hex, "folders": folders, "shapes": shapes})


def base_and_task(sweep: SweepConfig, config: TrialConfig) -> tuple[str, str]:
    """What tells a trial's base and its task from all others: their names, or what is in their folders."""
    tasks = {sweep.folders.get(name, name): weight for name, weight in task_weights(config.task).items()}
    return sweep.folders.get(config.model, config.model), "+".join(f"{tasks[name]!r}*{name}" for name in sorted(tasks))


def check_unchanged(sweep: SweepConfig) -> None:
    """Refuse to go on with a sweep whose models or tasks are not what they were, as its trials would not compare.

    Raises:
        UserError: With all folders that are gone or have changed.
    """
    problems = []
    for path, digest in sweep.folders.items():
        if not Path(path).is_dir():
            problems.append(f"'{path}', which the sweep was launched with, is gone")
        elif _digest(Path(path)) != digest:
            problems.append(f"'{path}' has changed since the sweep was launched")
    if problems:
        raise UserError(
            problems, "bring back what was there; to go on with what is there now, launch under another name"
        )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES and file.is_file():
            digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
