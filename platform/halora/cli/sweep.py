"""`halora sweep`: launch, resume, stop, and see how sweeps stand."""

import json
import shlex
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.analysis.formats import duration
from halora.cli.arguments import SweepArgument, SweepSetOption, overrides_from
from halora.cli.comparison import print_comparison
from halora.cli.output import (
    CheckpointUrlOption,
    ColumnsOption,
    Format,
    FormatOption,
    ServerOption,
    SortOption,
    StoreOption,
    SweepProgress,
    open_store,
    say,
    show_rows,
    talk,
)
from halora.cli.remote_commands import AddressOption, FollowOption, WheelOption, detached, elsewhere
from halora.errors import UserError, shortened
from halora.records.names import REPORT_FILE
from halora.records.store import Store
from halora.sweep.cluster.cluster import Cluster

if TYPE_CHECKING:
    from halora.api.sweep import Sweep
    from halora.records.store import SweepFolder
    from halora.spaces.sweep import SweepConfig
    from halora.sweep.run.launch import Outcome


class LogFormat(StrEnum):
    """Forms of a log."""

    TEXT = "text"
    JSON = "json"


app = typer.Typer(help="Launch sweeps and see how they stand.", no_args_is_help=True)

MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        envvar="HALORA_METRICS_PORT",
        metavar="PORT",
        help="Serve the sweep's metrics to Prometheus at http://127.0.0.1:PORT/metrics while it runs.",
        show_default=False,
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a launched sweep.")]


@app.command()
def launch(
    sweep: SweepArgument,
    name: Annotated[
        str | None, typer.Option(help="Name of this sweep; default: the file's.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sweep; default: the file's.", show_default=False)
    ] = None,
    set_: SweepSetOption = None,
    simulate: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="Take results from a CSV table of recorded curves instead of training."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and launch nothing.")] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: score the untrained bases on their chips all the same."),
    ] = False,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
    checkpoint_url: CheckpointUrlOption = None,
    address: AddressOption = None,
    wheel: WheelOption = None,
    follow: FollowOption = None,
    metrics_port: MetricsPortOption = None,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="Resume this very sweep where it was launched before: for batch jobs.")
    ] = False,
) -> None:
    """Run a sweep to its end, on this machine or in a cluster, and print its front. SWEEP `-` is read from stdin."""
    cluster = Cluster.at(address, wheel)
    if simulate and cluster.address:
        raise UserError("--simulate takes results from a table of this machine", "leave --address out")
    if probe and not dry_run:
        raise UserError("--probe goes with --dry-run", "a launch probes by itself, as `probe` in the sweep's file says")
    if probe or not dry_run:
        detached(cluster, name or Path(sweep).stem, dry_run or follow, sweep)

    from halora.api.store import Store as Surface
    from halora.api.sweep import Sweep

    overrides, place = overrides_from(set_), open_store(store, tracking_uri, checkpoint_url)
    described = Sweep(sweep, overrides, name=name, seed=seed, store=Surface(place)).validate()
    _tell_free_knobs(described.config)
    if dry_run:
        _print_plan(described.config)
        if probe:
            _probe(described.config, place, cluster)
        return
    if or_resume and place.sweep(described.name).sweep_file.exists():
        from halora.sweep.run.state import check_same

        check_same(described.config, place.sweep(described.name))
        outcome = described.resume(address=address, wheel=wheel, metrics_port=metrics_port)
    else:
        outcome = described.launch(simulate, address=address, wheel=wheel, metrics_port=metrics_port)
    _close(described.name, place, outcome)


@app.command()
def resume(
    name: NameArgument,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
    checkpoint_url: CheckpointUrlOption = None,
    address: AddressOption = None,
    wheel: WheelOption = None,
    follow: FollowOption = None,
    metrics_port: MetricsPortOption = None,
) -> None:
    """Resume a sweep: unfinished trials from their checkpoints, then the rest, and records MLflow lacks."""
    detached(Cluster.at(address, wheel), name, follow)
    place = open_store(store, tracking_uri, checkpoint_url)
    outcome = _launched(name, place).resume(address=address, wheel=wheel, metrics_port=metrics_port)
    _close(name, place, outcome)


