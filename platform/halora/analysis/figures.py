"""Pictures of a sweep, drawn from its points, and of a chip's errors, drawn from their curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halora.analysis.layers import by_kind
from halora.analysis.summary import FrontView
from halora.analysis.trials import RecordedTrial
from halora.hardware.error_curves import ErrorCurve

METHOD_COLOURS = {"lora": "#0072B2", "noise_lora": "#E69F00", "halora": "#009E73"}  # Okabe and Ito
OTHER_COLOUR = "#666666"
_SHAPES = {"lora": "s", "noise_lora": "^", "halora": "o"}


def front_figure(view: FrontView, title: str) -> Figure:
    """Accuracy under noise with its intervals against energy; the front is filled and joined by a staircase.

    Args:
        view: The sweep's front over accuracy and energy.
        title: Title of the figure.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    members, points = view.members, view.groups.feasible
    if members:
        steps = [[p.energy_uj_per_token for p in members], [p.accuracy for p in members]]
        axes.step(*steps, where="post", color="0.4", linewidth=1, zorder=1)
    on_front = {point.number for point in members}
    for method in dict.fromkeys([*_SHAPES, *(_method(p) for p in points)]):
        for filled in (True, False):
            shown = [p for p in points if _method(p) == method and (p.number in on_front) == filled]
            if shown:
                _draw_trials(axes, shown, method, filled)
    for point in members:
        place = (point.energy_uj_per_token, point.accuracy)
        axes.annotate(str(point.number), place, xytext=(5, 5), textcoords="offset points")
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="energy per token (µJ)", ylabel="accuracy under noise (95 % interval)")
    if points:
        for text in axes.legend(fontsize="small", loc="best").get_texts():
            text.set_parse_math(False)
    else:
        axes.text(0.5, 0.5, "no finished trial yet", ha="center", transform=axes.transAxes)
    return figure


def _draw_trials(axes: Axes, shown: Sequence[RecordedTrial], method: str, filled: bool) -> None:
    colour = METHOD_COLOURS.get(method, OTHER_COLOUR)
    axes.errorbar(
        [p.energy_uj_per_token for p in shown],
        [p.accuracy for p in shown],
        yerr=[  # never below 0: rounding can put a limit of an accuracy of 1 on its wrong side
            [max(p.accuracy - p.metrics.get("accuracy_low", p.accuracy), 0) for p in shown],
            [max(p.metrics.get("accuracy_high", p.accuracy) - p.accuracy, 0) for p in shown],
        ],
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
