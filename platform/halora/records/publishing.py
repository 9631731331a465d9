"""The front and the report of a sweep as files, drawn from its records: on disk, and from there on the parent run."""

import csv
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from halora.analysis.figures import front_figure
from halora.analysis.formats import number, searched_values
from halora.analysis.importance import doubts, importance_of
from halora.analysis.recommendation import Progress, named_baselines, recommend
from halora.analysis.report import SweepSummary, render_report
from halora.analysis.summary import view_front, volumes
from halora.analysis.trials import sweep_objectives
from halora.evaluation.damage import described
from halora.files import write_whole
from halora.records import names
from halora.records.store import SweepFolder
from halora.records.sweep_state import SweepState
from halora.spaces.sweep import SweepConfig

_RENEWAL_S = 30.0


def summarise(sweep: SweepConfig, recorded: SweepState, *, simulated: bool) -> SweepSummary:
    """A sweep as its report tells it."""
    view = view_front(recorded.points(), sweep_objectives(sweep))
    named = named_baselines(sweep, view)
    progress = Progress(recorded.sweep_state == "running", simulated, recorded.comparison)
    return SweepSummary(
        name=sweep.name,
        family=sweep.family,
        description=sweep.description,
        trials=sweep.trials,
        front=view,
        importance=importance_of(view),
        doubts=doubts(view),
        hypervolume=volumes(view, sweep.reference),
        baselines=named,
        comparison=recorded.comparison,
        damage=described(recorded.damage or ()),
        recommendation=recommend(sweep, view, progress, named),
        time=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def publish(sweep: SweepConfig, recorded: SweepState, folder: SweepFolder) -> None:
    """Draw the front and the report into the sweep's folder for them, which is made."""
    summary = summarise(sweep, recorded, simulated=folder.simulated)
    rows = summary.front.rows()
    folder.published.mkdir(exist_ok=True)
    picture, scored = io.BytesIO(), len(summary.front.groups.feasible)
    front_figure(summary.front, f"{sweep.name}: {scored} trials").savefig(picture, format="png")
    files: dict[str, str | bytes] = {
        names.FRONT_JSON: json.dumps(rows, indent=1, allow_nan=False),
        names.FRONT_CSV: front_csv(rows),
        names.REPORT_FILE: render_report(summary),
        names.FRONT_PNG: picture.getvalue(),
        names.SUMMARY_FILE: summary_text(summary),
    }
    for name, content in files.items():
        write_whole(folder.published / name, content, durable=False)  # drawn anew from the event log at any time


def summary_text(summary: SweepSummary, most: int = 20) -> str:
    """A sweep in Markdown: what it is for, what to make of it, and its front up to a number of trials."""
    view, recommended = summary.front, summary.recommendation
    parts = [summary.description[:1000], f"**{_plain_text(recommended.text)}**"]
    if recommended.command:
        parts.append(f"Next: `{recommended.command}`")
    if view.members:
        heads = ["trial", *(each.words for each in view.objectives), "P(front)", "searched values"]
        rows = [
            [
                str(p.number),
                *(number(p.metrics[each.metric]) for each in view.objectives),
                f"{view.probability[p.number]:.2f}",
                _plain_text(searched_values(p.params)[:120]),
            ]
            for p in view.members[:most]
        ]
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if len(view.members) > most:
        parts.append(f"and {len(view.members) - most} more, in {names.FRONT_CSV}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain_text(text: str) -> str:
    """A text that Markdown shows as it is, on one line of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


class Publisher:
    """Keeps a sweep's published files up with its records.

    Args:
        folder: The sweep's folder.
        sweep: The sweep.
        recorded: Its records, which grow.
    """

    def __init__(self, folder: SweepFolder, sweep: SweepConfig, recorded: SweepState) -> None:
        self._folder, self._sweep, self._recorded = folder, sweep, recorded
        self.drawn = 0
        """What of the recorded the files show."""
        self._at = time.monotonic()
        self._took_s = 0.0

    @property
    def due(self) -> bool:
        """Whether the records have gone on, and drawing them again takes a small share of the time."""
        enough = time.monotonic() - self._at >= max(_RENEWAL_S, 20 * self._took_s)
        return enough and self._recorded.milestones != self.drawn

    def draw(self) -> None:
        """Draw what the records say now, unless the files do."""
        now, began = self._recorded.milestones, time.monotonic()
        if now != self.drawn:
            publish(self._sweep, self._recorded, self._folder)
            self.drawn, self._at = now, time.monotonic()
            self._took_s = self._at - began


def front_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a front as CSV, labels and searched values in columns of their own."""
    nested = ("violated", "labels", "params")
    flat = []
    for row in rows:
        own = {key: value for key, value in row.items() if key not in nested}
        own["violated"] = " ".join(row["violated"])
        flat.append({**own, **row["labels"], **row["params"]})
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
