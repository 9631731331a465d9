"""Oracles: the study read afresh, arithmetic on the goals, the same search undisturbed, the table's own lines."""

import csv
import random
from math import ceil

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage

from benchmarks.analytic import FUNCTIONS, AnalyticCurves
from halora.analysis.front import ranks
from halora.analysis.racing import chip_estimates, front_probabilities
from halora.analysis.trials import DEFAULT_OBJECTIVES
from halora.errors import UserError
from halora.events import Reported, Scored
from halora.settings.trial import Goal
from halora.spaces.search import Budget, Constraint, Racing, SearchSettings
from halora.spaces.sweep import load_sweep
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.samplers import History
from halora.sweep.search.study import State, SweepStudy
from halora.sweep.simulation.simulator import SimulatedClock, simulate
from halora.sweep.simulation.table import read_table

CURVES = AnalyticCurves(FUNCTIONS["zdt1"], curve="saturating", chip_std=0.02)
NOISY = AnalyticCurves(FUNCTIONS["zdt1"], chip_std=0.8)
GOALS = [Goal(3, 2), Goal(9, 2), Goal(27, 4)]


def _problem(curves=CURVES, *, trials=30, sampler="random", **changes):
    settings = SearchSettings(sampler=sampler, skip_unreachable=changes.pop("skip_unreachable", False))
    return curves.problem("sim", trials=trials, chip_instances=4, settings=settings, **changes)


def _run(problem, storage=None, curves=CURVES, concurrent=3, **settings):
    clock = SimulatedClock()
    core = DecisionCore(problem, SweepStudy("sim", storage or InMemoryStorage()), clock_s=clock)
    simulate(core, curves, clock, concurrent=concurrent, **settings)
    return core, clock


def test_without_rungs_every_trial_is_trained_whole():
    core, clock = _run(_problem(trials=12), concurrent=3)
    assert core.over
    assert [trial.state for trial in core.trials()] == [State.FINISHED] * 12
    assert core.steps_taken() == 12 * 27
    assert clock() == 12 * 27 / 3
    for trial in core.trials():
        expected = [CURVES.accuracy(trial.values, 27, chip) for chip in range(4)]
        assert trial.scores[-1].accuracy_by_chip == expected
        assert trial.frozen.values == [pytest.approx(np.mean(expected)), trial.energy_uj_per_token]


