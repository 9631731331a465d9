"""Commands that are typed here and carried out in a cluster."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from halora.cli.output import talk
from halora.errors import UnreachableError
from halora.sweep.cluster.cluster import BEGINS, RUNS, Cluster
from halora.sweep.cluster.versions import CLIENT

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="HALORA_ADDRESS",
        metavar="ADDRESS",
        help="Ray cluster: `auto` or HOST:PORT on one of its machines; http://HOST:PORT (Ray jobs) or ray://HOST:PORT "
        "(Ray client) from anywhere, to carry the command out on its head. Default: this machine alone.",
        show_default=False,
    ),
]
WheelOption = Annotated[
    Path | None,
    typer.Option(
        "--wheel",
        metavar="FILE",
        help="Wheel of halora whose code all nodes of the cluster are to use, instead of what is installed there.",
        show_default=False,
    ),
]
FollowOption = Annotated[
    bool | None,
    typer.Option(
        "--follow/--detach",
        help="Stay until the sweep ends, or leave once it runs. Default: stay on this machine, leave on a cluster.",
        show_default=False,
    ),
]
_TAKING_A_VALUE = ("--address", "--wheel")
_FLAGS = ("--follow", "--detach")


def elsewhere(cluster: Cluster) -> None:
    """Where the cluster's head is another machine, carry this very command out there, and end with its exit code.

    Raises:
        UnreachableError: The cluster does not answer, or not to us.
    """
    if cluster.elsewhere:
        from halora.sweep.cluster.remote import carry_out

        raise typer.Exit(carry_out(cluster, _arguments(_TAKING_A_VALUE), _print) or 0)


def detached(cluster: Cluster, name: str, follow: bool | None, sweep: str = "") -> None:
    """Carry a launch or a resume out in the cluster, by a process that outlives this one, unless this is to stay.

    Args:
        cluster: The cluster, or this machine.
        name: Name of the sweep, as far as it is known here.
        follow: Whether to stay until the sweep ends; nothing asked for.
        sweep: The sweep file to launch, which is sent along where it is one of this machine.

    Raises:
        UnreachableError: The cluster does not answer, or not to us.
    """
    if not cluster.elsewhere and (follow or not cluster.address):
        return
    from halora.sweep.cluster.remote import carry_out

    arguments, stdin = _arguments((*_TAKING_A_VALUE, *_FLAGS)), ""
    if cluster.elsewhere and Path(sweep).is_file():
        stdin = Path(sweep).read_text(encoding="utf-8")
        arguments[arguments.index(sweep)] = "-"
    in_cluster = "auto" if cluster.elsewhere else cluster.address
    arguments += ["--follow", "--address", in_cluster]
    if cluster.wheel and not cluster.elsewhere:
        arguments += ["--wheel", str(cluster.wheel)]
    code = carry_out(cluster, arguments, _print, stdin=stdin, until="" if follow else RUNS)
    if code is None:
        at = f" --address {cluster.address}" if cluster.elsewhere else ""
        talk.print(
            f"\nit runs on without this terminal\nfollow it: halora sweep logs {name} --follow{at}"
            f"\nsee how it stands: halora sweep status {name}{at}\nend it: halora sweep stop {name}{at}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    raise typer.Exit(code or 0)


def check_client() -> None:
    """Say that a command begins which another machine sent; refuse one of another version of this program.

    Raises:
        UnreachableError: It did.
    """
    if client := os.environ.get(CLIENT):
        from halora.sweep.cluster.versions import own_code

        print(BEGINS, flush=True)
        if (own := own_code()) != client:
            raise UnreachableError(
                f"halora on the cluster's head is {own}, on the machine that asks {client}",
                "install the same wheel on both, or bring it along with --wheel",
            )


def _arguments(without: tuple[str, ...]) -> list[str]:
    """What was typed, without some options."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        name = argument.partition("=")[0]
        if skip:
            skip = False
        elif name in without:
            skip = name in _TAKING_A_VALUE and "=" not in argument
        else:
            kept.append(argument)
    return kept


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
