"""A sweep's report: one HTML page that needs nothing but itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from halora.analysis import charts
from halora.analysis.formats import number, script_json
from halora.analysis.recommendation import Recommendation
from halora.analysis.summary import FrontView

_TEMPLATE = "report.html.jinja"
_SIDES = ("front", "front_2", "front_3")
_MOST_ROWS = 200
"""Rows of a table; the page says how many it leaves out."""


@dataclass(frozen=True)
class SweepSummary:
    """A sweep as its report tells it.

    Attributes:
        name: Name of the sweep.
        family: Its MLflow experiment.
        description: What it is for, in its author's words.
        trials: Number of trials asked for.
        front: Its trials and their front.
        importance: Share of each searched field, by metric of the objective.
        doubts: Why these shares may mislead, in words.
        hypervolume: The hypervolume after each finished trial that breaks no constraint, in the order they ended.
        baselines: Energy per token of named GPU baselines in microjoule, by model and name.
        comparison: The closing comparison, in plain values; none where there is none.
        recommendation: Which trial to take, how sure that is and what is left to do.
        damage: What the chips do to the untrained bases, in lines; warnings among them.
        time: When this was put together, as text.
    """

    name: str
    family: str
    description: str
    trials: int
    front: FrontView
    importance: dict[str, dict[str, float]]
    doubts: Sequence[str]
    hypervolume: list[float]
    baselines: Mapping[str, Mapping[str, float]]
    comparison: Mapping[str, Any] | None
    recommendation: Recommendation
    damage: Sequence[str]
    time: str


def render_report(summary: SweepSummary) -> str:
    """The page, with Plotly's code in it. Whatever a user named is escaped."""
    from plotly.offline import get_plotlyjs

    view = summary.front
    scored = view.groups.scored
    strengths = sorted({strength for point in scored for strength in point.accuracy_by_strength})
    several = charts.noise_chart(scored, "noise_strength", "noise strength of the chip (unit of its model)")
    drawn = {
        **dict(zip(_SIDES, charts.front_charts(view) if scored else (), strict=False)),
        "noise_strength": several if len(strengths) > 1 else None,
        "noise_db": charts.noise_chart(scored, "noise_db", "realised noise to signal of the weights (dB)"),
        "energy": charts.energy_chart(view),
        "importance": charts.importance_chart(summary.importance),
        "hypervolume": charts.hypervolume_chart(summary.hypervolume, view.objectives) if summary.hypervolume else None,
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "described": charts.described}
    template = environment.from_string((files("halora.analysis") / _TEMPLATE).read_text(encoding="utf-8"))
    shown = {name: chart for name, chart in drawn.items() if chart and chart["data"]}
    return template.render(
        summary=summary,
        view=view,
        charts=shown,
        charts_json=script_json(shown),
        sides=[name for name in _SIDES if name in shown],
        strengths=strengths,
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        most=_MOST_ROWS,
        ratios=_ratios(summary),
        seconds=sum(max(p.ended_ms - p.began_ms, 0) for p in view.groups.all if p.ended_ms) / 1000,
    )


def _ratios(summary: SweepSummary) -> list[dict[str, Any]]:
    """Energy of the front's cheapest, knee and most accurate trial beside the named baselines of its model."""
    members = sorted(summary.front.members, key=lambda point: point.energy_uj_per_token)
    chosen = {"cheapest": members[:1], "knee": [k] if (k := summary.front.knee) else []}
    chosen["most accurate"] = [best] if (best := max(members, key=lambda point: point.accuracy, default=None)) else []
    rows = []
    for what, points in chosen.items():
        for point in points:
            named = summary.baselines.get(str(point.labels.get("model")), {})
            own = point.energy_uj_per_token
            beside = {name: (energy, own / energy) for name, energy in named.items()}
            rows.append({"what": what, "number": point.number, "energy": own, "beside": beside})
    return rows
