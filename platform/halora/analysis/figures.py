"""Pictures of a sweep, drawn from its points."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from halora.analysis.front import TrialPoint, front

_STYLES = {
    "lora": ("#0072B2", "s"),
    "noise_lora": ("#E69F00", "^"),
    "halora": ("#009E73", "o"),
}  # Okabe and Ito


def front_figure(points: Sequence[TrialPoint], title: str, methods: dict[int, str]) -> Figure:
    """Accuracy under noise with its intervals against energy; the front is filled and joined by a staircase.

    Args:
        points: Finished trials.
        title: Title of the figure.
        methods: Training method by trial number; it sets colour and shape.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    members = front(points)
    if members:
        axes.step(
            [p.energy_uj_per_token for p in members],
            [p.accuracy for p in members],
            where="post",
            color="0.4",
            linewidth=1,
            zorder=1,
        )
    on_front = {point.number for point in members}
    for method, (colour, shape) in _STYLES.items():
        group = [p for p in points if methods.get(p.number) == method]
        for filled in (True, False):
            shown = [p for p in group if (p.number in on_front) == filled]
            if not shown:
                continue
            axes.errorbar(
                [p.energy_uj_per_token for p in shown],
                [p.accuracy for p in shown],
                yerr=[  # never below 0: rounding can put a limit of an accuracy of 1 on its wrong side
                    [max(p.accuracy - p.accuracy_low, 0) for p in shown],
                    [max(p.accuracy_high - p.accuracy, 0) for p in shown],
                ],
                fmt=shape,
                color=colour,
                markerfacecolor=colour if filled else "white",
                elinewidth=0.8,
                capsize=2,
                label=f"{method}, {'on the front' if filled else 'dominated'}",
            )
    for point in members:
        place = (point.energy_uj_per_token, point.accuracy)
        axes.annotate(str(point.number), place, xytext=(5, 5), textcoords="offset points")
    axes.set(title=title, xlabel="energy per token (µJ)", ylabel="accuracy under noise (95 % interval)")
    if points:
        axes.legend(fontsize="small", loc="best")
    else:
        axes.text(0.5, 0.5, "no finished trial yet", ha="center", transform=axes.transAxes)
    return figure
