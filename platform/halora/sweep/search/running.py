"""What both adapters of the decision core share: the jobs in hand, between the core and whoever asks about them."""

from typing import Protocol

from halora.errors import StorageError
from halora.events import JobEvent, Reported, Scored, WorkerLost
from halora.sweep.search.jobs import Decision, Job


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

    def judged(self, event: JobEvent) -> JobEvent:
        """What an event amounts to: the loss of one worker too many, or scores that are not a number, are a failure."""

    def take(self, event: JobEvent) -> Decision:
        """Take a judged event. After a report the job runs on or is paused; after any other it is over."""


class JobListener(Protocol):
    """Who wants to know what happens to jobs."""

    def began(self, job: Job) -> None:
        """A job was handed to a worker."""

    def told(self, job: Job, event: JobEvent) -> None:
        """Something happened to it, as its source judged it.

        Raises:
            StorageError: What the worker left in the storage cannot be read.
        """


class RunningJobs:
    """The jobs an adapter has in hand, each under a key of its own.

    Args:
        source: Hands them out and judges them.
        listener: Told of everything before the source, so that a crash between the two repeats a record and loses none.
    """

    def __init__(self, source: JobSource, listener: JobListener | None = None) -> None:
        self.source, self._listener = source, listener
        self._jobs: dict[str, Job] = {}

    def begin(self, key: str) -> Job | None:
        """The next job, kept under the key."""
        job = self.source.suggest()
        if job is not None:
            self._jobs[key] = job
            if self._listener:
                self._listener.began(job)
        return job

    def take(self, key: str, event: JobEvent) -> Decision:
        """Pass on what happened to a job, which ends with anything but a report."""
        job, event = self._jobs[key], self.source.judged(event)
        if self._listener:
            try:
                self._listener.told(job, event)
            except StorageError as error:
                if not isinstance(event, Scored):
                    raise
                return self.take(key, WorkerLost(trial=job.number, cause=str(error)))
        if not isinstance(event, Reported):
            del self._jobs[key]
        return self.source.take(event)

    def left(self, key: str) -> None:
        """Let go of a job that was paused or interrupted; its trial stays unfinished."""
        self._jobs.pop(key, None)

    def job(self, key: str) -> Job | None:
        """The job under a key, while it is in hand."""
        return self._jobs.get(key)
