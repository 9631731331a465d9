"""A process that ends at any of its writes. Oracle: the same simulated sweep undisturbed, trial by trial, row by row.

The study, the event log and the trials' files are written through three functions of the product. A kill is an
exception in one of them after which none of them writes any more, as after SIGKILL; what was written before stays. So
each run leaves what a killed process leaves between two writes, and a resume reads nothing else.
"""

from collections import Counter

import pytest

from halora import files
from halora.analysis.front import front
from halora.analysis.trials import grouped
from halora.events import Estimated
from halora.pricing import trial_energy
from halora.records.event_log import EventLog, read
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.records.sweep_state import SweepState
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.reconcile import record_as_studied
from halora.sweep.run.state import _study, is_running, only_driver, open_core
from halora.sweep.run.trial_files import TrialFiles
from halora.sweep.run.trial_records import TrialRecords
from halora.sweep.search.requests import clone, cut_short, discard
from halora.sweep.search.study_storage import PatientStorage, StudyFile
from halora.sweep.simulation.simulator import SimulatedClock, simulate

_OF_A_DATABASE = (
    "_create_new_trial",
    "create_new_study",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_study_user_attr",
)


class _Killed(BaseException):
    """As little to be caught as a signal."""


class _Axe:
    """Falls at a write, and from then on at every other."""

    def __init__(self, monkeypatch):
        self.left, self.writes = None, []
        targets = [(StudyFile, "append_logs"), (EventLog, "append"), (files, "write_whole")]
        for where, name in [*targets, *((PatientStorage, name) for name in _OF_A_DATABASE)]:
            monkeypatch.setattr(where, name, self._guarded(name, getattr(where, name)))

    def _guarded(self, what, write):
        def guarded(*arguments, **named):
            if self.left == 0:
                raise _Killed
            if self.left is not None:
                self.left -= 1
            self.writes.append(what)
            return write(*arguments, **named)

        return guarded


class _Curves:
    """The higher the rank and the finer the converters, the better; some fail the constraint, chips differ."""

    def step_s(self, values):
        return 1.0

    def chip_s(self, values):
        return 1.0

    def report(self, values, step):
        return {"train_loss": 1 / step}

    def accuracy(self, values, step, chip):
        best = 0.05 * values["chip.adc.bits"] + 0.02 * values["lora.rank"]
        return best * (1 - 0.5**step) + 0.05 * ((7 * chip + 3 * values["lora.rank"]) % 5 - 2)

    def clean(self, values, step):
        return {"clean_accuracy": 0.1 * values["chip.adc.bits"]}


class _Quiet:
    def say(self, text):
        pass

    def trial(self, number, state, text="", node=""):
        pass


@pytest.fixture(scope="module")
def sweep(tiny_models, tiny_task):
    content = {
        "name": "kills",
        "family": "tests",
        "seed": 4,
        "trials": 4,
        "concurrent": 1,
        "trial": {
            "model": tiny_models["llama"],
            "task": tiny_task,
            "chip": "halora-2026",
            "training": {"steps": 6, "report_every": 2},
            "evaluation": {"chip_instances": 2, "rows": 4},
        },
        "space": {"lora.rank": {"choices": [2, 4, 8]}, "chip.adc.bits": {"low": 4, "high": 9, "kind": "int"}},
        "first": [],
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
        "early_stopping": {"rungs": [{"steps": 2, "chip_instances": 1, "rows": 4}], "reduction_factor": 2},
        "racing": {"extra": 4, "most": 4},
        "search": {"sampler": "random"},
    }
    example = SweepConfig.model_validate(content).resolve({"lora.rank": 8, "chip.adc.bits": 7})
    content["trial"]["chip"] = example.chip.model_dump(mode="json")  # read once, not in every one of some hundred runs
    dear = trial_energy(example)
    bounds = [f"energy_uj_per_token <= {dear.total_uj_per_token}", "clean_accuracy >= 0.45"]
    return SweepConfig.model_validate(content | {"constraints": bounds})


def _drive(sweep, store, curves=None, listening=TrialRecords):
    """What a launch and a resume do with a simulated sweep, but for the delivery to MLflow."""
    folder = store.sweep(sweep.name)
    with only_driver(folder):
        clock = SimulatedClock()
        core, recorder, trial_files = open_core(sweep, store, clock), SweepRecorder(folder, sweep), TrialFiles(folder)
        try:
            listener = listening(sweep, core, recorder, _Quiet(), trial_files, folder)
            simulate(core, curves or _Curves(), clock, report_every=2, listener=listener, folder=folder)
            record_as_studied(core.trials(), recorder)
            recorder.record_estimates(core.estimates())
            recorder.finish(interrupted=not core.over)
            listener.prune()
        finally:
            recorder.close()


