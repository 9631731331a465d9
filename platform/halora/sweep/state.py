"""How a launched sweep stands: its decision core and whether a process runs it. Light: no MLflow, Ray or torch."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from halora.errors import UserError
from halora.records.store import Store, SweepFolder
from halora.spaces.sweep import SweepConfig
from halora.sweep.core import DecisionCore, open_study


def load_core(name: str, store: Store) -> tuple[SweepConfig, DecisionCore]:
    """A launched sweep and its decision core, for looking and for asking it to stop."""
    folder = store.existing(name)
    sweep = load_sweep_of(folder)
    return sweep, DecisionCore(sweep, open_study(sweep, folder))


def load_sweep_of(folder: SweepFolder) -> SweepConfig:
    """The sweep as it was launched."""
    return SweepConfig.model_validate(yaml.safe_load(folder.sweep_file.read_text()))


def is_running(folder: SweepFolder) -> bool:
    """Whether a process of this machine is running the sweep."""
    try:
        with only_driver(folder):
            return False
    except UserError:
        return True


@contextmanager
def only_driver(folder: SweepFolder) -> Iterator[None]:
    """Hold the sweep's lock; the system releases it when the process ends, however it ends.

    Raises:
        UserError: Another process holds it.
    """
    with folder.lock_file.open("a") as lock:
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
