"""What a person asks of single trials. Oracles: the study read on its own, and the commands' own answers."""

import pytest
from test_sweep_core import _scores, _sweep

from halora.errors import UserError
from halora.events import Discarded, Failed, Reported, Scored
from halora.records.store import Store
from halora.sweep.cluster.session import gpus_per_trial
from halora.sweep.run.state import load_study, open_core, write_sweep
from halora.sweep.search.jobs import Decision
from halora.sweep.search.requests import clone, cut_short, discard


def _rungs(factor):
    return {"rungs": [{"steps": 2, "chip_instances": 1, "rows": 2}], "reduction_factor": factor}


@pytest.fixture
def asked(tiny_models, tiny_task, tmp_path):
    """A function that makes a launched sweep: a core that runs it, and the sweep with its study as another has them."""

    def make(**changes):
        store = Store(tmp_path / f"store-{len(list(tmp_path.iterdir()))}")
        sweep = _sweep(tiny_models["llama"], tiny_task, **changes)
        folder = store.sweep(sweep.name)
        folder.root.mkdir(parents=True)
        write_sweep(folder, sweep)
        return open_core(sweep, store), load_study(sweep.name, store)

    return make


def _report(core, job, step):
    return core.take(core.judged(Reported(trial=job.number, step=step, metrics={})))


def test_a_trial_is_stopped_at_its_next_report_and_scored_whole_there(asked):
    core, other = asked(trials=2)
    first, second = core.suggest(), core.suggest()
    assert _report(core, first, 1) is Decision.CONTINUE
    cut_short(*other, first.number)
    assert _report(core, second, 1) is Decision.CONTINUE
    assert _report(core, first, 2) is Decision.PAUSE
    job = core.suggest()  # any worker may score it
    assert (job.number, job.goal.steps, job.final, job.cut_short) == (first.number, 2, True, True)
    assert (job.goal.chip_instances, job.goal.rows) == (first.goal.chip_instances, first.goal.rows)
    assert job.name != first.name
    assert _report(core, job, 2) is Decision.CONTINUE
    core.take(_scores(job))
    trial = core.trial(first.number)
    assert (trial.state, trial.frozen.state.name, trial.scores[-1].step) == ("finished", "COMPLETE", 2)
    with pytest.raises(UserError, match="is finished, and has nothing left to stop"):
        cut_short(*other, first.number)
    cut_short(*other, second.number)
    assert _report(core, second, second.goal.steps) is Decision.CONTINUE  # it was at its end
    core.take(_scores(second))
    assert core.suggest() is None
    assert core.over


def test_a_trial_at_a_rung_that_is_stopped_is_scored_whole_there_and_not_promoted(asked):
    core, other = asked(trials=3, early_stopping=_rungs(3))
    jobs = [core.suggest() for _ in range(3)]
    for job in jobs[:2]:
        core.take(_scores(job))
    cut_short(*other, 0)
    job = core.suggest()
    assert (job.number, job.goal.steps, job.final) == (0, 2, True)
    core.take(_scores(job))
    assert [core.trial(0).state, len(core.trial(0).scores)] == ["finished", 2]
    core.take(_scores(jobs[2], accuracy=0.9))
    assert core.suggest() is None  # one of three goes on, and one has
    assert [trial.state for trial in core.trials()] == ["finished", "stopped", "stopped"]


