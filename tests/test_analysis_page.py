"""Oracles: places computed by hand, brute force over made-up trials, Plotly's own validation of figures."""

from math import nan

import plotly.graph_objects
import pytest

from halora.analysis import charts
from halora.analysis.layers import by_kind
from halora.analysis.parallel import ABSENT, line_places, parallel_axes
from halora.analysis.summary import narrowed, view_front
from halora.analysis.trial_charts import beside_chart, gradients_chart, layers_chart, loss_chart, time_chart
from halora.analysis.trials import ACCURACY, ENERGY, Objective, RecordedTrial, filtered


def _point(number, accuracy=0.5, energy=2.0, method="lora", clean=None, **params):
    metrics = {"accuracy": accuracy, "energy_uj_per_token": energy, "margin": 0.0, "accuracy_low": accuracy - 0.1}
    metrics |= {"accuracy_high": accuracy + 0.1} | ({} if clean is None else {"clean_accuracy": clean})
    chosen = {path.replace("__", "."): value for path, value in params.items()}
    return RecordedTrial(
        number=number, params=chosen, labels={"method": method, "model": f"m{number % 2}"}, metrics=metrics
    )


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("rank=2|8", {0, 2}),
        ("rank!=2|8", {1, 3}),
        ("rank=2.0|4", {0, 1}),
        ("method=halora|lora", {0, 1, 3}),
        ("method!=halora|lora", {2}),
        ("act=a|b", {3}),
        ("drop<=0.1", {0}),
        ("drop>0.1", {1}),
    ],
)
def test_a_condition_takes_several_values_and_the_drop(condition, expected):
    points = [
        _point(0, method="lora", clean=0.6, lora__rank=2),
        _point(1, method="halora", clean=0.7, lora__rank=4),
        _point(2, method="noise_lora", lora__rank=8),
        _point(3, method="lora", lora__rank=16, training__act="a|b"),
    ]
    assert {p.number for p in filtered(points, [condition])} == expected


def test_narrowing_a_view_draws_the_front_of_those_left():
    points = [_point(i, accuracy=0.3 + i / 20, energy=1 + i / 4, lora__rank=2 ** (i % 3)) for i in range(9)]
    whole = view_front(points)
    view = narrowed(whole, [p for p in points if p.params["lora.rank"] == 2])
    assert [p.number for p in view.members] == [1, 4, 7]
    assert view.probability == whole.probability


def test_axes_are_placed_by_what_their_fields_hold():
    points = [
        _point(0, 0.2, 1.0, training__learning_rate=1e-4, lora__rank=2, training__method="lora", fixed__x=1),
        _point(1, 0.6, 3.0, training__learning_rate=1e-2, lora__rank=6, training__method="halora", fixed__x=1),
        _point(2, nan, 2.0, training__learning_rate=1e-3, lora__rank=4, training__method="mu", training__mu=True),
        _point(3, 0.4, 2.0, training__learning_rate=1e-3, lora__rank=2, training__method="mu", training__mu=False),
    ]
    axes = parallel_axes(points, (ACCURACY, ENERGY))
    fields = [
        "training.learning_rate",
        "lora.rank",
        "training.method",
        "training.mu",
        "accuracy",
        "energy_uj_per_token",
    ]
    assert [axis.field for axis in axes] == fields  # one that never varies is left out
    assert [axis.log for axis in axes] == [True, False, False, False, False, False]
    assert [axis.whole for axis in axes] == [False, True, False, False, False, False]
    assert line_places(points[0], axes) == pytest.approx([0, 0, 0.5, ABSENT, 0, 0])
    assert line_places(points[1], axes) == pytest.approx([1, 1, 0, ABSENT, 1, 1])
    assert line_places(points[2], axes) == pytest.approx([0.5, 0.5, 1, 1, ABSENT, 0.5])
    assert axes[2].ticks == [(0.0, "halora"), (0.5, "lora"), (1.0, "mu")]
    assert axes[0].ticks == [(0.0, "0.0001"), (1.0, "0.01")]
    assert parallel_axes(points[:1], (ACCURACY,))[0].place(0.2) == 0.5


def _numbers(chart):
    return {number for trace in chart["data"] for number in trace.get("customdata", ())}


