"""Writes a sweep to MLflow: one parent run per sweep, one child run per trial, found again by (sweep, number)."""

import csv
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from halora.analysis.figures import front_figure
from halora.analysis.front import TrialPoint, front, hypervolume
from halora.errors import UnreachableError
from halora.hardware.energy import EnergyBreakdown
from halora.records import names
from halora.records.store import Store
from halora.spaces.sweep import SweepConfig
from halora.trial import TrialConfig

logging.getLogger("mlflow").setLevel(logging.WARNING)
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

_PARENT_TAG = "mlflow.parentRunId"
_NAME_TAG = "mlflow.runName"
_NOTE_TAG = "mlflow.note.content"


def open_client(store: Store) -> MlflowClient:
    """A client of the store's database, which is created on first use.

    Raises:
        UnreachableError: The database cannot be opened.
    """
    try:
        client = MlflowClient(store.tracking_uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow and SQLAlchemy raise many kinds
        text = str(error).strip().splitlines()[0]
        raise UnreachableError(f"MLflow's database in '{store.root}' cannot be opened: {text}") from None
    return client


class SweepRecorder:
    """Writes one sweep's records. Used by the one process that runs the sweep."""

    def __init__(self, client: MlflowClient, store: Store, sweep: SweepConfig, sweep_file: Path) -> None:
        self._client, self._sweep = client, sweep
        self.experiment_id = self._experiment(store)
        self._points: dict[int, TrialPoint] = {}
        self._methods: dict[int, str] = {}
        self._runs: dict[int, str] = {}
        self.parent = self._find_or_create(None, sweep.name)
        client.log_artifact(self.parent.info.run_id, str(sweep_file))

    def _experiment(self, store: Store) -> str:
        found = self._client.get_experiment_by_name(self._sweep.family)
        if found:
            return str(found.experiment_id)
        location = (store.artifacts / self._sweep.family).as_uri()
        return str(self._client.create_experiment(self._sweep.family, artifact_location=location))

    def _find_or_create(self, number: int | None, run_name: str) -> Run:
        """The run of this identity, made once whatever happened before, and marked running."""
        kind = "sweep" if number is None else "trial"
        identity = {names.SWEEP: self._sweep.name, names.KIND: kind}
        if number is not None:
            identity[names.NUMBER] = str(number)
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        found = self._client.search_runs([self.experiment_id], query, max_results=1)
        if found:
            run = found[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {**identity, _NAME_TAG: run_name}
            if number is not None:
                tags[_PARENT_TAG] = self.parent.info.run_id
            elif self._sweep.description:
                tags[_NOTE_TAG] = self._sweep.description
            run = self._client.create_run(self.experiment_id, tags=tags)
        self._client.set_tag(run.info.run_id, names.STATE, "running")
        return run

    def begin_trial(self, number: int, config: TrialConfig, params: Mapping[str, Any], energy: EnergyBreakdown) -> None:
        """Record what is known before training: searched values, full configuration, energy by component."""
        run_id = self._trial_run(number)
        metrics = {names.ENERGY: energy.total_uj_per_token} | {
            names.ENERGY_COMPONENT.format(component=name): value for name, value in energy.components_uj.items()
        }
        self._log(run_id, metrics, step=0, params=params)
        self._client.set_tag(run_id, names.CHIP_HASH, config.chip.content_hash)
        self._client.log_text(run_id, config.model_dump_json(indent=1), names.CONFIG_FILE)
        self._methods[number] = config.training.method

    def report_step(self, number: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record the training metrics up to an optimiser step."""
        self._log(
            self._trial_run(number),
            {k: metrics[k] for k in names.TRAINING_METRICS if k in metrics},
            step=step,
        )

    def report_rung(self, number: int, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores at a rung."""
        rung = {names.RUNG_METRIC.format(score=name): scores[name] for name in names.RUNG_SCORES}
        self._log(self._trial_run(number), rung, step=step)

    def report_missed(self, number: int, reports: Sequence[Mapping[str, float]]) -> None:
        """Record those of a trial's reports that are not recorded yet."""
        history = self._client.get_metric_history(self._trial_run(number), names.TRAINING_METRICS[0])
        recorded = {metric.step for metric in history}
        for report in reports:
            if (step := int(report["step"])) not in recorded:
                self.report_step(number, step, report)

    def finish_trial(
        self,
        point: TrialPoint,
        step: int,
        scores: Mapping[str, float],
        scores_file: Path,
        adapter: Path | None,
    ) -> None:
        """Record an evaluated trial with its adapter, and the sweep's front with it."""
        run_id = self._trial_run(point.number)
        per_task = {names.metric(name): scores[name] for name in scores if name.startswith(names.TASK_METRICS)}
        kept = {names.VIOLATION: scores[names.VIOLATION]} if names.VIOLATION in scores else {}
        self._log(run_id, {name: scores[name] for name in names.SCORE_METRICS} | per_task | kept, step=step)
        self._client.log_text(run_id, scores_file.read_text(), names.SCORES_FILE)
        if adapter:
            self._client.log_artifacts(run_id, str(adapter), names.ADAPTER_FOLDER)
        self._terminate(run_id, "FINISHED", "finished")
        self._points[point.number] = point
        self._record_front()

    def fail_trial(self, number: int, cause: str) -> None:
        """Record why a trial failed."""
        run_id = self._trial_run(number)
        self._client.set_tag(run_id, names.CAUSE, cause[:5000])
        self._terminate(run_id, "FAILED", "failed")

    def stop_trial(self, number: int) -> None:
        """Mark a trial that early stopping left at a rung."""
        self._terminate(self._trial_run(number), "FINISHED", "stopped")

    def record_front_probability(self, probabilities: Mapping[int, float]) -> None:
        """Record how likely each finished trial lies on the front."""
        for number, probability in probabilities.items():
            self._log(self._trial_run(number), {names.FRONT_PROBABILITY: probability}, step=0)
            self.mark_finished(number)

    def mark_finished(self, number: int) -> None:
        """Mark a trial finished that was recorded before."""
        self._terminate(self._trial_run(number), "FINISHED", "finished")

    def delete_run(self, run_id: str) -> None:
        """Delete a run that stands for no trial of the study, or for one that has a run already."""
        self._client.delete_run(run_id)

    def interrupt_trial(self, number: int) -> None:
        """Mark a trial that a later resume goes on with."""
        self._terminate(self._trial_run(number), "KILLED", "interrupted")

    def add_point(self, point: TrialPoint, method: str) -> None:
        """Take a trial that finished in an earlier run into the front without recording it again."""
        self._points[point.number] = point
        self._methods[point.number] = method

    @property
    def points(self) -> list[TrialPoint]:
        """Finished trials, by number."""
        return sorted(self._points.values(), key=lambda point: point.number)

    def record_comparison(self, comparison: Mapping[str, Any]) -> None:
        """Record the closing comparison on the parent run."""
        self._client.log_text(self.parent.info.run_id, json.dumps(dict(comparison), indent=1), names.COMPARISON_FILE)

    def finish(self, *, interrupted: bool) -> None:
        """Record the front and close the parent run."""
        self._record_front()
        self.close(interrupted=interrupted)

    def close(self, *, interrupted: bool) -> None:
        """Close the parent run."""
        run_id = self.parent.info.run_id
        if interrupted:
            self._terminate(run_id, "KILLED", "interrupted")
        else:
            self._terminate(run_id, "FINISHED", "finished")

    def _trial_run(self, number: int) -> str:
        if number not in self._runs:
            self._runs[number] = self._find_or_create(number, f"{self._sweep.name}/{number}").info.run_id
        return self._runs[number]

    def _record_front(self) -> None:
        points = self.points
        members = front(points)
        volume = hypervolume(points, **self._sweep.reference_point.model_dump())
        run_id = self.parent.info.run_id
        counts = {names.FRONT_SIZE: len(members), names.TRIALS_DONE: len(points), names.HYPERVOLUME: volume}
        self._log(run_id, counts, step=len(points))
        on_front = {point.number for point in members}
        rows = [{**asdict(point), "on_front": point.number in on_front} for point in points]
        self._client.log_text(run_id, json.dumps(rows, indent=1), names.FRONT_JSON)
        self._client.log_text(run_id, front_csv(rows), names.FRONT_CSV)
        figure = front_figure(points, f"{self._sweep.name}: {len(points)} trials", self._methods)
        self._client.log_figure(run_id, figure, names.FRONT_PNG)

    def _log(
        self, run_id: str, metrics: Mapping[str, float], *, step: int, params: Mapping[str, Any] | None = None
    ) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()],
            params=[Param(name, str(value)) for name, value in (params or {}).items()],
        )

    def _terminate(self, run_id: str, status: str, state: str) -> None:
        self._client.log_batch(run_id, tags=[RunTag(names.STATE, state)])
        self._client.set_terminated(run_id, status=status)


def front_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a front as CSV, searched values in columns of their own."""
    flat = [{**{k: v for k, v in row.items() if k != "params"}, **row["params"]} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
