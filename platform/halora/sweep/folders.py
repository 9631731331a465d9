"""Folders of models and tasks that a sweep names: what was in them at its launch, so that a resume meets the same."""

import hashlib
from pathlib import Path

from halora.errors import UserError
from halora.files import sha256_of
from halora.spaces.sweep import SweepConfig
from halora.training.tasks import as_sum, task_weights
from halora.trial import TrialConfig

_SUFFIXES = (".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja")
"""Of the files that a model or a task is read from."""


def folder_digests(sweep: SweepConfig) -> dict[str, str]:
    """SHA-256 of every folder of a model or a task that the sweep names, by its path."""
    tasks = [part for task in sweep.values_of("task") for part in task_weights(as_sum(task))]
    paths = map(Path, dict.fromkeys([*map(str, sweep.values_of("model")), *tasks]))
    return {str(path): _digest(path) for path in paths if path.is_absolute() and path.is_dir()}


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
