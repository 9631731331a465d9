"""Parallel coordinates as a drawing: places on a canvas of 1000 x 270."""

from collections.abc import Sequence
from dataclasses import dataclass

from halora.analysis.charts import label_styles
from halora.analysis.parallel import Axis, line_places, parallel_axes
from halora.analysis.summary import FrontView
from halora.analysis.trials import RecordedTrial

_LEFT, _RIGHT, _TOP, _BOTTOM = 75, 915, 46, 236
_MOST_LINES = 1000


@dataclass(frozen=True)
class DrawnAxis:
    """An axis on the canvas.

    Attributes:
        axis: The axis.
        x: Where it stands.
        ticks: Heights and texts beside it.
        bounds: Heights between which lines were asked for; none without a condition on it.
    """

    axis: Axis
    x: float
    ticks: list[tuple[float, str]]
    bounds: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """A path.

    Attributes:
        kind: `out` for trials that do not qualify, `in` for those that do, `front` for those on the front.
        colour: Colour of a trial on the front.
        number: Its trial; -1 for many trials.
        path: For an SVG.
    """

    kind: str
    colour: str
    number: int
    path: str


@dataclass(frozen=True)
class ParallelView:
    """The drawing.

    Attributes:
        axes: From left to right.
        lines: In the order to be drawn.
        left_out: Number of lines that are not drawn.
    """

    axes: list[DrawnAxis]
    lines: list[Line]
    left_out: int


def parallel_view(
    points: Sequence[RecordedTrial], view: FrontView, conditions: Sequence[tuple[str, str, str]], label: str
) -> ParallelView | None:
    """The drawing of scored trials; none where nothing was searched, or nothing is scored.

    Args:
        points: All scored trials.
        view: Those that qualify, with their front.
        conditions: Field, comparison and value of each constraint.
        label: Label that colours tell apart.
    """
    axes = parallel_axes(points, view.objectives)
    if len(axes) <= len(view.objectives) or not points:
        return None
    step = (_RIGHT - _LEFT) / (len(axes) - 1)
    xs = [_LEFT + i * step for i in range(len(axes))]
    members = {point.number for point in view.members}
    inside = {point.number for point in view.groups.feasible}
    styles = label_styles(points, label)
    kept = [p for p in points if p.number in inside and p.number not in members]
    out = [p for p in points if p.number not in inside]
    lines = [
        Line(kind, "", -1, "".join(_path(point, axes, xs) for point in group[:_MOST_LINES]))
        for kind, group in (("out", out), ("in", kept))
        if group
    ]
    for point in view.members[:_MOST_LINES]:
        colour = styles.get(str(point.labels.get(label, "other")), ("#666666", ""))[0]
        lines.append(Line("front", colour, point.number, _path(point, axes, xs)))
    drawn = [
        DrawnAxis(axis, x, [(_y(place), text) for place, text in axis.ticks], _bounds(axis, conditions))
        for axis, x in zip(axes, xs, strict=True)
    ]
    left_out = sum(max(len(group) - _MOST_LINES, 0) for group in (out, kept, view.members))
    return ParallelView(drawn, lines, left_out)


def _path(point: RecordedTrial, axes: Sequence[Axis], xs: Sequence[float]) -> str:
    places = zip(xs, line_places(point, axes), strict=True)
    return "M" + "L".join(f"{x:.0f},{_y(place):.1f}" for x, place in places)


def _y(place: float) -> float:
    return _BOTTOM - place * (_BOTTOM - _TOP)


def _bounds(axis: Axis, conditions: Sequence[tuple[str, str, str]]) -> tuple[float, float] | None:
    """Heights, upper and lower, that conditions on the axis leave."""
    own = [(comparison, value) for field, comparison, value in conditions if field in (axis.field, axis.label)]
    low, high = 0.0, 1.0
    found = False
    for comparison, value in own:
        try:
            if comparison == "=":
                places = [axis.place(v if axis.choices else float(v)) for v in value.split("|")]
                low, high = max(low, min(places)), min(high, max(places))
            elif comparison in (">=", ">"):
                low = max(low, axis.place(float(value)))
            elif comparison in ("<=", "<"):
                high = min(high, axis.place(float(value)))
            else:
                continue
            found = True
        except ValueError:
            continue
    if not found or low > high:
        return None
    return _y(min(high, 1.0)) - 4, _y(max(low, 0.0)) + 4
