"""`halora trial`: one trial, what it said, and whether its figures are reproduced."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.arguments import overrides_from
from halora.cli.output import Format, FormatOption, StoreOption, open_store, say, show_rows, talk
from halora.cli.remote_commands import AddressOption, elsewhere
from halora.errors import UserError
from halora.records.store import Store
from halora.sweep.cluster.cluster import Cluster

if TYPE_CHECKING:
    from halora.analysis.trials import RecordedTrial
    from halora.api.sweep import Sweep

app = typer.Typer(help="Single trials.", no_args_is_help=True)

CloneSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="A searched value of the clone, e.g. lora.rank=8."),
]
TrialArgument = Annotated[str, typer.Argument(metavar="ID", help="SWEEP/NUMBER, for example quickstart/3.")]


@app.command()
def show(
    trial: TrialArgument,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute energy and accuracy again from the logged configuration, adapter and seeds; exit code 1 if "
            "the energy differs at all, or margins by more than another order of sums explains.",
        ),
    ] = False,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """State, searched values and metrics of a trial."""
    place, sweep, point = _find(trial, store)
    rows: list[dict[str, Any]] = [{"name": "state", "value": point.state}]
    rows += [{"name": "cause", "value": point.cause}] if point.cause else []
    asked = {"clone of trial": point.clone_of, "stopped by somebody at step": point.cut_short_at}
    rows += [{"name": name, "value": value} for name, value in asked.items() if value is not None]
    rows += [{"name": name, "value": value} for name, value in sorted(point.labels.items())]
    rows += [{"name": name, "value": value} for name, value in sorted(point.params.items())]
    rows += [{"name": name, "value": round(value, 6)} for name, value in sorted(point.metrics.items())]
    show_rows(rows, form, trial)
    if recompute and not _agrees(place.serving(sweep), sweep, point):
        raise typer.Exit(1)


@app.command()
def logs(
    trial: TrialArgument,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each file.")] = 100,
    store: StoreOption = None,
) -> None:
    """What a trial's worker printed, and the error that ended it."""
    place, sweep, point = _find(trial, store)
    folder = place.sweep(sweep)
    files = [path for path in folder.logs(point.number) if path.stat().st_size]
    if point.cause:
        print(f"failed: {point.cause}")
    for path in files:
        print(f"==> {path} <==")
        print("\n".join(path.read_text(errors="replace", encoding="utf-8").splitlines()[-lines:]))
    if not files:
        talk.print(f"trial {trial} left no log in '{folder.root}'", markup=False)


@app.command()
def stop(trial: TrialArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """End a trial's training at its next report; it is scored there, and takes its place among the finished."""
    elsewhere(Cluster.at(address))
    sweep, number = _named(trial)
    launched = _launched(sweep, store)
    launched.stop_trial(number)
    _tell(launched, f"trial {trial} ends its training at its next report and is scored there")


@app.command()
def discard(trial: TrialArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """Take a trial out for good: it ends at its next report, its checkpoints go, and it is on no front."""
    elsewhere(Cluster.at(address))
    sweep, number = _named(trial)
    _launched(sweep, store).discard_trial(number)
    say(f"trial {trial} is discarded")


@app.command()
def clone(
    trial: TrialArgument,
    set_: CloneSetOption = None,
    store: StoreOption = None,
    address: AddressOption = None,
) -> None:
    """Have a trial begun next that is like another but for some searched values, beside the number asked for."""
    elsewhere(Cluster.at(address))
    sweep, number = _named(trial)
    launched = _launched(sweep, store)
    values = launched.clone_trial(number, overrides_from(set_, example="lora.rank=8"))
    told = ", ".join(f"{path}={value}" for path, value in values.items())
    _tell(launched, f"asked for a trial like {trial}: {told}")


def _launched(name: str, folder: Path | None) -> "Sweep":
    from halora.api.store import Store as Surface

    return Surface(open_store(folder)).sweep(name)


def _tell(sweep: "Sweep", text: str) -> None:
    later = (
        ""
        if sweep.status()["state"] == "running"
        else f"; '{sweep.name}' is not running: halora sweep resume {sweep.name}"
    )
    say(text + later)


def _named(trial: str) -> tuple[str, int]:
    """Sweep and number of an id.

    Raises:
        UserError: The id is malformed.
    """
    sweep, _, number = trial.rpartition("/")
    if not sweep or not number.isdecimal():
        raise UserError(f"'{trial}' is not a trial: write SWEEP/NUMBER, for example quickstart/3")
    return sweep, int(number)


def _find(trial: str, folder: Path | None) -> "tuple[Store, str, RecordedTrial]":
    """The store, the sweep and the trial of an id.

    Raises:
        UserError: The id is malformed, or there is no such sweep or trial.
    """
    from halora.records.index import recorded_trial

    sweep, number = _named(trial)
    place = open_store(folder)
    place.existing(sweep)
    return place, sweep, recorded_trial(place, sweep, number)


def _agrees(store: Store, sweep: str, point: "RecordedTrial") -> bool:
    from halora.evaluation.agreement import agreement, as_scored
    from halora.pricing import trial_energy
    from halora.records import names, queries
    from halora.records.tracking import open_client
    from halora.sweep.run.state import load_sweep_of
    from halora.trial_runner import TrialRunner

    client = open_client(store)
    launch = load_sweep_of(store.existing(sweep)).launch
    run = queries.trial_run(client, sweep, launch, point.number)
    config = queries.logged_config(client, run.info.run_id)
    logged = queries.logged_scores(client, run.info.run_id)
    energy = trial_energy(config).total_uj_per_token
    with TemporaryDirectory() as folder:
        adapter = queries.download_adapter(client, run, Path(folder))
        again = agreement(config, logged, TrialRunner().evaluate(as_scored(config, logged), adapter))
    recorded = run.data.metrics[names.ENERGY]
    energy_agrees = abs(energy - recorded) <= 1e-9 * energy
    for what, ok, text in (
        ("energy", energy_agrees, f"{recorded:.6f} logged, {energy:.6f} µJ/token again"),
        ("accuracy", again.agrees, str(again)),
    ):
        talk.print(
            f"{what}: {'agrees' if ok else 'DISAGREES'}: {text}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return energy_agrees and again.agrees
