"""Oracles: the definitions of front, hypervolume and knee by brute force and in closed form; a Monte Carlo by hand; the
decoded picture; Plotly's own validation of its figures."""

import csv
import io
import random
from dataclasses import replace
from math import erf

import matplotlib.image
import numpy as np
import plotly.graph_objects
import pytest

from halora.analysis import charts, uncertainty
from halora.analysis.figures import front_figure
from halora.analysis.front import best, front, hypervolume, hypervolume_history, knee
from halora.analysis.importance import doubts, importances
from halora.analysis.recommendation import Recommendation
from halora.analysis.report import SweepSummary
from halora.analysis.summary import view_front
from halora.analysis.trials import (
    ACCURACY,
    DEFAULT_OBJECTIVES,
    ENERGY,
    Objective,
    RecordedTrial,
    check_objectives,
    filtered,
    grouped,
    objective,
)
from halora.analysis.uncertainty import front_probability
from halora.errors import UserError
from halora.events import Answers
from halora.records.publishing import front_csv

DECIBEL = Objective("noise_db", maximise=False)


def _point(number, accuracy, energy, margin=0.0, width=0.1, **more):
    metrics = {
        "accuracy": accuracy,
        "accuracy_low": accuracy - width,
        "accuracy_high": accuracy + width,
        "margin": margin,
        "clean_accuracy": accuracy,
        "energy_uj_per_token": energy,
        **more.pop("metrics", {}),
    }
    return RecordedTrial(number=number, metrics=metrics, **more)


def _answers(correct, group="g"):
    correct = np.asarray(correct, dtype=bool)
    return Answers.of(group, correct)


def _dominates(one, other, objectives):
    better = [
        (a > b) - (a < b) if each.maximise else (a < b) - (a > b)
        for each in objectives
        for a, b in [(one.metrics[each.metric], other.metrics[each.metric])]
    ]
    return min(better) >= 0 and max(better) > 0


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("objectives", [DEFAULT_OBJECTIVES, (ACCURACY, DECIBEL, ENERGY)])
def test_the_front_is_what_no_point_dominates(seed, objectives):
    rng = random.Random(seed)
    # Few distinct values, so that points tie in one objective and in all.
    points = [
        _point(i, rng.randint(0, 6) / 8, rng.randint(1, 6) / 2, metrics={"noise_db": rng.randint(-3, 3)})
        for i in range(rng.randint(0, 25))
    ]
    expected = {p.number for p in points if not any(_dominates(q, p, objectives) for q in points)}
    found = front(points, objectives)
    assert {p.number for p in found} == expected
    assert len(found) == len(expected)
    energies = [p.energy_uj_per_token for p in found]
    assert energies == sorted(energies)


def test_hypervolume_is_the_area_under_the_staircase():
    steps = [(0.3, 1.0), (0.5, 2.0), (0.6, 4.5)]
    points = [_point(i, accuracy, energy) for i, (accuracy, energy) in enumerate(steps)]
    area = (2.0 - 1.0) * (0.3 - 0.1) + (4.5 - 2.0) * (0.5 - 0.1) + (6.0 - 4.5) * (0.6 - 0.1)
    corner = (0.1, 6.0)
    assert hypervolume(points, corner) == pytest.approx(area)
    nothing_more = [
        _point(3, 0.4, 3.0),  # dominated
        _point(4, 0.5, 2.0),  # a tie
        _point(5, 0.9, 6.5),  # beyond the reference in energy
        _point(6, 0.05, 0.5),  # below it in accuracy
    ]
    assert hypervolume(points + nothing_more, corner) == pytest.approx(area)
    assert hypervolume(nothing_more[2:], corner) == hypervolume([], corner) == 0.0


