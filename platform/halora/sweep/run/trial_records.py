"""What a sweep's driver records of its trials, and which of their files it keeps, as they go on."""

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from halora.analysis.front import front
from halora.analysis.trials import RecordedTrial, grouped, sweep_objectives
from halora.errors import UserError
from halora.events import CutShort, Discarded, Failed, JobEvent, OutOfMemory, Reported, Scored, WorkerLost
from halora.pricing import trial_energy
from halora.records.names import VIOLATION
from halora.records.store import SweepFolder
from halora.spaces.search import total_violation
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.driver_log import Watcher
from halora.sweep.run.trial_files import TrialFiles
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.jobs import Job
from halora.trial_folder import RESULT_FILE, adapter_folder

if TYPE_CHECKING:
    from halora.records.recorder import SweepRecorder


class TrialRecords:
    """Passes what happens to trials on to the records and to whoever watches, see `JobListener`.

    Args:
        sweep: The sweep.
        core: Decides about its trials.
        recorder: Writes its event log.
        watcher: Shown the progress.
        files: Its trials' files.
        folder: Its folder.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        core: DecisionCore,
        recorder: "SweepRecorder",
        watcher: Watcher,
        files: TrialFiles,
        folder: SweepFolder,
    ) -> None:
        self._sweep, self._core, self._recorder, self._watcher = sweep, core, recorder, watcher
        self._files, self._folder = files, folder
        self._objectives = sweep_objectives(sweep)
        self._begun: set[int] = set()
        self._to_prune, self._cannot_prune = True, ""

    def points(self) -> list[RecordedTrial]:
        """Finished trials of this sweep that break no constraint, earlier runs included."""
        return grouped(self._recorder.points, self._objectives).feasible

    def prune(self) -> None:
        """Remove what nobody needs again of trials that ended; what cannot be removed now is left for the next time."""
        points = self.points()
        if not self._sweep.racing or self._core.over:  # else a race may bring any of them there
            points = front(points, self._objectives)
        try:
            ended = [trial for trial in self._core.trials() if not self._core.holds(trial.number)]
            self._files.prune(ended, {point.number for point in points})
            self._to_prune = False
        except UserError as error:
            if str(error) != self._cannot_prune:
                self._watcher.say(f"checkpoints are not pruned: {error}")
            self._cannot_prune = str(error)

    def _record_discarded(self) -> None:
        """Record what somebody discarded that no worker has."""
        for number in self._core.discarded:
            if self._recorder.recorded.state(number) not in ("", "discarded"):
                self._discarded(number)

    def _discarded(self, number: int) -> None:
        self._recorder.record(Discarded(trial=number))
        self._to_prune = True
        self._watcher.trial(number, "discarded")

    def began(self, job: Job) -> None:
        """A job was handed to a worker."""
        self._record_discarded()
        if self._to_prune:  # the study has by now what was told here
            self.prune()
        if job.goal.first_chip:
            self._recorder.record_estimates(self._core.estimates())  # of the race so far
            with suppress(UserError):  # its worker will say so
                self._files.provide(job)
        if job.number not in self._begun and not job.goal.first_chip:
            config = self._sweep.resolve(job.values)
            self._recorder.begin_trial(job.number, config, job.values, trial_energy(config), job.clone_of)
            # A worker may have gone on for a moment after an earlier driver ended.
            with suppress(UserError):  # its worker will say so
                for report in self._files.reports(job.number):
                    self._recorder.record(report)
                self._begun.add(job.number)
        if job.cut_short:
            self._recorder.record(CutShort(trial=job.number, step=job.goal.steps))
        goal = f"up to step {job.goal.steps}" if not job.goal.first_chip else f"on {job.goal.chip_instances} chips"
        self._watcher.trial(job.number, "running", f"{goal}, {job.energy_uj_per_token:.2f} µJ/token")

    def told(self, job: Job, event: JobEvent) -> None:
        """Something happened to it, as the core judged it."""
        self._record_discarded()
        match event:
            case Discarded():
                self._to_prune = True  # now that no worker has it
            case Reported():
                self._recorder.record(event)
                loss = f", loss {event.metrics['train_loss']:.2f}" if "train_loss" in event.metrics else ""
                self._watcher.trial(job.number, "training", f"step {event.step}/{job.goal.steps}{loss}", event.node)
            case Scored(final=False):
                self._recorder.record(event)
                reached = f"accuracy {event.metrics['accuracy']:.3f} at step {event.step}"
                self._watcher.trial(job.number, "paused", reached)
            case Scored():
                self._finish(job, event)
            case WorkerLost():
                self._begun.discard(job.number)  # its last report may not have been heard
                self._recorder.record(event)
                self._watcher.say(f"trial {job.number} resumes from its checkpoint: {event.cause}")
            case OutOfMemory():
                self._recorder.record(replace(event, cause=f"{event.cause}; continued with half"))
                self._watcher.say(
                    f"trial {job.number} resumes from its checkpoint with half the micro-batch: {event.cause}"
                )
            case Failed() if job.goal.first_chip:
                self._watcher.say(f"trial {job.number} stays on {job.goal.first_chip} chips: {event.cause}")
            case Failed():
                self._recorder.record(event)
                self._to_prune = True
                self._watcher.trial(job.number, "failed", event.cause)

    def _finish(self, job: Job, event: Scored) -> None:
        """Record final scores with their file and the adapter, and by how much they break the constraints."""
        self._files.fetch(job)
        self._to_prune = True
        metrics = {**event.metrics, **job.costs}
        if self._sweep.constraints:
            metrics[VIOLATION] = total_violation(each.violation(metrics) for each in self._sweep.constraints)
        folder = self._folder.trial(job.number)
        adapter = None if job.goal.first_chip else adapter_folder(folder)
        whole = replace(
            event,
            metrics=metrics,
            scores_file=str((folder / RESULT_FILE).relative_to(self._folder.root)),
            adapter=str(adapter.relative_to(self._folder.root)) if adapter and adapter.exists() else "",
        )
        self._recorder.record(whole)
        point = self._recorder.recorded.point(job.number)
        told = f"accuracy {point.accuracy:.3f}, {point.energy_uj_per_token:.2f} µJ/token"
        self._watcher.trial(job.number, "finished", told)
