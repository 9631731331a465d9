"""Oracles: the journal itself (what a fresh reader of it says), determinism, the points written in the sweep file."""

import optuna
import pytest

from halora.errors import UserError
from halora.records.store import SweepFolder
from halora.spaces.sweep import SweepConfig, load_sweep
from halora.sweep.core import Decision, DecisionCore, check_not_launched, free_knobs, open_study
from halora.trial import trial_energy

_FIRST = (
    {"training.method": "lora", "lora.rank": 8, "chip.adc.bits": 6},
    {"training.method": "halora", "training.mu": 0.25, "lora.rank": 2, "chip.adc.bits": 9},
)


def _sweep(model, task, **changes):
    content = {
        "name": "core",
        "family": "tests",
        "seed": 5,
        "trials": 6,
        "trial": {"model": model, "task": task, "chip": "halora-2026", "training": {"steps": 4}},
        "space": {
            "training.method": {"choices": ["lora", "halora"]},
            "training.mu": {"low": 0.001, "high": 1.0, "log": True, "when": {"training.method": ["halora"]}},
            "lora.rank": {"choices": [2, 4, 8]},
            "chip.adc.bits": {"low": 4, "high": 10, "kind": "int"},
        },
        "first": _FIRST,
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
    }
    return SweepConfig.model_validate(content | changes)


@pytest.fixture
def sweep(tiny_models, tiny_task):
    return _sweep(tiny_models["llama"], tiny_task)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "core").mkdir()
    return SweepFolder(tmp_path / "core")


def _core(sweep, folder):
    """A new core over whatever the journal holds, as a new process would make it."""
    return DecisionCore(sweep, open_study(sweep, folder))


def _accuracy(suggestion):
    return suggestion.values["lora.rank"] / 10


def _run_out(core):
    """All suggestions of a core, each completed before the next is asked for."""
    done = []
    while suggestion := core.suggest():
        done.append(suggestion)
        core.on_complete(suggestion.number, _accuracy(suggestion), suggestion.energy.total_uj_per_token)
    return done


def test_the_points_of_the_file_come_first_and_the_budget_is_kept(sweep, folder):
    core = _core(sweep, folder)
    assert core.counts() == {"finished": 0, "failed": 0, "unfinished": 0, "waiting": 6}
    done = _run_out(core)
    assert [s.number for s in done] == list(range(6))
    assert [s.values for s in done[:2]] == list(_FIRST)
    assert core.counts() == {"finished": 6, "failed": 0, "unfinished": 0, "waiting": 0}
    assert core.suggest() is None
    assert _core(sweep, folder).suggest() is None
    for s in done:
        assert s.config == sweep.resolve(s.values)
        assert s.energy == trial_energy(s.config)
    short = sweep.model_copy(update={"trials": 1, "name": "short"})
    assert [s.values for s in _run_out(_core(short, folder))] == [_FIRST[0]]


def test_the_same_seed_suggests_the_same_and_another_seed_does_not(sweep, tmp_path):
    def suggestions(name, **changes):
        folder = SweepFolder(tmp_path / name)
        folder.root.mkdir()
        return [s.values for s in _run_out(_core(sweep.model_copy(update={"trials": 14, **changes}), folder))]

    once = suggestions("once")  # beyond ten trials the sampler goes by what it has seen
    assert suggestions("again") == once
    assert suggestions("other", seed=6)[2:] != once[2:]
    assert len({str(values) for values in once}) > 10


def test_a_new_core_goes_on_with_what_was_left_unfinished(sweep, folder):
    uninterrupted = SweepFolder(folder.root.parent / "whole")
    uninterrupted.root.mkdir()
    expected = [s.values for s in _run_out(_core(sweep, uninterrupted))]

    first = _core(sweep, folder)
    begun = [first.suggest() for _ in range(4)]
    first.on_complete(1, 0.5, begun[1].energy.total_uj_per_token)
    second = _core(sweep, folder)
    assert second.unfinished == [0, 2, 3]
    again = [second.suggest() for _ in range(3)]
    assert [(s.number, s.values, s.config) for s in again] == [
        (s.number, s.values, s.config) for s in begun if s.number != 1
    ]
    assert [second.suggest().number for _ in range(2)] == [4, 5]
    assert second.suggest() is None
    assert second.num_started == 6

    third = _core(sweep, folder)
    done = _run_out(third)
    assert [s.number for s in done] == [0, 2, 3, 4, 5]
    assert third.counts() == {"finished": 6, "failed": 0, "unfinished": 0, "waiting": 0}
    assert [third.suggestion(number).values for number in range(6)] == expected  # the random phase sees no results


