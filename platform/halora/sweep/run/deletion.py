"""Removes a launch and all that was recorded of it, whatever ends that in the middle; nothing of another launch.

The decision is one rename: the sweep's folder leaves the store's sweeps, which frees its name. It still says what there
is to remove elsewhere, and goes itself once that is gone, its description last. Whoever comes next finds what is left.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from halora.errors import UserError
from halora.files import locked_now, sync_folder
from halora.records.store import Store, SweepFolder
from halora.sweep.run.state import load_sweep_of, only_driver, study_name
from halora.sweep.search.study_storage import check_study, remove_study
from halora.url_folder import UrlFolder


@dataclass(frozen=True)
class Holdings:
    """What there is of a launch.

    Attributes:
        name: Name of the sweep.
        launch: Its identity.
        folder: Its folder in the store.
        size: Bytes of the files there.
        tracking_uri: MLflow's.
        runs: Number of its runs there.
        adapters: Registered versions that come from it, `NAME/VERSION`, with their aliases.
        study_in_database: Whether its study is in a database.
        checkpoint_url: Its place in the storage; empty where it has none.
        stored: Number of files there.
    """

    name: str
    launch: str
    folder: Path
    size: int
    tracking_uri: str
    runs: int
    adapters: tuple[str, ...]
    study_in_database: bool
    checkpoint_url: str
    stored: int

    def check(self, *, with_adapters: bool) -> None:
        """Refuse to delete what has registered adapters that were not meant.

        Raises:
            UserError: It has.
        """
        if self.adapters and not with_adapters:
            raise UserError(
                [f"adapter {each} of sweep '{self.name}' is registered" for each in self.adapters],
                "delete the adapters too with --with-adapters, or keep the sweep: `halora sweep archive` hides it",
            )

    def lines(self) -> list[str]:
        """What would be removed, and what would stay, for a person."""
        study = ["its study in the database of studies"] if self.study_in_database else []
        stored = [f"{self.stored} files in the storage '{self.checkpoint_url}'"] if self.checkpoint_url else []
        return [
            f"sweep '{self.name}', launch {self.launch}:",
            f"  {self.size / 1e6:.1f} MB of files in '{self.folder}'",
            *(f"  {each}" for each in (*study, *stored)),
            f"  {self.runs} runs in MLflow at '{self.tracking_uri}', with their artifacts",
            *(f"  registered adapter {each}" for each in self.adapters),
            "what stays: the share of the store's error level that its certifications took; rows of its runs, marked "
            "as deleted, until `mlflow gc`, which takes all that anybody has deleted there",
        ]


def holdings(name: str, store: Store) -> Holdings:
    """What there is of a sweep that could be deleted.

    Raises:
        UserError: There is no such sweep, or it cannot be read.
        UnreachableError: MLflow, the study's database or the storage does not answer.
    """
    from halora.records.removal import adapters_of, runs_of
    from halora.records.tracking import open_client

    folder = store.existing(name)
    sweep, place = load_sweep_of(folder), store.serving(folder)
    client = open_client(place)
    check_study(folder)
    url = folder.checkpoint_url
    adapters = adapters_of(client, sweep.launch)
    return Holdings(
        name=name,
        launch=sweep.launch,
        folder=folder.root,
        size=sum(path.lstat().st_size for path in folder.root.rglob("*") if path.is_file()),
        tracking_uri=place.tracking_uri,
        runs=len(runs_of(client, sweep.launch)),
        adapters=tuple(" ".join([f"{each.name}/{each.version}", *each.aliases]) for each in adapters),
        study_in_database=folder.database_mark.exists(),
        checkpoint_url=url,
        stored=len(UrlFolder(url, retries_s=()).files()) if url else 0,
    )


def delete(name: str, store: Store, say: Callable[[str], None], *, with_adapters: bool = False) -> None:
    """Delete a sweep: its folder, study, runs in MLflow with their artifacts, and checkpoints.

    A deletion that was interrupted is ended instead, where there is one; a sweep that has taken the name since stays.

    Args:
        name: The sweep.
        store: Its store.
        say: Told what is left, and what is done.
        with_adapters: Delete its registered adapters as well.

    Raises:
        UserError: There is no such sweep, it is running or being certified, or adapters of it are registered.
        UnreachableError: MLflow, the study's database or the storage does not answer; to be repeated.
    """
    if end_deletions(store, say, name):
        if name in store.sweeps(archived=True):
            say(f"the sweep '{name}' that is there now is of another launch, and stays; delete it by another call")
        return
    folder = store.existing(name)
    with only_driver(folder), _no_selection(folder):
        found = holdings(name, store)
        found.check(with_adapters=with_adapters)
        place = store.to_delete(found.launch, name)
        place.root.parent.mkdir(parents=True, exist_ok=True)
        folder.root.rename(place.root)
        sync_folder(store.root / ".deleted" / found.launch)
    _remove(place, store, say)
    _remove_empty(store)


def end_deletions(store: Store, say: Callable[[str], None], name: str = "*") -> int:
    """End deletions that were interrupted, of a name or of all; their number.

    Raises:
        UserError: Another process is at one of them.
        UnreachableError: MLflow, the study's database or the storage does not answer; to be repeated.
    """
    left = store.half_deleted(name)
    for folder in left:
        say(f"ending the deletion of sweep '{folder.name}', launch {folder.root.parent.name}, which was interrupted")
        _remove(folder, store, say)
    _remove_empty(store)
    return len(left)


def _remove(folder: SweepFolder, store: Store, say: Callable[[str], None]) -> None:
    """Remove all that a folder which left the store's sweeps says there is, and then itself."""
    if folder.sweep_file.exists():
        from halora.records.index import forget
        from halora.records.removal import remove_from_mlflow
        from halora.records.tracking import open_client

        with only_driver(folder):
            sweep = load_sweep_of(folder)
            remove_from_mlflow(open_client(store.serving(folder)), sweep.launch, say)
            remove_study(folder, study_name(sweep))
            if url := folder.checkpoint_url:
                UrlFolder(url).remove_folder()
            forget(store, folder.name)
            for path in folder.root.iterdir():
                if path not in (folder.sweep_file, folder.lock_file):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            folder.sweep_file.unlink()
    shutil.rmtree(folder.root)


def _remove_empty(store: Store) -> None:
    """Remove the folders that folders of deleted launches were in."""
    for folder in (*(store.root / ".deleted").glob("*"), store.root / ".deleted"):
        with suppress(OSError):  # there is something in it, or it is gone
            folder.rmdir()


@contextmanager
def _no_selection(folder: SweepFolder) -> Iterator[None]:
    """Keep certifications off.

    Raises:
        UserError: One is running.
    """
    file = folder.selection / "lock"
    if not file.exists():
        yield
        return
    if (lock := locked_now(file)) is None:
        raise UserError(f"an adapter of sweep '{folder.name}' is being selected", "wait for `halora adapter select`")
    with lock:
        yield
