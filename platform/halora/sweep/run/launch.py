"""Launches and resumes a sweep: study, adapter and records brought together, and everything closed at the end.

MLflow, Ray and torch are imported once nothing is left to refuse.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halora.errors import UserError, check_all
from halora.evaluation.damage import described
from halora.events import BasesProbed, Compared
from halora.files import write_json, write_whole
from halora.records.store import Store, SweepFolder
from halora.spaces.sweep import SweepConfig
from halora.storage import check_storage
from halora.sweep.cluster.cluster import LOCAL, RUNS, Cluster
from halora.sweep.run.archive import check_not_archived
from halora.sweep.run.comparison import ClosingComparison, check_rows, check_rows_left, compare, contestants
from halora.sweep.run.driver_log import DriverLog, Watcher
from halora.sweep.run.launched import as_launched, check_unchanged
from halora.sweep.run.notifying import Notify, notifying
from halora.sweep.run.probing import Probing, bases
from halora.sweep.run.reconcile import record_as_studied
from halora.sweep.run.state import (
    check_not_launched,
    claim,
    load_sweep_of,
    only_driver,
    open_core,
    warm_start,
    write_sweep,
)
from halora.sweep.run.trial_files import TrialFiles
from halora.sweep.run.trial_records import TrialRecords
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.study_storage import check_database
from halora.sweep.simulation.simulator import SimulatedClock, simulate
from halora.sweep.simulation.table import read_table
from halora.training.models import check_available

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.records.recorder import SweepRecorder


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended.

    Attributes:
        complete: All trials ended, and the comparison; False after Ctrl-C or a stop request.
        failed: Number of failed trials.
        comparison: The closing comparison, where the sweep asks for one and it was reached.
    """

    complete: bool
    failed: int
    comparison: ClosingComparison | None


def launch(
    sweep: SweepConfig,
    store: Store,
    watcher: Watcher,
    curves: Path | None = None,
    *,
    cluster: Cluster = LOCAL,
    metrics_port: int | None = None,
) -> Outcome:
    """Run a new sweep to its end.

    Args:
        sweep: The sweep.
        store: Where it is recorded.
        watcher: Shown the progress.
        curves: A table of recorded curves to take results from, instead of training.
        cluster: Where its workers run.
        metrics_port: Port of the loopback address to serve its metrics at; nowhere for none.

    Raises:
        UserError: The name is taken, the store cannot be written, the table does not fit, a model cannot be loaded, or
            the comparison would have no rows.
        UnreachableError: MLflow, the study's database, the storage or the cluster does not answer, or one of the nodes
            could not run a trial.
    """
    folder, notify = store.sweep(sweep.name), Notify.from_environment()
    store.check_writable()
    check_not_launched(folder)
    training = (
        lambda: _check_workers(sweep, store, cluster, store.checkpoint_url),
        lambda: check_rows(sweep),
        lambda: check_rows_left(sweep),
    )
    check_all(
        *((lambda: read_table(curves, sweep),) if curves else training),
        *(partial(store.existing, name) for name in sweep.search.warm_start),
    )
    earlier = warm_start(sweep, store)

    from halora.records.tracking import open_client

    open_client(store)
    check_database()
    with ExitStack() as workers:
        if not curves:
            workers.enter_context(_workers(sweep, cluster))  # the name is taken once the sweep can run
        sweep = as_launched(sweep)

        def write(new: SweepFolder) -> None:
            if store.server:
                write_whole(new.server_file, store.server)
            if curves:
                write_whole(new.curves_file, curves.read_bytes())
            if earlier:
                write_json(new.warm_start_file, earlier)
            write_sweep(new, sweep)

        claim(folder, write)
        return _run(sweep, store, watcher, workers, metrics_port, notify)


def resume(
    name: str, store: Store, watcher: Watcher, *, cluster: Cluster = LOCAL, metrics_port: int | None = None
) -> Outcome:
    """Resume a sweep: unfinished trials from their checkpoints, then those not begun yet.

    Args:
        name: The sweep.
        store: Where it is recorded.
        watcher: Shown the progress.
        cluster: Where its workers run from now on.
        metrics_port: Port of the loopback address to serve its metrics at; nowhere for none.

    Raises:
        UserError: There is no such sweep, another process is running it, or its models or tasks have changed.
        UnreachableError: The storage or the cluster does not answer, or one of its nodes could not run a trial.
    """
    folder, notify = store.existing(name), Notify.from_environment()
    check_not_archived(folder)
    if store.server:
        write_whole(folder.server_file, store.server)
    sweep = load_sweep_of(folder)
    if folder.simulated:
        return _run(sweep, store.serving(name), watcher, nullcontext(), metrics_port, notify)
    check_unchanged(sweep)
    _check_workers(sweep, store, cluster, store.checkpoint_url or folder.checkpoint_url)
    return _run(sweep, store.serving(name), watcher, _workers(sweep, cluster), metrics_port, notify)


def probe(sweep: SweepConfig, store: Store, watcher: Watcher, *, cluster: Cluster = LOCAL) -> None:
    """Say what a sweep's chips do to its untrained bases, and launch nothing.

    Args:
        sweep: The sweep.
        store: Where it would be recorded.
        watcher: Told of each base.
        cluster: Where the bases are scored.

    Raises:
        UserError: A model cannot be loaded, or rows cannot be scored.
        UnreachableError: The storage or the cluster does not answer, or one of its nodes could not run a trial.
    """
    _check_workers(sweep, store, cluster, store.checkpoint_url)
    from halora.sweep.cluster.session import ray_session
    from halora.sweep.run.executor import score_on_workers  # imports Ray and torch
    from halora.trial_runner import ScoringJob

    waiting = bases(sweep, watcher.say)
    jobs = [ScoringJob(base.config, None) for base in waiting]

    def scored(place: int, scores: "ChipScores") -> None:
        for line in described([waiting[place].damage(scores).to_json()]):
            watcher.say(line)

    with ray_session(sweep.concurrent, cpus=sweep.resources.cpus, cluster=cluster):
        score_on_workers(sweep, jobs, scored)