@app.command()
def stop(name: NameArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """Ask a running sweep to pause its trials at their next report, and to end; close the records of a killed one."""
    elsewhere(Cluster.at(address))
    place = open_store(store)
    if _launched(name, place).stop():
        left = f"sweep '{name}' ends after the next reports; resume it with: halora sweep resume {name}"
        talk.print(left, markup=False)
        return
    talk.print(f"sweep '{name}' is not running", markup=False)
    _close_records(name, place)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A launched sweep; default: all.")] = None,
    columns: ColumnsOption = None,
    sort: SortOption = None,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
    address: AddressOption = None,
) -> None:
    """Trials of sweeps by state."""
    elsewhere(Cluster.at(address))
    from halora.spaces.sweep import shipped_sweeps

    place = open_store(store)
    rows: list[dict[str, Any]] = []
    for each in [name] if name else place.sweeps():
        try:
            rows.append(_launched(each, place).status())
        except UserError as error:
            _tell_unreadable(each, error, alone=name is not None)
            rows.append({"sweep": each, "state": "unreadable"})
    if rows or form is not Format.TABLE:
        show_rows(rows, form, columns=columns, sort=sort)
    else:
        talk.print(f"no sweep in '{place.root}' yet; shipped: {', '.join(shipped_sweeps())}", markup=False)


@app.command("list")
def list_(
    every: Annotated[bool, typer.Option("--all", help="Archived sweeps as well.")] = False,
    columns: ColumnsOption = None,
    sort: SortOption = None,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
    address: AddressOption = None,
) -> None:
    """Sweeps of the store, newest last, with the best they found and what MLflow still lacks of them."""
    elsewhere(Cluster.at(address))
    from halora.analysis.front import front
    from halora.analysis.trials import grouped, sweep_objectives
    from halora.records.delivery import refused, undelivered
    from halora.records.index import read_sweep_state
    from halora.sweep.run.state import load_sweep_of

    place = open_store(store)
    rows: list[dict[str, Any]] = []
    for name in place.sweeps(archived=every):
        try:
            recorded, waiting = read_sweep_state(place, name), undelivered(place, name)
            objectives = sweep_objectives(load_sweep_of(place.sweep(name)))
        except UserError as error:
            _tell_unreadable(name, error)
            rows.append({"sweep": name, "state": "unreadable"})
            continue
        groups = grouped(recorded.points(), objectives)
        members = front(groups.feasible, objectives)
        rows.append(
            {
                "sweep": name,
                "state": _state_of(place.sweep(name), recorded.sweep_state),
                "finished": len(groups.feasible) + len(groups.violating) + len(groups.unscored),
                "failed": len(groups.failed),
                "front": len(members),
                "best_accuracy": max((point.accuracy for point in members), default=None),
                "lowest_energy_uj_per_token": min((point.energy_uj_per_token for point in members), default=None),
                "undelivered": waiting,
                "refused": len(refused(place.sweep(name))),
            }
        )
    if rows or form is not Format.TABLE:
        show_rows(rows, form, columns=columns, sort=sort)
    else:
        talk.print(f"no sweep in '{place.root}' yet", markup=False)


def _state_of(folder: "SweepFolder", recorded: str) -> str:
    from halora.sweep.run.state import is_running

    if folder.archive_file.exists():
        return "archived"
    return "running" if is_running(folder) else recorded


def _tell_unreadable(name: str, error: UserError, *, alone: bool = False) -> None:
    """Say why a sweep is not shown among the others; one that was asked for alone is an error."""
    if alone:
        raise error
    say(f"sweep '{name}' cannot be shown: {error}")


@app.command()
def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for what is still to come.")] = False,
    trial: Annotated[int | None, typer.Option(help="Only what is about this trial.", show_default=False)] = None,
    form: Annotated[LogFormat, typer.Option("--format", help="Form of the answer on stdout.")] = LogFormat.TEXT,
    store: StoreOption = None,
    address: AddressOption = None,
) -> None:
    """What happened to a sweep, by time: what its drivers said, and its trials with the nodes they ran on."""
    elsewhere(Cluster.at(address))
    from halora.sweep.run.driver_log import read_log

    folder = open_store(store).existing(name)
    for line in read_log(folder.log_file, follow=follow):
        if trial is None or line.get("trial") == trial:
            print(json.dumps(line, ensure_ascii=False) if form is LogFormat.JSON else _as_text(line), flush=True)


def _as_text(line: "Mapping[str, Any]") -> str:
    about = f"trial {line['trial']} {line['state']}: " if "trial" in line else ""
    node = f"  [{line['node']}]" if "node" in line else ""
    return f"{line['time'][:19].replace('T', ' ')} {line['level']:<7} {about}{line['message']}{node}"


@app.command()
def report(name: NameArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """Draw a sweep's report, one page that opens without a network, and print its path."""
    elsewhere(Cluster.at(address))
    from halora.records import names
    from halora.records.index import read_sweep_state
    from halora.records.publishing import publish
    from halora.sweep.run.state import load_sweep_of

    place = open_store(store)
    folder = place.existing(name)
    publish(load_sweep_of(folder), read_sweep_state(place, name), folder)
    print(folder.published / names.REPORT_FILE)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, .csv or .parquet.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Launched sweeps; default: all.", show_default=False)
    ] = None,
    store: StoreOption = None,
) -> None:
    """Write the trials of sweeps to a file, a row each, with columns that stay."""
    from halora.api.store import Store as Surface

    number = Surface(open_store(store)).export(file, *(names or ()))
    say(f"{number} trials in '{file}'")


