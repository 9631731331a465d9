"""How a launched sweep stands: its decision core and whether a process runs it. Light: no MLflow, Ray or torch."""

import fcntl
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from halora.analysis.trials import sweep_objectives
from halora.errors import UserError
from halora.files import write_whole
from halora.records.store import Store, SweepFolder
from halora.settings.trial import TrialConfig
from halora.spaces.mistakes import describe
from halora.spaces.sweep import SweepConfig
from halora.sweep.cluster.slurm import job_name
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.problem import problem_of
from halora.sweep.search.samplers import fitting_trials, kept_of
from halora.sweep.search.study import SweepStudy
from halora.sweep.search.study_storage import storage_of
from halora.yaml_files import read_yaml, to_yaml

_FLOCK = "hhqqi4x"  # C's struct flock on Linux: type, whence, start, length, process


def load_core(name: str, store: Store) -> tuple[SweepConfig, DecisionCore]:
    """A launched sweep and its decision core, for looking and for asking it to stop: it suggests nothing.

    Raises:
        UserError: There is no such sweep, or its files cannot be read.
        UnreachableError: The database that its study is in does not answer.
    """
    with _readable(name):
        sweep, study = load_study(name, store)
        return sweep, DecisionCore(problem_of(sweep), study)


def load_study(name: str, store: Store) -> tuple[SweepConfig, SweepStudy]:
    """A launched sweep and its study, to be asked something; see `load_core`."""
    sweep = load_sweep_of(store.existing(name))
    with _readable(name):
        return sweep, _study(sweep, store)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
        return
    except ValidationError as error:
        problems = describe(error, TrialConfig)
    except (ValueError, KeyError, TypeError, OSError) as error:  # what Optuna raises at a damaged journal
        if isinstance(error, UserError):
            raise
        problems = [f"{type(error).__name__}: {error}"]
    raise UserError([f"sweep '{name}' cannot be read: {problem}" for problem in problems])


def load_sweep_of(folder: SweepFolder) -> SweepConfig:
    """The sweep as it was launched; nothing but this is read of what it named.

    Raises:
        UserError: Its description cannot be read.
    """
    content = read_yaml(folder.sweep_file, f"'{folder.sweep_file}'")
    try:
        return SweepConfig.model_validate(content)
    except ValidationError as error:
        told = [f"'{folder.sweep_file}' is not a sweep this version reads: {p}" for p in describe(error, SweepConfig)]
        raise UserError(told) from None


def write_sweep(folder: SweepFolder, sweep: SweepConfig) -> None:
    """Write the description that `load_sweep_of` reads, to the disk itself."""
    write_whole(folder.sweep_file, to_yaml(sweep.model_dump(mode="json")))


def open_core(
    sweep: SweepConfig,
    store: Store,
    clock_s: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda text: None,
) -> DecisionCore:
    """The decision core of a sweep over whatever its study holds, and the trials that it was started warm from."""
    problem, file = problem_of(sweep), store.sweep(sweep.name).warm_start_file
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return DecisionCore(problem, _study(sweep, store, say), fitting_trials(problem, kept), clock_s)


def warm_start(sweep: SweepConfig, store: Store) -> list[dict[str, Any]]:
    """The trials that a sweep starts warm from as they are now, see `kept_of`.

    Raises:
        UserError: A sweep to start from is not in the store.
    """
    sources = [load_sweep_of(store.existing(name)) for name in sweep.search.warm_start]
    return [kept for source in sources for kept in kept_of(_study(source, store).trials())]


def study_name(sweep: SweepConfig) -> str:
    """Name of a launch's study; it has the identity, so that stores that share a database never meet."""
    return f"{sweep.name}-{sweep.launch}"


def _study(sweep: SweepConfig, store: Store, say: Callable[[str], None] = lambda text: None) -> SweepStudy:
    """The study of a launch."""
    return SweepStudy(study_name(sweep), storage_of(store.sweep(sweep.name), say), sweep_objectives(sweep))


