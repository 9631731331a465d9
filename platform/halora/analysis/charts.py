"""Charts of a sweep as Plotly figures in plain values; texts that a user chose are escaped, as Plotly reads HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import log10
from types import MappingProxyType
from typing import Any

from halora.analysis.figures import METHOD_COLOURS, OTHER_COLOUR
from halora.analysis.formats import searched_values
from halora.analysis.front import front
from halora.analysis.summary import FrontView
from halora.analysis.trials import ACCURACY, DEFAULT_OBJECTIVES, Objective, RecordedTrial, projections
from halora.hardware.energy import COSTS

Chart = dict[str, Any]
"""A Plotly figure: `data` and `layout`."""
Pair = tuple[Objective, Objective]
"""What is drawn upwards, and what to the right."""

_SYMBOLS = {"lora": "square", "noise_lora": "triangle-up", "halora": "circle"}
_COMPONENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#332288")
_MOST_BARS = 12
_MOST_SHOWN = 5000
"""Dominated trials drawn; beyond that the best are."""
_UNDECIDED = 0.05
"""Probability of being on the front from which a dominated trial is shown as one that might be."""
NEUTRAL = "#808080"  # seen on white and on black
MARK_COLOUR = "#CC79A7"
PLAIN_STYLES = (
    ("#0072B2", "circle"),
    ("#E69F00", "square"),
    ("#009E73", "diamond"),
    ("#CC79A7", "triangle-up"),
    ("#56B4E9", "cross"),
    ("#D55E00", "star"),
    ("#999999", "hexagon"),
)
"""Colours of Okabe and Ito with a shape each."""


def front_charts(view: FrontView, **settings: Any) -> list[Chart]:
    """The front seen from every side: a chart for every two of its objectives, see `front_chart`."""
    return [front_chart(view, pair, **settings) for pair in projections(view.objectives)]


def front_chart(
    view: FrontView,
    pair: Pair | None = None,
    *,
    others: Sequence[RecordedTrial] = (),
    marked: Sequence[RecordedTrial] = (),
    by: str = "method",
    most: int = _MOST_SHOWN,
) -> Chart:
    """Every feasible trial by two objectives, the front with its intervals, and those that break constraints.

    Args:
        view: A front.
        pair: What is drawn upwards and what to the right; the first of its projections when left out. The line is the
            front of these two, whereas marks are filled for trials on the front of all objectives.
        others: Feasible trials that do not take part, drawn pale.
        marked: Trials to draw a ring around.
        by: Label that colour and shape tell apart.
        most: Dominated trials drawn; beyond that the best are.
    """
    pair = pair or projections(view.objectives)[0]
    upwards, rightwards = pair
    sign = -1 if upwards.maximise else 1
    members = {point.number for point in view.members}
    styles = label_styles([*view.groups.scored, *others], by)
    data: list[Chart] = []
    dominated = [p for p in view.groups.feasible if p.number not in members]
    dominated = sorted(dominated, key=lambda p: sign * p.metrics[upwards.metric])[:most]
    maybe = [p for p in dominated if view.probability[p.number] >= _UNDECIDED]
    sure = [p for p in dominated if view.probability[p.number] < _UNDECIDED]
    if others:
        pale = _trials(others[:most], "does not qualify", "", view, pair, _Style(opacity=0.35, size=6, bars=False))
        pale["marker"] |= {"symbol": "circle-open", "color": NEUTRAL}
        data.append(pale)
    if view.members:
        data.append(staircase(front(view.members, pair), pair, NEUTRAL))
    for group, name, style in (
        (sure, "dominated", _Style(opacity=0.5, size=7, bars=False)),
        (maybe, "perhaps on the front", _Style(opacity=0.75, size=9)),
        (view.members, "on the front", _Style(opacity=1.0, size=11, filled=True)),
    ):
        for label, own in by_label(group, by):
            trace = _trials(own, f"{label}, {name}", label, view, pair, style, styles)
            trace |= {"legendgroup": escape(label), "showlegend": False}
            data.append(trace)
    for trace in {trace["legendgroup"]: trace for trace in data if "legendgroup" in trace}.values():
        trace |= {"name": trace["legendgroup"], "showlegend": True}  # one entry for a label: its trials on the front
    if view.groups.violating:
        broken = _trials(
            view.groups.violating[:most],
            "violates a constraint",
            "",
            view,
            pair,
            _Style(opacity=0.8, size=8, bars=False),
        )
        broken["marker"] |= {"symbol": "x-thin", "line": {"width": 2, "color": "#D55E00"}}
        data.append(broken)
    if view.knee:
        data.append(_ring([view.knee], f"knee: trial {view.knee.number}", pair, NEUTRAL, 20))
    if marked:
        data.append(_ring(marked, "shortlist", pair, MARK_COLOUR, 26))
    what = f"{upwards.words} (95 % interval)" if upwards == ACCURACY else upwards.words
    layout = chart_layout(rightwards.words, what, log_x=rightwards.metric in COSTS)
    layout["yaxis"] |= {"type": "log"} if upwards.metric in COSTS else {}
    return _with_room({"data": data, "layout": layout})


def staircase(members: Sequence[RecordedTrial], pair: Pair, colour: str) -> Chart:
    """The border of what the members of the front over a pair dominate, in the front's order."""
    upwards, rightwards = pair
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [p.metrics[rightwards.metric] for p in members],
        "y": [p.metrics[upwards.metric] for p in members],
        "line": {"shape": "hv", "color": colour, "width": 1},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def fronts_chart(fronts: Mapping[str, FrontView], reference: tuple[float, float]) -> Chart:
    """Several fronts and the accuracy and energy their hypervolumes are measured from."""
    data: list[Chart] = []
    for (name, view), (colour, symbol) in zip(fronts.items(), PLAIN_STYLES * len(fronts), strict=False):
        if view.members:
            data.append(staircase(view.members, DEFAULT_OBJECTIVES, colour))
            style = _Style(opacity=1.0, size=9, filled=True)
            trace = _trials(view.members, name, "", view, DEFAULT_OBJECTIVES, style)
            trace["marker"] |= {"color": colour, "symbol": symbol}
            data.append(trace)
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "reference point",
            "x": [reference[1]],
            "y": [reference[0]],
            "marker": {"symbol": "cross-thin", "size": 12, "line": {"width": 2, "color": NEUTRAL}},
            "hovertemplate": "accuracy %{y:.4f}, %{x:.4g} µJ<extra>reference point</extra>",
        }
    )
    return {"data": data, "layout": chart_layout("energy per token (µJ)", "accuracy under noise", log_x=True)}


