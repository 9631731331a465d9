"""How commands speak: tables, JSON and CSV on stdout, talk and progress on stderr."""

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from halora.api.progress import SweepProgress, say, talk
from halora.errors import UserError, nearest
from halora.records.store import Store

__all__ = ["SweepProgress", "say", "talk"]

_PIPED_WIDTH = 160
_GAP = 2
_HEADING = 12
"""Characters that a heading may take on one line even where its values are shorter."""


class Format(StrEnum):
    """Forms of a read command's answer."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


FormatOption = Annotated[Format, typer.Option("--format", help="Form of the answer on stdout.")]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--columns", metavar="NAME,...", help="Only these columns, in this order.", show_default=False),
]
SortOption = Annotated[
    str | None,
    typer.Option(
        "--sort", metavar="COLUMN", help="Sort by a column; -COLUMN for the largest first.", show_default=False
    ),
]
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


def show_rows(
    rows: Sequence[Mapping[str, Any]],
    form: Format,
    title: str = "",
    *,
    columns: str | None = None,
    sort: str | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Print rows.

    Args:
        rows: By column; the columns of all of them are those of the table.
        form: How to print them.
        title: Above a table.
        columns: The only columns, in their order, with commas between them.
        sort: Column to sort by, with `-` before it from the largest to the smallest.
        keep: Columns of a table that stay when others are left out because the terminal is too narrow.

    Raises:
        UserError: There is no such column.
    """
    named = list(dict.fromkeys(key for row in rows for key in row))
    chosen = named if columns is None else [name.strip() for name in columns.split(",") if name.strip()]
    by = (sort or "").removeprefix("-")
    if rows and (unknown := [name for name in (*chosen, by) if name and name not in named]):
        problems = [f"no column '{name}'{nearest(name, named)}" for name in unknown]
        raise UserError(problems, f"the columns are: {', '.join(named)}")
    if by:
        rows = _sorted(rows, by, falling=sort != by)
    rows = [{name: row.get(name) for name in chosen} for row in rows]
    match form:
        case Format.JSON:
            print(json.dumps(list(rows), indent=1))
        case Format.CSV:
            writer = csv.DictWriter(sys.stdout, chosen, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        case Format.TABLE:
            _print_table(rows, chosen, title, chosen if columns else keep)


def _sorted(rows: Sequence[Mapping[str, Any]], by: str, *, falling: bool) -> list[Mapping[str, Any]]:
    """Rows by a column, those without a value last; what is not all numbers by its text."""
    valued = [row for row in rows if row.get(by) is not None]
    numeric = all(isinstance(row[by], int | float) for row in valued)
    ordered = sorted(valued, key=lambda row: row[by] if numeric else str(row[by]), reverse=falling)
    return [*ordered, *(row for row in rows if row.get(by) is None)]


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str, keep: Sequence[str]) -> None:
    """A table no wider than the terminal: headings break at underscores, texts between words, whole columns go last.

    Into a pipe it is as wide as it takes, so that no heading breaks.
    """
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _PIPED_WIDTH)
    texts = {name: [cell(row.get(name)) for row in rows] for name in columns}
    headings = {name: name for name in columns}
    shown = list(columns)

    def widths(of: Callable[[str], int]) -> dict[str, int]:
        return {name: max(map(of, (headings[name], *texts[name]))) for name in shown}

    def fits(found: Mapping[str, int]) -> bool:
        return sum(found.values()) + _GAP * (len(found) - 1) <= console.width

    if not terminal:
        console.width = max(console.width, sum(widths(_longest_word).values()) + _GAP * len(columns))
    elif not fits(widths(_longest_line)):
        headings |= {name: _broken(name, max(_HEADING, *map(_longest_word, texts[name]))) for name in columns}
    droppable = [name for name in columns[1:] if name not in keep]
    while droppable and not fits(widths(_longest_word)):
        shown.remove(droppable.pop())
    least, whole = widths(_longest_word), widths(_longest_line)
    spare = max(console.width - sum(least.values()) - _GAP * (len(shown) - 1), 0)
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for name in shown:
        more = min(whole[name] - least[name], spare)
        spare -= more
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(
            headings[name], justify="right" if numeric else "left", overflow="fold", width=least[name] + more
        )
    for place in range(len(rows)):
        table.add_row(*(texts[name][place] for name in shown))
    console.print(table, markup=False, highlight=False)
    if left_out := [name for name in columns if name not in shown]:
        say(f"too narrow for {', '.join(left_out)}: widen the terminal, or see --format csv")


def _broken(name: str, width: int) -> str:
    """A heading on lines of a width where its underscores allow."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
