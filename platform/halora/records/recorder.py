"""What the process that runs a sweep writes down: every fact goes to the event log once, however often it is told."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from halora.analysis.front import front, hypervolume
from halora.analysis.layers import by_kind
from halora.analysis.trials import RecordedTrial, grouped
from halora.analysis.uncertainty import front_probability
from halora.errors import UserError
from halora.hardware.energy import EnergyBreakdown
from halora.records import names
from halora.records.event_log import EventLog, read
from halora.records.provenance import program
from halora.records.store import SweepFolder
from halora.records.sweep_state import SweepState
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import SweepConfig
from halora.training.tasks import Split, load_rows

_MOVES = ("accuracy", "accuracy_low", "accuracy_high")
_MOVES_AGAINST = ("drop_low", "drop_high")


class SweepRecorder:
    """Writes one sweep's event log. Used by the one process that runs the sweep.

    Args:
        folder: The sweep's folder.
        sweep: The sweep.
    """

    def __init__(self, folder: SweepFolder, sweep: SweepConfig) -> None:
        self._folder, self._sweep = folder, sweep
        self._log = EventLog(folder.event_log_file, sweep.launch)
        self.recorded = SweepState()
        self.recorded.take(read(folder.event_log_file)[0])
        self._state(None, "running")

    @property
    def points(self) -> list[RecordedTrial]:
        """Evaluated trials, by number."""
        return [point for point in self.recorded.points() if point.state == "finished"]

    def begin_trial(self, number: int, config: TrialConfig, params: Mapping[str, Any], energy: EnergyBreakdown) -> None:
        """Record what is known before training: searched values, full configuration, energy by component."""
        if not self.recorded.begun(number):
            metrics = {names.ENERGY: energy.total_uj_per_token} | {
                names.ENERGY_COMPONENT.format(component=name): value for name, value in energy.components_uj.items()
            }
            self._write(
                "begin",
                number,
                params=dict(params),
                metrics=metrics,
                labels=labels(config),
                chip_hash=config.chip.content_hash,
                config=config.model_dump(mode="json"),
                datasets=_datasets(config),
                program=program(),
            )
        if self.recorded.state(number) != "running":
            self._state(number, "running")

    def report_step(self, number: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record the training metrics up to an optimiser step; a step that is recorded already is left as it is."""
        if step not in self.recorded.steps(number):
            training = {name: float(metrics[name]) for name in names.TRAINING_METRICS if name in metrics}
            self._write("report", number, step=step, metrics=training)

    def report_missed(self, number: int, reports: Sequence[Mapping[str, float]]) -> None:
        """Record those of a trial's reports that are not recorded yet."""
        for report in reports:
            self.report_step(number, int(report["step"]), report)

    def report_rung(self, number: int, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores at a rung of early stopping; a rung that is recorded already is left as it is."""
        if step not in self.recorded.rungs(number):
            told = (*names.RUNG_SCORES, *(name for name in names.BESIDE_METRICS if name in scores))
            reached = {names.RUNG_METRIC.format(score=name): float(scores[name]) for name in told}
            self._write("rung", number, step=step, metrics=reached)

    def finish_trial(
        self, number: int, step: int, scores: Mapping[str, float], scores_file: Path, adapter: Path | None
    ) -> RecordedTrial:
        """Record an evaluated trial, with its adapter, and where the sweep's front stands with it.

        A trial can be scored again on more chips or rows; the same scores again are left as they are.
        """
        result = json.loads(scores_file.read_text(encoding="utf-8"))
        answers = _answers(result)
        chosen = filter(names.is_score, scores)
        metrics = {names.metric(name): float(scores[name]) for name in chosen}
        if not self._scored_so(number, answers, metrics):
            self._write(
                "scores",
                number,
                step=step,
                metrics=metrics,
                correct=answers,
                layer_noise_db=_layer_noise_db(result),
                scores_file=self._within(scores_file),
                adapter=self._within(adapter) if adapter else None,
            )
        self._state(number, "finished")
        self._record_front()
        return self.recorded.point(number)

    def record_estimates(self, accuracies: Mapping[int, float]) -> None:
        """Record the accuracies that a race compares trials by; their intervals move along.

        What was measured on each trial's own chips stays in its scores, and is what a trial without an estimate has.
        The same estimates again are left as they are.
        """
        for point in self.points:
            number, measured = point.number, self.recorded.measured(point.number)
            if not measured:
                continue
            shift = accuracies.get(number, measured["accuracy"]) - measured["accuracy"]
            moved = {name: min(max(measured[name] + shift, 0.0), 1.0) for name in _MOVES if name in measured}
            moved |= {name: measured[name] - shift for name in _MOVES_AGAINST if name in measured}
            now = self.recorded.metrics(number)
            if any(abs(now[name] - value) > 1e-9 for name, value in moved.items()):
                self._write("estimate", number, step=self.recorded.scored_step(number), metrics=moved)

    def mark_finished(self, number: int) -> None:
        """Record that a trial whose scores are recorded is finished."""
        self._state(number, "finished")

    def continue_trial(self, number: int, cause: str) -> None:
        """Record why a running trial continues in another way."""
        self._state(number, "running", cause)

    def fail_trial(self, number: int, cause: str) -> None:
        """Record why a trial failed."""
        self._state(number, "failed", cause)

    def stop_trial(self, number: int) -> None:
        """Record that early stopping ended a trial."""
        self._state(number, "stopped")

    def interrupt_trial(self, number: int) -> None:
        """Mark a trial that a later resume continues."""
        self._state(number, "interrupted")

    def record_comparison(self, comparison: Mapping[str, Any]) -> None:
        """Record the closing comparison."""
        self._write("comparison", None, content=dict(comparison))

    def record_damage(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Record what the chips do to the untrained bases, see `halora.evaluation.damage.described`."""
        self._write("damage", None, content=[dict(outcome) for outcome in outcomes])

    def finish(self, *, interrupted: bool) -> None:
        """Record that this run of the sweep ended, and with it every trial that is still open."""
        for point in self.recorded.points():
            if point.state == "running":
                self._state(point.number, "interrupted")
        self._record_front()
        self._record_probabilities()
        self._state(None, "interrupted" if interrupted else "finished")

    def close(self) -> None:
        """Close the event log."""
        self._log.close()

    def _record_front(self) -> None:
        """Record the front's size and volume, once for every number of finished trials."""
        done = self.points
        if self.recorded.front_step == len(done):
            return
        feasible = grouped(done).feasible
        corner = self._sweep.reference_point
        metrics = {
            names.FRONT_SIZE: float(len(front(feasible))),
            names.TRIALS_DONE: float(len(done)),
            names.HYPERVOLUME: hypervolume(feasible, (corner.accuracy, corner.energy_uj_per_token)),
        }
        self._write("front", None, step=len(done), metrics=metrics)

    def _record_probabilities(self) -> None:
        """Record how likely each trial is on the front, where that is not what is recorded."""
        done = self.points
        feasible = grouped(done).feasible
        for point, share in zip(feasible, front_probability(feasible), strict=True):
            if point.metrics.get(names.FRONT_PROBABILITY) != share:
                metrics = {names.FRONT_PROBABILITY: float(share)}
                self._write("probability", point.number, step=len(done), metrics=metrics)

    def _scored_so(self, number: int, answers: dict[str, Any] | None, metrics: Mapping[str, float]) -> bool:
        """Whether these scores are recorded: by the answers where there are any, as sums differ by their order."""
        if answers is not None:
            return self.recorded.answers(number) == answers
        return metrics.items() <= (self.recorded.metrics(number) | self.recorded.measured(number)).items()

    def _state(self, number: int | None, state: str, cause: str = "") -> None:
        """Record a state on the disk itself: whoever hears of it next may rely on it."""
        self._write("state", number, state=state, cause=cause)
        self._log.sync()

    def _write(self, kind: str, number: int | None, **content: Any) -> None:
        entry = {"kind": kind, "trial": number, "time_ms": int(time.time() * 1000), **content}
        self._log.append(entry)
        self.recorded.take([entry])

    def _within(self, path: Path) -> str:
        return str(path.relative_to(self._folder.root))


def labels(config: TrialConfig) -> dict[str, Any]:
    """What a trial is, by the names of `names.LABELS`."""
    chip = config.chip
    return {
        "method": config.training.method,
        "model": config.model,
        "chip": chip.name,
        "task": config.task,
        "noise": chip.noise.kind,
        "noise_strength": chip.noise.level,
    }


def _answers(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which answers were right on which chip and row, in few bytes; see `halora.analysis.trials.Answers`.

    None for a simulated trial, which has accuracies and no answers.
    """
    if "noisy_correct" not in scores:
        return None
    correct = np.array(scores["noisy_correct"], dtype=bool)  # (chips, rows)
    return {
        "group": hashlib.sha256(json.dumps(scores["row_ids"]).encode()).hexdigest()[:16],
        "chips": correct.shape[0],
        "rows": correct.shape[1],
        "bits": base64.b64encode(np.packbits(correct).tobytes()).decode(),
    }


def _layer_noise_db(scores: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Mean noise-to-signal ratio of every layer over the chips, by kind and depth; nothing for a simulated trial."""
    power = np.mean(10 ** (np.array(scores.get("layer_noise_db", [[]])) / 10), axis=0)  # (layers,)
    means_db = (10 * np.log10(power)).round(2).tolist()
    return by_kind(dict(zip(scores.get("layers", ()), means_db, strict=True)))


def _datasets(config: TrialConfig) -> list[dict[str, str]]:
    """The rows a trial trains on and is scored on, each with the digest of their text."""
    limits: dict[Split, int | None] = {"train": config.training.train_rows, "validation": config.evaluation.rows}
    try:
        return [dataset(config.task, split, limit) for split, limit in limits.items()]
    except UserError:
        return []  # the trial fails by the same mistake, and says so


@lru_cache(maxsize=64)
def dataset(task: str, split: Split, limit: int | None) -> dict[str, str]:
    """The first rows of a split, by `name`, `split`, `rows` and the `digest` of their text, wherever the task is."""
    rows = load_rows(task, split, limit)
    texts = (repr((row.prompt, row.options, row.answer, row.reference)) for row in rows)
    digest = hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return {"name": task, "split": split, "rows": str(len(rows)), "digest": digest}