def check_not_launched(folder: SweepFolder) -> None:
    """Refuse a sweep name that is taken in this store.

    Raises:
        UserError: With the ways forward.
    """
    if folder.sweep_file.exists():
        raise UserError(
            f"sweep '{folder.name}' was launched before",
            f"resume it with `halora sweep resume {folder.name}`, or launch under another name with --name",
        )
    if folder.root.is_file() or (folder.root.exists() and any(folder.root.iterdir())):
        raise UserError(
            f"'{folder.root}' is in the way: it has no {folder.sweep_file.name}, so it is not a sweep",
            "move it away, or launch under another name with --name",
        )


def claim(folder: SweepFolder, write: Callable[[SweepFolder], None]) -> None:
    """Take a sweep's name: its folder appears with all of its files at once, and for one launch only.

    A launch that is killed before leaves the name free.

    Args:
        folder: The folder to be.
        write: Writes the files into another that takes its place.

    Raises:
        UserError: The name is taken, perhaps by a launch at the same moment.
    """
    check_not_launched(folder)
    scratch = SweepFolder(folder.root.parent.with_name(f".launch-{uuid4().hex}"))
    scratch.root.mkdir()
    try:
        write(scratch)
        folder.root.parent.mkdir(exist_ok=True)
        try:
            scratch.root.rename(folder.root)  # refused where there is a folder with files
        except OSError:
            check_not_launched(folder)
            raise
    finally:
        shutil.rmtree(scratch.root, ignore_errors=True)


def is_running(folder: SweepFolder) -> bool:
    """Whether a process of this machine is running the sweep. Asking takes no lock, so that it never keeps one off."""
    try:
        with folder.lock_file.open("rb") as lock:
            held = fcntl.fcntl(lock, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
    except FileNotFoundError:
        return False
    return bool(struct.unpack(_FLOCK, held)[0] != fcntl.F_UNLCK)


def driver_of(folder: SweepFolder) -> dict[str, Any]:
    """What runs the sweep: `host`, `process`, `job` of Slurm where it is one, and `since` when, in UTC."""
    with suppress(OSError, ValueError):  # it has ended, or writes this now
        told = json.loads(folder.lock_file.read_text(encoding="utf-8"))
        if is_running(folder) and isinstance(told, dict):
            return told
    return {}


def check_same(sweep: SweepConfig, folder: SweepFolder) -> None:
    """Refuse to take a launched sweep for another one of its name.

    Raises:
        UserError: With what differs.
    """
    other = {"launch", "folders", "shapes", "chips_read"}  # of a launch, not of what was asked for
    here = sweep.model_dump(mode="json", exclude=other)
    there = load_sweep_of(folder).model_dump(mode="json", exclude=other)
    if differing := [name for name in here if here[name] != there[name]]:
        raise UserError(
            f"sweep '{folder.name}' was launched before with another {', '.join(differing)}",
            f"resume it as it is with `halora sweep resume {folder.name}`, or launch under another name with --name",
        )


@contextmanager
def only_driver(folder: SweepFolder) -> Iterator[None]:
    """Hold the sweep's lock; the system releases it when the process ends, however it ends.

    Raises:
        UserError: Another process holds it.
    """
    with folder.lock_file.open("a", encoding="utf-8") as lock:
        try:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
        except BlockingIOError:
            raise UserError(
                f"sweep '{folder.name}' is running in another process",
                f"watch it with `halora sweep status {folder.name}`",
            ) from None
        if not (folder.lock_file.exists() and os.path.samestat(os.fstat(lock.fileno()), folder.lock_file.stat())):
            raise UserError(f"sweep '{folder.name}' was deleted meanwhile")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        lock.truncate(0)
        lock.write(
            json.dumps({"host": socket.gethostname(), "process": os.getpid(), "job": job_name(), "since": since})
        )
        lock.flush()
        yield


def _whole_file(kind: int) -> bytes:
    """A lock on all of a file, for `fcntl`: it belongs to the open file, as one of `flock` does."""
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