def test_hypervolume_of_three_objectives_is_the_volume_of_boxes():
    """Two boxes that share a corner: the sum of their volumes less that of what they share."""
    points = [
        _point(0, 0.5, 1.0, metrics={"noise_db": -10.0}),
        _point(1, 0.25, 2.0, metrics={"noise_db": -20.0}),
    ]
    one, two, shared = 0.5 * 10 * 3, 0.25 * 20 * 2, 0.25 * 10 * 2
    found = hypervolume(points, (0.0, 0.0, 4.0), (ACCURACY, DECIBEL, ENERGY))
    assert found == pytest.approx(one + two - shared)


@pytest.mark.parametrize("seed", range(5))
def test_the_history_of_the_hypervolume_is_that_of_every_beginning(seed):
    rng = random.Random(seed)
    points = [_point(i, rng.randint(0, 8) / 8, rng.randint(1, 8)) for i in range(30)]
    expected = [hypervolume(points[: i + 1], (0.0, 6.0)) for i in range(30)]
    assert list(hypervolume_history(points, (0.0, 6.0))) == pytest.approx(expected)


def test_the_knee_is_furthest_from_the_chord():
    members = front([_point(i, a, e) for i, (a, e) in enumerate([(0.1, 1.0), (0.5, 1.5), (0.7, 3.0), (0.8, 9.0)])])
    chord = np.array([0.8 - 0.1, 9.0 - 1.0])
    scaled = [np.array([(p.accuracy - 0.1) / chord[0], (p.energy_uj_per_token - 1.0) / chord[1]]) for p in members]
    furthest = max(range(4), key=lambda i: scaled[i][0] - scaled[i][1])
    assert knee(members) is members[furthest]
    assert furthest in (1, 2)
    assert knee(members[:2]) is None
    hollow = [_point(i, a, e) for i, (a, e) in enumerate([(0.367, 2.18), (0.5, 3.238), (0.667, 3.6)])]
    assert knee(front(hollow)) is None  # the one between lies on the wrong side of the line
    assert knee([]) is None


def test_the_best_point_is_the_most_accurate_and_then_the_surest():
    points = [_point(0, 0.5, 1.0, margin=0.9), _point(1, 0.7, 3.0, margin=-0.2), _point(2, 0.7, 4.0, margin=0.1)]
    assert best(points).number == 2
    assert best([]) is None


# How sure the front is.


def test_probability_of_the_front_from_intervals_is_that_of_two_normals():
    """A dearer trial is on the front if its accuracy is the larger: P(d > 0) for a normal difference d."""
    points = [_point(0, 0.50, 1.0, width=0.098), _point(1, 0.52, 2.0, width=0.098)]
    probability = front_probability(points, draws=20_000)
    deviation = 0.098 / 1.959963984540054 * 2**0.5
    expected = 0.5 * (1 + erf(0.02 / deviation / 2**0.5))
    assert probability[0] == 1.0
    assert probability[1] == pytest.approx(expected, abs=0.015)


def test_trials_that_met_the_same_rows_are_resampled_together():
    """The second answers one row more than the first, so it is the better one whenever that row is drawn at all."""
    rng = np.random.default_rng(0)
    first = rng.random((4, 20)) < 0.5
    first[:, 7] = False
    second = first.copy()
    second[:, 7] = True
    points = [
        _point(i, correct.mean(), 1.0 + i, width=0.2, correct=_answers(correct))
        for i, correct in enumerate([first, second])
    ]
    drawn_at_all = 1 - (1 - 1 / 20) ** 20
    probability = front_probability(points, draws=20_000)
    assert probability[0] == 1.0
    assert probability[1] == pytest.approx(drawn_at_all, abs=0.01)
    apart = [RecordedTrial(number=p.number, metrics=p.metrics) for p in points]
    assert front_probability(apart, draws=2000)[1] < 0.75  # what their wide intervals alone would say


