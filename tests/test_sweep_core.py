"""Oracles: the study itself (what a fresh reader of it says), determinism, the points written in the sweep file."""

import shutil
import threading
from dataclasses import replace

import optuna
import pytest

from halora.errors import UserError
from halora.events import Failed, OutOfMemory, Reported, Scored, WorkerLost
from halora.files import write_json
from halora.hardware.chip_files import preset_names
from halora.pricing import trial_energy
from halora.records.store import Store
from halora.spaces.recipes import first_points
from halora.spaces.sweep import SweepConfig, load_sweep
from halora.sweep.run.state import check_not_launched, is_running, only_driver, open_core, warm_start, write_sweep
from halora.sweep.search.jobs import Decision
from halora.sweep.search.problem import free_knobs
from halora.sweep.search.study import SweepStudy
from halora.sweep.search.study_storage import storage_of

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
def store(tmp_path):
    return _store(tmp_path / "store")


def _store(root):
    (root / "sweeps" / "core").mkdir(parents=True)
    return Store(root)


def _scores(job, accuracy=None):
    """Scores of a job as a trainable reports them."""
    by_chip = [job.values["lora.rank"] / 10 if accuracy is None else accuracy] * job.goal.chip_instances
    mean = sum(by_chip) / len(by_chip)
    metrics = {"accuracy": mean, "clean_accuracy": 0.9, "clean_accuracy_high": 0.9}
    at = {"trial": job.number, "step": job.goal.steps, "final": job.final}
    return Scored(**at, metrics=metrics, accuracy_by_chip=by_chip)


def _run_out(core):
    """All jobs of a core, each done before the next is asked for."""
    done = []
    while job := core.suggest():
        done.append(job)
        core.take(_scores(job))
    return done


def test_the_points_of_the_file_come_first_and_the_budget_is_kept(sweep, store):
    core = open_core(sweep, store)
    none = {"finished": 0, "failed": 0, "stopped": 0, "skipped": 0, "discarded": 0, "unfinished": 0}
    assert core.counts() == none | {"waiting": 6}
    done = _run_out(core)
    assert [job.number for job in done] == list(range(6))
    first = first_points(sweep)
    assert [job.values for job in done[: len(first)]] == first
    assert first[:2] == list(_FIRST)
    assert core.counts() == none | {"finished": 6, "waiting": 0}
    assert core.suggest() is None
    assert core.over
    assert open_core(sweep, store).suggest() is None
    for job in done:
        assert job.energy_uj_per_token == trial_energy(sweep.resolve(job.values)).total_uj_per_token
    short = sweep.model_copy(update={"trials": 1, "name": "short"})
    (store.root / "sweeps" / "short").mkdir()
    assert [job.values for job in _run_out(open_core(short, store))] == [_FIRST[0]]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "gp", "random", "qmc"])
def test_the_same_seed_suggests_the_same_and_another_seed_does_not(sweep, tmp_path, sampler):
    def suggestions(name, **changes):
        settings = sweep.search.model_copy(update={"sampler": sampler})
        changed = sweep.model_copy(update={"trials": 14, "search": settings, **changes})
        return [job.values for job in _run_out(open_core(changed, _store(tmp_path / name)))]

    once = suggestions("once")  # beyond ten trials the sampler goes by what it has seen
    assert suggestions("again") == once
    first = len(first_points(sweep))
    assert suggestions("other", seed=6)[first:] != once[first:]
    assert len({str(values) for values in once}) == 14  # none twice


def test_a_space_without_anything_new_ends_the_search(sweep, store):
    small = {"lora.rank": {"choices": [2, 4]}, "chip.adc.bits": {"low": 6, "high": 7, "kind": "int"}}
    tiny = _sweep(sweep.trial["model"], sweep.trial["task"], space=small, first=[])
    core = open_core(tiny, store)
    assert len({str(job.values) for job in _run_out(core)}) == 4
    assert core.over
    assert "no configuration is left" in core.ended
    assert open_core(tiny, store).counts()["waiting"] == 0


def test_a_new_core_goes_on_with_what_was_left_unfinished(sweep, store, tmp_path):
    expected = [job.values for job in _run_out(open_core(sweep, _store(tmp_path / "whole")))]
    first = open_core(sweep, store)
    begun = [first.suggest() for _ in range(4)]
    first.take(_scores(begun[1]))
    second = open_core(sweep, store)
    assert second.unfinished == [0, 2, 3]
    again = [second.suggest() for _ in range(3)]
    assert again == [job for job in begun if job.number != 1]
    assert [second.suggest().number for _ in range(2)] == [4, 5]
    assert second.suggest() is None
    assert second.waiting

    third = open_core(sweep, store)
    assert [job.number for job in _run_out(third)] == [0, 2, 3, 4, 5]
    assert third.counts()["finished"] == 6
    assert [third.trial(number).values for number in range(6)] == expected  # the random phase sees no results


