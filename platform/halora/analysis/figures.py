"""Pictures of a sweep, drawn from its points, and of a chip's errors, drawn from their curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halora.analysis.front import front
from halora.analysis.layers import by_kind
from halora.analysis.summary import FrontView
from halora.analysis.trials import ACCURACY, Objective, RecordedTrial, projections
from halora.hardware.error_curves import ErrorCurve

METHOD_COLOURS = {"lora": "#0072B2", "noise_lora": "#E69F00", "halora": "#009E73"}  # Okabe and Ito
OTHER_COLOUR = "#666666"
_SHAPES = {"lora": "s", "noise_lora": "^", "halora": "o"}


def front_figure(view: FrontView, title: str) -> Figure:
    """Objectives against each other, accuracy with its intervals; the front is filled.

    Three objectives are seen from three sides. The line is the front of the two that are drawn.

    Args:
        view: The sweep's front.
        title: Title of the figure.
    """
    sides = projections(view.objectives)
    figure = Figure(figsize=(8, 5) if len(sides) == 1 else (6 * len(sides), 5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, side in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        _draw_side(axes, view, *side)
    if view.groups.feasible:  # below the axes, where it hides no interval
        named = axes.get_legend_handles_labels()
        for text in figure.legend(*named, fontsize="small", ncols=3, loc="outside lower center").get_texts():
            text.set_parse_math(False)
    return figure


def _draw_side(axes: Axes, view: FrontView, upwards: Objective, rightwards: Objective) -> None:
    members, points = view.members, view.groups.feasible
    if members:
        line = front(members, (upwards, rightwards))
        steps = [[p.metrics[each.metric] for p in line] for each in (rightwards, upwards)]
        axes.step(*steps, where="post", color="0.4", linewidth=1, zorder=1)
    on_front = {point.number for point in members}
    for method in dict.fromkeys([*_SHAPES, *(_method(p) for p in points)]):
        for filled in (True, False):
            shown = [p for p in points if _method(p) == method and (p.number in on_front) == filled]
            if shown:
                _draw_trials(axes, shown, method, filled, (upwards, rightwards))
    for point in members:
        place = (point.metrics[rightwards.metric], point.metrics[upwards.metric])
        axes.annotate(str(point.number), place, xytext=(5, 5), textcoords="offset points")
    interval = " (95 % interval)" if upwards == ACCURACY else ""
    axes.set(xlabel=rightwards.words, ylabel=f"{upwards.words}{interval}")
    if not points:
        axes.text(0.5, 0.5, "no finished trial yet", ha="center", transform=axes.transAxes)


def _draw_trials(
    axes: Axes, shown: Sequence[RecordedTrial], method: str, filled: bool, pair: tuple[Objective, Objective]
) -> None:
    colour = METHOD_COLOURS.get(method, OTHER_COLOUR)
    upwards, rightwards = pair
    bars = [  # never below 0: rounding can put a limit of an accuracy of 1 on its wrong side
        [max(p.accuracy - p.metrics.get("accuracy_low", p.accuracy), 0) for p in shown],
        [max(p.metrics.get("accuracy_high", p.accuracy) - p.accuracy, 0) for p in shown],
    ]
    axes.errorbar(
        [p.metrics[rightwards.metric] for p in shown],
        [p.metrics[upwards.metric] for p in shown],
        yerr=bars if upwards == ACCURACY else None,
        fmt=_SHAPES.get(method, "D"),
        color=colour,
        markerfacecolor=colour if filled else "white",
        elinewidth=0.8,
        capsize=2,
        label=f"{method}, {'on the front' if filled else 'dominated'}",
    )


def _method(point: RecordedTrial) -> str:
    return str(point.labels.get("method", "other"))


@dataclass(frozen=True)
class ErrorPanel:
    """One picture of an error over the value aimed at.

    Attributes:
        title: What and when.
        quantity: Name and unit of the value aimed at.
        error: Name and unit of the error.
        stated: What the noise models say.
        drawn: What a chip instance shows.
    """

    title: str
    quantity: str
    error: str
    stated: ErrorCurve
    drawn: ErrorCurve


def error_figure(panels: Sequence[ErrorPanel], noise_db: Mapping[str, float], title: str) -> Figure:
    """Mean and standard deviation of errors, stated (lines) and drawn (marks), and the noise of every layer.

    Args:
        panels: Side by side.
        noise_db: Realised noise-to-signal ratio in dB by canonical layer name; empty for no such panel.
        title: Title of the figure.
    """
    count = len(panels) + bool(noise_db)
    figure = Figure(figsize=(5 * max(count, 1), 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, count, index + 1)
        for name, colour, shape in (("std", "#0072B2", "o"), ("mean", "#E69F00", "^")):
            axes.plot(panel.stated.target, getattr(panel.stated, name), color=colour, label=f"{name}, stated")
            drawn = getattr(panel.drawn, name)
            axes.plot(panel.drawn.target, drawn, shape, color=colour, markersize=4, label=f"{name}, drawn")
        axes.set(title=panel.title, xlabel=panel.quantity, ylabel=panel.error)
        axes.legend(fontsize="small")
    if noise_db:
        _draw_layers(figure.add_subplot(1, count, count), noise_db)
    return figure


def _draw_layers(axes: Axes, noise_db: Mapping[str, float]) -> None:
    """One line per kind of layer over the depth."""
    for kind, points in by_kind(noise_db).items():
        axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    axes.set(title="weights of each layer", xlabel="decoder block", ylabel="noise to signal (dB)")
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize="x-small", ncols=4, loc="upper center")
