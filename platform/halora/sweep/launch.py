"""Launches and resumes a sweep: study, Ray and records brought together, and everything closed at the end.

MLflow, Ray and torch are imported once nothing is left to refuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from halora.analysis.trials import TrialPoint, grouped
from halora.records.store import Store, SweepFolder
from halora.spaces.sweep import SweepConfig, load_sweep
from halora.sweep.comparison import ClosingComparison, check_rows_left, compare, contestants
from halora.sweep.core import DecisionCore, Suggestion, check_not_launched, open_study
from halora.sweep.state import load_core, only_driver
from halora.training.models import check_available

if TYPE_CHECKING:
    from halora.records.recorder import SweepRecorder


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


def launch(sweep: SweepConfig, store: Store, watcher: Watcher) -> Outcome:
    """Run a new sweep to its end.

    Raises:
        UserError: The name is taken, the store cannot be written, a model cannot be loaded, or the comparison would
            have no rows.
        UnreachableError: The store's database cannot be opened.
    """
    folder = store.sweep(sweep.name)
    store.check_writable()
    check_not_launched(folder)
    for model in sweep.values_of("model"):
        check_available(str(model))
    check_rows_left(sweep)

    from halora.records.tracking import open_client

    open_client(store)
    folder.root.mkdir(parents=True)
    if store.server:
        folder.server_file.write_text(store.server)
    folder.sweep_file.write_text(yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    return _run(sweep, store, watcher)


def resume(name: str, store: Store, watcher: Watcher) -> Outcome:
    """Go on with a sweep: unfinished trials from their checkpoints, then those not begun yet.

    Raises:
        UserError: There is no such sweep, or another process is running it.
    """
    folder = store.existing(name)
    if store.server:
        folder.server_file.write_text(store.server)
    return _run(load_sweep(str(folder.sweep_file)), store.serving(name), watcher)


def close_records(name: str, store: Store, watcher: Watcher) -> None:
    """Record what a sweep that nobody runs any more left open as interrupted, and deliver what waits on disk.

    Raises:
        UserError: There is no such sweep, or a process is running it.
    """
    from halora.records.sender import recording

    folder = store.existing(name)
    sweep, core = load_core(name, store)
    with only_driver(folder), recording(store.serving(name), sweep, watcher.say) as recorder:
        recorder.finish(interrupted=bool(core.unfinished) or core.num_started < sweep.trials)


def _run(sweep: SweepConfig, store: Store, watcher: Watcher) -> Outcome:
    from halora.records.sender import recording

    folder = store.sweep(sweep.name)
    with only_driver(folder), recording(store, sweep, watcher.say) as recorder:
        core = DecisionCore(sweep, open_study(sweep, folder))
        core.request_stop(False)
        events = _Recording(recorder, watcher, folder)
        comparison = None
        interrupted = True
        try:
            from halora.sweep.executor import ray_session, run_trials  # imports Ray and torch

            watcher.say(f"starting {sweep.concurrent * sweep.workers} workers; each loads the model once")
            with ray_session(sweep.concurrent * sweep.workers):
                run_trials(sweep, folder, core, events)
                interrupted = core.stopping or bool(core.unfinished) or core.num_started < sweep.trials
                chosen = contestants(sweep.comparison, events.points()) if sweep.comparison else {}
                if chosen and not interrupted:
                    numbers = ", ".join(str(point.number) for point in chosen.values())
                    watcher.say(f"comparing trial {numbers} with the untrained base on fresh chips and rows")
                    comparison = compare(sweep, folder, core, chosen)
                    recorder.record_comparison(comparison.to_json())
        except KeyboardInterrupt:
            interrupted = True
        finally:
            recorder.finish(interrupted=interrupted)
        return Outcome(not interrupted, core.counts()["failed"], comparison)


class _Recording:
    """Passes what happens to trials on to the records and to whoever watches."""

    def __init__(self, recorder: "SweepRecorder", watcher: Watcher, folder: SweepFolder) -> None:
        self._recorder, self._watcher, self._folder = recorder, watcher, folder

    def points(self) -> list[TrialPoint]:
        """Finished trials of this sweep that break no constraint, earlier runs included."""
        return grouped(self._recorder.points).feasible

    def began(self, suggestion: Suggestion) -> None:
        from halora.trainable import past_reports

        self._recorder.begin_trial(suggestion.number, suggestion.config, suggestion.values, suggestion.energy)
        # A worker may have gone on for a moment after an earlier driver ended.
        self._recorder.report_missed(suggestion.number, past_reports(self._folder.trial(suggestion.number)))
        energy = suggestion.energy.total_uj_per_token
        self._watcher.trial(suggestion.number, "running", f"{suggestion.config.training.method}, {energy:.2f} µJ/token")

    def reported(self, suggestion: Suggestion, report: Mapping[str, Any]) -> None:
        self._recorder.report_step(suggestion.number, int(report["step"]), report)
        loss = f", loss {report['train_loss']:.2f}" if "train_loss" in report else ""
        steps = suggestion.config.training.steps
        self._watcher.trial(suggestion.number, "training", f"step {report['step']}/{steps}{loss}")

    def evaluated(self, suggestion: Suggestion, report: Mapping[str, Any]) -> None:
        from halora.trainable import RESULT_FILE, adapter_folder

        number, folder = suggestion.number, self._folder.trial(suggestion.number)
        adapter = adapter_folder(folder)
        point = self._recorder.finish_trial(number, int(report["step"]), report, folder / RESULT_FILE, adapter)
        self._watcher.trial(
            number,
            "finished",
            f"accuracy {point.accuracy:.3f}, {point.energy_uj_per_token:.2f} µJ/token",
        )

    def failed(self, suggestion: Suggestion, cause: str) -> None:
        self._recorder.fail_trial(suggestion.number, cause)
        self._watcher.trial(suggestion.number, "failed", cause)
