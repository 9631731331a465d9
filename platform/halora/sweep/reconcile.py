"""Whether the records say of every trial what the study says, and mending them where they do not.

The study is the truth. A process that was killed may have written one store and not yet the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halora.records.store import SweepFolder
from halora.sweep.study import State, Trial

if TYPE_CHECKING:
    from halora.records.queries import TrialRecord
    from halora.records.tracking import SweepRecorder

_RECORDED_AS = {
    State.RUNNING: "interrupted",
    State.PAUSED: "interrupted",
    State.FINISHED: "finished",
    State.STOPPED: "stopped",
    State.FAILED: "failed",
    State.SKIPPED: "",
}
"""What the records say of a trial while no process runs its sweep; nothing of one that was never trained."""


@dataclass(frozen=True)
class Difference:
    """A trial that the records have otherwise than the study.

    Attributes:
        number: The trial.
        study: Where the study says it stands; empty if it does not know it.
        recorded: Where the records say it stands; empty if they have none.
        mended: What was done.
    """

    number: int
    study: str
    recorded: str
    mended: str


def reconcile(
    trials: Sequence[Trial],
    records: Sequence["TrialRecord"],
    recorder: "SweepRecorder",
    folder: SweepFolder,
) -> list[Difference]:
    """Bring the records to what the study says of every trial; what was different, by number.

    Only for a sweep that no other process runs.
    """
    recorded = {record.number: record.state for record in records}
    found = []
    for trial in trials:
        state, expected = recorded.get(trial.number, ""), _RECORDED_AS[trial.state]
        if state != expected and not (trial.state is State.RUNNING and not state):  # not begun there: a resume does
            found.append(Difference(trial.number, trial.state, state, _mend(trial, expected, recorder, folder)))
    seen: set[int] = set()
    for record in records:
        if record.number in seen or record.number >= len(trials):
            study = trials[record.number].state if record.number < len(trials) else ""
            recorder.delete_run(record.run_id)
            found.append(Difference(record.number, study, record.state, "its run is deleted"))
        seen.add(record.number)
    return sorted(found, key=lambda difference: difference.number)


def _mend(trial: Trial, expected: str, recorder: "SweepRecorder", folder: SweepFolder) -> str:
    match trial.state:
        case State.FAILED:
            recorder.fail_trial(trial.number, "its worker or its driver ended")
        case State.STOPPED:
            recorder.stop_trial(trial.number)
        case State.RUNNING | State.PAUSED:
            recorder.interrupt_trial(trial.number)
        case State.FINISHED:
            recorder.mark_finished(trial.number)
        case State.SKIPPED:
            return "none: it was never trained"
    return f"recorded as {expected}"
