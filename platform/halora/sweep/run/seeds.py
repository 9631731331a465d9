"""Chosen configurations trained again with other seeds, on the sweep's workers, for the closing comparison.

Their folders are below the sweep's own, and as durable as trials: a training resumes from its last report.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halora.errors import StorageError, UserError
from halora.events import Failed, JobEvent, OutOfMemory, Reported, Scored, WorkerLost
from halora.files import write_json, write_whole
from halora.pricing import trial_energy
from halora.records.store import SweepFolder
from halora.settings.trial import Goal
from halora.spaces.sweep import SweepConfig
from halora.storage import TrialStorage
from halora.sweep.search.core import MOST_LOST
from halora.sweep.search.jobs import Decision, Job
from halora.trial_folder import adapter_folder, latest_checkpoint

_PLAN_FILE = "training.json"


@dataclass(frozen=True)
class SeedTraining:
    """One training of a contestant.

    Attributes:
        contestant: What its configuration was chosen for.
        trial: The trial it is the configuration of.
        values: The trial's searched values.
        seed: The training's seed, which is not the trial's.
    """

    contestant: str
    trial: int
    values: Mapping[str, Any]
    seed: int

    @property
    def described(self) -> dict[str, Any]:
        """Searched values and the seed, by path."""
        return {**self.values, "seed": self.seed}


@dataclass(frozen=True)
class Trained:
    """What became of a training.

    Attributes:
        adapter: Folder of the adapter; none for one that failed.
        cause: Why it failed.
    """

    adapter: Path | None
    cause: str = ""


def train_seeds(
    sweep: SweepConfig,
    folder: SweepFolder,
    trainings: Sequence[SeedTraining],
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> list[Trained] | None:
    """Carry out trainings on the sweep's workers, or continue them; none if that was interrupted.

    Ray has to run, see `halora.sweep.cluster.session.ray_session`.

    Args:
        sweep: The sweep.
        folder: Its folder.
        trainings: What to train; a training that is done is not repeated.
        stopping: Whether someone asked the sweep to stop.
        say: Told of the progress.
    """
    from halora.sweep.run.executor import run_trials

    own = folder.comparison
    own.root.mkdir(exist_ok=True)
    if folder.checkpoint_url:
        write_whole(own.checkpoint_url_file, f"{folder.checkpoint_url}-comparison")
    jobs = [_job(sweep, number, training) for number, training in enumerate(trainings)]
    for job in jobs:
        _claim(sweep, own, job)
    done = {job.number for job in jobs if _steps(own.trial(job.number)) >= job.goal.steps}
    work = _SeedWork(jobs, done, stopping)
    listener = _Telling(own, trainings, say)
    if left := len(jobs) - len(done):
        say(f"training {left} of {len(jobs)} adapters for the comparison, with seeds of their own")
        run_trials(sweep, own, work, listener)
    if not work.over:
        return None
    return [
        Trained(None, listener.causes[job.number])
        if job.number in work.failed
        else Trained(adapter_folder(own.trial(job.number)))
        for job in jobs
    ]


def _job(sweep: SweepConfig, number: int, training: SeedTraining) -> Job:
    config = sweep.resolve(training.described)
    goal = Goal(config.training.steps, chip_instances=0)
    costs = trial_energy(config).metrics
    return Job(number, training.described, costs, goal, True, f"{number:05d}-seed-{training.seed}")


def _claim(sweep: SweepConfig, own: SweepFolder, job: Job) -> None:
    """Have the job's folder to itself: what another configuration left there goes."""
    place, config = own.trial(job.number), sweep.resolve(job.values).model_dump(mode="json")
    plan = place / _PLAN_FILE
    if not plan.exists() or json.loads(plan.read_text(encoding="utf-8")) != config:
        shutil.rmtree(place, ignore_errors=True)
        if url := own.trial_url(job.number):
            TrialStorage(url).remove()
        place.mkdir(parents=True)
        write_json(plan, config)


