"""Oracles: Optuna's own study asked and told directly, brute force over small tables, hypervolumes by inclusion and
exclusion, and two objectives that a third which never varies must leave as they are."""

import json
from itertools import combinations

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from recorded_sweeps import begin, finish, made_up_sweep
from starlette.testclient import TestClient

from benchmarks.analytic import FUNCTIONS, OF_THREE, AnalyticCurves
from benchmarks.search import _optuna_directly, search, volume
from halora.analysis.candidates import standings
from halora.analysis.charts import front_charts
from halora.analysis.figures import front_figure
from halora.analysis.front import front, hypervolume, knee
from halora.analysis.promotion import promotion_order
from halora.analysis.racing import front_probabilities, value_of_a_chip
from halora.analysis.summary import view_front
from halora.analysis.trials import DEFAULT_OBJECTIVES, RecordedTrial, objective, projections
from halora.dashboard.app import create_app
from halora.errors import UserError
from halora.events import FrontMoved
from halora.records import names
from halora.records.event_log import read
from halora.records.publishing import publish
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.settings.trial import Goal
from halora.spaces.gates import Gates
from halora.spaces.search import Constraint, Racing, SearchSettings
from halora.spaces.sweep import load_sweep
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.problem import problem_of
from halora.sweep.search.samplers import make_sampler
from halora.sweep.search.study import State, SweepStudy
from halora.sweep.simulation.simulator import SimulatedClock, simulate

THREE = tuple(map(objective, ("accuracy", "energy_uj_per_token", "latency_us_per_token")))
CURVES = AnalyticCurves(OF_THREE["dtlz2, three"], steps=27)
CORNER = (0.0, 10.0, 10.0)


def _problem(curves=CURVES, *, trials=30, sampler="random", **changes):
    settings = SearchSettings(sampler=sampler, skip_unreachable=changes.pop("skip_unreachable", False))
    return curves.problem("three", trials=trials, settings=settings, **changes)


def _run(problem, curves=CURVES, concurrent=2):
    clock = SimulatedClock()
    core = DecisionCore(problem, SweepStudy("three", InMemoryStorage(), problem.objectives), clock_s=clock)
    simulate(core, curves, clock, concurrent=concurrent)
    return core


def _points(seed, count=12, **more):
    rng = np.random.default_rng(seed)
    rows = np.column_stack([rng.uniform(0.1, 0.9, count), rng.uniform(1, 9, (count, 2))])
    names = [each.metric for each in THREE]
    return [
        RecordedTrial(number=i, metrics=dict(zip(names, map(float, row), strict=True)) | more)
        for i, row in enumerate(rows)
    ]


# The search.


@pytest.mark.parametrize("function", OF_THREE)
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_as_good_as_optuna_at_the_same_budget(function, sampler):
    """Hypervolume within 2 % of a study of Optuna's own whose sampler is seeded as ours is, trial by trial."""
    curves = AnalyticCurves(OF_THREE[function], steps=1)
    trials = {"tpe": 20, "nsga2": 60}[sampler]  # of which the first 10 and 50 are drawn at random
    problem = _problem(curves, trials=trials, sampler=sampler)
    ours = [dict(trial.values) for trial in search(problem, curves, workers=1).trials()]
    anew = (make_sampler(sampler, problem.space, 0, number) for number in range(trials))
    theirs = _optuna_directly(problem, curves, anew)
    assert volume(ours, problem, curves) == pytest.approx(volume(theirs, problem, curves), rel=0.02)


def test_optuna_s_own_record_has_all_three_objectives():
    core = _run(_problem(trials=8, sampler="tpe"))
    for trial in core.trials():
        accuracy, energy, latency = CURVES.true_objectives(trial.values)
        assert trial.frozen.values == pytest.approx([accuracy, energy, latency])
        assert trial.costs == pytest.approx({"energy_uj_per_token": energy, "latency_us_per_token": latency})


def test_rungs_promote_by_all_three():
    levels = [Goal(9, 1), Goal(27, 1)]
    core = _run(_problem(goals=lambda values: levels, reduction_factor=3))
    trials = core.trials()
    assert sum(trial.state is State.FINISHED for trial in trials) == 10
    table = np.array([[t.scores[0].metrics["accuracy"], *t.costs.values()] for t in trials])
    problem = _problem()
    kept = promotion_order(table, THREE, problem.reference, 10)
    promoted = [trial.number for trial in trials if len(trial.scores) == 2]
    assert len(set(promoted) & set(kept)) >= 5  # those that paused late are promoted among fewer