@app.command()
def validate(sweep: SweepArgument, set_: SweepSetOption = None) -> None:
    """Check a sweep file; all errors are reported together."""
    from halora.api.sweep import Sweep

    config = Sweep(sweep, overrides_from(set_)).validate().config
    _tell_free_knobs(config)
    talk.print(f"{sweep}: valid, {config.trials} trials over {len(config.space)} searched fields", markup=False)


def _launched(name: str, place: Store) -> "Sweep":
    """A sweep of the store.

    Raises:
        UserError: There is none of that name.
    """
    from halora.api.store import Store as Surface

    return Surface(place).sweep(name)


def _tell_free_knobs(sweep: "SweepConfig") -> None:
    from halora.sweep.search.problem import free_knobs

    for path in free_knobs(sweep):
        talk.print(
            f"note: {path} is free: it changes nothing that the chip's energy counts (see trial.chip.boundary)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _print_plan(sweep: "SweepConfig") -> None:
    from halora.sweep.run.plan import plan
    from halora.yaml_files import to_yaml

    planned = plan(sweep)
    found = {"launch", "chips_read"}  # found when it was read, and not said in the file
    print(to_yaml(sweep.model_dump(mode="json", exclude_defaults=True, exclude=found)))
    rows = [
        {
            "goal": f"rung {i}" if i + 1 < len(planned.goals) else "whole",
            "steps": each.goal.steps,
            "rows": each.goal.rows or "all",
            "chips": each.goal.chip_instances,
            "trials": each.trials,
            "time each": duration(each.seconds),
        }
        for i, each in enumerate(planned.goals)
    ]
    show_rows(rows, Format.TABLE)
    gib = planned.memory_bytes / 2**30
    processes = f" in each of {planned.workers} processes" if planned.workers > 1 else ""
    for line in (
        f"{len(planned.first)} of {sweep.trials} trials are points tried first",
        f"memory of a trial: about {gib:.1f} GiB{processes}",
        f"at once: {planned.concurrent} as the sweep asks; {planned.fit} would fit on this machine now",
        *([f"the closing comparison trains {planned.trained_anew} adapters anew"] if planned.trained_anew else []),
        f"the whole sweep: about {duration(3600 * planned.hours)} of training and scoring, good to a factor of two",
    ):
        talk.print(line, markup=False, highlight=False, soft_wrap=True)


def _probe(sweep: "SweepConfig", store: Store, cluster: Cluster) -> None:
    from halora.sweep.run import launch as launching

    if sweep.probe is None:
        raise UserError("the sweep's file switches the probe off", "--set probe={} asks for it all the same")
    with SweepProgress(0) as progress:
        launching.probe(sweep, store, progress, cluster=cluster)


def _close_records(name: str, store: Store) -> None:
    """Close and deliver the records that a killed sweep left."""
    from halora.records.delivery import undelivered
    from halora.records.index import read_sweep_state
    from halora.sweep.run.reconcile import close_records

    if undelivered(store, name) or any(point.state == "running" for point in read_sweep_state(store, name).points()):
        talk.print("closing and delivering its records", markup=False)
        with SweepProgress(0) as progress:
            close_records(name, store, progress.say)


def _close(name: str, store: Store, outcome: "Outcome") -> None:
    from halora.cli.front import print_front
    from halora.records.delivery import refused

    talk.print()
    print_front(name, store, Format.TABLE)
    if outcome.comparison:
        print_comparison(outcome.comparison)
    uri = store.serving(name).tracking_uri
    if not outcome.complete:
        talk.print(f"\ninterrupted; all reports are kept. Resume it with: halora sweep resume {name}", markup=False)
    talk.print(
        f"\nlook at a trial:  halora trial show {name}/NUMBER"
        f"\nopen the report:  {store.sweep(name).published / REPORT_FILE}"
        f"\nbrowse in MLflow: {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {shlex.quote(uri)}'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    lost = refused(store.sweep(name))
    for number, cause in lost.items():
        what = "of the sweep" if number is None else f"of trial {number}"
        said = f"records {what} are not in MLflow, which refused them: {shortened(cause, 300)}"
        talk.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
    if lost:
        talk.print(f"they are kept in {store.sweep(name).refused_file}", markup=False, highlight=False, soft_wrap=True)
    if outcome.failed or lost or not outcome.complete:
        raise typer.Exit(1)
