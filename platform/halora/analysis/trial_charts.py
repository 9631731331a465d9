"""Charts of a single trial, or of a chip before there is any, in the manner of `halora.analysis.charts`."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, isfinite, nan
from typing import Any

from halora.analysis.charts import NEUTRAL, PLAIN_STYLES, Chart, chart_layout


def loss_chart(reports: Sequence[tuple[int, Mapping[str, float]]]) -> Chart:
    """Training losses over optimiser steps, and the noise trained under on an axis of its own."""
    names = {"train_loss": "loss", "train_task_loss": "task loss", "train_reg_loss": "regulariser"}
    return {"data": _lines(reports, names), "layout": chart_layout("optimiser step", "loss (nats)")}


def _lines(reports: Sequence[tuple[int, Mapping[str, float]]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """A line for each of the metrics that any report has, under its name."""
    data = []
    for (metric, name), (colour, _) in zip(names.items(), PLAIN_STYLES, strict=False):
        known = [(step, metrics[metric]) for step, metrics in reports if isfinite(metrics.get(metric, nan))]
        if known:
            line = {"x": [step for step, _ in known], "y": [value for _, value in known], "line": {"color": colour}}
            mode = "lines+markers" if len(known) < 30 else "lines"
            data.append({"type": "scatter", "mode": mode, "name": name, **line})
    return data


def gradients_chart(reports: Sequence[tuple[int, Mapping[str, float]]]) -> Chart:
    """What each term of the loss pulls at the adapter with over optimiser steps; their ratio is a distance."""
    names = {"train_task_grad_norm": "task", "train_reg_grad_norm": "µ · regulariser"}
    lines = _lines(reports, names)
    shares = {step: metrics["train_reg_share"] for step, metrics in reports if "train_reg_share" in metrics}
    for line in lines[1:]:
        line["text"] = [f"{shares[step]:.3g} of the task's" if step in shares else "" for step in line["x"]]
    layout = chart_layout("optimiser step", "norm of the gradient")
    layout["yaxis"] |= {"type": "log"}
    return {"data": lines, "layout": layout}


def layers_chart(noise_db: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """Realised noise-to-signal ratio of each layer's weights over the depth, a line per kind of layer.

    Args:
        noise_db: Depth and ratio in dB of every layer, by kind.
    """
    data = []
    for (kind, layers), (colour, symbol) in zip(noise_db.items(), PLAIN_STYLES * len(noise_db), strict=False):
        line = {"x": [depth for depth, _ in layers], "y": [ratio_db for _, ratio_db in layers]}
        mark = {"color": colour, "symbol": symbol, "size": 6}
        data.append({"type": "scatter", "mode": "lines+markers", "name": escape(kind), **line, "marker": mark})
    layout = chart_layout("decoder block", "noise to signal of the weights (dB)")
    depths = 1 + max((depth for layers in noise_db.values() for depth, _ in layers), default=0)
    layout["xaxis"] |= {"tick0": 0, "dtick": ceil(depths / 8)}
    return {"data": data, "layout": layout}


def time_chart(measured: Sequence[tuple[float, float, float]], asked: float) -> Chart:
    """Accuracy over the time since programming, which is logarithmic.

    Args:
        measured: Time in seconds, mean accuracy over chips, and that of the worst, in the order of time.
        asked: The accuracy that is asked for.
    """
    times = [time_s for time_s, _, _ in measured]
    data = []
    if measured:
        for place, name in ((1, "mean over chips"), (2, "worst chip")):
            colour, symbol = PLAIN_STYLES[place - 1]
            line = {"x": times, "y": [each[place] for each in measured], "marker": {"color": colour, "symbol": symbol}}
            data.append({"type": "scatter", "mode": "lines+markers", "name": name, **line})
        line = {"x": [times[0], times[-1]], "y": [asked, asked], "line": {"color": NEUTRAL, "dash": "dash", "width": 1}}
        data.append({"type": "scatter", "mode": "lines", "name": "threshold", "hoverinfo": "skip", **line})
    return {"data": data, "layout": chart_layout("time since programming (s)", "accuracy under noise", log_x=True)}


def beside_chart(own_uj: Mapping[str, float], named_uj: Mapping[str, float], name: str) -> Chart:
    """Energy per token by component, as one bar, over those of named baselines on the same logarithmic axis.

    Args:
        own_uj: Microjoule per token by component.
        named_uj: Microjoule per token by baseline.
        name: What the components are of.
    """
    rows = dict(sorted(((part, value) for part, value in own_uj.items() if value > 0), key=lambda item: item[1]))
    rows |= {f"{name}: total": sum(own_uj.values())} | dict(sorted(named_uj.items(), key=lambda item: item[1]))
    colours = [NEUTRAL if text in named_uj else "#0072B2" if text.endswith(": total") else "#56B4E9" for text in rows]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": list(rows.values()),
        "y": [escape(text) for text in rows],
        "marker": {"color": colours},
        "text": [f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}" for value in rows.values()],
        "textposition": "auto",  # inside where there is room
        "textangle": 0,
        "constraintext": "none",
        "insidetextfont": {"color": ["#ffffff" if text.endswith(": total") else "#000000" for text in rows]},
        "cliponaxis": False,
        "hovertemplate": "%{y}<br>%{x:.4g} µJ<extra></extra>",
        "showlegend": False,
    }
    layout = chart_layout("energy per token (µJ)", "", log_x=True) | {"height": 90 + 26 * len(rows)}
    layout["yaxis"] |= {"type": "category"}
    return {"data": [bar], "layout": layout}
