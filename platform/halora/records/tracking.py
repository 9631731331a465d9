"""Writes a sweep's event log to MLflow: a parent run per sweep, a child run per trial, found again by (launch, number).

Delivering an event twice leaves what delivering it once does: metrics keep their timestamp, step and value, by which
MLflow tells rows apart; everything else is looked for before it is made.
"""

import getpass
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which is for a command's answer
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a blind second try can make a second run
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient as MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy import NullPool, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from halora.errors import UnreachableError, UserError
from halora.evaluation.damage import Damage
from halora.events import BasesProbed, Began, Compared, CutShort, Event, Scored
from halora.files import locked
from halora.records import names
from halora.records.delivery import keep_delivered
from halora.records.moving import follow
from halora.records.provenance import program
from halora.records.store import Store
from halora.spaces.sweep import SweepConfig

logging.getLogger("mlflow").setLevel(logging.ERROR)

_PARENT_TAG = "mlflow.parentRunId"
_NAME_TAG = "mlflow.runName"
_KIND_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow's page takes logged adapters for versions of an agent."""
_NOTE_TAG = "mlflow.note.content"
_LONGEST_NOTE = 5000
"""Characters; MLflow's older databases take no longer tag."""
_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "discarded": "KILLED",
}
_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST"}
_MOST_RUNS = 50_000  # MLflow's own limit of one search
_MOST_PARAMS = 100  # of one request, MLflow's own limit
_LONGEST_DATASET = 500  # characters of a name, MLflow's own limit
_LARGEST_BATCH = 900  # metrics; MLflow takes 1000 metrics, params and tags together
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ANSWERING_S = 12.0
"""How long a server may take for an answer before a person is told."""


def open_client(store: Store) -> MlflowClient:
    """A client of the store's server or database; its own database is created on first use.

    Raises:
        UnreachableError: It does not answer, or cannot be opened.
    """
    own = not store.server and os.access(store.root, os.W_OK)
    making = locked(store.root) if own else nullcontext()
    try:
        _ask_first(store)
        with making:  # two at once would both make the tables of a new database
            client = _client(store)
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, requests and SQLAlchemy raise many kinds
        raise UnreachableError(
            f"MLflow at '{store.tracking_uri}' cannot be opened: {first_line(error)}",
            "start its server, or name another with --tracking-uri" if store.server else "",
        ) from None
    return client


def _client(store: Store) -> MlflowClient:
    follow(store)
    return MlflowClient(store.tracking_uri)  # opens a database at once


def first_line(error: Exception) -> str:
    """What an error of a library says, on one line."""
    if isinstance(error, UserError):
        return error.problems[0]
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if isinstance(error, MlflowException) else f"{type(error).__name__}: {text}"


def _ask_first(store: Store) -> None:
    """Have a server or its database answer something small in time; MLflow itself tries a dead one for two minutes.

    Raises:
        Exception: What was said instead, or that nothing was.
    """
    uri = store.tracking_uri
    failed: list[Exception] = []
    served = urlsplit(uri).scheme.startswith("http")
    if not (served or urlsplit(uri).scheme.startswith(_DATABASES)):
        return
    if uri.startswith("sqlite") and not Path(make_url(uri).database or "").parent.exists():
        return  # MLflow makes it

    def ask() -> None:
        try:
            if served:
                MlflowClient(uri).search_experiments(max_results=1)
            else:
                create_engine(uri, poolclass=NullPool).connect().close()
        except Exception as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWERING_S)
    if asking.is_alive():
        raise TimeoutError(f"no answer within {ANSWERING_S:.0f} s")
    if failed:
        raise failed[0]


def is_refusal(error: Exception) -> bool:
    """Whether MLflow said no, as it would however often it is asked."""
    return isinstance(error, MlflowException) and error.error_code in _REFUSALS


def is_silence(error: Exception) -> bool:
    """Whether an error is for want of an answer of MLflow's, which may come later."""
    if isinstance(error, MlflowException):
        return not is_refusal(error)
    return isinstance(error, RequestException | SQLAlchemyError | UnreachableError | ConnectionError | TimeoutError)


def may_pass(error: Exception) -> bool:
    """Whether the same delivery may succeed later: MLflow is silent, or this machine's disk is full.

    Whatever else is raised, MLflow's refusals and faults of this program, is raised again however often it is tried.
    """
    lasting = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return is_silence(error) or (isinstance(error, OSError) and not lasting)