@pytest.mark.parametrize("factor", [3, 2])
def test_rungs_let_the_share_that_ranks_best_go_on(factor):
    core, _ = _run(_problem(goals=lambda values: GOALS, reduction_factor=factor))
    trials = core.trials()
    reached = [[trial for trial in trials if len(trial.scores) > rung] for rung in range(3)]
    assert len(reached[0]) == 30
    for rung in (0, 1):
        assert len(reached[rung + 1]) in (len(reached[rung]) // factor, ceil(len(reached[rung]) / factor))
    assert {trial.state for trial in trials} == {State.FINISHED, State.STOPPED}
    assert [t.state is State.FINISHED for t in trials] == [len(t.scores) == 3 for t in trials]
    assert core.steps_taken() == sum(GOALS[len(trial.scores) - 1].steps for trial in trials)
    for trial in trials:
        assert [scores.step for scores in trial.scores] == [3, 9, 27][: len(trial.scores)]
        assert [len(scores.accuracy_by_chip) for scores in trial.scores] == [2, 2, 4][: len(trial.scores)]
        assert trial.frozen.state.name == ("COMPLETE" if len(trial.scores) == 3 else "PRUNED")
        assert (trial.frozen.values is None) == (len(trial.scores) < 3)


def _after_a_full_rung(**changes):
    """Trials of a search whose first rung fills before any goes on, and the numbers promoted from it."""
    core = DecisionCore(_problem(goals=lambda values: GOALS, **changes), SweepStudy("sim", InMemoryStorage()))
    jobs = []
    while job := core.suggest():
        jobs.append(job)
    for job in jobs:
        by_chip = [CURVES.accuracy(job.values, 3, chip) for chip in range(2)]
        metrics = {"accuracy": float(np.mean(by_chip))}
        core.take(Scored(trial=job.number, step=3, metrics=metrics, accuracy_by_chip=by_chip, final=False))
    promoted = []
    while job := core.suggest():
        assert job.goal == GOALS[1]
        promoted.append(job.number)
    return core.trials(), promoted


def test_the_best_ranks_of_a_rung_go_on():
    trials, promoted = _after_a_full_rung(trials=60, reduction_factor=10 / 3, accuracy_floor=-100.0)
    found = ranks(np.array([(trial.scores[0].metrics["accuracy"], trial.energy_uj_per_token) for trial in trials]))
    assert len(promoted) == 18
    assert max(found[promoted]) <= min(rank for number, rank in enumerate(found) if number not in promoted)
    assert list(found[promoted]) == sorted(found[promoted])


def test_trials_below_the_accuracy_floor_go_on_last():
    trials, promoted = _after_a_full_rung(trials=40, reduction_factor=5)
    cheapest = min(trials, key=lambda trial: trial.energy_uj_per_token)
    assert cheapest.number in promoted  # nothing dominates it
    floor = cheapest.scores[0].metrics["accuracy"] + 0.01
    trials, promoted = _after_a_full_rung(trials=40, reduction_factor=5, accuracy_floor=floor)
    assert cheapest.number not in promoted
    assert sum(trial.scores[0].metrics["accuracy"] > floor for trial in trials) >= len(promoted) == 8
    assert all(trials[number].scores[0].metrics["accuracy"] > floor for number in promoted)


def _disturbed(problem, storage, kills, seed):
    """Run to the end, with a new core after each of as many crashes at random moments."""
    chance = random.Random(seed)

    class Crash(Exception):
        pass

    class Listener:
        left = None

        def began(self, job):
            self._count()

        def told(self, job, event):
            assert isinstance(event, Reported | Scored), event
            self._count()

        def _count(self):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise Crash

    listener = Listener()
    while True:
        listener.left = chance.randrange(40) if kills else None
        kills -= 1
        try:
            return _run(problem, storage, listener=listener, report_every=3)[0]
        except Crash:
            continue


@pytest.mark.parametrize("goals", [[Goal(27, 4)], GOALS])
@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_crashes_at_random_moments_lose_and_repeat_nothing(goals, sampler, tmp_path):
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
    problem = _problem(
        goals=lambda values: goals, reduction_factor=3, sampler=sampler, racing=Racing(extra=10, most=12)
    )
    core = _disturbed(problem, optuna.storages.JournalStorage(journal), kills=20, seed=3)
    fresh = optuna.load_study(study_name="sim", storage=optuna.storages.JournalStorage(journal))
    assert {trial.state.name for trial in fresh.trials} <= {"COMPLETE", "PRUNED"}
    assert [trial.number for trial in fresh.trials] == list(range(30))
    assert core.over
    for trial in core.trials():
        assert [scores.step for scores in trial.scores] == [goal.steps for goal in goals][: len(trial.scores)]
    undisturbed, _ = _run(problem)
    if sampler != "tpe":  # suggestions by number alone
        assert [trial.values for trial in core.trials()] == [trial.values for trial in undisturbed.trials()]
    if len(goals) == 1 and sampler != "tpe":
        chips = [[len(t.scores[-1].accuracy_by_chip) for t in c.trials()] for c in (core, undisturbed)]
        assert chips[0] == chips[1]


def test_a_configuration_over_the_energy_constraint_is_never_trained():
    bound = Constraint.model_validate("energy_uj_per_token <= 0.4")
    first = [{f"x{i}": 0.9 for i in range(5)}]
    core, _ = _run(_problem(trials=25, sampler="tpe", constraints=[bound], first=first))
    trials = core.trials()
    trained = [trial for trial in trials if trial.state is not State.SKIPPED]
    skipped = [trial for trial in trials if trial.state is State.SKIPPED]
    assert len(trained) == 25
    assert max(trial.energy_uj_per_token for trial in trained) <= 0.4
    assert trials[0].state is State.SKIPPED
    assert trials[0].skipped == "0.9 breaks energy_uj_per_token <= 0.4"
    assert all(trial.energy_uj_per_token > 0.4 and not trial.scores for trial in skipped)
    assert all(trial.frozen.constraints[str(bound)] > 0 for trial in skipped)
    assert all(trial.frozen.constraints[str(bound)] <= 0 for trial in trained)
    blind, _ = _run(_problem(trials=25, constraints=[bound], first=first))  # a sampler that does not learn
    assert core.counts()["skipped"] < blind.counts()["skipped"]
    none = Constraint.model_validate("energy_uj_per_token <= -1")
    core, _ = _run(_problem(trials=5, constraints=[none]))
    assert core.counts()["finished"] == 0
    assert "no configuration is left" in core.ended
    assert core.counts()["skipped"] <= 40


class _CleanIsReached(AnalyticCurves):
    """No accuracy above 1, and some cheap configurations that reach it."""

    def accuracy(self, values, step, chip):
        return 1.0 if values["x0"] > 0.3 else 0.5

    def clean(self, values, step):
        return {"clean_accuracy": 1.0}


def test_a_configuration_that_cannot_reach_the_front_is_skipped_once_enough_are_known():
    curves = _CleanIsReached(FUNCTIONS["zdt1"])
    core, _ = _run(_problem(curves, trials=40, skip_unreachable=True), curves=curves, concurrent=1)
    trials = core.trials()
    first_skip = next(trial.number for trial in trials if trial.state is State.SKIPPED)
    assert first_skip >= 10
    for trial in trials:
        reached = [t.energy_uj_per_token for t in trials[: trial.number] if t.accuracy == 1.0]
        hopeless = trial.number >= 10 and min(reached, default=9) < trial.energy_uj_per_token
        assert hopeless == (trial.state is State.SKIPPED) or trial.state is State.FINISHED
    assert core.counts()["finished"] == 40
    everything, _ = _run(_problem(curves, trials=40), curves=curves)
    assert everything.counts()["skipped"] == 0


class _CleanOnFewRows(_CleanIsReached):
    """The same, but clean accuracies rest on few rows, so that more may be reached than was seen."""

    def clean(self, values, step):
        return {"clean_accuracy": 1.0, "clean_accuracy_high": 1.02}


def test_what_a_clean_accuracy_on_few_rows_leaves_open_is_not_skipped():
    curves = _CleanOnFewRows(FUNCTIONS["zdt1"])
    core, _ = _run(_problem(curves, trials=15, skip_unreachable=True), curves=curves, concurrent=1)
    assert core.counts()["skipped"] == 0


def test_a_race_spends_its_chips_on_the_undecided():
    racing = Racing(extra=24, most=10, at_once=2)
    core, _ = _run(_problem(NOISY, trials=20, racing=racing), curves=NOISY)
    chips = {trial.number: len(trial.scores[-1].accuracy_by_chip) for trial in core.trials()}
    assert 0 < sum(chips.values()) - 20 * 4 <= 24
    assert max(chips.values()) <= 10
    for trial in core.trials():
        expected = [NOISY.accuracy(trial.values, 27, chip) for chip in range(chips[trial.number])]
        assert trial.scores[-1].accuracy_by_chip == expected
    before, _ = _run(_problem(NOISY, trials=20), curves=NOISY)
    estimates = chip_estimates([trial.scores[-1].accuracy_by_chip for trial in before.trials()])
    chances = front_probabilities(*estimates, np.array([[trial.energy_uj_per_token] for trial in before.trials()]))
    undecided = np.flatnonzero((chances > 0.05) & (chances < 0.95))
    assert any(chips[number] > 4 for number in undecided)
    settled, _ = _run(_problem(trials=20, racing=racing))  # hardly any noise
    assert {len(trial.scores[-1].accuracy_by_chip) for trial in settled.trials()} == {4}


def test_budgets_of_steps_and_hours_end_the_search():
    core, _ = _run(_problem(budget=Budget(steps=200)), concurrent=2)
    assert 200 <= core.steps_taken() < 200 + 2 * 27
    assert core.ended == "the budget of 200 steps is spent"
    assert core.counts()["waiting"] == core.counts()["unfinished"] == 0
    core, clock = _run(_problem(budget=Budget(hours=100 / 3600)), concurrent=2)
    assert 100 <= clock() <= 100 + 27
    assert core.ended == "the budget of 0.0277778 hours is spent"


class _Slow(AnalyticCurves):
    """Takes its time."""

    def step_s(self, values):
        return 100.0

    def chip_s(self, values):
        return 5.0


class _Timed:
    """Seconds that jobs were in hand, by the simulation's own clock."""

    def __init__(self, clock, until=None):
        self.clock, self.until, self.began_s, self.spent_s = clock, until, {}, 0.0

    def began(self, job):
        self.began_s[job.number] = self.clock()

    def told(self, job, event):
        if not isinstance(event, Reported):
            self.spent_s += self.clock() - self.began_s.pop(job.number)
        elif self.until is not None and self.clock() >= self.until:
            raise KeyboardInterrupt  # the driver ends here, with jobs in hand


def test_gpu_hours_are_those_that_jobs_have_gpus_set_aside_over_all_drivers_of_a_sweep():
    """Two drivers, three jobs at once, 1.5 GPUs each: the sum over jobs, but for less than a minute at the kill."""
    slow, storage, budget = (
        _Slow(FUNCTIONS["zdt1"], steps=27),
        InMemoryStorage(),
        Budget(gpu_hours=1.5 * 12 * 2700 / 3600),
    )
    problem = _problem(slow, trials=40, budget=budget)
    clock, spent_s = SimulatedClock(), 0.0
    for until in (4000.0, None):
        study = SweepStudy("sim", storage)
        core, timed = DecisionCore(problem, study, clock_s=clock), _Timed(clock, until)
        core.spending.gpus = 1.5
        before_s = clock()
        try:
            simulate(core, slow, clock, concurrent=3, report_every=3, listener=timed)
        except KeyboardInterrupt:
            spent_s += sum(clock() - at for at in timed.began_s.values())
            clock.now_s += 5000.0  # nobody drives it
            assert before_s < 4000.0
        spent_s += timed.spent_s
        lost = 3 * 300.0 if until else 0.0  # a report's time of each job, as each is counted when it is heard
        counted_s = 3600 * study.gpu_hours / 1.5
        assert spent_s - lost <= counted_s <= spent_s + 1e-6
        spent_s = counted_s
    assert core.ended == f"the budget of {budget.gpu_hours:g} GPU hours is spent"
    assert budget.gpu_hours <= study.gpu_hours < budget.gpu_hours + 1.5 * 3 * 2800 / 3600
    assert core.counts()["unfinished"] == 0


def test_the_sampler_sees_the_best_and_the_latest_of_many_trials():
    core, _ = _run(_problem(trials=150))
    trials = core.trials()
    history = History(60, DEFAULT_OBJECTIVES, (0.0, 1.1))
    seen = history.seen(trials)
    assert len(seen) <= 60
    shown = {tuple(entry.params.items()) for entry in seen}
    found = ranks(np.array([(trial.accuracy, trial.energy_uj_per_token) for trial in trials]))
    best = np.argsort(found, kind="stable")[:30]
    assert {tuple(trials[i].values.items()) for i in best} <= shown
    assert {tuple(trial.values.items()) for trial in trials[-30:]} <= shown
    assert len(History(400, DEFAULT_OBJECTIVES, (0.0, 1.1)).seen(trials)) == 150


def test_the_sampler_sees_what_a_paused_trial_reached_and_what_others_gained_from_there():
    core, _ = _run(_problem(goals=lambda values: GOALS, reduction_factor=3))
    trials = core.trials()
    seen = History(200, DEFAULT_OBJECTIVES, (0.0, 1.1)).seen(trials)
    reached = [[scores.metrics["accuracy"] for scores in trial.scores] for trial in trials]
    first, second = ([own[i + 1] - own[i] for own in reached if len(own) > i + 1] for i in (0, 1))
    to_come = {1: np.median(first) + np.median(second), 2: np.median(second), 3: 0.0}
    assert {len(own) for own in reached} == {1, 2, 3}
    assert [entry.values[0] for entry in seen] == pytest.approx([own[-1] + to_come[len(own)] for own in reached])
    assert {entry.state.name for entry in seen} == {"COMPLETE"}


# Tables of recorded curves.


@pytest.fixture
def sweep():
    return load_sweep("quickstart")


def _line(trial, step, accuracy, **more):
    return {"trial": trial, "step": step, "accuracy": accuracy, "clean_accuracy": accuracy + 0.1, **more}


_PLAIN = {"training.method": "lora", "training.learning_rate": 2e-3, "lora.rank": 4}
_NOISY = {"training.method": "halora", "training.mu": 0.1, "training.learning_rate": 2e-3, "lora.rank": 4}


def _written(path, lines):
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)
    return path


