"""`halora cluster`: whether a file for Ray's launcher or a running cluster will do; and sweeps as jobs of Slurm."""

from pathlib import Path
from typing import Annotated

import typer

from halora.cli.arguments import SweepArgument, SweepSetOption, overrides_from
from halora.cli.output import (
    CheckpointUrlOption,
    Format,
    FormatOption,
    ServerOption,
    StoreOption,
    open_store,
    show_rows,
    talk,
)
from halora.cli.remote_commands import AddressOption, elsewhere
from halora.errors import UserError, attempt
from halora.records.store import Store
from halora.sweep.cluster.cluster import Cluster

app = typer.Typer(help="Check a cluster, or run a sweep as a job of Slurm.", no_args_is_help=True)


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


@app.command()
def slurm(
    sweep: SweepArgument,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.", show_default=False)],
    time: Annotated[
        str, typer.Option(metavar="LIMIT", help="Wall-clock limit of a job, as Slurm writes it, e.g. 8:00:00.")
    ],
    cpus: Annotated[
        int | None, typer.Option(help="Cores of each node; default: whole nodes.", show_default=False)
    ] = None,
    partition: Annotated[str, typer.Option(help="Slurm's; default: the site's.", show_default=False)] = "",
    account: Annotated[str, typer.Option(help="Slurm's; default: the site's.", show_default=False)] = "",
    gres: Annotated[str, typer.Option(help="Of each node, e.g. gpu:4.", show_default=False)] = "",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Another option of sbatch, without dashes, e.g. constraint=a100."),
    ] = None,
    notice: Annotated[
        int, typer.Option(metavar="SECONDS", help="How long before its limit the sweep is paused.")
    ] = 300,
    jobs: Annotated[
        int,
        typer.Option(help="Where a job cannot be requeued: as many in a row, each of which goes on with the sweep."),
    ] = 1,
    container: Annotated[
        Path | None, typer.Option(metavar="IMAGE", help="Apptainer image to run in.", show_default=False)
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it, and print the number of the job.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep; default: the file's.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sweep; default: the file's.", show_default=False)
    ] = None,
    set_: SweepSetOption = None,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
    checkpoint_url: CheckpointUrlOption = None,
) -> None:
    """Print a file for `sbatch` that runs a sweep on nodes of Slurm, or submit it.

    The job pauses the sweep before its limit and is requeued; it then goes on with the same launch. All nodes have to
    see the store.
    """
    from halora.api.sweep import Sweep
    from halora.sweep.cluster import slurm as jobs_of_slurm

    place, problems = open_store(store, tracking_uri, checkpoint_url), list[str]()
    asked = jobs_of_slurm.SlurmJob(
        nodes, time, cpus, partition, account, gres, tuple(sbatch or ()), notice, jobs, container
    )
    attempt(problems, asked.check)
    described = attempt(problems, lambda: Sweep(sweep, overrides_from(set_), name=name, seed=seed).config)
    if problems or described is None:
        raise UserError(problems)
    if place.sweep(described.name).sweep_file.exists():
        from halora.sweep.run.state import check_same

        check_same(described, place.sweep(described.name))  # the job would be refused
    script = asked.script(described, place)
    jobs_of_slurm.make_jobs_folder(place)
    if not submit:
        print(script, end="")
        return
    job = jobs_of_slurm.submit(script)
    print(job)
    folder = jobs_of_slurm.jobs_folder(place)
    talk.print(
        f"follow it: tail -F {folder}/{job}{'_1' if jobs > 1 else ''}.log"
        f"\nsee how it stands: halora sweep status {described.name} --store {place.root}"
        f"\nend it: scancel {job}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


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
