"""How commands speak: tables, JSON and CSV on stdout, talk and progress on stderr."""

import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from halora.records.store import Store

talk = Console(stderr=True)


class Format(StrEnum):
    """Forms of a read command's answer."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


FormatOption = Annotated[Format, typer.Option("--format", help="Form of the answer on stdout.")]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the store. Default: $HALORA_STORE, or ./halora-store.", show_default=False),
]

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database to record in. Default: $HALORA_TRACKING_URI, or a SQLite file in the store.",
        show_default=False,
    ),
]


CheckpointUrlOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-url",
        metavar="URL",
        help="Path or URL for the trials' checkpoints, which every worker reaches, e.g. s3://BUCKET/FOLDER. "
        "Default: $HALORA_CHECKPOINT_URL, or the store's folder.",
        show_default=False,
    ),
]


def open_store(folder: Path | None, server: str | None = None, checkpoint_url: str | None = None) -> Store:
    """The store a command works on."""
    return Store.at(folder, server, checkpoint_url)


def say(text: str) -> None:
    """A line on stderr as it is: no markup, no colours, not broken."""
    talk.print(text, markup=False, highlight=False, soft_wrap=True)


def show_rows(rows: Sequence[Mapping[str, Any]], form: Format, title: str = "") -> None:
    """Print rows of equal keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    match form:
        case Format.JSON:
            print(json.dumps(list(rows), indent=1))
        case Format.CSV:
            writer = csv.DictWriter(sys.stdout, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        case Format.TABLE:
            table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
            for column in columns:
                numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
                table.add_column(column, justify="right" if numeric else "left", overflow="fold")
            for row in rows:
                table.add_row(*(cell(row.get(column)) for column in columns))
            Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False, highlight=False)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class SweepProgress:
    """Progress of a sweep: a bar on a terminal, a line per event elsewhere."""

    def __init__(self, trials: int) -> None:
        self._trials, self._done, self._failed = trials, 0, 0
        self._running: set[int] = set()
        self._paused: set[int] = set()
        self._began, self._ended_here = time.monotonic(), 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=talk,
            disable=not talk.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("trials", total=trials, state="")

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def already_ended(self, finished: int, failed: int) -> None:
        """Count the trials of earlier runs."""
        self._done, self._failed = finished, failed
        self._refresh()

    def say(self, text: str) -> None:
        """One line about what happens now."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def trial(self, number: int, state: str, text: str = "", node: str = "") -> None:
        """A trial began, reported, paused at a rung, finished or failed."""
        self._running.discard(number)
        self._paused.discard(number)
        if state in ("finished", "failed"):
            self._done += state == "finished"
            self._failed += state == "failed"
            self._ended_here += 1
        else:
            (self._paused if state == "paused" else self._running).add(number)
        self._refresh()
        if state != "training" or not talk.is_terminal:
            self.say(f"trial {number:>3} {state:<9} {text}{self._left()}")

    def _refresh(self) -> None:
        paused = f"{len(self._paused)} paused, " if self._paused else ""
        state = f"{len(self._running)} running, {paused}{self._failed} failed{self._left()}"
        self._bar.update(self._task, completed=self._done + self._failed + len(self._paused), state=state)

    def _left(self) -> str:
        if not self._ended_here or self._paused:  # early stopping makes the rest a guess
            return ""
        remaining = self._trials - self._done - self._failed
        seconds = (time.monotonic() - self._began) / self._ended_here * remaining
        return f" · about {seconds / 60:.0f} min left" if remaining else ""
