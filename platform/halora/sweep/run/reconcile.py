"""Whether event log and MLflow say of every trial what the study says, and fixing them where they do not.

The study is the truth. A process that was killed may have written one and not yet the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halora.errors import UnreachableError, UserError
from halora.events import Discarded, Failed, Finished, Interrupted, Stopped
from halora.records.store import Store
from halora.sweep.run.state import is_running, load_core, only_driver
from halora.sweep.search.study import State, Trial

if TYPE_CHECKING:
    from halora.records.recorder import SweepRecorder

_RECORDED_AS = {
    State.RUNNING: "interrupted",
    State.PAUSED: "interrupted",
    State.FINISHED: "finished",
    State.STOPPED: "stopped",
    State.FAILED: "failed",
    State.SKIPPED: "",
    State.DISCARDED: "discarded",
}
"""What the records say of a trial while no process runs its sweep; nothing of one that was never trained."""


@dataclass(frozen=True)
class Difference:
    """A trial that event log or MLflow had otherwise than the study.

    Attributes:
        number: The trial.
        study: Where the study says it stands; empty if it does not know it.
        event_log: Where the event log said it stands; empty if it had none.
        mlflow: Where MLflow said it stands, all of its runs; empty if it had none.
        fixed: What was done.
    """

    number: int
    study: str
    event_log: str
    mlflow: str
    fixed: str


def reconcile_store(store: Store, say: Callable[[str], None]) -> tuple[list[tuple[str, Difference]], list[str]]:
    """Bring the records of every sweep that no process runs to what its study says; a sweep that cannot be read stays.

    Args:
        store: The store.
        say: Tells a person one line.

    Returns:
        What was different, by sweep; and why sweeps were left as they are.

    Raises:
        UnreachableError: MLflow, or a database of studies, does not answer.
    """
    found, left = [], []
    for name in store.sweeps():
        if is_running(store.sweep(name)):
            continue
        try:
            found += [(name, difference) for difference in _reconcile(name, store.serving(name), say)]
        except UnreachableError:
            raise
        except UserError as error:
            left.append(f"sweep '{name}' is left as it is: {error}")
    return found, left


def close_records(name: str, store: Store, say: Callable[[str], None]) -> None:
    """Bring the event log of a sweep that nobody runs any more to what its study says, and deliver it.

    Raises:
        UserError: There is no such sweep, or a process is running it.
    """
    from halora.records.exporter import recording

    sweep, core = load_core(name, store)
    with only_driver(store.sweep(name)), recording(store.serving(name), sweep, say) as recorder:
        core.complete()
        record_as_studied(core.trials(), recorder)
        recorder.record_estimates(core.estimates())
        counts = core.counts()
        recorder.finish(interrupted=bool(counts["unfinished"] or counts["waiting"]))


def record_as_studied(trials: Sequence[Trial], recorder: "SweepRecorder") -> None:
    """Record of every trial what the study says of it, where the event log says otherwise; for when no trial runs."""
    for trial in trials:
        state = recorder.recorded.state(trial.number)
        if not _agrees(trial, state):
            _record(trial, recorder)


def _reconcile(name: str, store: Store, say: Callable[[str], None]) -> list[Difference]:
    from halora.records import event_log
    from halora.records.index import read_sweep_state
    from halora.records.tracking import MlflowSweep, open_client

    open_client(store)
    sweep, core = load_core(name, store)
    mlflow = MlflowSweep(store, sweep)
    recorded, runs = read_sweep_state(store, name), mlflow.trial_states()
    close_records(name, store, say)
    states = {point.number: point.state for point in read_sweep_state(store, name).points()}
    fixed = mlflow.repair(event_log.read(store.sweep(name).event_log_file)[0], states)
    trials = {trial.number: trial for trial in core.trials()}
    found = []
    for number in sorted({*trials, *states, *runs}):
        trial, state, in_mlflow = trials.get(number), recorded.state(number), runs.get(number, [])
        if not (trial and _agrees(trial, state) and in_mlflow == ([state] if state else [])):
            done = [f"recorded as {now}"] if (now := states.get(number, "")) != state else []
            done += [fixed[number]] if number in fixed else []
            what = trial.state if trial else ""
            found.append(Difference(number, what, state, ", ".join(in_mlflow), "; ".join(done) or "delivered"))
    return found


def _agrees(trial: Trial, state: str) -> bool:
    return state == _RECORDED_AS[trial.state] or (trial.state is State.RUNNING and not state)  # a resume begins it


def _record(trial: Trial, recorder: "SweepRecorder") -> None:
    match trial.state:
        case State.FAILED:
            recorder.record(Failed(trial=trial.number, cause="its worker or its driver ended"))
        case State.DISCARDED:
            recorder.record(Discarded(trial=trial.number))
        case State.STOPPED:
            recorder.record(Stopped(trial=trial.number))
        case State.RUNNING | State.PAUSED:
            recorder.record(Interrupted(trial=trial.number))
        case State.FINISHED:
            recorder.record(Finished(trial=trial.number))
