"""Whether the records say of every trial what the study says, and mending them where they do not.

The study is the truth. A process that was killed may have written one store and not yet the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halora.records.store import Store
from halora.sweep.state import is_running, load_core, only_driver
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


def reconcile_store(store: Store) -> list[tuple[str, Difference]]:
    """Bring the records of every sweep that no process runs to what its study says; what was different, by sweep.

    Raises:
        UnreachableError: The store's database cannot be opened.
    """
    from halora.records import queries
    from halora.records.tracking import SweepRecorder, open_client

    found = []
    for name in store.sweeps():
        folder = store.sweep(name)
        if is_running(folder):
            continue
        with only_driver(folder):
            sweep, core = load_core(name, store)
            client = open_client(store)
            recorder = SweepRecorder(client, store, sweep, folder.sweep_file)
            found += [(name, d) for d in reconcile(core.trials(), queries.trials(client, name), recorder)]
            counts = core.counts()
            recorder.close(interrupted=bool(counts["unfinished"] or counts["waiting"]))
    return found


def reconcile(
    trials: Sequence[Trial],
    records: Sequence["TrialRecord"],
    recorder: "SweepRecorder",
) -> list[Difference]:
    """Bring the records to what the study says of every trial; what was different, by number.

    Only for a sweep that no other process runs.
    """
    found = []
    recorded: dict[int, TrialRecord] = {}
    for record in sorted(records, key=lambda record: len(record.metrics), reverse=True):  # of two, the fuller stays
        if record.number < len(trials) and record.number not in recorded:
            recorded[record.number] = record
            continue
        recorder.delete_run(record.run_id)
        study = trials[record.number].state if record.number < len(trials) else ""
        found.append(Difference(record.number, study, record.state, "its run is deleted"))
    for trial in trials:
        state = recorded[trial.number].state if trial.number in recorded else ""
        expected = _RECORDED_AS[trial.state]
        if state != expected and not (trial.state is State.RUNNING and not state):  # a resume begins it there
            found.append(Difference(trial.number, trial.state, state, _mend(trial, expected, recorder)))
    return sorted(found, key=lambda difference: difference.number)


def _mend(trial: Trial, expected: str, recorder: "SweepRecorder") -> str:
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
