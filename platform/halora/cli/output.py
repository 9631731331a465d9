"""How commands speak: tables, JSON and CSV on stdout, talk and progress on stderr."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from halora.api.progress import SweepProgress, say, talk
from halora.records.store import Store

__all__ = ["SweepProgress", "say", "talk"]


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
