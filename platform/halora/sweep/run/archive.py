"""Puts a sweep aside: lists and the page leave it out, and what MLflow has as well is freed here until it comes back.

The mark is the decision, written first and removed last; what follows from it is repeated by whoever comes next.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from halora.analysis.front import front
from halora.analysis.trials import grouped, sweep_objectives
from halora.errors import UserError
from halora.files import sha256_of, write_json
from halora.records.delivery import undelivered
from halora.records.index import read_sweep_state
from halora.records.store import Store, SweepFolder
from halora.storage import TrialStorage
from halora.sweep.run.state import load_sweep_of, only_driver
from halora.trial_folder import adapter_folder

_ASIDE = "archived-"
"""Before the name of a checkpoint's folder whose adapter is in MLflow alone."""


def archive(name: str, store: Store, say: Callable[[str], None]) -> None:
    """Archive a sweep. Freed are the adapters of finished trials off the front that MLflow has byte for byte, and what
    the storage has of finished trials; unfinished trials keep their checkpoints.

    Raises:
        UserError: There is no such sweep, it is running, or MLflow lacks records of it.
        UnreachableError: MLflow or the storage does not answer; to be repeated.
    """
    folder = store.existing(name)
    with only_driver(folder):
        if left := undelivered(store, name):
            told = f"MLflow lacks {left} records of sweep '{name}', which it would get from here"
            raise UserError(told, f"deliver: halora sweep resume {name}")
        sweep, points = load_sweep_of(folder), read_sweep_state(store, name).points()
        fetch = _fetching(store, folder, sweep.launch)
        if not folder.archive_file.exists():
            write_json(folder.archive_file, {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        objectives = sweep_objectives(sweep)
        kept = {point.number for point in front(grouped(points, objectives).feasible, objectives)}
        freed = 0
        for point in points:
            if point.state != "finished":
                continue
            if url := folder.trial_url(point.number):
                TrialStorage(url).remove()
            if point.number not in kept:
                freed += _free(fetch, folder.trial(point.number), point.number)
        if freed:
            say(f"{freed} adapters off the front are in MLflow alone now")


def unarchive(name: str, store: Store) -> None:
    """Bring a sweep back as it was; one that is not archived is left as it is.

    Raises:
        UserError: There is no such sweep, or MLflow has lost an adapter.
        UnreachableError: MLflow does not answer; to be repeated.
    """
    folder = store.existing(name)
    if not folder.archive_file.exists():
        return
    with only_driver(folder):
        fetch = _fetching(store, folder, load_sweep_of(folder).launch)
        for aside in sorted((folder.root / "trials").glob(f"*/{_ASIDE}step-*")):
            _bring_back(fetch, aside)
        folder.archive_file.unlink()


def check_not_archived(folder: SweepFolder) -> None:
    """Refuse to run a sweep that is archived.

    Raises:
        UserError: It is.
    """
    if folder.archive_file.exists():
        raise UserError(f"sweep '{folder.name}' is archived", f"bring it back: halora sweep unarchive {folder.name}")


_Fetch = Callable[[int, Path], Path | None]


def _fetching(store: Store, folder: SweepFolder, launch: str) -> _Fetch:
    """A function that copies the adapter of a trial from MLflow into a folder; none where MLflow has none."""
    from halora.records.queries import download_adapter, trial_run
    from halora.records.tracking import open_client

    client = open_client(store.serving(folder))
    return lambda number, into: download_adapter(client, trial_run(client, folder.name, launch, number), into)


def _free(fetch: _Fetch, own: Path, number: int) -> bool:
    """Remove a trial's adapter from its folder if MLflow has the same; whether that was done now."""
    for aside in own.glob(f"{_ASIDE}step-*"):  # of one that was killed
        shutil.rmtree(aside / "adapter", ignore_errors=True)
    adapter = adapter_folder(own)
    if adapter is None or not adapter.exists():
        return False
    with TemporaryDirectory() as scratch:
        there = fetch(number, Path(scratch))
        if there is None or _digests(there) != _digests(adapter):
            return False
    aside = adapter.parent.rename(own / f"{_ASIDE}{adapter.parent.name}")
    shutil.rmtree(aside / "adapter")
    return True


def _bring_back(fetch: _Fetch, aside: Path) -> None:
    for partial in (aside / "adapter", *aside.glob(".fetched-*")):  # of one that was killed
        shutil.rmtree(partial, ignore_errors=True)
    with TemporaryDirectory(dir=aside, prefix=".fetched-") as scratch:
        there = fetch(int(aside.parent.name), Path(scratch))
        if there is None:
            raise UserError(f"MLflow has no adapter for '{aside.parent}' any more")
        there.rename(aside / "adapter")
    aside.rename(aside.with_name(aside.name.removeprefix(_ASIDE)))


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