def test_rungs_on_two_objectives_are_what_they_were_with_a_third_that_never_varies():
    two = AnalyticCurves(FUNCTIONS["zdt1"], curve="saturating")
    levels = [Goal(3, 1), Goal(9, 1), Goal(27, 1)]
    settings = {"goals": lambda values: levels, "reduction_factor": 3, "trials": 40}
    plain = two.problem("two", settings=SearchSettings(sampler="random", skip_unreachable=False), **settings)
    costs, reference = plain.costs, (*plain.reference, 2.0)
    third = two.problem("three", settings=plain.settings, **settings)
    object.__setattr__(third, "costs", lambda values: {**costs(values), "latency_us_per_token": 1.0})
    object.__setattr__(third, "objectives", THREE)
    object.__setattr__(third, "reference", reference)
    stories = [
        [(trial.values, trial.state, len(trial.scores)) for trial in _run(problem, two).trials()]
        for problem in (plain, third)
    ]
    assert stories[0] == stories[1]


def test_a_race_decides_places_in_three_objectives():
    noisy = AnalyticCurves(OF_THREE["dtlz2, three"], chip_std=0.3)
    racing = Racing(extra=20, most=8, at_once=2)
    core = _run(_problem(noisy, trials=15, chip_instances=3, racing=racing), noisy)
    chips = [len(trial.scores[-1].accuracy_by_chip) for trial in core.trials()]
    assert sum(chips) - 45 == 20
    assert max(chips) <= 8


def test_constraints_on_costs_are_checked_before_training():
    bound = Constraint.model_validate("latency_us_per_token <= 0.3")
    core = _run(_problem(trials=10, constraints=[bound]))
    trials = core.trials()
    skipped = [trial for trial in trials if trial.state is State.SKIPPED]
    assert skipped
    assert all(trial.costs["latency_us_per_token"] > 0.3 and not trial.scores for trial in skipped)
    assert all("breaks latency_us_per_token <= 0.3" in trial.skipped for trial in skipped)
    finished = [trial for trial in trials if trial.state is State.FINISHED]
    assert len(finished) == 10
    assert max(trial.costs["latency_us_per_token"] for trial in finished) <= 0.3


class _CleanIsReached(AnalyticCurves):
    """Noise costs nothing, and no configuration is better than another."""

    def accuracy(self, values, step, chip):
        return 1.0

    def clean(self, values, step):
        return {"clean_accuracy": 1.0}


def test_what_is_worse_in_every_cost_than_a_trial_that_reached_all_is_not_trained():
    curves = _CleanIsReached(OF_THREE["dtlz2, three"])
    trials = _run(_problem(curves, trials=25, skip_unreachable=True), curves, concurrent=1).trials()
    reached, in_a_row = [], 0
    for trial in trials:
        costs = tuple(trial.costs.values())
        hopeless = len(reached) >= 10 and any(
            all(a <= b for a, b in zip(other, costs, strict=True)) and other != costs for other in reached
        )
        if in_a_row < 20:  # else one is taken at random
            assert (trial.state is State.SKIPPED) == hopeless, trial
        in_a_row = in_a_row + 1 if trial.state is State.SKIPPED else 0
        if trial.state is State.FINISHED:
            reached.append(costs)
    assert any(trial.state is State.SKIPPED for trial in trials)


# Orders, races, hypervolumes, knees.