@pytest.fixture
def table_file(tmp_path):
    lines = [
        _line(0, step, 0.2 + step / 100, seconds=3.0 * step, train_loss=2 - step / 16, **_PLAIN) for step in (4, 16)
    ]
    lines += [_line(1, step, 0.3 + step / 50, seconds=6.0 * step, **_NOISY) for step in (4, 8, 16)]
    return _written(tmp_path / "curves.csv", lines)


def test_a_table_gives_back_its_own_lines_and_what_lies_between(sweep, table_file):
    table = read_table(table_file, sweep)
    assert table.accuracy(_PLAIN, 4, chip=0) == pytest.approx(0.24)
    assert table.accuracy(_PLAIN, 10, chip=1) == pytest.approx(0.30)
    assert table.clean(_NOISY, 8) == {"clean_accuracy": pytest.approx(0.56)}
    assert table.report(_PLAIN, 4) == {"train_loss": pytest.approx(1.75)}
    assert table.report(_NOISY, 4) == {}
    assert (table.step_s(_PLAIN), table.step_s(_NOISY)) == (3.0, 6.0)
    near = {**_NOISY, "training.mu": 0.3, "training.learning_rate": 1e-3}
    assert table.accuracy(near, 8, chip=0) == table.accuracy(_NOISY, 8, chip=0)
    spread = [dict(line, accuracy_std_chips=0.05) for line in [_line(0, 16, 0.5, **_PLAIN)]]
    noisy = read_table(_written(table_file, spread), sweep)
    chips = [noisy.accuracy(_PLAIN, 16, chip) for chip in range(200)]
    assert np.mean(chips) == pytest.approx(0.5, abs=0.01)
    assert np.std(chips) == pytest.approx(0.05, rel=0.2)


