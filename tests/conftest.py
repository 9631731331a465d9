"""Fixtures shared by all tests: tiny random models of every supported architecture, and a tiny task."""

import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from services import S3Server, postgres, s3_server
from tiny_families import FAMILIES, tiny_model

torch.set_num_threads(1)

VOCABULARY = 49152
_COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sea": "blue"}


class _TinyModels(Mapping[str, str]):
    """Folder of a family's tiny model with SmolLM2's tokenizer, made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, family: str) -> str:
        from transformers import AutoTokenizer

        from halora.training.models import find_model

        folder, tokenizer = self._folder / family, self._folder / "tokenizer"
        if not tokenizer.exists():
            AutoTokenizer.from_pretrained(find_model("smollm2-135m-instruct")).save_pretrained(tokenizer)
        if not folder.exists():
            shutil.copytree(tokenizer, folder)
            tiny_model(family, VOCABULARY).save_pretrained(folder)
        return str(folder)

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES)

    def __len__(self) -> int:
        return len(FAMILIES)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Folder of a random two-layer model, with SmolLM2's tokenizer, by the name of its family."""
    return _TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that a module's launched sweeps share."""
    return tmp_path_factory.mktemp("cli") / "store"


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of JSONL files: 64 training, 24 validation and 24 test questions on sums and colours, 2 to 5 options."""
    folder = tmp_path_factory.mktemp("tasks") / "tiny"
    folder.mkdir()
    records = [_sum_record(i) if i % 2 else _colour_record(i) for i in range(112)]
    _write_rows(folder / "train.jsonl", records[:64])
    _write_rows(folder / "validation.jsonl", records[64:88])
    _write_rows(folder / "test.jsonl", records[88:])
    return str(folder)


@pytest.fixture
def tiny_trial(tiny_models: Mapping[str, str], tiny_task: str) -> Callable[..., Any]:
    """A function that makes the `TrialConfig` of a short training, by default of the tiny LLaMA model under noise.

    Its keyword arguments are settings of the training; `architecture`, `chip`, `lora`, `evaluation` and `seed` are the
    trial's own.
    """
    from halora.settings.trial import TrialConfig

    def make(architecture: str = "llama", chip: Any = "halora-2026", **settings: Any) -> TrialConfig:
        own = {name: settings.pop(name) for name in ("lora", "evaluation", "seed") if name in settings}
        training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "report_every": 1, **settings}
        content = {"model": tiny_models[architecture], "task": tiny_task, "chip": chip, "training": training, **own}
        return TrialConfig.model_validate(content)

    return make


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """SQLAlchemy's address of a PostgreSQL server with an empty database."""
    with postgres() as uri:
        yield uri


@pytest.fixture(scope="session")
def s3_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with an empty bucket named `bucket`."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture
def s3(s3_service: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """That server, found by this process and its children through their environment."""
    for name, value in s3_service.environment.items():
        monkeypatch.setenv(name, value)
    return s3_service


@pytest.fixture
def halora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """The command line in this process: (exit code, stdout, stderr)."""
    from halora.cli import main as cli

    def run(arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halora", *shlex.split(arguments)])
        capsys.readouterr()  # what others said before, such as a model that was made
        with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
            cli.main()
        told = capsys.readouterr()
        return int(exit_.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def halora_json(halora: Callable[[str], Any]) -> Callable[[str], Any]:
    """What a read command that succeeds says with `--format json`."""

    def ask(arguments: str) -> Any:
        code, out, err = halora(f"{arguments} --format json")
        assert code == 0, err
        return json.loads(out)

    return ask


def _write_rows(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# The place of the right option says nothing about its text, so a model without knowledge answers by chance.


def _sum_record(i: int) -> dict[str, Any]:
    first, second, count = 10 + 5 * i % 37, 10 + 7 * i % 31, 2 + i // 2 % 4
    answer = i // 8 % count
    choices = [f"{first + second - answer + place} apples" for place in range(count)]
    question = f"A basket of {first} apples gains {second}. How many does it hold?"
    return {"id": f"sum-{i}", "question": question, "choices": choices, "answer": answer}


def _colour_record(i: int) -> dict[str, Any]:
    things = list(_COLOURS)
    thing, count = things[i // 2 % 5], 2 + i // 2 % 4
    answer = i // 8 % count
    choices = [colour for other, colour in _COLOURS.items() if other != thing][: count - 1]
    choices.insert(answer, _COLOURS[thing])
    question = f"On day {i}, which colour is {thing}?"
    return {"id": f"colour-{i}", "question": question, "choices": choices, "answer": answer}
