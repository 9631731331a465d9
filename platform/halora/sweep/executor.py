"""The Ray Tune adapter of the decision core. Ray runs trials and keeps nothing: storage is the truth."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray import cloudpickle, tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from halora.evaluation.chips import ChipScores
from halora.records.store import SweepFolder
from halora.spaces.sweep import SweepConfig
from halora.storage import read_adapter
from halora.sweep.core import Decision, DecisionCore
from halora.sweep.running import RunningJobs, TrialEvents
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


class _CoreSearcher(Searcher):
    """Tune's searcher: asks the core. Tune pickles it; there is nothing to keep."""

    def __init__(self, running: RunningJobs, sweep: SweepConfig, folder: SweepFolder) -> None:
        super().__init__()
        self._running, self._sweep, self._folder = running, sweep, folder

    def suggest(self, trial_id: str) -> Any:
        """The next job as Ray's config for the trainable; nothing for now, or `FINISHED`."""
        job = self._running.begin(trial_id)
        if job is None:
            return None if self._running.core.waiting else Searcher.FINISHED
        return {
            "job": job.name,
            "number": job.number,
            "folder": str(self._folder.trial(job.number)),
            "storage": self._folder.trial_url(job.number),
            "trial": self._sweep.resolve(job.values).model_dump(mode="json"),
            "goal": asdict(job.goal),
        }

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A job ended or was stopped; one that was paused or interrupted stays unfinished."""
        job, report = self._running.job(trial_id), result or {}
        if job is None:
            return
        stage = report.get("stage")
        if stage == "evaluated":
            self._running.scored(trial_id, report)
        elif stage == "failed":
            self._running.failed(trial_id, str(report["cause"]))
        elif stage == "lost":
            self._running.lost(trial_id, str(report["cause"]))
        else:
            self._running.left(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """The study is the state; Tune wants a file."""
        open(checkpoint_path, "wb").close()

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _CoreScheduler(FIFOScheduler):
    """Tune's scheduler: asks the core after every report, and tells it of workers that end."""

    def __init__(self, running: RunningJobs, folder: SweepFolder) -> None:
        super().__init__()
        self._running, self._folder = running, folder

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        """Stop a trial that the core wants paused: its own checkpoint stays."""
        paused = result["stage"] == "training" and self._running.report(trial.trial_id, result) is Decision.PAUSE
        return TrialScheduler.STOP if paused else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A worker ended, or raised an error that no trial is meant to raise; before the searcher hears of it."""
        job = self._running.job(trial.trial_id)
        if job is None:
            return
        logs = f"see `halora trial logs {self._folder.name}/{job.number}`"
        if _raised(trial):
            self._running.failed(trial.trial_id, f"an error in its worker; {logs}")
        else:
            self._running.lost(trial.trial_id, f"its worker ended; {logs}")

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
    """Run the core's jobs until it has none left, or until Ctrl-C or a stop request.

    Trials still unfinished at the end keep their checkpoint and stay unfinished in the study.
    """
    running = RunningJobs(core, events)
    worker = {"CPU": 1, "GPU": _gpus_per_worker(sweep)}
    tune.Tuner(
        tune.with_resources(HaloraTrainable, tune.PlacementGroupFactory([worker] * sweep.workers)),
        tune_config=tune.TuneConfig(
            search_alg=_CoreSearcher(running, sweep, folder),
            scheduler=_CoreScheduler(running, folder),
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


def score_on_workers(
    sweep: SweepConfig,
    jobs: Sequence[ScoringJob],
    scored: Callable[[int, ChipScores], None] = lambda place, scores: None,
) -> list[ChipScores]:
    """Carry out scoring jobs on the workers, side by side.

    Args:
        sweep: Says how many run at once.
        jobs: The jobs.
        scored: Told the place of a job among them and its scores, as soon as it is done.
    """
    score = ray.remote(num_cpus=1, num_gpus=_gpus_per_worker(sweep))(ScoringJob.run)
    # An adapter's folder may not be where a worker is.
    files = {adapter: ray.put(read_adapter(adapter) if adapter else None) for adapter in {job.adapter for job in jobs}}
    places = {score.remote(job, files[job.adapter]): place for place, job in enumerate(jobs)}
    found: dict[int, ChipScores] = {}
    waiting = list(places)
    while waiting:
        (ended,), waiting = ray.wait(waiting)
        place = places[ended]
        found[place] = ray.get(ended)
        scored(place, found[place])
    return [found[place] for place in range(len(jobs))]


def _gpus_per_worker(sweep: SweepConfig) -> float:
    return min(torch.cuda.device_count() / (sweep.concurrent * sweep.workers), 1)


def _raised(trial: Any) -> bool:
    """Whether a trial of Tune's ended by an error raised in its worker, and not with the worker."""
    if not (written := trial.pickled_error_file):
        return False
    try:
        return isinstance(cloudpickle.loads(Path(written).read_bytes()), RayTaskError)
    except Exception:  # a library's own error, which may not unpickle; Ray's do
        return True


def _trial_name(trial: Any) -> str:
    return str(trial.config["job"])