def test_the_front_s_chart_tells_those_that_do_not_qualify_and_the_shortlist():
    points = [_point(i, accuracy=0.3 + (i * 7 % 10) / 20, energy=1 + i / 4, clean=0.9 - i / 50) for i in range(10)]
    whole = view_front(points)
    view = narrowed(whole, points[:6])
    chart = charts.front_chart(view, others=points[6:], marked=points[8:9], by="model", most=3)
    plotly.graph_objects.Figure(chart)
    by_name = {trace.get("name"): trace for trace in chart["data"] if trace.get("name")}
    assert by_name["does not qualify"]["customdata"] == [6, 7, 8]  # three at most
    assert by_name["shortlist"]["x"] == [points[8].energy_uj_per_token]
    assert {"m0", "m1"} <= by_name.keys()
    assert {p.number for p in view.members} <= _numbers(chart)
    clean = charts.front_chart(view_front(points, (Objective("clean_accuracy", maximise=True), ENERGY)))
    drawn = {y for trace in clean["data"] if "customdata" in trace for y in trace["y"]}
    assert drawn == {p.metrics["clean_accuracy"] for p in points}
    assert all("error_y" not in trace for trace in clean["data"])


def test_fronts_are_drawn_with_their_reference_point_and_hostile_names_as_text():
    points = [_point(i, accuracy=0.3 + i / 20, energy=1 + i / 4) for i in range(4)]
    fronts = {f"<b>{i}": view_front(points[: i + 1]) for i in range(9)} | {"none": view_front([])}
    chart = charts.fronts_chart(fronts, (0.1, 9.0))
    plotly.graph_objects.Figure(chart)
    assert "<b>" not in repr(chart)
    assert (chart["data"][-1]["x"], chart["data"][-1]["y"]) == ([9.0], [0.1])
    assert sum("customdata" in trace for trace in chart["data"]) == 9


def test_losses_that_are_no_numbers_are_left_out():
    reports = [(2, {"train_loss": 3.0}), (4, {"train_loss": nan, "train_task_loss": 1.0}), (6, {"train_loss": 1.0})]
    chart = loss_chart(reports)
    plotly.graph_objects.Figure(chart)
    assert [(t["name"], t["x"], t["y"]) for t in chart["data"]] == [
        ("loss", [2, 6], [3.0, 1.0]),
        ("task loss", [4], [1.0]),
    ]
    assert loss_chart([])["data"] == []


def test_gradients_are_drawn_beside_each_other_with_their_ratio():
    first = {"train_task_grad_norm": 2.0, "train_reg_grad_norm": 0.5, "train_reg_share": 0.25}
    chart = gradients_chart([(2, first), (4, {"train_task_grad_norm": 1.0})])
    plotly.graph_objects.Figure(chart)
    assert [(t["name"], t["x"], t["y"], t.get("text")) for t in chart["data"]] == [
        ("task", [2, 4], [2.0, 1.0], None),
        ("µ · regulariser", [2], [0.5], ["0.25 of the task's"]),
    ]
    assert chart["layout"]["yaxis"]["type"] == "log"
    assert gradients_chart([(2, {"train_loss": 1.0})])["data"] == []


def test_layers_are_drawn_by_kind_over_the_depth():
    noise_db = {f"model.layers.{depth}.mlp.<b>{kind}": -30.0 - depth for depth in (10, 2) for kind in range(9)}
    chart = layers_chart(by_kind(noise_db | {"lm_head": -40.0}))
    plotly.graph_objects.Figure(chart)
    lines = {trace["name"]: (trace["x"], trace["y"]) for trace in chart["data"]}
    assert lines.pop("lm_head") == ([0], [-40.0])
    assert lines == {f"&lt;b&gt;{kind}": ([2, 10], [-32.0, -40.0]) for kind in range(9)}
    assert layers_chart({})["data"] == []


def test_accuracy_over_time_stands_beside_what_is_asked():
    chart = time_chart([(1.0, 0.5, 0.4), (1e5, 0.3, 0.1)], asked=0.35)
    plotly.graph_objects.Figure(chart)
    assert [(trace["x"], trace["y"]) for trace in chart["data"]] == [
        ([1.0, 1e5], values) for values in ([0.5, 0.3], [0.4, 0.1], [0.35, 0.35])
    ]
    assert time_chart([], asked=0.35)["data"] == []


def test_energies_stand_beside_named_ones_with_their_total():
    chart = beside_chart({"adc": 2.0, "dac": 0.5, "sram": 0.0}, {"gpu": 100.0, "other": 1.0}, "<i>")
    plotly.graph_objects.Figure(chart)
    (bar,) = chart["data"]
    rows = dict(zip(bar["y"], bar["x"], strict=True))
    assert rows == {"dac": 0.5, "adc": 2.0, "&lt;i&gt;: total": 2.5, "other": 1.0, "gpu": 100.0}
