"""Trials as a table whose columns stay: for pandas, CSV and Parquet."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from halora.analysis.summary import FrontView
from halora.analysis.trials import RecordedTrial
from halora.hardware.energy import COSTS

IDENTITY = ("sweep", "launch", "trial", "state", "cause", "began", "ended", "on_front", "front_probability", "knee")
"""Columns of every table, in this order, then `LABELS` and `METRICS`; empty where a trial has no value."""
LABELS = ("method", "model", "chip", "task", "noise", "noise_strength")
METRICS = (
    *COSTS,
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_std_chips",
    "accuracy_worst",
    "clean_accuracy",
    "clean_accuracy_low",
    "clean_accuracy_high",
    "drop_low",
    "drop_high",
    "margin",
    "margin_low",
    "margin_high",
    "clean_margin",
    "noise_db",
)
PARAM = "params."
"""Before the dotted path of a searched field; these columns and those of further metrics follow, each by name."""


_DTYPES = {
    "trial": "Int64",
    "began": "datetime64[ms, UTC]",
    "ended": "datetime64[ms, UTC]",
    "on_front": "boolean",
    "front_probability": "Float64",
    "knee": "boolean",
    "noise_strength": "Float64",
}


def table(
    trials: Sequence[tuple[str, str, RecordedTrial, FrontView]],
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Columns of trials with their pandas dtypes, and rows.

    Args:
        trials: Name and launch of the sweep, the trial, and the front it is seen in.
    """
    rows = [_row(*each) for each in trials]
    fixed = {name: _DTYPES.get(name, "string") for name in (*IDENTITY, *LABELS)} | dict.fromkeys(METRICS, "Float64")
    others = {column for row in rows for column in row} - set(fixed)
    params = sorted(column for column in others if column.startswith(PARAM))
    dtypes = {column: _dtype([row.get(column) for row in rows]) for column in params}
    columns = fixed | dtypes | dict.fromkeys(sorted(others - set(params)), "Float64")
    for row in rows:
        row |= {name: _text(row[name]) for name in params if dtypes[name] == "string" and name in row}
    return columns, [{column: row.get(column) for column in columns} for row in rows]


def _dtype(values: Sequence[Any]) -> str:
    """What holds all searched values of a field: numbers or booleans of one kind, or their texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "Int64"
    return "Float64" if kinds and kinds <= {int, float} else "string"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value)


def _row(sweep: str, launch: str, point: RecordedTrial, view: FrontView) -> dict[str, Any]:
    identity = (
        sweep,
        launch,
        point.number,
        point.state,
        point.cause or None,
        _time(point.began_ms),
        _time(point.ended_ms),
        any(member.number == point.number for member in view.members),
        view.probability.get(point.number),
        view.knee is not None and view.knee.number == point.number,
    )
    return {
        **dict(zip(IDENTITY, identity, strict=True)),
        **{name: point.labels.get(name) for name in LABELS},
        **{f"{PARAM}{path}": value for path, value in point.params.items()},
        **{_free(name): value for name, value in point.metrics.items()},
    }


def _free(metric: str) -> str:
    """A metric's column; one that is called as another column is told apart."""
    return f"metrics.{metric}" if metric in (*IDENTITY, *LABELS) or metric.startswith(PARAM) else metric


def _time(ms: int) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, UTC) if ms else None