class MlflowSweep:
    """One sweep in MLflow. Nothing is asked of MLflow before the first delivery.

    Args:
        store: The store, with its server.
        sweep: The sweep.
    """

    def __init__(self, store: Store, sweep: SweepConfig) -> None:
        self._store, self._sweep = store, sweep
        self._folder = store.sweep(sweep.name)
        self._experiment = ""
        self._runs: dict[int | None, str] = {}
        self._unsure: set[int | None] = set()

    @cached_property
    def _client(self) -> MlflowClient:
        return open_client(self._store)

    def deliver(self, number: int | None, events: Sequence[Event]) -> None:
        """Write events of one trial, or of the sweep itself, in their order.

        Raises:
            Exception: MLflow does not answer, or refuses, see `may_pass`.
        """
        run_id = self._run(number, events[0].time_ms)
        metrics: list[Metric] = []
        for event in events:
            step = getattr(event, "step", 0)
            metrics += [Metric(k, float(v), event.time_ms, step) for k, v in names.metrics_of(event).items()]
            match event:
                case Began():
                    self._begin(run_id, event)
                case Scored(final=True):
                    self._metrics(run_id, metrics)  # first: a file may be gone
                    metrics = []
                    self._artifacts(run_id, event)
                case CutShort():
                    self._client.set_tag(run_id, names.CUT_SHORT_AT, str(event.step))
                case Compared():
                    self._client.log_text(run_id, json.dumps(event.comparison, indent=1), names.COMPARISON_FILE)
                case BasesProbed():
                    self._damage(run_id, event.outcomes)
            if event.state:
                self._metrics(run_id, metrics)
                metrics = []
                self._state(run_id, event)
        self._metrics(run_id, metrics)
        keep_delivered(self._folder, events)

    def publish(self, folder: Path) -> None:
        """Put the files of a folder on the parent run, in the place of older ones; its summary as the description."""
        run_id = self._run(None, 0)
        self._client.log_artifacts(run_id, str(folder))
        summary = (folder / names.SUMMARY_FILE).read_text(encoding="utf-8")
        self._client.set_tag(run_id, _NOTE_TAG, summary[:_LONGEST_NOTE])

    def remove_duplicates(self) -> None:
        """Delete runs that a request made though its answer was lost."""
        for number in list(self._unsure):
            for run in self._find(number):
                if run.info.run_id != self._runs[number]:
                    self._client.delete_run(run.info.run_id)
            self._unsure.discard(number)

    def trial_states(self) -> dict[int, list[str]]:
        """States of the runs of every trial, that of the run that counts first; there should be one run of each."""
        states: dict[int, list[str]] = {}
        for run in self._trial_runs():
            states.setdefault(_number(run), []).append(_state(run))
        return states

    def repair(self, events: Sequence[Event], states: Mapping[int, str]) -> dict[int, str]:
        """Delete runs that double another or stand for no trial, and deliver again trials that stand otherwise.

        Args:
            events: The sweep's event log.
            states: Where each trial stands by it.

        Returns:
            What was done, by number.
        """
        done: dict[int, str] = {}
        found: dict[int, str] = {}
        for run in self._trial_runs():
            number = _number(run)
            if number in states and number not in found:
                found[number] = _state(run)
                continue
            self._client.delete_run(run.info.run_id)
            done[number] = "a second run is deleted" if number in states else "its run is deleted"
        for number in states:
            if found.get(number) != states[number]:
                self.deliver(number, [event for event in events if event.trial == number])
                done[number] = "delivered again"
        return done

    def _trial_runs(self) -> list[Run]:
        return self._search({names.LAUNCH: self._sweep.launch, names.KIND: "trial"})

    def _run(self, number: int | None, began_ms: int) -> str:
        """The run of this identity, made once whatever happened before."""
        if number in self._runs:
            return self._runs[number]
        found = self._find(number)
        if not found:
            tags = self._tags(number)
            tags |= _origin()
            tags[_NAME_TAG] = self._sweep.name if number is None else f"{self._sweep.name}/{number}"
            if number is not None:
                tags[_PARENT_TAG] = self._run(None, began_ms)
            elif self._sweep.description:
                tags[_NOTE_TAG] = self._sweep.description
            self._unsure.add(number)
            found = [self._client.create_run(self._experiment, start_time=began_ms, tags=tags)]
            self._unsure.discard(number)
        elif len(found) > 1:  # made by an earlier process, which ended before it could delete one
            self._unsure.add(number)
        run_id = str(found[0].info.run_id)
        if number is None:
            self._client.log_artifact(run_id, str(self._folder.sweep_file))
        self._runs[number] = run_id
        return run_id

    def _find(self, number: int | None) -> list[Run]:
        return self._search(names.identity(self._sweep.launch, number))

    def _tags(self, number: int | None) -> dict[str, str]:
        return {**names.identity(self._sweep.launch, number), names.SWEEP: self._sweep.name}

    def _search(self, tags: Mapping[str, str]) -> list[Run]:
        if not self._experiment:
            self._experiment = self._find_or_create_experiment()
        query, oldest_first = names.query(tags), ["attributes.start_time ASC"]
        return list(self._client.search_runs([self._experiment], query, max_results=_MOST_RUNS, order_by=oldest_first))

    def _find_or_create_experiment(self) -> str:
        family = self._sweep.family
        if found := self._client.get_experiment_by_name(family):
            return str(found.experiment_id)
        # A server keeps artifacts itself; a database has no place for them.
        served = self._store.tracking_uri.startswith("http")
        location = None if served else (self._store.artifacts / family).as_uri()
        try:
            return str(self._client.create_experiment(family, artifact_location=location, tags=_KIND_TAGS))
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS" and (
                found := self._client.get_experiment_by_name(family)
            ):  # another sweep of the family was faster
                return str(found.experiment_id)
            raise

    def _begin(self, run_id: str, event: Began) -> None:
        tags = {names.LABEL.format(label=label): str(value) for label, value in event.labels.items()}
        tags[names.CHIP_HASH] = event.chip_hash
        told = {names.VERSION: event.program.get("version"), names.COMMIT: event.program.get("commit")}
        tags |= {name: value for name, value in told.items() if value}
        if event.clone_of is not None:
            tags[names.CLONE_OF] = str(event.clone_of)
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        params = [Param(name, str(value)) for name, value in event.params.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
        self._client.log_text(run_id, json.dumps(event.config, indent=1), names.CONFIG_FILE)
        if event.datasets:
            self._client.log_inputs(run_id, [_dataset_input(dataset) for dataset in event.datasets])

    def _artifacts(self, run_id: str, event: Scored) -> None:
        root = self._folder.root
        self._client.log_text(run_id, (root / event.scores_file).read_text(encoding="utf-8"), names.SCORES_FILE)
        if event.adapter:
            self._log_adapter(run_id, root / event.adapter, event)

    def _log_adapter(self, run_id: str, adapter: Path, event: Scored) -> None:
        """The adapter as a logged model of the run."""
        if not adapter.is_dir():
            raise FileNotFoundError(f"adapter '{adapter}' is gone")
        found = self._client.search_logged_models([self._experiment], f"source_run_id = '{run_id}'", max_results=1)
        tags = self._tags(event.trial)
        model = (
            found[0]
            if found
            else self._client.create_logged_model(
                self._experiment, f"trial-{event.trial}", run_id, tags=tags, model_type="peft adapter"
            )
        )
        if str(model.status) != "READY":
            self._client.log_model_artifacts(model.model_id, str(adapter))
            self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(run_id).outputs
        if not any(output.model_id == model.model_id for output in (outputs.model_outputs if outputs else ())):
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=event.step)])
        linked = {"model_id": model.model_id, "run_id": run_id}
        self._metrics(
            run_id,
            [
                Metric(name, float(value), event.time_ms, event.step, **linked)
                for name, value in names.metrics_of(event).items()
                if names.is_score(name) and isfinite(value)
            ],
        )

    def _damage(self, run_id: str, outcomes: Sequence[Mapping[str, Any]]) -> None:
        self._client.log_text(run_id, json.dumps(outcomes, indent=1), names.DAMAGE_FILE)
        warnings = [Damage.from_json(outcome).warning for outcome in outcomes if "cause" not in outcome]
        if any(warnings):
            self._client.set_tag(run_id, names.WARNING, "\n".join(filter(None, warnings))[:5000])

    def _state(self, run_id: str, event: Event) -> None:
        cause = getattr(event, "cause", "")
        tags = [RunTag(names.STATE, event.state)] + ([RunTag(names.CAUSE, cause[:5000])] if cause else [])
        self._client.log_batch(run_id, tags=tags)
        if event.state == "running":
            self._client.update_run(run_id, status="RUNNING")
        else:
            self._client.set_terminated(run_id, status=_STATUS[event.state], end_time=event.time_ms)

    def _metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _LARGEST_BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _LARGEST_BATCH])


def _origin() -> dict[str, str]:
    """Who made a run and with what, by the tags that MLflow's own pages show."""
    told = {"mlflow.source.name": "halora", "mlflow.source.type": "LOCAL"}
    with suppress(KeyError, OSError):  # a user without a name
        told["mlflow.user"] = getpass.getuser()
    commit = program()["commit"].removesuffix("+")
    return told | ({"mlflow.source.git.commit": commit} if commit else {})


def _number(run: Run) -> int:
    return int(run.data.tags[names.NUMBER])


def _state(run: Run) -> str:
    """Where a run says that its trial stands; MLflow's own status where its tag is at odds with that."""
    state = str(run.data.tags.get(names.STATE, ""))
    return state if _STATUS.get(state) == run.info.status else str(run.info.status).lower()


def _dataset_input(dataset: Mapping[str, Any]) -> DatasetInput:
    profile = json.dumps({"rows": int(dataset["rows"])})
    name = names.bounded(dataset["name"], _LONGEST_DATASET)
    entry = Dataset(name, dataset["digest"], "halora task", dataset["name"], profile=profile)
    return DatasetInput(entry, [InputTag("mlflow.data.context", dataset["split"])])