def test_a_forest_learns_what_the_nearest_line_cannot_say(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for trial in range(150):
        rate = float(np.exp(rng.uniform(np.log(5e-4), np.log(5e-3))))
        values = {
            "training.method": "lora",
            "training.learning_rate": rate,
            "lora.rank": int(rng.choice([2, 4, 8, 16])),
        }
        lines.append(_line(trial, 16, 0.2 + 100 * rate + rng.normal(0, 0.05), **values))
    path = _written(tmp_path / "noisy.csv", lines)
    asked = [{**_PLAIN, "training.learning_rate": rate} for rate in (6e-4, 1e-3, 2e-3, 4e-3)]
    truth = [0.2 + 100 * values["training.learning_rate"] for values in asked]
    miss = {}
    for kind in ("forest", "nearest"):
        table = read_table(path, load_sweep("quickstart", {"search.surrogate": kind}))
        miss[kind] = np.abs([table.accuracy(v, 16, chip=0) - t for v, t in zip(asked, truth, strict=True)])
    assert miss["forest"].mean() < miss["nearest"].mean()
    assert miss["forest"].max() < 0.06


def test_every_mistake_of_a_table_is_told(sweep, tmp_path):
    lines = [
        {**_line(0, 4, 0.5), "lora.rank": 4, "lora.rnk": 1},
        {**_line(0, "x", 0.5), "lora.rank": 3},
        {**_line(1, 4, 0.5), "accuracy": ""},
        {**_line(1, 8, 0.5), "accuracy": 55},
        {**_line(1, 12, 0.5), "accuracy": "nan"},
        {**_line(1.5, 12, 0.5)},
    ]
    with pytest.raises(UserError) as told:
        read_table(_written(tmp_path / "wrong.csv", lines), sweep)
    for problem in (
        "column 'lora.rnk' is neither a score nor a searched field; did you mean 'lora.rank'?",
        "line 3: step is 'x', not a number",
        "line 5: accuracy is '55', not a share between 0 and 1",
        "line 6: accuracy is 'nan', which is not a finite number",
        "line 7: trial is '1.5', not a whole number from 0 up",
        "line 3: lora.rank is '3', outside the sweep's space",
        "line 4: accuracy left empty",
    ):
        assert any(problem in text for text in told.value.problems), told.value.problems
    assert len(told.value.problems) == 7
    for text, problem in (("trial,step\n", "column 'accuracy' is missing"), ("", "column 'trial' is missing")):
        (tmp_path / "short.csv").write_text(text)
        with pytest.raises(UserError, match=problem):
            read_table(tmp_path / "short.csv", sweep)
    with pytest.raises(UserError, match="cannot be read: it is a folder"):
        read_table(tmp_path, sweep)
    (tmp_path / "comma.csv").write_text("trial,step,accuracy,clean_accuracy\n0,4,0,5,0,6\n")
    with pytest.raises(UserError, match="line 2: more cells than the head has columns; is a comma a decimal point"):
        read_table(tmp_path / "comma.csv", sweep)


def test_numbers_of_a_table_may_be_written_in_any_way(sweep, tmp_path):
    head = "trial,step,accuracy,clean_accuracy,lora.rank,chip.adc.bits,training.learning_rate,training.method"
    (tmp_path / "any.csv").write_text(f"\ufeff{head}\n0.0,4.0,5e-1,0.6,8.0,7.0,1e-3,lora\n", encoding="utf-8")
    table = read_table(tmp_path / "any.csv", sweep)
    assert table.accuracy({"lora.rank": 8, "chip.adc.bits": 7}, 4, chip=0) == 0.5
