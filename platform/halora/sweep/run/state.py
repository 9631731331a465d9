"""How a launched sweep stands: its decision core and whether a process runs it. Light: no MLflow, Ray or torch."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml

from halora.errors import UserError
from halora.records.store import Store, SweepFolder
from halora.spaces.sweep import SweepConfig
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.problem import problem_of
from halora.sweep.search.samplers import fitting_trials
from halora.sweep.search.study import SweepStudy
from halora.sweep.search.study_storage import storage_of


def load_core(name: str, store: Store) -> tuple[SweepConfig, DecisionCore]:
    """A launched sweep and its decision core, for looking and for asking it to stop."""
    sweep = load_sweep_of(store.existing(name))
    return sweep, open_core(sweep, store)


def load_sweep_of(folder: SweepFolder) -> SweepConfig:
    """The sweep as it was launched."""
    return SweepConfig.model_validate(yaml.safe_load(folder.sweep_file.read_text(encoding="utf-8")))


def open_core(
    sweep: SweepConfig,
    store: Store,
    clock_s: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda text: None,
) -> DecisionCore:
    """The decision core of a sweep over whatever its study holds, and the trials of those it starts warm from.

    Raises:
        UserError: A sweep to start from is not in the store.
    """
    problem = problem_of(sweep)
    earlier = [
        trial
        for name in sweep.search.warm_start
        for trial in fitting_trials(problem, SweepStudy(name, storage_of(store.existing(name))).trials())
    ]
    return DecisionCore(problem, SweepStudy(sweep.name, storage_of(store.sweep(sweep.name), say)), earlier, clock_s)


def check_not_launched(folder: SweepFolder) -> None:
    """Refuse a sweep name that is taken.

    Raises:
        UserError: With the ways forward.
    """
    if folder.root.exists():
        raise UserError(
            f"sweep '{folder.name}' was launched before",
            f"resume it with `halora sweep resume {folder.name}`, or launch under another name with --name",
        )


def is_running(folder: SweepFolder) -> bool:
    """Whether a process of this machine is running the sweep."""
    try:
        with folder.lock_file.open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


@contextmanager
def only_driver(folder: SweepFolder) -> Iterator[None]:
    """Hold the sweep's lock; the system releases it when the process ends, however it ends.

    Raises:
        UserError: Another process holds it.
    """
    with folder.lock_file.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"sweep '{folder.name}' is running in another process",
                f"watch it with `halora sweep status {folder.name}`",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