def noise_chart(
    points: Sequence[RecordedTrial], field: str, title: str, *, marked: Sequence[RecordedTrial] = ()
) -> Chart:
    """Accuracy over `noise_strength`, at all strengths a trial was scored at, or over the metric `noise_db`.

    The `marked` trials get a ring.
    """
    data = []
    for method, own in by_method(points):
        placed = sorted((x, y, p.number) for p in own for x, y in _accuracies_over(p, field))
        if not placed:
            continue
        tops = [max(group, key=lambda item: item[1]) for _, group in groupby(placed, key=lambda item: item[0])]
        colour = METHOD_COLOURS.get(method, OTHER_COLOUR)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x for x, _, _ in placed],
                "y": [y for _, y, _ in placed],
                "text": [f"trial {number}" for _, _, number in placed],
                "name": escape(method),
                "marker": {"color": colour, "symbol": _SYMBOLS.get(method, "diamond"), "opacity": 0.6, "size": 8},
            }
        )
        if 1 < len(tops) <= len(placed) / 2:  # several trials at each strength: their best, joined
            line = {"x": [x for x, _, _ in tops], "y": [y for _, y, _ in tops], "line": {"color": colour}}
            data.append({"type": "scatter", "mode": "lines", "name": f"{escape(method)}, best", **line})
    for p in marked:
        places = _accuracies_over(p, field)
        ring = _ring([p], f"trial {p.number}", DEFAULT_OBJECTIVES, MARK_COLOUR, 18)
        data.append(ring | {"x": [x for x, _ in places], "y": [y for _, y in places]})
    return _with_room({"data": data, "layout": chart_layout(title, "accuracy under noise")})