def test_after_a_race_the_draws_are_centred_on_its_estimates():
    """The raced trial met harder chips; its estimate is 0.1 above its plain mean, and so is every draw."""
    rng = np.random.default_rng(2)
    correct = rng.random((6, 40)) < 0.5
    rival = RecordedTrial(number=0, metrics={"accuracy": correct.mean() + 0.1, "energy_uj_per_token": 1.0})
    plain, estimated = (
        front_probability([rival, _point(1, correct.mean() + shift, 2.0, correct=_answers(correct))], draws=4000)[1]
        for shift in (0.0, 0.1)
    )
    assert plain < 0.25
    assert estimated == pytest.approx(0.5, abs=0.06)


def test_a_trial_on_more_chips_shares_its_rows_with_the_others():
    """As above, on chips that change no answer; sums of sixteenths and of quarters are exact."""
    answers = np.random.default_rng(0).random(16) < 0.5
    worse, better = answers & (np.arange(16) != 7), answers | (np.arange(16) == 7)
    tables = [np.tile(worse, (2, 1)), np.tile(better, (4, 1))]
    points = [_point(i, c.mean(), 1.0 + i, width=0.2, correct=_answers(c)) for i, c in enumerate(tables)]
    assert front_probability(points, draws=20_000)[1] == pytest.approx(1 - (1 - 1 / 16) ** 16, abs=0.01)


def test_accuracies_are_resampled_over_rows_and_chips():
    rng = np.random.default_rng(1)
    correct = rng.random((5, 40)) < 0.6
    means = [correct[np.ix_(rng.integers(5, size=5), rng.integers(40, size=40))].mean() for _ in range(4000)]
    rival_accuracy = np.quantile(means, 0.025)  # a cheaper trial, known exactly
    rival = RecordedTrial(number=0, metrics={"accuracy": rival_accuracy, "energy_uj_per_token": 1.0})
    trial = _point(1, correct.mean(), 2.0, correct=_answers(correct))
    assert front_probability([rival, trial], draws=8000)[1] == pytest.approx(0.975, abs=0.01)


@pytest.mark.parametrize("objectives", [DEFAULT_OBJECTIVES, (ACCURACY, DECIBEL, ENERGY)])
def test_leaving_out_what_is_beaten_in_every_draw_changes_no_probability(objectives, monkeypatch):
    rng = np.random.default_rng(3)
    points = []
    for i in range(120):
        accuracy, correct = rng.uniform(0.1, 0.9), None
        if i % 2:
            correct = rng.random((3, 16)) < accuracy
            accuracy, correct = correct.mean(), _answers(correct)
        level = {"noise_db": float(rng.uniform(-30, -10))}
        points.append(_point(i, accuracy, rng.integers(1, 20) / 4, width=0.1, metrics=level, correct=correct))
    probability = front_probability(points, objectives, draws=100)
    monkeypatch.setattr(uncertainty, "_within_reach", lambda tables, _: np.arange(tables.shape[1]))
    assert (probability == front_probability(points, objectives, draws=100)).all()
    assert 0 < (probability == 0).sum() < len(points)


def test_a_probability_needs_no_trials():
    assert front_probability([]).shape == (0,)


# Which trials take part.


