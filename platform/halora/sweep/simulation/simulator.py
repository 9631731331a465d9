"""The second adapter of the decision core: jobs whose results are known beforehand, run on a clock of its own."""

import heapq
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Protocol

import numpy as np

from halora.evaluation.intervals import crossed
from halora.events import Reported, Scored
from halora.files import write_json
from halora.records.store import SweepFolder
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.jobs import Decision, Job
from halora.sweep.search.running import JobListener, RunningJobs
from halora.trial_folder import REPORTS_FILE, RESULT_FILE, latest_checkpoint


class Curves(Protocol):
    """What training would have given."""

    def step_s(self, values: Mapping[str, Any]) -> float:
        """Seconds per optimiser step."""

    def chip_s(self, values: Mapping[str, Any]) -> float:
        """Seconds to score one chip instance."""

    def report(self, values: Mapping[str, Any], step: int) -> dict[str, float]:
        """Training metrics at a step."""

    def accuracy(self, values: Mapping[str, Any], step: int, chip: int) -> float:
        """Accuracy on a chip instance after so many steps."""

    def clean(self, values: Mapping[str, Any], step: int) -> dict[str, float]:
        """Metrics that do not depend on the chip instance: `clean_accuracy`, and others a table has."""


@dataclass
class SimulatedClock:
    """Seconds since the simulation began."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


@dataclass(order=True)
class _Due:
    at_s: float
    order: int
    job: Job = field(compare=False)
    step: int = field(compare=False)  # reached then
    scored: bool = field(compare=False)


def simulate(
    core: DecisionCore,
    curves: Curves,
    clock: SimulatedClock,
    *,
    concurrent: int = 1,
    report_every: int | None = None,
    listener: JobListener | None = None,
    folder: SweepFolder | None = None,
) -> None:
    """Run the core's jobs until it has none left, or until it is asked to stop.

    Args:
        core: Hands out the jobs.
        curves: What comes of them.
        clock: Set to the time of each event; the core's own.
        concurrent: Jobs that run side by side.
        report_every: Optimiser steps between two reports; a job reports at its goal only when left out.
        listener: Who wants to know.
        folder: Where trials keep their reports and how far they came, as real ones do; nowhere when left out.
    """
    running = RunningJobs(core, listener)
    agenda: list[_Due] = []
    handed_out = 0

    def schedule(job: Job, step: int) -> None:
        nonlocal handed_out
        handed_out += 1
        left = job.goal.steps - step
        if left > 0:
            taken = min(report_every or left, left)
            due = _Due(clock() + taken * curves.step_s(job.values), handed_out, job, step + taken, False)
        else:
            chips = job.goal.chip_instances - job.goal.first_chip
            due = _Due(clock() + chips * curves.chip_s(job.values), handed_out, job, step, True)
        heapq.heappush(agenda, due)

    def fill() -> None:
        while len(agenda) < concurrent:
            job = running.begin(f"{handed_out + 1}")
            if job is None:
                return
            keys[job.number] = f"{handed_out + 1}"
            begun = core.trial(job.number)
            reached = begun.scores[-1].step if begun.scores else 0
            schedule(job, max(reached, _steps_kept(folder, job)))

    keys: dict[int, str] = {}
    fill()
    while agenda:
        due = heapq.heappop(agenda)
        clock.now_s = due.at_s
        job, key = due.job, keys[due.job.number]
        if due.scored:
            scored = _scored(curves, job, due.step)
            if folder:
                _write(folder, job, RESULT_FILE, {**scored.metrics, "accuracy_by_chip": scored.accuracy_by_chip})
            running.take(key, scored)
        else:
            report = Reported(trial=job.number, step=due.step, metrics=curves.report(job.values, due.step))
            if folder:
                _keep_report(folder, job, report)
            if running.take(key, report) is Decision.PAUSE:
                running.left(key)
            else:
                schedule(job, due.step)
        fill()


def _scored(curves: Curves, job: Job, step: int) -> Scored:
    by_chip = [curves.accuracy(job.values, step, chip) for chip in range(job.goal.chip_instances)]
    mean, spread = fmean(by_chip), stdev(by_chip) if len(by_chip) > 1 else 0.0
    found = crossed(np.array(by_chip)[:, None]).interval()  # over chips: curves rest on no rows
    low, high = found.low, found.high
    clean = curves.clean(job.values, step)
    metrics = {  # what a table does not hold is left out: margins, noise of the weights, intervals of the clean score
        **clean,
        "accuracy": mean,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_std_chips": spread,
        "accuracy_worst": min(by_chip),
        "drop_low": clean["clean_accuracy"] - high,
        "drop_high": clean["clean_accuracy"] - low,
    }
    return Scored(
        trial=job.number,
        step=step,
        metrics=metrics,
        accuracy_by_chip=by_chip,
        rows=job.goal.rows,
        final=job.final,
    )


# A simulated trial's folder holds what a real one's does, but for the adapter: reports, and how far it came.


def _steps_kept(folder: SweepFolder | None, job: Job) -> int:
    checkpoint = latest_checkpoint(folder.trial(job.number)) if folder else None
    return int(json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["step"]) if checkpoint else 0


def _keep_report(folder: SweepFolder, job: Job, report: Reported) -> None:
    path = folder.trial(job.number) / REPORTS_FILE
    reports = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    told = {"step": report.step, **report.metrics}
    _write(folder, job, REPORTS_FILE, [*(each for each in reports if each["step"] < report.step), told])
    _write(folder, job, f"step-{report.step:06d}/progress.json", {"step": report.step})


def _write(folder: SweepFolder, job: Job, name: str, content: Any) -> None:
    path = folder.trial(job.number) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, durable=False)  # simulated again at no loss