def _box_union(points, corner):
    """Volume of a union of boxes by inclusion and exclusion: accuracy above, costs below the corner."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in combinations(points, size):
            low = [min(p[0] for p in some) - corner[0]]
            sides = low + [corner[i] - max(p[i] for p in some) for i in (1, 2)]
            total += (-1) ** (size + 1) * float(np.prod(np.maximum(sides, 0)))
    return total


@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_and_promotion_by_brute_force(seed):
    points = _points(seed, 9)
    table = np.array([[point.metrics[each.metric] for each in THREE] for point in points])
    assert hypervolume(points, CORNER, THREE) == pytest.approx(_box_union(table.tolist(), CORNER))
    order = promotion_order(table, THREE, CORNER, 9)
    assert sorted(order) == list(range(9))
    assert all(promotion_order(table, THREE, CORNER, k) == order[:k] for k in range(9))
    members = [point.number for point in front(points, THREE)]
    assert set(order[: len(members)]) == set(members)
    for k in range(len(members)):
        gains = {i: _box_union(table[[*order[:k], i]].tolist(), CORNER) for i in order[k : len(members)]}
        assert gains[order[k]] == pytest.approx(max(gains.values()))
    floors = {"accuracy": 0.5}
    above = promotion_order(table, THREE, CORNER, 9, floors)
    useless = [i for i in above if table[i, 0] <= 0.5]
    assert above[len(above) - len(useless) :] == sorted(useless, key=lambda i: -table[i, 0])


def test_a_rival_in_a_race_is_no_worse_in_any_cost():
    accuracy, error = np.array([0.60, 0.61, 0.62]), np.full(3, 0.02)
    losses = np.array([[1.0, 1.0], [2.0, 2.0], [0.5, 3.0]])  # the last one is slower than both
    probability = front_probabilities(accuracy, error, losses)
    assert probability[0] == 1.0
    assert probability[2] == 1.0
    assert 0.5 < probability[1] < 0.8
    value = value_of_a_chip(accuracy, error, losses, np.full(3, 4))
    assert value[0] > 0
    assert value[1] > 0
    assert value[2] == 0


def test_the_knee_is_the_member_with_the_largest_sum_of_gains():
    points = _points(3, 20)
    members = front(points, THREE)
    table = np.array([[-p.metrics["accuracy"], *(p.metrics[e.metric] for e in THREE[1:])] for p in members])
    gains = ((table.max(axis=0) - table) / np.ptp(table, axis=0)).sum(axis=1)
    assert knee(members, THREE) is members[int(gains.argmax())]


def test_candidates_are_those_of_the_sweep_s_own_objectives():
    """Dominated in accuracy and energy, the second is on the front for its time."""
    names = [each.metric for each in THREE]
    rows = [(0.6, 1.0, 9.0), (0.5, 2.0, 1.0), (0.4, 3.0, 5.0)]
    points = [
        RecordedTrial(number=i, metrics=dict(zip(names, row, strict=True)) | {"clean_accuracy": 0.7, "margin": 0.1})
        for i, row in enumerate(rows)
    ]
    order = [standing.point.number for standing in standings(points, Gates(), "energy", THREE)]
    assert order == [0, 1, 2]
    assert [p.number for p in front(points, THREE)] == [1, 0]
    assert [p.number for p in front(points)] == [0]


# Pictures.


def test_three_objectives_are_seen_from_three_sides():
    sides = projections(THREE)
    assert [(up.metric, right.metric) for up, right in sides] == [
        ("accuracy", "energy_uj_per_token"),
        ("accuracy", "latency_us_per_token"),
        ("energy_uj_per_token", "latency_us_per_token"),
    ]
    assert projections(DEFAULT_OBJECTIVES[::-1]) == [DEFAULT_OBJECTIVES]  # accuracy upwards
    points = _points(5, 15, accuracy_low=0.05, accuracy_high=0.95)
    view = view_front(points, THREE)
    drawn = front_charts(view)
    figure = front_figure(view, "three")
    assert len(drawn) == len(figure.axes) == 3
    for chart, axes, (up, right) in zip(drawn, figure.axes, sides, strict=True):
        assert (axes.get_xlabel(), chart["layout"]["xaxis"]["title"]["text"]) == (right.words, right.words)
        placed = {n: xy for t in chart["data"] for n, *xy in zip(t.get("customdata", ()), t["x"], t["y"], strict=False)}
        assert placed == {p.number: [p.metrics[right.metric], p.metrics[up.metric]] for p in points}
        (line,) = [trace for trace in chart["data"] if trace["mode"] == "lines"]
        two = front(points, (up, right))
        assert line["x"] == [p.metrics[right.metric] for p in two]
        filled = [n for t in chart["data"] for n in t.get("customdata", ()) if "open" not in t["marker"]["symbol"]]
        assert sorted(filled) == sorted(point.number for point in view.members)
        bars = any("error_y" in trace for trace in chart["data"])
        assert bars == (up.metric == "accuracy")


# The sweep file.

THREE_NAMES = ["accuracy", "energy_uj_per_token", "latency_us_per_token"]
POINT = {"accuracy": 0.0, "energy_uj_per_token": 6.0, "latency_us_per_token": 20.0}


def test_a_sweep_names_its_objectives():
    sweep = load_sweep("quickstart", {"objectives": THREE_NAMES, "reference_point": POINT})
    problem = problem_of(sweep)
    assert problem.objectives == THREE
    assert problem.reference == (0.0, 6.0, 20.0)
    costs = problem.costs(sweep.first[0])
    assert {"energy_uj_per_token", "latency_us_per_token", "area_mm2"} <= costs.keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objectives": ["accuracy"]}, "two or three different objectives, got accuracy"),
        ({"objectives": [*THREE_NAMES, "area_mm2"]}, "two or three different objectives"),
        ({"objectives": ["area_mm2", "power_w"]}, "nothing to train for: name one of accuracy, accuracy_worst, clean"),
        ({"objectives": ["accuracy", "latency"]}, "got 'latency'"),
        ({"objectives": THREE_NAMES}, "a value of every objective (accuracy, energy_uj_per_token, latency_us_per"),
        ({"objectives": THREE_NAMES, "reference_point": POINT | {"accuracy": 2}}, "accuracy: input should be from 0"),
        (
            {"objectives": ["accuracy_worst", "area_mm2"], "reference_point": {"accuracy_worst": 0, "area_mm2": 9},
             "racing": {"extra": 4, "most": 6}},
            "racing: compares accuracies",
        ),
    ],
)  # fmt: skip
def test_objectives_that_make_no_sense_are_refused(changes, told):
    with pytest.raises(UserError) as refused:
        load_sweep("quickstart", changes)
    assert any(told in problem for problem in refused.value.problems), refused.value.problems


# The whole way, from a journal to every place that shows a front.


def test_records_report_page_and_command_line_go_by_the_sweeps_objectives(
    tmp_path, tiny_models, tiny_task, halora, halora_json
):
    store = Store(tmp_path / "store")
    store.check_writable()
    sweep = made_up_sweep(
        store, "three", tiny_models["llama"], tiny_task, objectives=THREE_NAMES, reference_point=POINT
    )
    folder = store.sweep("three")
    recorder = SweepRecorder(folder, sweep)
    priced = {}
    for number, (bits, share, accuracy) in enumerate([(5, 64, 0.6), (5, 4, 0.5), (8, 64, 0.9), (8, 64, 0.3)]):
        chip = {"chip__adc__bits": bits, "chip__tile__adc_share": share}
        priced[number] = begin(recorder, sweep, number, **chip)[1].metrics
        finish(recorder, folder.root, number, accuracy=accuracy)
    recorder.finish(interrupted=False)
    points = recorder.points
    assert all({name: point.metrics[name] for name in names.COSTS} == priced[point.number] for point in points)
    members = [point.number for point in front(points, THREE)]
    assert sorted(members) == [0, 1, 2]
    assert sorted(point.number for point in front(points)) == [0, 2]  # the second is on the front for its time
    events, _ = read(folder.event_log_file)
    volumes = [event.metrics[names.HYPERVOLUME] for event in events if isinstance(event, FrontMoved)]
    assert volumes[-1] == pytest.approx(hypervolume(points, (0.0, 6.0, 20.0), THREE))
    recorder.close()

    publish(sweep, recorder.recorded, folder)
    rows = json.loads((folder.published / "front.json").read_text())
    assert sorted(row["number"] for row in rows if row["on_front"]) == sorted(members)
    assert set(THREE_NAMES) <= rows[0].keys()
    page = (folder.published / "report.html").read_text()
    for told in ('id="front"', 'id="front_2"', 'id="front_3"', "beats it in all three", "time per token (µs)"):
        assert told in page
    code, table, _ = halora(f"front show three --store {store.root}")
    assert code == 0
    assert "3 of 4 finished trials" in table
    shown = halora_json(f"front show three --store {store.root}")
    assert sorted(row["trial"] for row in shown) == sorted(members)
    assert {*THREE_NAMES} <= shown[0].keys()
    filtered = halora_json(f"front show three --store {store.root} --filter 'area_mm2>1e9'")
    assert filtered == []
    two = halora_json(f"front show three --store {store.root} --objective accuracy --objective area_mm2")
    assert set(two[0]) >= {"accuracy", "area_mm2"}

    with TestClient(create_app(store), base_url="http://127.0.0.1:8050") as client:
        for address in ("/", "/sweeps/three", "/sweeps/three?shown=clean_accuracy", "/sweeps/three/trials/0", "/chip"):
            answer = client.get(address)
            assert answer.status_code == 200, address
        text = client.get("/sweeps/three").text
        assert [f'id="chart-{name}"' in text for name in ("front", "front-2", "front-3")] == [True] * 3
        assert "better in all three objectives" in text
        compared = client.get("/compare?sweep=three")
        assert compared.status_code == 200
        assert "tokens of a prompt per second" in client.get("/chip").text