def test_trials_are_kept_apart_by_how_they_stand():
    points = [
        _point(0, 0.5, 1.0),
        _point(1, 0.9, 1.0, metrics={"constraint_violation.energy_uj_per_token": 0.5}),
        _point(2, float("nan"), 1.0),
        _point(3, 0.5, 1.0, metrics={"constraint_violation.clean_accuracy": -0.1}),
        RecordedTrial(number=4, state="failed", cause="loss nan"),
        RecordedTrial(number=5, state="running"),
        RecordedTrial(number=6, state="interrupted", metrics={"accuracy": 1.0, "energy_uj_per_token": 0.1}),
        RecordedTrial(number=7),
        RecordedTrial(number=8, state="stopped", metrics={"accuracy": 1.0, "energy_uj_per_token": 0.1}),
        _point(9, 0.9, 1.0, metrics={"constraint_violation": 0.25}),
        replace(_point(10, 0.99, 0.1), state="discarded"),  # the best of all, and on no front
    ]
    groups = grouped(points)
    found = {name: [p.number for p in getattr(groups, name)] for name in vars(groups)}
    assert found == {
        "feasible": [0, 3],
        "violating": [1, 9],
        "unscored": [2, 7],
        "failed": [4],
        "stopped": [8],
        "discarded": [10],
        "open": [5, 6],
    }
    assert points[1].violated == {"energy_uj_per_token": 0.5}
    assert points[9].violated == {"constraints": 0.25}
    view = view_front(points)
    assert [p.number for p in view.members] == [0, 3]  # of equal points all
    assert [(row["number"], row["on_front"], list(row["violated"])) for row in view.rows()] == [
        (0, True, []),
        (1, False, ["energy_uj_per_token"]),
        (3, True, []),
        (9, False, ["constraints"]),
    ]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], {0, 1, 2, 3}),
        (["method=halora"], {0, 2}),
        (["rank>=4"], {1, 2}),
        (["lora.rank>=4", " method != halora "], {1, 3} & {1, 2}),
        (["noise_strength<0.02"], {0, 1}),
        (["noise_strength=0.010"], {0, 1}),
        (["accuracy>0.25"], {1, 2}),
        (["mu!=0.1"], {1, 2, 3}),
        (["mu=0.1"], {0}),
        (["trial<=1"], {0, 1}),
        (["state=finished", "method=a=b"], {3}),
    ],
)
def test_filters_choose_by_labels_values_and_metrics(conditions, expected):
    points = [
        _point(0, 0.1, 1.0, labels={"method": "halora", "noise_strength": 0.01}, params={"lora.rank": 2, "t.mu": 0.1}),
        _point(1, 0.5, 1.0, labels={"method": "lora", "noise_strength": 0.01}, params={"lora.rank": 4}),
        _point(2, 0.5, 1.0, labels={"method": "halora", "noise_strength": 0.02}, params={"lora.rank": 8}),
        _point(3, 0.2, 1.0, labels={"method": "a=b", "noise_strength": 0.02}, params={}),
    ]
    assert {p.number for p in filtered(points, conditions)} == expected


def test_filters_that_fit_nothing_are_told_all_at_once():
    points = [_point(0, 0.5, 1.0, labels={"method": "lora"})]
    with pytest.raises(UserError) as caught:
        filtered(points, ["methd=lora", "method", "method=lora"])
    assert caught.value.problems == [
        "filter 'methd=lora': no trial has a field 'methd'; did you mean 'method'?",
        "filter 'method': write FIELD=VALUE, or with one of != < <= > >=",
    ]
    assert filtered([], ["anything=1"]) == []


def test_booleans_are_met_as_they_are_written():
    points = [_point(i, 0.5, 1.0, params={"chip.adc.lossless": lossless}) for i, lossless in enumerate((True, False))]
    for condition, expected in (("lossless=true", [0]), ("lossless!=true", [1]), ("lossless=False", [1])):
        assert [point.number for point in filtered(points, [condition])] == expected


def test_a_last_part_that_several_fields_share_is_refused():
    points = [_point(0, 0.5, 1.0, params={"chip.adc.bits": 6, "chip.dac.bits": 8})]
    with pytest.raises(UserError, match=r"'bits' may be chip\.adc\.bits or chip\.dac\.bits; write it whole"):
        filtered(points, ["bits=8"])
    assert filtered(points, ["chip.dac.bits=8"]) == points


