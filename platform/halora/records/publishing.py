"""The front and the report of a sweep as files, drawn from its records: on disk, and from there on the parent run."""

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halora.analysis.figures import front_figure
from halora.analysis.importance import importance_of
from halora.analysis.report import render_report
from halora.analysis.summary import SweepSummary, view_front, volumes
from halora.errors import UserError
from halora.evaluation.damage import described
from halora.files import write_whole
from halora.hardware.baselines import baselines
from halora.hardware.shapes import ModelShape
from halora.records import names
from halora.records.store import SweepFolder
from halora.records.sweep_state import SweepState
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import SweepConfig
from halora.training.models import model_shape

_RENEWAL_S = 30.0


def summarise(sweep: SweepConfig, recorded: SweepState) -> SweepSummary:
    """A sweep as its report tells it."""
    view = view_front(recorded.points())
    corner = sweep.reference_point
    models = {str(point.labels["model"]) for point in view.groups.feasible if "model" in point.labels}
    return SweepSummary(
        name=sweep.name,
        family=sweep.family,
        description=sweep.description,
        trials=sweep.trials,
        front=view,
        importance=importance_of(view),
        hypervolume=volumes(view, (corner.accuracy, corner.energy_uj_per_token)),
        baselines={
            model: baseline_energies(sweep.resolve({"model": model}), sweep.shape(model)) for model in sorted(models)
        },
        comparison=recorded.comparison,
        damage=described(recorded.damage or ()),
        time=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def publish(sweep: SweepConfig, recorded: SweepState, folder: Path) -> None:
    """Draw the front and the report into a folder, which is made."""
    summary = summarise(sweep, recorded)
    rows = summary.front.rows()
    folder.mkdir(exist_ok=True)
    picture, scored = io.BytesIO(), len(summary.front.groups.feasible)
    front_figure(summary.front, f"{sweep.name}: {scored} trials").savefig(picture, format="png")
    files: dict[str, str | bytes] = {
        names.FRONT_JSON: json.dumps(rows, indent=1, allow_nan=False),
        names.FRONT_CSV: front_csv(rows),
        names.REPORT_FILE: render_report(summary),
        names.FRONT_PNG: picture.getvalue(),
    }
    for name, content in files.items():
        write_whole(folder / name, content, durable=False)  # drawn anew from the event log at any time


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
            publish(self._sweep, self._recorded, self._folder.published)
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


def baseline_energies(config: TrialConfig, shape: ModelShape | None = None) -> dict[str, float]:
    """Energy per token of the named baselines that have a figure for a trial's model, in microjoule.

    Args:
        config: The trial.
        shape: Dimensions of its model; looked up where they are not given, on the hub if need be.
    """
    try:
        shape = shape or model_shape(config.model)
    except UserError:
        return {}
    found = {
        name: baseline.energy_uj_per_token(shape, config.chip, config.evaluation.context_tokens)
        for name, baseline in baselines().items()
    }
    return {name: energy for name, energy in found.items() if energy is not None}
