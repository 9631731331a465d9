"""What the process that runs a sweep writes down: every fact goes to the event log once, however often it is told."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from halora.analysis.front import front, hypervolume
from halora.analysis.layers import by_kind
from halora.analysis.trials import RecordedTrial, grouped, sweep_objectives
from halora.analysis.uncertainty import front_probability
from halora.errors import UserError
from halora.events import (
    Answers,
    Began,
    CutShort,
    Discarded,
    Estimated,
    Event,
    Finished,
    FrontMoved,
    Interrupted,
    Placed,
    Reported,
    Resumed,
    Scored,
    SweepFinished,
    SweepInterrupted,
    SweepStarted,
)
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
        self._objectives = sweep_objectives(sweep)
        self._log = EventLog(folder.event_log_file, sweep.launch)
        self.recorded = SweepState()
        self.recorded.take(read(folder.event_log_file)[0])
        self._write(SweepStarted())

    @property
    def points(self) -> list[RecordedTrial]:
        """Evaluated trials, by number."""
        return [point for point in self.recorded.points() if point.state == "finished"]

    def begin_trial(
        self,
        number: int,
        config: TrialConfig,
        params: Mapping[str, Any],
        energy: EnergyBreakdown,
        clone_of: int | None = None,
    ) -> None:
        """Record that a trial runs, and once what is known before training: values, configuration, costs."""
        if not self.recorded.begun(number):
            metrics = energy.metrics | {
                names.ENERGY_COMPONENT.format(component=name): value for name, value in energy.components_uj.items()
            }
            began = Began(
                trial=number,
                params=dict(params),
                labels=labels(config),
                metrics=metrics,
                chip_hash=config.chip.content_hash,
                config=config.model_dump(mode="json"),
                datasets=_datasets(config),
                program=program(),
                clone_of=clone_of,
            )
            self._write(began)
        elif self.recorded.state(number) != "running":
            self._write(Resumed(trial=number))

    def record(self, event: Event) -> None:
        """Record an event, with the metrics that records have a name for; one that is recorded is left as it is.

        Final scores need their `scores_file`. They finish the trial, and the sweep's front moves. A trial can be scored
        again on more chips or rows.
        """
        match event:
            case Reported():
                if event.step not in self.recorded.steps(event.trial):
                    self._write(_narrowed(event, names.TRAINING_METRICS))
            case Scored(final=False):
                if event.step not in self.recorded.rungs(event.trial):
                    self._write(_narrowed(event, (*names.RUNG_SCORES, *names.BESIDE_METRICS)))
            case Scored():
                self._record_scores(event)
                self._write(Finished(trial=event.trial))
                self._record_front()
            case CutShort():
                if self.recorded.last_step_asked(event.trial) != event.step:
                    self._write(event)
            case Discarded():
                if self.recorded.state(event.trial) != "discarded":
                    self._write(event)
                    self._record_front()
            case _:
                self._write(event)

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
                self._write(Estimated(trial=number, step=self.recorded.scored_step(number), metrics=moved))

    def finish(self, *, interrupted: bool) -> None:
        """Record that this run of the sweep ended, and with it every trial that is still open."""
        for point in self.recorded.points():
            if point.state == "running":
                self._write(Interrupted(trial=point.number))
        self._record_front()
        self._record_probabilities()
        self._write(SweepInterrupted() if interrupted else SweepFinished())

    def close(self) -> None:
        """Close the event log."""
        self._log.close()

    def _record_front(self) -> None:
        """Record the front's size and volume, once for every number of finished trials."""
        done = self.points
        if self.recorded.front_step == len(done):
            return
        feasible = grouped(done, self._objectives).feasible
        metrics = {
            names.FRONT_SIZE: float(len(front(feasible, self._objectives))),
            names.TRIALS_DONE: float(len(done)),
            names.HYPERVOLUME: hypervolume(feasible, self._sweep.reference, self._objectives),
        }
        self._write(FrontMoved(step=len(done), metrics=metrics))

    def _record_probabilities(self) -> None:
        """Record how likely each trial is on the front, where that is not what is recorded."""
        done = self.points
        feasible = grouped(done, self._objectives).feasible
        for point, share in zip(feasible, front_probability(feasible, self._objectives), strict=True):
            if point.metrics.get(names.FRONT_PROBABILITY) != share:
                metrics = {names.FRONT_PROBABILITY: float(share)}
                self._write(Placed(trial=point.number, step=len(done), metrics=metrics))

    def _record_scores(self, event: Scored) -> None:
        """Record final scores unless they are: by the answers where there are any, as sums differ by their order."""
        number, result = event.trial, json.loads((self._folder.root / event.scores_file).read_text(encoding="utf-8"))
        metrics = {names.metric(name): float(value) for name, value in event.metrics.items() if names.is_score(name)}
        answers = _answers(result)
        if answers is not None:
            known = self.recorded.answers(number) == answers
        else:
            known = metrics.items() <= (self.recorded.metrics(number) | self.recorded.measured(number)).items()
        if not known:
            self._write(replace(event, metrics=metrics, answers=answers, layer_noise_db=_layer_noise_db(result)))

    def _write(self, event: Event) -> None:
        """Append an event; where it says how things stand, to the disk itself: whoever hears of it may rely on it."""
        event = replace(event, time_ms=int(time.time() * 1000))
        self._log.append(event)
        self.recorded.take([event])
        if event.state:
            self._log.sync()


def _narrowed[E: (Reported, Scored)](event: E, wanted: Sequence[str]) -> E:
    """An event with these of its metrics alone."""
    return replace(event, metrics={name: float(event.metrics[name]) for name in wanted if name in event.metrics})


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


def _answers(scores: Mapping[str, Any]) -> Answers | None:
    """The right answers by chip and row; none for a simulated trial, which has accuracies alone."""
    if "noisy_correct" not in scores:
        return None
    group = hashlib.sha256(json.dumps(scores["row_ids"]).encode()).hexdigest()[:16]
    return Answers.of(group, np.array(scores["noisy_correct"], dtype=bool))


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