def test_objectives_know_their_direction_or_are_asked_for_it():
    known = {
        "accuracy": True,
        "accuracy.arc-easy": True,
        "accuracy_per_byte": True,
        "margin_low": True,
        "accuracy_std_chips": False,
        "energy_uj_per_token.adc": False,
        "train_loss": False,
        "noise_db:max": True,
        "accuracy:min": False,
    }
    assert {text: objective(text).maximise for text in known} == known
    assert objective("noise_db:max").metric == "noise_db"
    with pytest.raises(UserError, match="say whether more is better, 'noise_db:max' or 'noise_db:min'"):
        objective("noise_db")
    points = [_point(0, 0.5, 1.0)]
    for aims, message in (
        ([ACCURACY], "two or three different objectives, got: accuracy"),
        ([ACCURACY, ACCURACY], "two or three"),
        ([ACCURACY, objective("margn:max")], "no trial has a metric 'margn'; did you mean 'margin'?"),
    ):
        with pytest.raises(UserError, match=message):
            check_objectives(points, aims)
    check_objectives([], [ACCURACY, ENERGY])


# Which fields matter.


def test_the_field_that_decides_the_objective_is_the_important_one():
    rng = random.Random(0)
    points = []
    for i in range(80):
        params = {"a.decides": rng.uniform(0, 1), "b.idle": rng.choice(["x", "y"]), "c.flag": rng.random() < 0.5}
        if i % 2:
            params["d.some"] = rng.randint(1, 5)
        points.append(_point(i, params["a.decides"], 1.0, params={**params, "e.fixed": 3}))
    found = importances(points, ACCURACY)
    assert next(iter(found)) == "a.decides"
    assert found["a.decides"] > 0.8
    assert set(found) == {"a.decides", "b.idle", "c.flag", "d.some"}
    assert sum(found.values()) == pytest.approx(1)
    assert importances(points, ENERGY) == {}  # it never varies
    assert importances(points[:7], ACCURACY) == {}


def test_shares_that_may_mislead_say_so():
    """The review's case: plain LoRA reaches less, and the sampler has nearly stopped drawing it."""
    methods = ["lora"] * 6 + ["noise_lora"] * 194
    points = [
        _point(i, 0.39 if method == "lora" else 0.54, 1.0, params={"training.method": method, "lora.rank": 4})
        for i, method in enumerate(methods)
    ]
    (said,) = doubts(view_front(points))
    assert said.startswith("Of 200 trials with training.method, so few have 'lora' 6:")
    (few,) = doubts(view_front([_point(i, i / 20, 1.0, params={"a.flag": i % 2 == 0}) for i in range(8)]))
    assert few == "8 trials are few: another seed may order the fields anew."
    assert doubts(view_front([])) == []
    even = [_point(i, i / 40, 1.0, params={"a.flag": i % 2 == 0}) for i in range(40)]
    assert doubts(view_front(even)) == []


# Pictures and tables.


def test_csv_holds_every_row_with_its_params_in_columns():
    rows = [
        {"number": 0, "accuracy": 0.1 + 0.2, "violated": {}, "labels": {}, "params": {"lora.rank": 4, "mu": 1e-3}},
        {
            "number": 1,
            "accuracy": 0.5,
            "violated": {"energy": 1.0},
            "labels": {"chip": "c"},
            "params": {"m": 'a "b", c'},
        },
    ]
    read = list(csv.DictReader(io.StringIO(front_csv(rows))))
    assert [float(row["accuracy"]) for row in read] == [0.1 + 0.2, 0.5]
    assert [row["lora.rank"] for row in read] == ["4", ""]
    assert [row["mu"] for row in read] == ["0.001", ""]
    assert [row["m"] for row in read] == ["", 'a "b", c']
    assert [row["violated"] for row in read] == ["", "energy"]
    assert [row["chip"] for row in read] == ["", "c"]
    assert front_csv([]).strip() == ""


