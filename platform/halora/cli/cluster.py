"""`halora cluster`: whether a file for Ray's launcher will work, and whether a cluster that runs can run sweeps."""

from pathlib import Path
from typing import Annotated

import typer

from halora.cli.output import CheckpointUrlOption, Format, FormatOption, StoreOption, open_store, show_rows, talk
from halora.cli.remote_commands import AddressOption, elsewhere
from halora.errors import UserError
from halora.records.store import Store
from halora.sweep.cluster.cluster import Cluster

app = typer.Typer(help="Check the description of a cluster.", no_args_is_help=True)


@app.callback()
def _cluster() -> None:
    """The group keeps its name in front of its one command."""


@app.command()
def check(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A file for `ray up`, such as ray_cluster.yaml.", show_default=False),
    ] = None,
    address: AddressOption = None,
    checkpoint_url: CheckpointUrlOption = None,
    store: StoreOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Every mistake in a cluster file, by Ray's schema and by what sweeps need; without FILE, in a running cluster.

    There every node must have the head's versions and code, and reach the storage.
    """
    cluster = Cluster.at(address)
    if file is not None:
        _check_file(file, form)
    elif cluster.address:
        _check_nodes(cluster, open_store(store, checkpoint_url=checkpoint_url), form)
    else:
        raise UserError("nothing to check", "name a FILE for `ray up`, or a running cluster with --address")


def _check_nodes(cluster: Cluster, store: Store, form: Format) -> None:
    elsewhere(cluster)
    from halora.sweep.cluster.preflight import look_at, refuse

    store.check_writable()
    reports = look_at(cluster, store, store.checkpoint_url)
    show_rows([{"node": r.address, "CPU": r.cpus, "GPU": r.gpus, "problems": len(r.problems)} for r in reports], form)
    refuse(reports)
    talk.print("every node can run trials", markup=False, highlight=False)


def _check_file(file: Path, form: Format) -> None:
    from halora.sweep.cluster.cluster_file import check_cluster_file

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
