"""What both adapters of the decision core share: the jobs in hand, between the core and whoever asks about them."""

from collections.abc import Mapping
from typing import Any, Protocol

from halora.errors import StorageError
from halora.records.names import BESIDE_METRICS
from halora.spaces.search import METRICS
from halora.sweep.search.core import Decision, Job

_KEPT = (*METRICS, *BESIDE_METRICS, "step", "rows", "accuracy_by_chip")


class JobSource(Protocol):
    """Who hands out jobs and judges what comes of them: a `DecisionCore`, or a fixed list."""

    @property
    def waiting(self) -> bool:
        """Whether jobs are running whose end may bring new ones."""

    @property
    def stopping(self) -> bool:
        """Whether someone asked it to stop."""

    def suggest(self) -> Job | None:
        """The next job."""

    def on_report(self, number: int, report: Mapping[str, Any]) -> Decision:
        """Judge a report on the way to a goal."""

    def on_scores(self, number: int, scores: Mapping[str, Any]) -> None:
        """Take the scores at the goal."""

    def on_failure(self, number: int) -> None:
        """Take a failure."""

    def on_loss(self, number: int) -> bool:
        """Take the end of a worker; whether the job is handed out again."""

    def on_out_of_memory(self, number: int) -> None:
        """Hand a job out again, with half the micro-batch."""


class TrialEvents(Protocol):
    """Who wants to know what happens to trials."""

    def began(self, job: Job) -> None:
        """A job was handed to a worker."""

    def reported(self, job: Job, report: Mapping[str, Any]) -> None:
        """A trial took some optimiser steps."""

    def evaluated(self, job: Job, report: Mapping[str, Any]) -> None:
        """A trial was brought to its goal and scored."""

    def failed(self, job: Job, cause: str) -> None:
        """A trial failed."""

    def lost(self, job: Job, cause: str) -> None:
        """The worker of a trial ended; the trial resumes from its checkpoint."""

    def out_of_memory(self, job: Job, cause: str) -> None:
        """A trial ran out of memory; it resumes from its checkpoint with half the micro-batch."""


class RunningJobs:
    """The jobs an adapter has in hand, each under a key of its own.

    Args:
        core: Hands them out and judges them.
        events: Told of everything before the core, so that a crash between the two repeats a record and loses none.
    """

    def __init__(self, core: JobSource, events: TrialEvents | None = None) -> None:
        self.core, self._events = core, events
        self._jobs: dict[str, Job] = {}

    def begin(self, key: str) -> Job | None:
        """The next job, kept under the key."""
        job = self.core.suggest()
        if job is not None:
            self._jobs[key] = job
            if self._events:
                self._events.began(job)
        return job

    def report(self, key: str, report: Mapping[str, Any]) -> Decision:
        """Pass an intermediate report on."""
        job = self._jobs[key]
        if self._events:
            self._events.reported(job, report)
        return self.core.on_report(job.number, report)

    def scored(self, key: str, report: Mapping[str, Any]) -> None:
        """Close a job that reached its goal."""
        job = self._jobs[key]
        if self._events:
            try:
                self._events.evaluated(job, report)
            except StorageError as error:  # what the worker left there cannot be read
                self.lost(key, str(error))
                return
        del self._jobs[key]
        self.core.on_scores(job.number, {name: report[name] for name in _KEPT if name in report})

    def failed(self, key: str, cause: str) -> None:
        """Close a job whose trial failed."""
        job = self._jobs.pop(key)
        if self._events:
            self._events.failed(job, cause)
        self.core.on_failure(job.number)

    def lost(self, key: str, cause: str) -> None:
        """Close a job whose worker ended. The core hands it out again, unless the trial lost too many."""
        job = self._jobs[key]
        if not self.core.on_loss(job.number):
            self.failed(key, cause)
            return
        del self._jobs[key]
        if self._events:
            self._events.lost(job, cause)

    def out_of_memory(self, key: str, cause: str) -> None:
        """Close a job that ran out of memory while its micro-batch had more than a row. The core hands it out again."""
        job = self._jobs.pop(key)
        if self._events:
            self._events.out_of_memory(job, cause)
        self.core.on_out_of_memory(job.number)

    def left(self, key: str) -> None:
        """Let go of a job that was paused or interrupted; its trial stays unfinished."""
        self._jobs.pop(key, None)

    def job(self, key: str) -> Job | None:
        """The job under a key, while it is in hand."""
        return self._jobs.get(key)