@pytest.mark.parametrize("number_of_points", [0, 1, 12])
def test_the_figure_shows_every_point_and_numbers_the_front(number_of_points):
    rng = random.Random(0)
    methods = ("lora", "noise_lora", "halora", "$\\frac{own$")
    points = [
        _point(i, rng.random(), 1 + 4 * rng.random(), labels={"method": methods[i % 4]})
        for i in range(number_of_points)
    ]
    for point in points[-1:]:
        point.metrics.update(accuracy=1.0, accuracy_low=1 + 2e-16, accuracy_high=1 - 2e-16)
    figure = front_figure(view_front(points), "title $\\frac{of it$")
    (axes,) = figure.axes
    drawn = {tuple(xy) for bars in axes.containers for xy in zip(*bars.lines[0].get_data(), strict=True)}
    assert drawn == {(p.energy_uj_per_token, p.accuracy) for p in points}
    texts = {text.get_text() for text in axes.texts}
    assert texts == ({str(p.number) for p in front(points)} or {"no finished trial yet"})
    png = io.BytesIO()
    figure.savefig(png, format="png")
    png.seek(0)
    pixels = matplotlib.image.imread(png)
    assert pixels.shape[:2] == (500, 800)
    assert np.ptp(pixels[..., :3]) > 0.9


def _summary(points, **more):
    view = view_front(points)
    given = {
        "importance": {"accuracy": {"lora.rank": 0.7, "<i>": 0.3}, "energy_uj_per_token": {}},
        "hypervolume": list(hypervolume_history(view.groups.feasible, (0.0, 6.0))),
        "baselines": {},
        "comparison": None,
        "damage": [],
        "doubts": [],
        "recommendation": Recommendation(None, (), ("what to <take>",)),
    }
    fixed = {"name": "s", "family": "f", "description": "d", "trials": 9, "time": "now"}
    return SweepSummary(front=view, **fixed, **(given | more))


def test_a_trial_stands_at_every_strength_of_noise_it_was_scored_at():
    others = {"accuracy_at.0.02": 0.4, "accuracy_at.0.005": 0.6}
    point = _point(0, 0.5, 1.0, labels={"noise_strength": 0.01}, metrics=others)
    assert point.accuracy_by_strength == {0.005: 0.6, 0.01: 0.5, 0.02: 0.4}
    (markers,) = charts.noise_chart([point], "noise_strength", "level")["data"]
    assert (markers["x"], markers["y"]) == ([0.005, 0.01, 0.02], [0.6, 0.5, 0.4])


@pytest.mark.parametrize("count", [0, 1, 12, 400])
def test_charts_are_valid_plotly_figures_and_hold_every_trial(count):
    rng = random.Random(2)
    points = [
        _point(
            i,
            rng.random(),
            1 + 4 * rng.random(),
            labels={"method": rng.choice(["lora", "halora", "<b>own</b>"]), "noise_strength": rng.choice([0.01, 0.02])},
            params={"lora.rank": 4, "model": "<img src=x onerror=alert(1)>"},
            metrics={"noise_db": rng.uniform(-40, -10), "energy_uj_per_token.adc": 0.5}
            | ({"constraint_violation.energy": 0.5} if i % 5 == 4 else {}),
        )
        for i in range(count)
    ]
    summary = _summary(points)
    drawn = [
        charts.front_chart(summary.front),
        charts.noise_chart(points, "noise_strength", "level"),
        charts.noise_chart(points, "noise_db", "dB"),
        charts.energy_chart(summary.front),
        charts.importance_chart(summary.importance),
        charts.hypervolume_chart(summary.hypervolume),
    ]
    for chart in drawn:
        plotly.graph_objects.Figure(chart)
        assert "<b>own" not in repr(chart)
        assert "<i>" not in repr(chart)
        assert "<img" not in repr(chart)
    places = {
        place
        for trace in drawn[0]["data"]
        if trace["mode"] == "markers"
        for place in zip(trace["x"], trace["y"], strict=True)
    }
    assert places == {(p.energy_uj_per_token, p.accuracy) for p in points}
    for chart in drawn[1:3]:
        assert sum(len(trace["x"]) for trace in chart["data"] if trace["mode"] == "markers") == count
