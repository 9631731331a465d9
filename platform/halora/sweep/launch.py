"""Launches and resumes a sweep: study, adapter and records brought together, and everything closed at the end.

MLflow, Ray and torch are imported once nothing is left to refuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from halora.analysis.front import TrialPoint
from halora.records.names import ENERGY, VIOLATION
from halora.records.store import Store, SweepFolder
from halora.spaces.sweep import SweepConfig, load_sweep
from halora.sweep.comparison import ClosingComparison, check_rows_left, compare, contestants
from halora.sweep.core import DecisionCore, Job
from halora.sweep.reconcile import reconcile
from halora.sweep.simulator import SimulatedClock, simulate
from halora.sweep.state import check_not_launched, only_driver, open_core
from halora.sweep.table import read_table
from halora.training.models import check_available
from halora.trial import trial_energy

if TYPE_CHECKING:
    from halora.records.tracking import SweepRecorder


class Watcher(Protocol):
    """Shows a person how the sweep goes on."""

    def say(self, text: str) -> None:
        """One line about what happens now."""

    def trial(self, number: int, state: str, text: str = "") -> None:
        """A trial began, reported, finished or failed."""


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended.

    Attributes:
        complete: All trials ended; False after Ctrl-C or a stop request.
        failed: Number of failed trials.
        comparison: The closing comparison, where the sweep asks for one and it was reached.
    """

    complete: bool
    failed: int
    comparison: ClosingComparison | None