def _accuracies_over(point: RecordedTrial, field: str) -> list[tuple[float, float]]:
    if field == "noise_strength":
        return list(point.accuracy_by_strength.items())
    return [(point.metrics[field], point.accuracy)] if field in point.metrics else []


def energy_chart(view: FrontView) -> Chart:
    """Energy by component of the front's trials, at most a dozen spread over it."""
    every = max(-(-len(view.members) // _MOST_BARS), 1)
    shown = view.members[::every]
    prefix = "energy_uj_per_token."
    components = sorted({name for p in shown for name in p.metrics if name.startswith(prefix)})
    components = [name for name in components if any(p.metrics.get(name, 0) > 0 for p in shown)]
    data = [
        {
            "type": "bar",
            "name": escape(name.removeprefix(prefix)),
            "x": [f"trial {p.number}" for p in shown],
            "y": [p.metrics.get(name, 0.0) for p in shown],
            "marker": {"color": _COMPONENT_COLOURS[i % len(_COMPONENT_COLOURS)]},
        }
        for i, name in enumerate(components)
    ]
    layout = chart_layout("", "energy per token (µJ)") | {"barmode": "stack"}
    layout["xaxis"] |= {"type": "category"}
    return {"data": data, "layout": layout}


def importance_chart(importance: Mapping[str, Mapping[str, float]]) -> Chart:
    """Share of each searched field, by metric of the objective."""
    paths = sorted(
        {path for shares in importance.values() for path in shares},
        key=lambda path: sum(shares.get(path, 0) for shares in importance.values()),
    )
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(metric),
            "x": [shares.get(path, 0.0) for path in paths],
            "y": [escape(path) for path in paths],
            "marker": {"color": colour},
        }
        for (metric, shares), colour in zip(importance.items(), _COMPONENT_COLOURS, strict=False)
        if shares
    ]
    layout = chart_layout("share of the importance", "") | {"barmode": "group", "height": 140 + 44 * len(paths)}
    layout["yaxis"] |= {"type": "category"}
    return {"data": data, "layout": layout}


def hypervolume_chart(volumes: Sequence[float], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> Chart:
    """The hypervolume over finished trials, in the order they ended."""
    what = " × ".join(each.words for each in objectives)
    colour = "#0072B2"
    line = {
        "type": "scatter",
        "mode": "lines" if len(volumes) > 1 else "markers",
        "line": {"shape": "hv", "color": colour},
        "marker": {"size": 9, "color": colour},
        "cliponaxis": False,
    }
    data = [{**line, "x": list(range(1, len(volumes) + 1)), "y": list(volumes), "showlegend": False}]
    layout = chart_layout("trials finished", f"hypervolume<br>({what})")
    layout["yaxis"] |= {"rangemode": "tozero"}
    layout["xaxis"] |= {"tickformat": "d", "nticks": min(len(volumes) + 2, 12), "rangemode": "nonnegative"}
    return {"data": data, "layout": layout}


def by_method(points: Sequence[RecordedTrial]) -> list[tuple[str, list[RecordedTrial]]]:
    """Trials by training method, the known methods first."""
    return by_label(points, "method")


def by_label(points: Sequence[RecordedTrial], label: str) -> list[tuple[str, list[RecordedTrial]]]:
    """Trials by one of their labels, the known training methods first."""
    groups: dict[str, list[RecordedTrial]] = {method: [] for method in METHOD_COLOURS}
    for point in points:
        groups.setdefault(str(point.labels.get(label, "other")), []).append(point)
    return [(name, own) for name, own in groups.items() if own]


def label_styles(points: Sequence[RecordedTrial], label: str) -> dict[str, tuple[str, str]]:
    """Colour and shape of each value of a label; those of the methods are the same everywhere."""
    if label == "method":
        return {method: (METHOD_COLOURS[method], _SYMBOLS[method]) for method in METHOD_COLOURS}
    names = sorted({str(point.labels.get(label, "other")) for point in points})
    return {name: PLAIN_STYLES[place % len(PLAIN_STYLES)] for place, name in enumerate(names)}


def described(point: RecordedTrial) -> str:
    """A trial's searched values on one line."""
    return searched_values(point.params)


@dataclass(frozen=True)
class _Style:
    opacity: float
    size: int
    filled: bool = False
    bars: bool = True


def _ring(points: Sequence[RecordedTrial], name: str, pair: Pair, colour: str, size: int) -> Chart:
    upwards, rightwards = pair
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [p.metrics[rightwards.metric] for p in points],
        "y": [p.metrics[upwards.metric] for p in points],
        "name": escape(name),
        "marker": {"symbol": "circle-open", "size": size, "color": colour, "line": {"width": 1.5}},
        "hoverinfo": "skip",
    }


