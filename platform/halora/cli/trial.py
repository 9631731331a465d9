"""`halora trial`: one trial, and whether its figures can be had again."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from halora.cli.output import Format, FormatOption, StoreOption, open_store, show_rows, talk
from halora.records.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from halora.records.queries import TrialRecord

app = typer.Typer(help="Single trials.", no_args_is_help=True)


@app.command()
def show(
    trial: Annotated[str, typer.Argument(metavar="ID", help="SWEEP/NUMBER, for example quickstart/3.")],
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute energy and accuracy again from the logged configuration, adapter and seeds; exit code 1 if "
            "the energy differs at all, or margins by more than 0.01 nats in the mean (bf16: 0.1).",
        ),
    ] = False,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """State, searched values and metrics of a trial."""
    place: Store = open_store(store)
    if sweep := trial.rpartition("/")[0]:
        place.existing(sweep)

    from halora.records import queries
    from halora.records.tracking import open_client

    client = open_client(place)
    record = queries.trial(client, trial)
    rows: list[dict[str, str | float]] = [
        {"name": "state", "value": record.state},
        {"name": "run", "value": record.run_id},
    ]
    rows += [{"name": "cause", "value": record.cause}] if record.cause else []
    rows += [{"name": name, "value": value} for name, value in sorted(record.params.items())]
    rows += [{"name": name, "value": round(value, 6)} for name, value in sorted(record.metrics.items())]
    show_rows(rows, form, trial)
    if recompute and not _agrees(client, record):
        raise typer.Exit(1)


def _agrees(client: "MlflowClient", record: "TrialRecord") -> bool:
    from halora.records import names, queries
    from halora.sweep.recompute import recompute
    from halora.trial import trial_energy

    config = queries.logged_config(client, record.run_id)
    logged = queries.logged_json(client, record.run_id, names.SCORES_FILE)
    energy = trial_energy(config).total_uj_per_token
    with TemporaryDirectory() as folder:
        adapter = queries.download_adapter(client, record.run_id, Path(folder))
        again = recompute(config, adapter, logged)
    energy_agrees = abs(energy - record.metrics[names.ENERGY]) <= 1e-9 * energy
    for what, ok, text in (
        ("energy", energy_agrees, f"{record.metrics[names.ENERGY]:.6f} logged, {energy:.6f} µJ/token again"),
        ("accuracy", again.agrees, again.describe()),
    ):
        talk.print(
            f"{what}: {'agrees' if ok else 'DISAGREES'}: {text}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return energy_agrees and again.agrees