def launch(sweep: SweepConfig, store: Store, watcher: Watcher, curves: Path | None = None) -> Outcome:
    """Run a new sweep to its end.

    Args:
        sweep: The sweep.
        store: Where it is recorded.
        watcher: Shown how it goes on.
        curves: A table of recorded curves to take results from, instead of training.

    Raises:
        UserError: The name is taken, the store cannot be written, the table does not fit, a model cannot be loaded, or
            the comparison would have no rows.
        UnreachableError: The store's database cannot be opened.
    """
    folder = store.sweep(sweep.name)
    store.check_writable()
    check_not_launched(folder)
    if curves:
        read_table(curves, sweep)
    else:
        for model in sweep.values_of("model"):
            check_available(str(model))
        check_rows_left(sweep)
    for name in sweep.search.warm_start:
        store.existing(name)

    from halora.records.tracking import open_client

    open_client(store)
    folder.root.mkdir(parents=True)
    if curves:
        folder.curves_file.write_bytes(curves.read_bytes())
    folder.sweep_file.write_text(yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    return _run(sweep, store, watcher)


def resume(name: str, store: Store, watcher: Watcher) -> Outcome:
    """Go on with a sweep: unfinished trials from their checkpoints, then those not begun yet.

    Raises:
        UserError: There is no such sweep, or another process is running it.
    """
    return _run(load_sweep(str(store.existing(name).sweep_file)), store, watcher)


def _run(sweep: SweepConfig, store: Store, watcher: Watcher) -> Outcome:
    from halora.records import queries
    from halora.records.tracking import SweepRecorder, open_client

    folder = store.sweep(sweep.name)
    with only_driver(folder):
        client = open_client(store)
        simulated = folder.curves_file.exists()
        clock = SimulatedClock()
        core = open_core(sweep, store, clock) if simulated else open_core(sweep, store)
        core.request_stop(False)
        recorder = SweepRecorder(client, store, sweep, folder.sweep_file)
        for record in queries.trials(client, sweep.name):
            if point := record.point():
                recorder.add_point(point, sweep.resolve(core.trial(record.number).values).training.method)
        events = _Recording(sweep, recorder, watcher, folder)
        comparison = None
        try:
            if simulated:
                table = read_table(folder.curves_file, sweep)
                every = sweep.resolve({}).training.report_every
                simulate(
                    core, table, clock, concurrent=sweep.concurrent, report_every=every, events=events, folder=folder
                )
            else:
                comparison = _train(sweep, folder, core, events, recorder, watcher)
        except KeyboardInterrupt:
            pass
        finally:
            interrupted = not core.over
            if core.ended:
                watcher.say(f"no further trials: {core.ended}")
            if sweep.early_stopping:
                taken, whole = core.steps_taken(), core.steps_unstopped()
                watcher.say(
                    f"{taken} of {whole} optimiser steps taken; early stopping saved {1 - taken / max(whole, 1):.0%}"
                )
            reconcile(core.trials(), queries.trials(client, sweep.name), recorder)
            recorder.record_front_probability(core.front_probability())
            recorder.finish(interrupted=interrupted)
        return Outcome(not interrupted, core.counts()["failed"], comparison)


def _train(
    sweep: SweepConfig,
    folder: SweepFolder,
    core: DecisionCore,
    events: "_Recording",
    recorder: "SweepRecorder",
    watcher: Watcher,
) -> ClosingComparison | None:
    """Run the core's jobs on Ray, and the closing comparison after them."""
    from halora.sweep.executor import ray_session, run_trials  # imports Ray and torch

    watcher.say(f"starting {sweep.concurrent * sweep.workers} workers; each loads the model once")
    with ray_session(sweep.concurrent * sweep.workers):
        run_trials(sweep, folder, core, events)
        chosen = contestants(sweep.comparison, events.points()) if sweep.comparison else {}
        if not chosen or not core.over:
            return None
        numbers = ", ".join(str(point.number) for point in chosen.values())
        watcher.say(f"comparing trial {numbers} with the untrained base on fresh chips and rows")
        comparison = compare(sweep, folder, core, chosen)
        recorder.record_comparison(comparison.to_json())
        return comparison


class _Recording:
    """Passes what happens to trials on to the records and to whoever watches."""

    def __init__(self, sweep: SweepConfig, recorder: "SweepRecorder", watcher: Watcher, folder: SweepFolder) -> None:
        self._sweep, self._recorder, self._watcher, self._folder = sweep, recorder, watcher, folder
        self._begun: set[int] = set()

    def points(self) -> list[TrialPoint]:
        """Finished trials of this sweep, earlier runs included."""
        return self._recorder.points

    def began(self, job: Job) -> None:
        from halora.trainable import past_reports

        if job.number not in self._begun and not job.first_chip:
            config = self._sweep.resolve(job.values)
            self._recorder.begin_trial(job.number, config, job.values, trial_energy(config))
            # A worker may have gone on for a moment after an earlier driver ended.
            self._recorder.report_missed(job.number, past_reports(self._folder.trial(job.number)))
            self._begun.add(job.number)
        goal = f"up to step {job.goal.steps}" if not job.first_chip else f"on {job.goal.chip_instances} chips"
        self._watcher.trial(job.number, "running", f"{goal}, {job.energy_uj_per_token:.2f} µJ/token")

    def reported(self, job: Job, report: Mapping[str, Any]) -> None:
        self._recorder.report_step(job.number, int(report["step"]), report)
        loss = f", loss {report['train_loss']:.2f}" if "train_loss" in report else ""
        self._watcher.trial(job.number, "training", f"step {report['step']}/{job.goal.steps}{loss}")

    def evaluated(self, job: Job, report: Mapping[str, Any]) -> None:
        from halora.trainable import RESULT_FILE, adapter_folder

        if not job.final:
            self._recorder.report_rung(job.number, job.goal.steps, report)
            self._watcher.trial(job.number, "paused", f"accuracy {report['accuracy']:.3f} at step {job.goal.steps}")
            return
        metrics = {**report, ENERGY: job.energy_uj_per_token}
        violation = sum(max(constraint.violation(metrics), 0.0) for constraint in self._sweep.constraints)
        scores = {name: float(report[name]) for name in ("accuracy", "accuracy_low", "accuracy_high")}
        scores |= {name: float(report[name]) for name in ("margin", "clean_accuracy")}
        energy = {ENERGY: job.energy_uj_per_token}
        point = TrialPoint(number=job.number, params=dict(job.values), feasible=violation <= 0, **scores, **energy)
        folder = self._folder.trial(job.number)
        adapter = None if job.first_chip else adapter_folder(folder)
        kept = {**report, **({VIOLATION: violation} if self._sweep.constraints else {})}
        self._recorder.finish_trial(
            point, job.goal.steps, kept, folder / RESULT_FILE, adapter if adapter and adapter.exists() else None
        )
        self._watcher.trial(
            job.number, "finished", f"accuracy {point.accuracy:.3f}, {point.energy_uj_per_token:.2f} µJ/token"
        )

    def failed(self, job: Job, cause: str) -> None:
        if job.first_chip:
            self._watcher.say(f"trial {job.number} stays on {job.first_chip} chips: {cause}")
            return
        self._recorder.fail_trial(job.number, cause)
        self._watcher.trial(job.number, "failed", cause)