def _steps(place: Path) -> int:
    checkpoint = latest_checkpoint(place)
    return int(json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["step"]) if checkpoint else 0


class _SeedWork:
    """Hands out a fixed list of trainings, see `halora.sweep.search.running.JobSource`."""

    def __init__(self, jobs: Sequence[Job], done: set[int], stopping: Callable[[], bool]) -> None:
        self._jobs = {job.number: job for job in jobs}
        self._done, self._stop_requested = set(done), stopping
        self._in_flight: set[int] = set()
        self._lost: dict[int, int] = {}
        self.failed: set[int] = set()

    @property
    def over(self) -> bool:
        """Whether every training ended."""
        return self._done | self.failed == set(self._jobs)

    @property
    def stopping(self) -> bool:
        """Whether someone asked the sweep to stop."""
        return self._stop_requested()

    @property
    def waiting(self) -> bool:
        """Whether a running one may have to be handed out again."""
        return bool(self._in_flight) and not self.stopping

    def suggest(self) -> Job | None:
        """The next training."""
        left = [n for n in self._jobs if n not in self._done | self.failed | self._in_flight]
        if not left or self.stopping:
            return None
        self._in_flight.add(left[0])
        return self._jobs[left[0]]

    def judged(self, event: JobEvent) -> JobEvent:
        """What an event amounts to: too many lost workers without a report between are a failure."""
        if isinstance(event, WorkerLost) and self._lost.get(event.trial, 0) + 1 >= MOST_LOST:
            return Failed(trial=event.trial, cause=event.cause)
        return event

    def take(self, event: JobEvent) -> Decision:
        """Take what became of a training; one that lost its worker, or its memory, is handed out again."""
        number = event.trial
        if isinstance(event, Reported):
            self._lost.pop(number, None)
            return Decision.PAUSE if self.stopping else Decision.CONTINUE
        self._in_flight.discard(number)
        match event:
            case Scored():
                self._done.add(number)
            case WorkerLost():
                self._lost[number] = self._lost.get(number, 0) + 1
            case OutOfMemory():
                self._jobs[number] = replace(self._jobs[number], halvings=self._jobs[number].halvings + 1)
            case Failed():
                self.failed.add(number)
        return Decision.CONTINUE


class _Telling:
    """Tells of the trainings and brings adapters from the storage; see `halora.sweep.search.running.JobListener`."""

    def __init__(self, own: SweepFolder, trainings: Sequence[SeedTraining], say: Callable[[str], None]) -> None:
        self._own, self._trainings, self._say = own, trainings, say
        self.causes: dict[int, str] = {}

    def began(self, job: Job) -> None:
        self._tell(job, f"up to step {job.goal.steps}")

    def told(self, job: Job, event: JobEvent) -> None:
        match event:
            case Reported():
                loss = f", loss {event.metrics['train_loss']:.2f}" if "train_loss" in event.metrics else ""
                self._tell(job, f"step {event.step}/{job.goal.steps}{loss}")
            case Scored():
                self._fetch(job)
                self._tell(job, "trained")
            case WorkerLost():
                self._tell(job, f"resumes from its checkpoint: {event.cause}")
            case OutOfMemory():
                self._tell(job, f"resumes from its checkpoint with half the micro-batch: {event.cause}")
            case Failed():
                self.causes[job.number] = event.cause
                self._tell(job, f"failed: {event.cause}")

    def _fetch(self, job: Job) -> None:
        if url := self._own.trial_url(job.number):
            place = TrialStorage(url)
            try:
                there = place.fetch_checkpoint(self._own.trial(job.number), moments=False)
            except UserError as error:
                raise StorageError(error.problems, error.next_step) from None
            if not there:
                raise StorageError(f"storage '{self._own.checkpoint_url}' lacks the adapter of training {job.number}")
            place.remove()

    def _tell(self, job: Job, text: str) -> None:
        training = self._trainings[job.number]
        self._say(f"comparison, {training.contestant} with seed {training.seed}: {text}")