def _outcome(sweep, store):
    """What became of a sweep, by its study and by its records."""
    folder = store.sweep(sweep.name)
    core = open_core(sweep, store)
    trials = [
        (
            *(trial.number, dict(trial.values), trial.state, trial.scores, trial.skipped, trial.energy_uj_per_token),
            *(trial.violation, trial.frozen.state.name, trial.frozen.values, trial.frozen.constraints),
        )
        for trial in core.trials()
    ]
    events, recorded = read(folder.event_log_file)[0], SweepState()
    recorded.take(events)
    points = [(point.number, point.state, point.cause, point.params, point.metrics) for point in recorded.points()]
    rows = Counter(
        (event.kind, event.trial, getattr(event, "step", None), name, value)
        for event in events
        if not isinstance(event, Estimated)  # which says again how trials compare, whenever it is asked
        for name, value in getattr(event, "metrics", {}).items()
    )
    kept = {str(path.relative_to(folder.root)) for path in (folder.root / "trials").rglob("*") if path.is_file()}
    return {
        "trials": trials,
        "points": points,
        "rows": rows,
        "state": (recorded.sweep_state, recorded.sweep_metrics),
        "spent": (core.steps_taken(), core.counts()),
        "kept": kept,
    }


def _place(tmp_path, name):
    store = Store(tmp_path / name)
    store.sweep("kills").root.mkdir(parents=True)
    return store


def _killed_and_resumed(axe, sweep, store, at, listening=TrialRecords):
    axe.left = at
    try:
        with pytest.raises(_Killed):
            _drive(sweep, store, listening=listening)
    finally:
        axe.left = None
    assert not is_running(store.sweep(sweep.name))
    _drive(sweep, store, listening=listening)
    return _outcome(sweep, store)


class _Diverging(_Curves):
    """The largest rank ends without an accuracy."""

    def accuracy(self, values, step, chip):
        return float("nan") if values["lora.rank"] == 8 else super().accuracy(values, step, chip)


def test_a_trial_without_an_accuracy_has_failed_for_study_and_records_alike(sweep, tmp_path):
    """The records once called it finished."""
    store = _place(tmp_path, "diverging")
    trial = sweep.trial | {"evaluation": {"chip_instances": 1, "rows": 4}}
    plain = {"constraints": (), "early_stopping": None, "racing": None, "trial": trial}
    _drive(sweep.model_copy(update=plain), store, _Diverging())
    outcome = _outcome(sweep, store)
    failed = {number for number, values, state, *_ in outcome["trials"] if state == "failed"}
    assert failed == {number for number, values, *_ in outcome["trials"] if values["lora.rank"] == 8}
    assert failed
    recorded = {number: (state, cause) for number, state, cause, *_ in outcome["points"]}
    told = ("failed", "its accuracy is nan, not a number")
    assert {number for number, state in recorded.items() if state == told} == failed


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_loses_and_repeats_nothing(sweep, tmp_path, monkeypatch, every):
    """In CI at every fourth of them, and between all that follow each other in the study."""
    axe, store = _Axe(monkeypatch), _place(tmp_path, "whole")
    _drive(sweep, store)
    writes, whole = list(axe.writes), _outcome(sweep, store)
    states = Counter(str(trial[2]) for trial in whole["trials"])
    assert min(states[state] for state in ("finished", "stopped", "skipped")) > 0, states  # all that can become of one
    assert any(len(trial[3][-1].accuracy_by_chip) > 2 for trial in whole["trials"] if trial[3])  # and the race
    assert set(writes) == {"append_logs", "append", "write_whole"}
    assert len(writes) >= 40
    in_study = [at for at in range(1, len(writes)) if {*writes[at - 1 : at + 1]} == {"append_logs"}]
    for at in sorted({*range(0, len(writes), every), *in_study}):
        found = _killed_and_resumed(axe, sweep, _place(tmp_path, f"{at}"), at)
        for what, expected in whole.items():
            assert found[what] == expected, f"{what}, killed at write {at}, after {writes[max(at - 3, 0) : at]}"