def test_a_discarded_trial_is_over_whatever_becomes_of_it(asked):
    core, other = asked(trials=4, early_stopping=_rungs(2))
    running, waiting, done = (core.suggest() for _ in range(3))
    core.take(_scores(waiting))
    core.take(_scores(done, accuracy=0.9))
    last = core.suggest()
    assert last.number == done.number  # promoted
    core.take(_scores(last, accuracy=0.9))
    for number in (0, 0, 1, 2):
        discard(*other, number)
    for event in (Failed(trial=0, cause="x"), _scores(running), Reported(trial=0, step=1, metrics={})):
        assert core.judged(event) == Discarded(trial=0)
    assert _report(core, running, 1) is Decision.PAUSE
    new = core.suggest()
    assert new.number == 3
    trials = core.trials()
    assert [trial.state for trial in trials[:3]] == ["discarded"] * 3
    assert [trial.frozen.state.name for trial in trials[:3]] == ["PRUNED", "PRUNED", "COMPLETE"]
    core.take(_scores(new))
    while job := core.suggest():
        assert job.number == new.number
        core.take(_scores(job))
    assert core.counts()["discarded"] == 3
    assert core.over


def test_a_clone_is_begun_next_beside_the_trials_that_the_search_chooses(asked):
    core, other = asked(trials=3)
    alone, _ = asked(trials=3)
    chosen = []
    while job := alone.suggest():
        chosen.append(job.values)
        alone.take(_scores(job))
    first = core.suggest()
    ranks = [rank for rank in (2, 4, 8) if rank != first.values["lora.rank"]]
    asked_for = [clone(*other, 0, {"lora.rank": rank}) for rank in ranks]
    assert core.counts()["waiting"] == 2 + 2
    jobs = [first]
    core.take(_scores(first))
    while job := core.suggest():
        jobs.append(job)
        core.take(_scores(job))
    assert [job.values for job in jobs[1:3]] == asked_for
    assert [job.clone_of for job in jobs] == [None, 0, 0, None, None]
    assert [jobs[0].values, jobs[3].values] == chosen[:2]  # the file's points, none lost
    assert len(jobs) == 5
    for values in asked_for:
        assert {path for path, value in values.items() if first.values[path] != value} == {"lora.rank"}
    assert core.over
    clone(*other, 1, {"chip.adc.bits": 4 if first.values["chip.adc.bits"] != 4 else 5})
    assert core.suggest().clone_of == 1  # also after its end


def test_a_clone_that_cannot_be_is_refused_with_every_mistake(asked):
    core, other = asked(trials=2)
    first = core.suggest()
    rank = first.values["lora.rank"]
    for changes, problems in (
        (
            {"lora.rnk": 4, "lora.rank": 3, "chip.adc.bits": 99},
            ["lora.rnk: not searched", "3 is outside", "99 is outside"],
        ),
        ({"lora.rank": rank}, ["trial 0 has these values already"]),
        ({}, ["trial 0 has these values already"]),
    ):
        with pytest.raises(UserError) as told:
            clone(*other, 0, changes)
        assert len(told.value.problems) == len(problems)
        assert all(each in str(told.value) for each in problems)
    for ask in (cut_short, discard, lambda *of: clone(*of, {})):
        with pytest.raises(UserError, match="no trial 'core/7'; it has 1 so far"):
            ask(*other, 7)
    new = {"lora.rank": next(each for each in (2, 4, 8) if each != rank)}
    clone(*other, 0, new)
    with pytest.raises(UserError, match="a trial that was asked for has these values already"):
        clone(*other, 0, new)


def test_the_gpus_of_a_trial_are_those_of_all_its_workers(asked):
    _, (sweep, _) = asked(resources={"gpus": 0.5})
    assert (sweep.workers, gpus_per_trial(sweep)) == (1, 0.5)
    two = sweep.model_copy(update={"trial": sweep.trial | {"training": sweep.trial["training"] | {"workers": 2}}})
    assert gpus_per_trial(two) == 1.0


def test_a_spent_budget_keeps_clones_waiting(asked):
    core, other = asked(trials=2, budget={"steps": 1})
    first = core.suggest()
    clone(*other, 0, {"lora.rank": next(each for each in (2, 4, 8) if each != first.values["lora.rank"])})
    core.take(_scores(first))
    assert core.suggest() is None
    assert core.counts()["waiting"] == 1
    assert isinstance(core.trial(0).scores[-1], Scored)
