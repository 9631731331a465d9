"""`halora init`: a sweep file to start from."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from halora.cli.output import say
from halora.errors import UserError


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, ending in .yaml.")],
    model: Annotated[
        str | None,
        typer.Option(help="A known model, a folder or a hub id; asked for on a terminal.", show_default=False),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A known task, a folder or a hub data set; likewise.", show_default=False)
    ] = None,
    chip: Annotated[str | None, typer.Option(help="A preset or a YAML file; likewise.", show_default=False)] = None,
    name: Annotated[str, typer.Option(help="Name of the sweep; default: made of the three.", show_default=False)] = "",
) -> None:
    """Write a commented sweep file for a model, a task and a chip, valid as it is."""
    from halora.files import write_whole
    from halora.spaces.starting import starting_file

    if file.suffix not in (".yaml", ".yml") or file.exists() or not file.parent.is_dir():
        raise UserError(f"'{file}' exists, or is no new .yaml file in a folder", "name a new one")

    def asked(what: str, given: str | None, default: str) -> str:
        return given or (typer.prompt(what, default=default, err=True) if sys.stdin.isatty() else default)

    model = asked("model", model, "smollm2-135m-instruct")
    task = asked("task", task, "arc-easy")
    write_whole(file, starting_file(model, task, asked("chip", chip, "halora-2026"), name))
    say(f"written: '{file}'; next: halora sweep launch {file} --dry-run")
