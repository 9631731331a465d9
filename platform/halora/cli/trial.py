"""`halora trial`: one trial, what it said, and whether its figures are reproduced."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.output import Format, FormatOption, StoreOption, open_store, show_rows, talk
from halora.errors import UserError
from halora.records.store import Store

if TYPE_CHECKING:
    from halora.analysis.trials import RecordedTrial

app = typer.Typer(help="Single trials.", no_args_is_help=True)

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


def _find(trial: str, folder: Path | None) -> "tuple[Store, str, RecordedTrial]":
    """The store, the sweep and the trial of an id.

    Raises:
        UserError: The id is malformed, or there is no such sweep or trial.
    """
    from halora.records.index import recorded_trial

    sweep, _, number = trial.rpartition("/")
    if not sweep or not number.isdecimal():
        raise UserError(f"'{trial}' is not a trial: write SWEEP/NUMBER, for example quickstart/3")
    place = open_store(folder)
    place.existing(sweep)
    return place, sweep, recorded_trial(place, sweep, int(number))


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