def test_values_that_contradict_each_other_are_skipped_with_their_cause(tiny_models, tiny_task, store):
    """Each end of each range is allowed beside the defaults; more stages than steps are not."""
    stages = {"low": 2, "high": 12, "kind": "int"}
    training = {"steps": 12, "schedule": {"shape": "step", "strength_start": 0.0, "strength_end": 0.01, "stages": 2}}
    sweep = _sweep(
        tiny_models["llama"],
        tiny_task,
        trial={"model": tiny_models["llama"], "task": tiny_task, "chip": "halora-2026", "training": training},
        space={
            "training.steps": {"low": 2, "high": 12, "kind": "int"},
            "training.schedule.stages": stages,
            "lora.rank": {"choices": [2, 4]},
        },
        first=[{"training.steps": 3, "training.schedule.stages": 9, "lora.rank": 4}],
        trials=12,
    )
    core = open_core(sweep, store)
    done = _run_out(core)
    assert len(done) == 12
    assert all(job.values["training.schedule.stages"] <= job.values["training.steps"] for job in done)
    first, *others = core.trials()
    assert first.skipped == (
        "training.schedule.shape: 'step' with 9 stages takes 9 steps to be met, the training has 3"
    )
    assert {trial.energy_uj_per_token for trial in others if trial.skipped} <= {
        sweep.reference_point["energy_uj_per_token"]
    }
    assert core.counts()["finished"] == 12


def test_the_journal_holds_how_trials_ended(sweep, store):
    core = open_core(sweep, store)
    good, bad, non_finite = core.suggest(), core.suggest(), core.suggest()
    core.take(core.judged(_scores(good, 0.75)))
    core.take(Failed(trial=bad.number, cause="boom"))
    judged = core.judged(_scores(non_finite, float("nan")))
    assert judged == Failed(trial=non_finite.number, cause="its accuracy is nan, not a number")
    core.take(judged)
    journal = optuna.storages.journal.JournalFileBackend(str(store.sweep("core").study_file))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(journal))
    complete, failed, no_number = study.get_trials()
    assert (complete.state.name, complete.values) == ("COMPLETE", [0.75, good.energy_uj_per_token])
    assert (failed.state.name, failed.values) == ("FAIL", None)
    assert no_number.state.name == "FAIL"
    assert complete.params == good.values
    assert open_core(sweep, store).suggest().number == 3  # a failed trial is not tried again


def test_a_trial_that_loses_its_worker_is_handed_out_again_but_not_for_ever(sweep, store):
    core = open_core(sweep, store)
    job = core.suggest()
    lost = WorkerLost(trial=job.number, cause="its node is gone")
    for _ in range(2):
        assert core.judged(lost) == lost
        core.take(lost)
        assert core.suggest() == job
    other = open_core(sweep, store)  # what was lost under another process counts
    assert other.suggest() == job
    other.take(Reported(trial=job.number, step=1, metrics={}))
    for _ in range(2):
        assert other.judged(lost) == lost
        other.take(lost)
        assert other.suggest() == job
    assert other.judged(lost) == Failed(trial=job.number, cause="its node is gone")
    other.take(other.judged(lost))
    assert other.counts()["failed"] == 1
    assert other.suggest().number == 1


def test_a_trial_that_runs_out_of_memory_is_handed_out_again_in_smaller_parts(sweep, store):
    core = open_core(sweep, store)
    job = core.suggest()
    core.take(OutOfMemory(trial=job.number, cause="too many rows"))
    assert core.suggest() == replace(job, halvings=1)
    core.take(OutOfMemory(trial=job.number, cause="too many rows"))
    other = open_core(sweep, store)  # another process knows
    assert other.suggest() == replace(job, halvings=2)


def test_a_stop_request_of_another_process_pauses_everything(sweep, store):
    driver, other = open_core(sweep, store), open_core(sweep, store)
    running = driver.suggest()
    report = Reported(trial=running.number, step=2, metrics={})
    assert driver.take(report) is Decision.CONTINUE
    other.request_stop()
    assert driver.take(report) is Decision.PAUSE
    assert driver.suggest() is None
    assert not driver.waiting
    assert not driver.over
    assert driver.unfinished == [running.number]
    other.request_stop(False)
    assert driver.take(report) is Decision.CONTINUE
    assert driver.suggest().number == 1


def test_looking_at_a_sweep_changes_nothing(sweep, store):
    open_core(sweep, store).suggest()
    journal = store.sweep("core").study_file
    before = journal.read_bytes()
    counts = open_core(sweep, store).counts()
    assert (counts["unfinished"], counts["waiting"]) == (1, 5)
    assert journal.read_bytes() == before
    with pytest.raises(UserError, match=r"sweeps/core' is in the way: it has no sweep.yaml"):
        check_not_launched(store.sweep("core"))
    write_sweep(store.sweep("core"), sweep)
    with pytest.raises(UserError, match=r"sweep 'core' was launched before .*halora sweep resume core"):
        check_not_launched(store.sweep("core"))


