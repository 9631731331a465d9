"""Reads runs and their artifacts back from MLflow."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from halora.errors import UserError
from halora.records import names
from halora.settings.trial import TrialConfig

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores


def trial_run(client: MlflowClient, sweep: str, launch: str, number: int) -> Run:
    """The run of a trial in MLflow.

    Args:
        client: MLflow.
        sweep: Name of the sweep, for the message.
        launch: Identity of its launch.
        number: The trial.

    Raises:
        UserError: It is not there, or not yet.
    """
    found = list(runs(client, names.query(names.identity(launch, number))))
    if not found:
        raise UserError(f"MLflow has no run of trial '{sweep}/{number}' yet", f"deliver: halora sweep resume {sweep}")
    return found[0]


def parent_run(client: MlflowClient, sweep: str, launch: str) -> Run:
    """The parent run of a launch, see `trial_run`.

    Raises:
        UserError: Nothing is recorded of it.
    """
    found = list(runs(client, names.query(names.identity(launch, None))))
    if not found:
        raise UserError(f"nothing is recorded of sweep '{sweep}'")
    return found[0]


def logged_config(client: MlflowClient, run_id: str) -> TrialConfig:
    """The resolved configuration a trial was run with."""
    return TrialConfig.model_validate_json(_text(client, run_id, names.CONFIG_FILE))


def logged_scores(client: MlflowClient, run_id: str, name: str = names.SCORES_FILE) -> "ChipScores":
    """Scores of a trial: by default those the search took."""
    from halora.evaluation.chips import ChipScores

    return ChipScores.from_json(logged_json(client, run_id, name))


def logged_json(client: MlflowClient, run_id: str, name: str) -> Any:
    """A JSON artifact of a run."""
    return json.loads(_text(client, run_id, name))


def adapter_model_id(run: Run) -> str | None:
    """The logged model that holds a trial's adapter; None if the trial has none."""
    outputs = run.outputs.model_outputs if run.outputs else ()
    return str(outputs[0].model_id) if outputs else None


def download_adapter(client: MlflowClient, run: Run, folder: Path) -> Path | None:
    """Copy a trial's adapter into `folder`; None if the trial has none."""
    model_id = adapter_model_id(run)
    if model_id is None:
        return None
    location = client.get_logged_model(model_id).artifact_location
    copy = download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=client.tracking_uri)
    return Path(copy)


def _text(client: MlflowClient, run_id: str, name: str) -> str:
    with TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
        except (OSError, MlflowException):
            raise UserError(f"run {run_id} has no '{name}'; it did not get that far") from None


def runs(client: MlflowClient, query: str) -> Iterator[Run]:
    """The runs of all experiments that a search finds, but for those marked as deleted."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
