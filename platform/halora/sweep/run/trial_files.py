"""The driver's side of its trials' files: fetched from the storage where there is one, pruned once nobody needs them.

The sweep's own folder keeps every finished trial's adapter and scores. So a trial's place in the storage may be emptied
when it ended, and be filled again for a race.
"""

from collections.abc import Container, Sequence

from halora.errors import StorageError, UserError
from halora.events import Reported
from halora.files import write_whole
from halora.records.store import SweepFolder
from halora.storage import TrialStorage, prune_folder
from halora.sweep.search.jobs import Job
from halora.sweep.search.study import State, Trial
from halora.trial_folder import latest_checkpoint, past_reports
from halora.url_folder import UrlFolder


class TrialFiles:
    """Files of one sweep's trials, for the process that runs it.

    Args:
        folder: The sweep's folder.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._pruned: dict[int, bool] = {}  # by number, whether an adapter was kept in the storage

    def keep_at(self, base_url: str, launch: str, unfinished: Sequence[int]) -> None:
        """Have trials kept below a URL from now on; those not finished are taken there from where they are.

        The sweep's place has the identity of its launch in its name, so that two sweeps of one name do not meet.

        Raises:
            UserError: A checkpoint is damaged.
            StorageError: One of the two places cannot be read or written.
        """
        before = self._folder.checkpoint_url
        url = f"{base_url}/{self._folder.name}-{launch}"
        if url == before:
            return
        for number in unfinished:
            own = self._folder.trial(number)
            if before:
                self._place(number).fetch_checkpoint(own)
            if latest_checkpoint(own):
                TrialStorage(f"{url}/{number:05d}").put_checkpoint(own)
        write_whole(self._folder.checkpoint_url_file, url)

    def reports(self, number: int) -> list[Reported]:
        """Reports of a trial up to its latest checkpoint.

        Raises:
            UserError: The checkpoint is damaged.
            StorageError: The storage cannot be read.
        """
        kept = self._place(number).reports() if self._stored else past_reports(self._folder.trial(number))
        return [Reported.of(number, report) for report in kept]

    def provide(self, job: Job) -> None:
        """Before a finished trial races: have its adapter and its scores where any worker finds them.

        Raises:
            UserError: What is there is damaged.
            StorageError: The storage cannot be read or written.
        """
        if not self._stored:
            return
        place, own, scored = self._place(job.number), self._folder.trial(job.number), job.goal.first_chip
        if not place.has(job.goal.steps, scored):
            place.put_checkpoint(own)
            place.put_result(own, job.goal.steps, scored)
        self._pruned.pop(job.number, None)

    def fetch(self, job: Job) -> None:
        """Bring the adapter and the scores of a trial that reached a goal into the sweep's folder.

        Raises:
            StorageError: They are damaged or not there, or the storage cannot be read.
        """
        if not self._stored:
            return
        place, own = self._place(job.number), self._folder.trial(job.number)
        try:
            adapter = job.goal.first_chip or place.fetch_checkpoint(own, moments=False)
            scores = place.fetch_result(own, job.goal.steps, job.goal.chip_instances)
        except UserError as error:
            raise StorageError(error.problems, error.next_step) from None
        if not (adapter and scores):
            raise StorageError(f"storage '{self._folder.checkpoint_url}' lacks what trial {job.number} left there")

    def prune(self, trials: Sequence[Trial], wanted: Container[int]) -> None:
        """Remove what nobody needs again of trials that ended; to be repeated, which does no harm.

        Moments of finished trials go everywhere, checkpoints of failed and stopped ones too.

        Args:
            trials: All trials.
            wanted: Numbers of the finished ones whose adapters the storage keeps.

        Raises:
            UserError: A checkpoint is damaged.
            StorageError: The storage cannot be written.
        """
        ended = [
            trial for trial in trials if trial.state in (State.FINISHED, State.FAILED, State.STOPPED, State.DISCARDED)
        ]
        there = self._stored_trials() if ended and not self._pruned else None  # of earlier drivers, by one listing
        for trial in ended:
            kept = trial.state is State.FINISHED and trial.number in wanted
            if self._pruned.get(trial.number) == kept:
                continue
            prune_folder(self._folder.trial(trial.number), finished=trial.state is State.FINISHED)
            if self._stored and (there is None or trial.number in there):
                place = TrialStorage(self._folder.trial_url(trial.number), retries_s=())  # the sweep goes on meanwhile
                place.keep_adapter() if kept else place.remove()
            self._pruned[trial.number] = kept

    def _stored_trials(self) -> set[int]:
        """Numbers of the trials that have anything in the storage."""
        url = self._folder.checkpoint_url
        names = UrlFolder(url, retries_s=()).files() if url else {}
        return {int(name.partition("/")[0]) for name in names}

    @property
    def _stored(self) -> bool:
        return bool(self._folder.checkpoint_url)

    def _place(self, number: int) -> TrialStorage:
        return TrialStorage(self._folder.trial_url(number))