def _trials(
    points: Sequence[RecordedTrial],
    name: str,
    label: str,
    view: FrontView,
    pair: Pair,
    style: _Style,
    styles: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> Chart:
    upwards, rightwards = pair
    colour, symbol = styles.get(label, (OTHER_COLOUR, "diamond"))
    trace: Chart = {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": [p.metrics[rightwards.metric] for p in points],
        "y": [p.metrics[upwards.metric] for p in points],
        "customdata": [p.number for p in points],
        "text": [
            f"trial {p.number}, on the front with probability {view.probability.get(p.number, 0):.2f}"
            f"<br>{escape(described(p))[:300]}"
            for p in points
        ],
        "hovertemplate": f"%{{text}}<br>{upwards.words}: %{{y:.4g}}<br>{rightwards.words}: %{{x:.4g}}<extra></extra>",
        "marker": {
            "symbol": symbol if style.filled else f"{symbol}-open",
            "color": colour,
            "size": style.size,
        },
        "opacity": style.opacity,
    }
    if style.bars and upwards == ACCURACY:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [max(p.metrics.get("accuracy_high", p.accuracy) - p.accuracy, 0) for p in points],
            "arrayminus": [max(p.accuracy - p.metrics.get("accuracy_low", p.accuracy), 0) for p in points],
            "thickness": 1,
            "width": 3,
        }
    return trace


def _with_room(chart: Chart) -> Chart:
    """The chart with a narrow range around values that are all the same, where Plotly's own is two units wide."""
    shown: dict[str, set[float]] = {"x": set(), "y": set()}
    for trace in chart["data"]:
        shown["x"] |= set(trace["x"])
        shown["y"] |= set(trace["y"])
        if bars := trace.get("error_y"):
            shown["y"] |= {y + up for y, up in zip(trace["y"], bars["array"], strict=True)}
            shown["y"] |= {y - down for y, down in zip(trace["y"], bars["arrayminus"], strict=True)}
    for name, values in shown.items():
        if len(values) == 1 and (value := values.pop()):
            axis = chart["layout"][f"{name}axis"]
            ends = sorted((0.9 * value, 1.1 * value))
            axis["range"] = [log10(end) for end in ends] if axis.get("type") == "log" else ends
    return chart


def chart_layout(x: str, y: str, *, log_x: bool = False) -> Chart:
    """How every chart looks, with the titles of its axes."""
    grid = {"gridcolor": "#e6e6e6", "zerolinecolor": "#cccccc", "automargin": True}
    grid |= {"exponentformat": "e"}  # an SI prefix would stand before the title's unit
    return {
        "template": "none",
        "height": 420,
        "showlegend": True,
        "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": x, "font": {"size": 13}}, "type": "log" if log_x else "-", **grid},
        "yaxis": {"title": {"text": y, "font": {"size": 13}}, **grid},
        "hovermode": "closest",
    }
