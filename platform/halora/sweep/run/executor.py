"""The Ray Tune adapter of the decision core. Ray runs trials and keeps nothing: storage is the truth."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.tune import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from halora.errors import UserError, causes
from halora.evaluation.chips import ChipScores
from halora.events import BaseScored, Failed, JobEvent, OutOfMemory, Reported, Scored, WorkerLost
from halora.heartbeat import Heartbeats
from halora.records.store import SweepFolder
from halora.spaces.sweep import SweepConfig
from halora.storage import read_adapter
from halora.sweep.cluster.session import worker_share
from halora.sweep.run.probing import Base, Probing
from halora.sweep.search.jobs import Decision
from halora.sweep.search.running import JobListener, JobSource, RunningJobs
from halora.trainable import HaloraTrainable
from halora.trial_runner import ScoringJob


class _CoreSearcher(Searcher):
    """Tune's searcher: asks the core, once all bases are probed. Tune pickles it; there is nothing to keep."""

    def __init__(
        self, running: RunningJobs, probing: Probing, sweep: SweepConfig, folder: SweepFolder, heartbeats: str
    ) -> None:
        super().__init__()
        self._running, self._probing, self._sweep, self._folder = running, probing, sweep, folder
        self._heartbeats = (heartbeats, sweep.resources.heartbeat_s)

    def suggest(self, trial_id: str) -> Any:
        """The next job as Ray's config for the trainable; nothing for now, or `FINISHED`."""
        if not self._probing.over and not self._running.source.stopping:
            base = self._probing.begin(trial_id)
            return base and self._probe(base)
        job = self._running.begin(trial_id)
        if job is None:
            return None if self._running.source.waiting else Searcher.FINISHED
        return {
            "job": job.name,
            "number": job.number,
            "folder": str(self._folder.trial(job.number)),
            "storage": self._folder.trial_url(job.number),
            "trial": self._sweep.resolve(job.values).with_micro_batch_halved(job.halvings).model_dump(mode="json"),
            "goal": asdict(job.goal),
            "final": job.final,
            "heartbeats": self._heartbeats,
        }

    def _probe(self, base: Base) -> dict[str, Any]:
        return {
            "job": f"probe-{uuid.uuid4().hex[:8]}",
            "number": -1,
            "folder": str(self._folder.root),
            "trial": base.config.model_dump(mode="json"),
            "goal": None,
            "heartbeats": self._heartbeats,
        }

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A job ended or was stopped; one that was paused or interrupted stays unfinished."""
        event = (result or {}).get("event")
        if self._probing.holds(trial_id):
            if isinstance(event, BaseScored):
                self._probing.scored(trial_id, ChipScores.from_json(event.scores))
            else:
                self._probing.failed(trial_id, getattr(event, "cause", "its worker ended"))
        elif self._running.job(trial_id) and isinstance(event, Scored | Failed | WorkerLost | OutOfMemory):
            self._running.take(trial_id, event)
        else:
            self._running.left(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """The study is the state; Tune wants a file."""
        open(checkpoint_path, "wb").close()

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _CoreScheduler(FIFOScheduler):
    """Tune's scheduler: asks the core after every report, and tells it of workers that end."""

    def __init__(self, running: RunningJobs, folder: SweepFolder, hung: "_HungWorkers") -> None:
        super().__init__()
        self._running, self._folder, self._hung = running, folder, hung

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        """Stop a trial that the core wants paused: its own checkpoint stays."""
        event = result["event"]
        if isinstance(event, Reported):
            event = replace(event, node=result["node_ip"])
            if self._running.take(trial.trial_id, event) is Decision.PAUSE:
                return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A worker ended, or raised an error that no trial is meant to raise; before the searcher hears of it."""
        job = self._running.job(trial.trial_id)
        if job is None:
            return
        logs = f"see `{self._folder.logs_command(job.number)}`"
        if cause := self._hung.causes.pop(trial.trial_id, "") or _loss(trial):
            event: JobEvent = WorkerLost(trial=job.number, cause=f"{cause}; {logs}")
        else:
            event = Failed(trial=job.number, cause=f"an error in its worker; {logs}")
        self._running.take(trial.trial_id, event)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _HungWorkers(tune.Callback):
    """Ends workers that have been silent too long, wherever they are, and keeps why by Tune's id of their trial.

    Args:
        longest_s: Seconds a worker may be silent.
    """

    def __init__(self, longest_s: float) -> None:
        self.name = f"heartbeats-{uuid.uuid4().hex}"
        self.causes: dict[str, str] = {}
        self._longest_s, self._asked_s = longest_s, time.monotonic()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, max_restarts=-1)(Heartbeats)
        self._heartbeats = actor.options(name=self.name, scheduling_strategy=here).remote()

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        """Look for silent workers, now and then."""
        if time.monotonic() - self._asked_s < self._longest_s / 4:
            return
        self._asked_s = time.monotonic()
        try:
            silent = ray.get(self._heartbeats.silent.remote(self._longest_s), timeout=self._longest_s)
        except RayError:  # the actor is starting anew
            return
        for process, job in silent:
            for trial in trials:
                if trial.config["job"] == job and trial.status == trial.RUNNING:
                    self.causes[trial.trial_id] = f"its worker hung: it said nothing for {self._longest_s:g} s"
            process.kill()

    def end(self) -> None:
        """End the actor."""
        ray.kill(self._heartbeats)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def run_trials(
    sweep: SweepConfig, folder: SweepFolder, source: JobSource, listener: JobListener, probing: Probing | None = None
) -> None:
    """Score the bases that are to be probed, then run jobs until none is left, or Ctrl-C or a stop request.

    Trials still unfinished at the end keep their checkpoint and stay unfinished in the study.

    Raises:
        UnreachableError: The study's database stays away, or refuses.
        OSError: The records or the study cannot be written.
    """
    running, hung = RunningJobs(source, listener), _HungWorkers(sweep.resources.heartbeat_s)
    tuner = tune.Tuner(
        tune.with_resources(HaloraTrainable, tune.PlacementGroupFactory([worker_share(sweep)] * sweep.workers)),
        tune_config=tune.TuneConfig(
            search_alg=_CoreSearcher(running, probing or Probing([], print), sweep, folder, hung.name),
            scheduler=_CoreScheduler(running, folder, hung),
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
            callbacks=[hung],
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        for each in causes(error):  # Tune passes on the text of what its searcher or scheduler raised
            if isinstance(each, UserError | OSError):
                raise each from None
        raise
    finally:
        hung.end()


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
    share = worker_share(sweep)
    score = ray.remote(num_cpus=share["CPU"], num_gpus=share["GPU"])(ScoringJob.run)
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


def _loss(trial: Any) -> str:
    """How a trial of Tune's lost its worker; empty where an error was raised in the worker instead."""
    if not (written := trial.pickled_error_file):
        return "its worker ended"
    try:
        error = cloudpickle.loads(Path(written).read_bytes())
    except Exception:  # a library's own error, which may not unpickle; Ray's do
        return ""
    if not isinstance(error, RayError) or isinstance(error, RayTaskError):
        return ""
    if isinstance(error, OutOfMemoryError):
        return "Ray ended its worker, as its node ran out of memory"
    return "its node is gone" if "node has died" in str(error) else "its worker ended"


def _trial_name(trial: Any) -> str:
    return str(trial.config["job"])