def _check_workers(sweep: SweepConfig, store: Store, cluster: Cluster, storage: str) -> None:
    """Refuse a sweep that the machines it is to run on could not run, or whose trials could not be kept."""
    if storage:
        check_storage(storage)
    models = [str(model) for model in sweep.values_of("model")]
    if not cluster.address:
        for model in models:
            check_available(model)
        return
    from halora.sweep.cluster.preflight import check_cluster  # imports Ray

    check_cluster(cluster, store, storage, models)


@contextmanager
def _workers(sweep: SweepConfig, cluster: Cluster) -> Iterator[None]:
    """Ray with room for a sweep's workers, from when it is entered.

    Raises:
        UserError: The sweep has a budget of GPU hours, and its trials get no GPU.
    """
    from halora.sweep.cluster.session import gpus_per_trial, ray_session

    with ray_session(sweep.concurrent * sweep.workers, cpus=sweep.resources.cpus, cluster=cluster):
        if sweep.budget.gpu_hours and not gpus_per_trial(sweep):
            raise UserError(
                f"budget.gpu_hours: {sweep.budget.gpu_hours:g}, but no GPU is set aside for a trial here",
                "give a budget.hours or budget.steps instead, or run it where there are GPUs",
            )
        yield


def _run(
    sweep: SweepConfig,
    store: Store,
    watcher: Watcher,
    workers: AbstractContextManager[Any],
    metrics_port: int | None,
    notify: Notify | None,
) -> Outcome:
    from halora.records.delivery import undelivered
    from halora.records.exporter import recording
    from halora.sweep.run.metrics import SweepCollector, serving_metrics

    folder = store.sweep(sweep.name)
    with only_driver(folder):
        watcher = DriverLog(folder.log_file, sweep.name, watcher)
        simulated, clock = folder.simulated, SimulatedClock()
        core = open_core(sweep, store, clock) if simulated else open_core(sweep, store, say=watcher.say)
        if simulated:
            core.spending.gpus = (sweep.resources.gpus or 1.0) * sweep.workers
        core.request_stop(False)
        files = TrialFiles(folder)
        if store.checkpoint_url and not simulated:
            files.keep_at(store.checkpoint_url, sweep.launch, core.unfinished)
        with (
            notifying(folder, sweep, notify, watcher.say),
            recording(store, sweep, watcher.say) as recorder,
            serving_metrics(
                metrics_port, SweepCollector(sweep.name, recorder.recorded, lambda: undelivered(store, sweep.name))
            ),
        ):
            ended = False
            listener = TrialRecords(sweep, core, recorder, watcher, files, folder)
            comparison = None
            try:
                if simulated:
                    table = read_table(folder.curves_file, sweep)
                    every = sweep.resolve({}).training.report_every
                    at_once = sweep.concurrent
                    simulate(
                        core, table, clock, concurrent=at_once, report_every=every, listener=listener, folder=folder
                    )
                    ended = core.over
                else:
                    ended, comparison = _train(sweep, folder, core, listener, recorder, watcher, workers)
            except KeyboardInterrupt:
                pass
            finally:
                try:
                    _tell_end(sweep, core, watcher)
                    record_as_studied(core.trials(), recorder)
                    recorder.record_estimates(core.estimates())
                finally:  # the study may be away
                    recorder.finish(interrupted=not ended)
                listener.prune()
        return Outcome(ended, core.counts()["failed"], comparison)


def _tell_end(sweep: SweepConfig, core: DecisionCore, watcher: Watcher) -> None:
    if core.ended:
        watcher.say(f"no further trials: {core.ended}")
    if sweep.early_stopping:
        taken, whole = core.steps_taken(), core.steps_unstopped()
        saved = 1 - taken / max(whole, 1)
        watcher.say(f"{taken} of {whole} optimiser steps taken; early stopping saved {saved:.0%}")


def _train(
    sweep: SweepConfig,
    folder: SweepFolder,
    core: DecisionCore,
    listener: TrialRecords,
    recorder: "SweepRecorder",
    watcher: Watcher,
    workers: AbstractContextManager[Any],
) -> tuple[bool, ClosingComparison | None]:
    """Run the core's jobs on Ray, and the closing comparison after them; whether both came to their end."""
    import torch

    from halora.sweep.cluster.session import gpus_per_trial
    from halora.sweep.run.executor import run_trials  # imports Ray

    torch.set_num_threads(1)  # the cores are the workers'
    with workers:
        core.spending.gpus = gpus_per_trial(sweep)
        watcher.say(f"{RUNS} on up to {sweep.concurrent * sweep.workers} workers; each loads the model once")
        unknown = bases(sweep, watcher.say) if recorder.recorded.damage is None else []

        def probed(outcomes: Sequence[dict[str, Any]]) -> None:
            recorder.record(BasesProbed(outcomes=outcomes))

        run_trials(sweep, folder, core, listener, Probing(unknown, watcher.say, probed))
        recorder.record_estimates(core.estimates())
        chosen = contestants(sweep.comparison, listener.points()) if sweep.comparison else {}
        if not chosen or not core.over:
            return core.over, None
        comparison = compare(sweep, folder, core, chosen, watcher.say)
        if comparison is not None:
            recorder.record(Compared(comparison=comparison.to_json()))
        return comparison is not None, comparison