def test_a_trial_without_values_is_given_up_and_the_sweep_goes_on(sweep, folder):
    study = open_study(sweep, folder)
    study.ask()  # a process that ended between asking and choosing
    done = _run_out(_core(sweep, folder))
    assert [s.number for s in done] == [1, 2, 3, 4, 5]
    assert _core(sweep, folder).counts() == {"finished": 5, "failed": 1, "unfinished": 0, "waiting": 0}


def test_the_journal_holds_how_trials_ended(sweep, folder):
    core = _core(sweep, folder)
    good, bad = core.suggest(), core.suggest()
    core.on_complete(good.number, 0.75, good.energy.total_uj_per_token)
    core.on_failure(bad.number)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder.study_file)))
    complete, failed = optuna.load_study(study_name="core", storage=storage).get_trials()
    assert (complete.state.name, complete.values) == ("COMPLETE", [0.75, good.energy.total_uj_per_token])
    assert (failed.state.name, failed.values) == ("FAIL", None)
    assert complete.user_attrs["values"] == complete.params == good.values
    assert _core(sweep, folder).suggest().number == 2  # a failed trial is not tried again
    assert [t.number for t in core.completed()] == [0]


def test_a_stop_request_of_another_process_pauses_everything(sweep, folder):
    driver, other = _core(sweep, folder), _core(sweep, folder)
    running = driver.suggest()
    report = {"stage": "training", "step": 2}
    assert driver.on_report(running.number, report) is Decision.CONTINUE
    other.request_stop()
    assert driver.on_report(running.number, report) is Decision.PAUSE
    assert driver.suggest() is None
    assert driver.unfinished == [running.number]
    other.request_stop(False)
    assert driver.on_report(running.number, report) is Decision.CONTINUE
    assert driver.suggest().number == 1


def test_looking_at_a_sweep_changes_nothing(sweep, folder):
    core = _core(sweep, folder)
    core.suggest()
    before = folder.study_file.read_bytes()
    looking = _core(sweep, folder)
    assert looking.counts() == {"finished": 0, "failed": 0, "unfinished": 1, "waiting": 5}
    assert folder.study_file.read_bytes() == before
    with pytest.raises(UserError, match=r"sweep 'core' was launched before .*halora sweep resume core"):
        check_not_launched(folder)


def test_quickstart_searches_a_wide_range_of_energies(folder):
    sweep = load_sweep("quickstart").model_copy(update={"trials": 40})
    core = _core(sweep, folder)
    energies = []
    while suggestion := core.suggest():
        energies.append(suggestion.energy.total_uj_per_token)
    assert max(energies) / min(energies) >= 1.5
    assert len({round(energy, 3) for energy in energies}) >= 15
    assert max(energies) < sweep.reference_point.energy_uj_per_token


def test_a_searched_knob_whose_cost_lies_outside_the_boundary_is_told(tiny_models, tiny_task):
    space = {
        "chip.adc.bits": {"low": 4, "high": 8, "kind": "int"},
        "chip.write_verify.pulses": {"low": 1, "high": 20, "when": {"chip.adc.bits": [4]}},
        "lora.rank": {"choices": [4]},
    }
    sweep = _sweep(tiny_models["llama"], tiny_task, space=space)
    assert free_knobs(sweep) == ["chip.write_verify.pulses"]
    inside = {**sweep.trial, "chip": {"preset": "halora-2026", "boundary": {"programming": True}}}
    assert free_knobs(_sweep(tiny_models["llama"], tiny_task, space=space, trial=inside)) == []