def test_asking_whether_a_sweep_runs_keeps_nobody_from_running_it(store):
    """Two ask all the time; whoever starts is never refused."""
    folder, over, asked = store.sweep("core"), threading.Event(), 0

    def ask():
        nonlocal asked
        while not over.is_set():
            is_running(folder)
            asked += 1

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        started = 0
        while started < 2000 or asked < 2000:
            with only_driver(folder):
                assert is_running(folder)
            started += 1
    finally:
        over.set()
        for asker in askers:
            asker.join()
    assert not is_running(folder)
    with only_driver(folder), pytest.raises(UserError, match="running in another process"), only_driver(folder):
        pass
    assert not is_running(folder)
    folder.lock_file.chmod(0o444)
    assert not is_running(folder)


def test_a_sweep_starts_warm_from_earlier_ones(sweep, store):
    many = sweep.model_copy(update={"trials": 30})
    _run_out(open_core(many, store))
    write_sweep(store.sweep("core"), many)
    (store.root / "sweeps" / "later").mkdir()
    settings = sweep.search.model_copy(update={"warm_start": ("core",)})
    best = {"choices": [2, 4, 8]}
    later = _sweep(sweep.trial["model"], sweep.trial["task"], name="later", trials=12, first=[], search=settings)
    assert later.space["lora.rank"].choices == tuple(best["choices"])
    cold = later.model_copy(update={"search": sweep.search, "name": "cold"})
    (store.root / "sweeps" / "cold").mkdir()
    write_json(store.sweep("later").warm_start_file, warm_start(later, store))
    shutil.rmtree(store.sweep("core").root)  # what becomes of it is nothing to the other
    ranks = {
        name: [job.values["lora.rank"] for job in _run_out(open_core(each, store))]
        for name, each in (("later", later), ("cold", cold))
    }
    assert ranks["later"] != ranks["cold"]
    with pytest.raises(UserError, match="no sweep 'coer'"):
        warm_start(later.model_copy(update={"search": settings.model_copy(update={"warm_start": ("coer",)})}), store)


def test_quickstart_searches_a_wide_range_of_energies(tmp_path):
    sweep = load_sweep("quickstart").model_copy(update={"trials": 40, "name": "core"})
    core = open_core(sweep, _store(tmp_path))
    energies = []
    while job := core.suggest():
        energies.append(job.energy_uj_per_token)
    assert max(energies) / min(energies) >= 1.5
    assert len({round(energy, 3) for energy in energies}) >= 15
    assert max(energies) < sweep.reference_point["energy_uj_per_token"]


def test_a_study_in_postgresql_is_the_same(sweep, tmp_path, postgresql, monkeypatch):
    """The same jobs as from a journal file; another process's core goes on with them."""
    expected = _run_out(open_core(sweep, _store(tmp_path / "journal")))
    monkeypatch.setenv("HALORA_STUDY_URL", postgresql)
    place = _store(tmp_path / "database")
    begun = [open_core(sweep, place).suggest(), open_core(sweep, place).suggest()]
    assert begun[0] == begun[1] == expected[0]  # unfinished, so handed out again
    assert _run_out(open_core(sweep, place)) == expected
    assert not place.sweep("core").study_file.exists()
    trials = SweepStudy(f"core-{sweep.launch}", storage_of(place.sweep("core"))).trials()
    assert [dict(trial.values) for trial in trials] == [job.values for job in expected]
    monkeypatch.setenv("HALORA_STUDY_URL", postgresql.replace("/postgres", "/nowhere").replace("//", "//me:secret@"))
    with pytest.raises(UserError, match=r"the study's database \(\$HALORA_STUDY_URL\) cannot be opened") as told:
        open_core(sweep, place)
    assert "secret" not in str(told.value)
    monkeypatch.delenv("HALORA_STUDY_URL")
    with pytest.raises(UserError, match=r"the study of sweep 'core' is in a database \(set \$HALORA_STUDY_URL"):
        open_core(sweep, place)
    assert not place.sweep("core").study_file.exists()


def test_a_searched_knob_whose_cost_lies_outside_the_boundary_is_told(tiny_models, tiny_task):
    space = {
        "chip.adc.bits": {"low": 4, "high": 8, "kind": "int"},
        "chip.write_verify.pulses": {"low": 1, "high": 20, "when": {"chip.adc.bits": [4]}},
        "lora.rank": {"choices": [4]},
    }
    sweep = _sweep(tiny_models["llama"], tiny_task, space=space)
    for preset in preset_names():
        priced, free = (
            {**sweep.trial, "chip": {"preset": preset, "adc": {"costs": "isaac"}, "boundary": boundary}}
            for boundary in ({}, {"programming": False})
        )
        assert free_knobs(_sweep(tiny_models["llama"], tiny_task, space=space, trial=priced)) == []
        told = free_knobs(_sweep(tiny_models["llama"], tiny_task, space=space, trial=free))
        assert told == ["chip.write_verify.pulses"]