def _asking(axe, store):
    """A listener to whose sweep somebody asks something at three moments, each time from another process."""

    class Asking(TrialRecords):
        def told(self, job, event):
            super().told(job, event)
            study = _study(self._sweep, store)
            left, axe.left = axe.left, None  # the other process is not killed
            writes = len(axe.writes)
            match (job.number, event.kind, getattr(event, "step", 0)):
                case (0, "reported", 2):
                    cut_short(self._sweep, study, 0)
                case (0, "scored", 2) if not study.asked() and not any(t.asked_as for t in study.trials()):
                    bits = job.values["chip.adc.bits"]
                    clone(self._sweep, study, 0, {"chip.adc.bits": bits - 1 if bits > 4 else bits + 1})
                case (2, "reported", 2):
                    discard(self._sweep, study, 2)
            del axe.writes[writes:]
            axe.left = left

    return Asking


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_leaves_a_trial_stopped_discarded_or_cloned_as_asked(sweep, tmp_path, monkeypatch, every):
    """Trial 0 is stopped at its first report, before the rung; the next is its clone; another is discarded."""
    plain = sweep.model_copy(update={"constraints": (), "early_stopping": None, "racing": None, "trials": 3})
    axe, store = _Axe(monkeypatch), _place(tmp_path, "whole")
    _drive(plain, store, listening=_asking(axe, store))
    writes, whole = list(axe.writes), _outcome(plain, store)
    trials = open_core(plain, store).trials()
    assert [(trial.state, trial.clone_of) for trial in trials[:2]] == [("finished", None), ("finished", 0)]
    assert [trial.state for trial in trials].count("discarded") == 1
    assert len(trials) == plain.trials + 1
    assert (trials[0].scores[-1].step, trials[0].last_step, trials[1].scores[-1].step) == (2, 2, 6)
    changed = {path for path, value in trials[1].values.items() if trials[0].values[path] != value}
    assert changed == {"chip.adc.bits"}
    assert [trial.frozen.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    recorded = SweepState()
    recorded.take(read(store.sweep(plain.name).event_log_file)[0])
    points = recorded.points()
    assert [point.state for point in points] == [trial.state for trial in trials]
    assert [(point.cut_short_at, point.clone_of) for point in points] == [
        (2, None),
        (None, 0),
        (None, None),
        (None, None),
    ]
    assert [point.number for point in front(grouped(points).feasible)] == [
        point.number for point in front([points[0], points[1], points[3]])
    ]
    assert not list(store.sweep(plain.name).trial(2).glob("step-*"))  # its checkpoint
    for at in range(0, len(writes), every):
        place = _place(tmp_path, f"{at}")
        found = _killed_and_resumed(axe, plain, place, at, _asking(axe, place))
        for what, expected in whole.items():
            assert found[what] == expected, f"{what}, killed at write {at}, after {writes[max(at - 3, 0) : at]}"


@pytest.mark.slow
def test_a_kill_at_any_write_to_a_database_loses_and_repeats_nothing(sweep, tmp_path, postgresql, monkeypatch):
    axe, store = _Axe(monkeypatch), _place(tmp_path, "whole")
    _drive(sweep, store)
    whole = _outcome(sweep, store)
    monkeypatch.setenv("HALORA_STUDY_URL", postgresql)
    axe.writes.clear()
    short = sweep.model_copy(update={"name": "kills-database"})
    place = Store(tmp_path / "database")
    place.sweep(short.name).root.mkdir(parents=True)
    _drive(short, place)
    writes = list(axe.writes)
    assert _outcome(short, place)["trials"] == whole["trials"]
    points = [at for at, write in enumerate(writes) if write in _OF_A_DATABASE]
    assert len(points) >= 20
    for at in points:
        again = sweep.model_copy(update={"name": f"kills-{at}"})
        store = Store(tmp_path / f"{at}")
        store.sweep(again.name).root.mkdir(parents=True)
        found = _killed_and_resumed(axe, again, store, at + 1)  # after it
        assert found == whole, f"killed after write {at}, {writes[at]}"


def test_two_kills_in_a_row_are_no_worse(sweep, tmp_path, monkeypatch):
    """The second comes while the resume of the first picks up what was left."""
    axe, store = _Axe(monkeypatch), _place(tmp_path, "whole")
    _drive(sweep, store)
    writes, whole = len(axe.writes), _outcome(sweep, store)
    for first in range(7, writes - 15, 9):
        store = _place(tmp_path, f"{first}")
        for at in (first, 1 + first % 5):
            axe.left = at
            with pytest.raises(_Killed):
                _drive(sweep, store)
        axe.left = None
        _drive(sweep, store)
        assert _outcome(sweep, store) == whole, f"killed at write {first}, then {1 + first % 5}"
