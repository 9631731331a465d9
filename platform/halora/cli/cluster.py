"""`halora cluster`: whether a file for Ray's cluster launcher will work, before it costs money."""

from pathlib import Path
from typing import Annotated

import typer

from halora.cli.output import Format, FormatOption, show_rows, talk

app = typer.Typer(help="Check the description of a cluster.", no_args_is_help=True)


@app.callback()
def _cluster() -> None:
    """One command so far; the group keeps its name in front."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file for `ray up`, such as ray_cluster.yaml.")],
    form: FormatOption = Format.TABLE,
) -> None:
    """Every mistake in a cluster file: by Ray's schema, and by what sweeps need. Prints its types of nodes."""
    from halora.sweep.cluster_file import check_cluster_file

    types = check_cluster_file(file)
    rows = [
        {
            "node": node.name,
            "runs": "servers and drivers" if node.head else "trials",
            "CPU": node.cpus,
            "GPU": node.gpus,
            "min": node.min_workers,
            "max": node.max_workers,
        }
        for node in types
    ]
    talk.print(f"no mistake in '{file}' that can be seen from here", markup=False, highlight=False)
    if rows or form is not Format.TABLE:
        show_rows(rows, form)
