"""Reads sweeps and trials back from MLflow."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from halora.analysis.front import TrialPoint
from halora.errors import UserError
from halora.records import names
from halora.trial import TrialConfig


@dataclass(frozen=True)
class TrialRecord:
    """A trial as recorded.

    Attributes:
        run_id: MLflow's id of its run.
        number: Number in the sweep.
        state: running, finished, stopped, failed or interrupted.
        cause: Why it failed, else empty.
        params: Searched values, as text.
        metrics: Latest value by metric name.
    """

    run_id: str
    number: int
    state: str
    cause: str
    params: dict[str, str]
    metrics: dict[str, float]

    def point(self) -> TrialPoint | None:
        """The trial as the front sees it; None until it is evaluated."""
        if "accuracy" not in self.metrics:
            return None
        scores = {
            name: self.metrics[name]
            for name in (
                "accuracy",
                "accuracy_low",
                "accuracy_high",
                "margin",
                "clean_accuracy",
                names.ENERGY,
            )
        }
        feasible = self.metrics.get(names.VIOLATION, 0.0) <= 0
        return TrialPoint(number=self.number, params=dict(self.params), feasible=feasible, **scores)


def trials(client: MlflowClient, sweep: str) -> list[TrialRecord]:
    """All recorded trials of a sweep, by number."""
    runs = _runs(client, f"tags.`{names.SWEEP}` = '{sweep}' and tags.`{names.KIND}` = 'trial'")
    return sorted(map(_record, runs), key=lambda record: record.number)


def trial(client: MlflowClient, trial_id: str) -> TrialRecord:
    """One trial by `SWEEP/NUMBER`.

    Raises:
        UserError: The id is malformed or there is no such trial.
    """
    sweep, _, number = trial_id.rpartition("/")
    if not sweep or not number.isdigit():
        raise UserError(f"'{trial_id}' is not a trial: write SWEEP/NUMBER, for example quickstart/3")
    identity = {names.SWEEP: sweep, names.KIND: "trial", names.NUMBER: str(int(number))}
    found = list(_runs(client, " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())))
    if not found:
        known = ", ".join(str(record.number) for record in trials(client, sweep)) or "none"
        raise UserError(f"no trial '{trial_id}' (numbers of '{sweep}': {known})", "see `halora front show`")
    return _record(found[0])


def parent_run(client: MlflowClient, sweep: str) -> Run:
    """The parent run of a sweep.

    Raises:
        UserError: Nothing is recorded of it.
    """
    found = list(_runs(client, f"tags.`{names.SWEEP}` = '{sweep}' and tags.`{names.KIND}` = 'sweep'"))
    if not found:
        raise UserError(f"nothing is recorded of sweep '{sweep}'")
    return found[0]


def logged_config(client: MlflowClient, run_id: str) -> TrialConfig:
    """The resolved configuration a trial was run with."""
    return TrialConfig.model_validate_json(_text(client, run_id, names.CONFIG_FILE))


def logged_json(client: MlflowClient, run_id: str, name: str) -> Any:
    """A JSON artifact of a run."""
    return json.loads(_text(client, run_id, name))


def download_adapter(client: MlflowClient, run_id: str, folder: Path) -> Path | None:
    """Copy a trial's adapter below `folder`; None if the trial has none."""
    if not client.list_artifacts(run_id, names.ADAPTER_FOLDER):
        return None
    return Path(client.download_artifacts(run_id, names.ADAPTER_FOLDER, str(folder)))


def _text(client: MlflowClient, run_id: str, name: str) -> str:
    with TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, name, folder)).read_text()
        except (OSError, MlflowException):
            raise UserError(f"run {run_id} has no '{name}'; it did not get that far") from None


def _runs(client: MlflowClient, query: str) -> Iterator[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _record(run: Run) -> TrialRecord:
    tags = run.data.tags
    return TrialRecord(
        run_id=run.info.run_id,
        number=int(tags[names.NUMBER]),
        state=tags.get(names.STATE, "running"),
        cause=tags.get(names.CAUSE, ""),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )
