"""`halora sweep archive`, `unarchive` and `delete`: what becomes of a sweep that has done its work."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halora.cli.output import StoreOption, open_store, say
from halora.cli.remote_commands import AddressOption, elsewhere
from halora.cli.sweep import NameArgument
from halora.errors import UserError
from halora.sweep.cluster.cluster import Cluster

if TYPE_CHECKING:
    from halora.api.store import Store as SurfaceStore


def archive(name: NameArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """Leave a sweep out of lists and the page, and free here what MLflow has of it as well; `unarchive` undoes it."""
    elsewhere(Cluster.at(address))
    _surface(store).archive(name)
    say(f"sweep '{name}' is archived; bring it back: halora sweep unarchive {name}")


def unarchive(name: NameArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """Bring an archived sweep back as it was."""
    elsewhere(Cluster.at(address))
    _surface(store).unarchive(name)


def delete(
    name: NameArgument,
    with_adapters: Annotated[
        bool, typer.Option("--with-adapters", help="Delete its registered adapters as well.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = None,
    address: AddressOption = None,
) -> None:
    """Delete a sweep for good: files, study, runs in MLflow, checkpoints. Interrupted, it is to be repeated."""
    elsewhere(Cluster.at(address))
    from halora.sweep.run.deletion import holdings

    place = open_store(store)
    if not place.half_deleted(name):
        found = holdings(name, place)
        for line in found.lines():
            say(line)
        found.check(with_adapters=with_adapters)
        if not yes and not sys.stdin.isatty():
            raise UserError("nothing is deleted without a word from you", "say it with --yes")
        if not (yes or typer.confirm("delete it?", err=True)):
            raise typer.Exit(1)
    _surface(store).delete(name, with_adapters=with_adapters)
    say(f"sweep '{name}' is deleted")


def _surface(folder: Path | None) -> "SurfaceStore":
    from halora.api.store import Store as Surface

    return Surface(open_store(folder))
