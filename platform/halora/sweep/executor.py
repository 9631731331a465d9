"""The Ray Tune adapter of the decision core. Ray runs trials and keeps nothing: storage is the truth."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ray
import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from halora.evaluation.chips import ChipScores
from halora.records.store import SweepFolder
from halora.spaces.sweep import SweepConfig
from halora.sweep.core import Decision, DecisionCore, Suggestion
from halora.trainable import HaloraTrainable, ScoringJob

# Read by Ray when it starts.
_RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_niceness": "0",  # workers at Ray's default of 15 starve beside any other job
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class TrialEvents(Protocol):
    """Who wants to know what happens to trials."""

    def began(self, suggestion: Suggestion) -> None:
        """A trial was handed to a worker."""

    def reported(self, suggestion: Suggestion, report: Mapping[str, Any]) -> None:
        """A trial took some optimiser steps."""

    def evaluated(self, suggestion: Suggestion, report: Mapping[str, Any]) -> None:
        """A trial was trained and scored."""

    def failed(self, suggestion: Suggestion, cause: str) -> None:
        """A trial failed by its own fault or lost its worker."""


class _Running:
    """The trials Ray has in hand, between the core that suggested them and whoever wants to know of them."""

    def __init__(self, folder: SweepFolder, core: DecisionCore, events: TrialEvents) -> None:
        self.folder, self.core, self.events = folder, core, events
        self.by_ray_id: dict[str, Suggestion] = {}

    def begin(self, ray_id: str) -> dict[str, Any] | None:
        """The next trial as Ray's config for the trainable."""
        suggestion = self.core.suggest()
        if suggestion is None:
            return None
        self.by_ray_id[ray_id] = suggestion
        self.events.began(suggestion)
        return {
            "number": suggestion.number,
            "folder": str(self.folder.trial(suggestion.number)),
            "trial": suggestion.config.model_dump(mode="json"),
        }

    def report(self, ray_id: str, report: Mapping[str, Any]) -> Decision:
        """Pass an intermediate report on."""
        suggestion = self.by_ray_id[ray_id]
        self.events.reported(suggestion, report)
        return self.core.on_report(suggestion.number, report)

    def end(self, ray_id: str, report: Mapping[str, Any], *, error: bool) -> None:
        """Close a trial by its last report; one that was paused or interrupted stays unfinished.

        Recorded first, told to the study last: a crash between the two repeats a record, and loses none.
        """
        suggestion = self.by_ray_id.pop(ray_id, None)
        if suggestion is None:
            return
        stage = report.get("stage")
        if stage == "evaluated":
            self.events.evaluated(suggestion, report)
            self.core.on_complete(suggestion.number, report["accuracy"], suggestion.energy.total_uj_per_token)
        elif error or stage == "failed":
            log = self.folder.root / "ray" / f"{suggestion.number:05d}" / "error.txt"
            cause = str(report.get("cause") or f"its worker ended; see {log}")
            self.events.failed(suggestion, cause)
            self.core.on_failure(suggestion.number)


class _CoreSearcher(Searcher):
    """Tune's searcher: asks the core. Tune pickles it; there is nothing to keep."""

    def __init__(self, running: _Running) -> None:
        super().__init__()
        self._running = running

    def suggest(self, trial_id: str) -> Any:
        """A config, or `FINISHED`."""
        return self._running.begin(trial_id) or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A trial ended, was stopped, or lost its worker."""
        self._running.end(trial_id, result or {}, error=error)

    def save(self, checkpoint_path: str) -> None:
        """The study is the state; Tune wants a file."""
        open(checkpoint_path, "wb").close()

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _CoreScheduler(FIFOScheduler):
    """Tune's scheduler: asks the core after every report."""

    def __init__(self, running: _Running) -> None:
        super().__init__()
        self._running = running

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        """Stop a trial that the core wants paused: its own checkpoint stays."""
        paused = result["stage"] == "training" and self._running.report(trial.trial_id, result) is Decision.PAUSE
        return TrialScheduler.STOP if paused else TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def ray_session(processes: int) -> Iterator[None]:
    """Ray on this machine while the block runs, with room for as many processes, which share the cores."""
    os.environ.update(_RAY_SETTINGS)
    threads = max((os.cpu_count() or 1) // processes, 1)
    ray.init(
        num_cpus=processes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def run_trials(sweep: SweepConfig, folder: SweepFolder, core: DecisionCore, events: TrialEvents) -> None:
    """Run the core's suggestions until it has none left, or until Ctrl-C or a stop request.

    Trials still unfinished at the end keep their checkpoint and stay unfinished in the study.
    """
    running = _Running(folder, core, events)
    worker = {"CPU": 1, "GPU": _gpus_per_worker(sweep)}
    tune.Tuner(
        tune.with_resources(HaloraTrainable, tune.PlacementGroupFactory([worker] * sweep.workers)),
        tune_config=tune.TuneConfig(
            search_alg=_CoreSearcher(running),
            scheduler=_CoreScheduler(running),
            num_samples=-1,
            max_concurrent_trials=sweep.concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.root),
            verbose=0,
            log_to_file=True,
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the trial's folder has its own
        ),
    ).fit()


def score_on_workers(sweep: SweepConfig, jobs: Sequence[ScoringJob]) -> list[ChipScores]:
    """Carry out scoring jobs on the workers, side by side."""
    score = ray.remote(num_cpus=1, num_gpus=_gpus_per_worker(sweep))(ScoringJob.run)
    return list(ray.get([score.remote(job) for job in jobs]))


def _gpus_per_worker(sweep: SweepConfig) -> float:
    return min(torch.cuda.device_count() / (sweep.concurrent * sweep.workers), 1)


def _trial_name(trial: Any) -> str:
    return f"{trial.config['number']:05d}"
