"""Storage of trials on a URL: what a worker leaves there, any other finds complete or not at all.

A trial's place is `URL/NUMBER`. A checkpoint is a folder `step-NNNNNN-ID` below it, with the trial's reports, and a
manifest of names, sizes and SHA-256 digests that is written last: a folder without its manifest, or with files that are
not as it says, is not a checkpoint. ID is drawn for every upload, so that two workers that both believe the trial is
theirs never write into one folder, and an upload removes only checkpoints of earlier steps than its own: whichever ends
last, and however long it hung, the furthest checkpoint stays. `result-STEPS-CHIPS.json` are the scores at a goal,
one object each.
"""

import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from halora.errors import StorageError, UserError
from halora.files import locked_now, sha256_of, write_whole
from halora.retries import retried
from halora.settings.trial import Goal
from halora.trial_folder import OPTIMIZER_FILE, REPORTS_FILE, RESULT_FILE, TRIAL_FILE, adapter_folder, latest_checkpoint
from halora.url_folder import RETRIES_S, UrlFolder, is_below

MANIFEST_FILE = "manifest.json"
"""Written last into a stored checkpoint."""
_CHECKPOINT = re.compile(r"(step-(\d{6,}))-[0-9a-f]{8}")
_BESIDE = (TRIAL_FILE, REPORTS_FILE)
"""Files of a trial's folder that a checkpoint takes along, so that they always fit it."""
_SCRATCH = "halora-trial-"
_LOOKS = 3
"""How often a checkpoint is looked for, as a newer one may take its place meanwhile."""

Manifest = dict[str, dict[str, Any]]


def check_storage(url: str) -> None:
    """Refuse a storage that cannot be used, before anything is launched.

    Raises:
        UserError: fsspec does not know the protocol, or its package is not installed.
        StorageError: It cannot be reached or written.
    """
    try:
        UrlFolder(url, retries_s=()).check_writable()
    except StorageError as error:
        next_step = "name another with --checkpoint-url; its credentials come from the environment"
        raise StorageError(error.problems, next_step) from None


class TrialStorage:
    """One trial's place in the storage.

    Args:
        url: Its URL.
        retries_s: Waits between the tries of an operation.

    Raises:
        UserError: fsspec does not know the protocol, or its package is not installed.
    """

    def __init__(self, url: str, retries_s: tuple[float, ...] = RETRIES_S) -> None:
        self._place = UrlFolder(url, retries_s)

    def put_checkpoint(self, folder: Path) -> None:
        """Store the latest checkpoint of a trial's folder; then those of earlier steps are removed.

        Raises:
            StorageError: It cannot be written; what was there before still is.
        """
        checkpoint = latest_checkpoint(folder)
        assert checkpoint is not None
        files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
        files |= {name: folder / name for name in _BESIDE if (folder / name).is_file()}
        name = f"{checkpoint.name}-{secrets.token_hex(4)}"
        manifest = {file: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for file, path in files.items()}
        for file, path in files.items():
            self._place.put(path, f"{name}/{file}")
        self._write_manifest(name, manifest)
        with suppress(StorageError):  # the next one removes what is left
            self._remove(each for each in _checkpoints(self._place.files()) if _step(each) < _step(name))

    def fetch_checkpoint(self, folder: Path, *, moments: bool = True) -> bool:
        """Bring the latest whole checkpoint into a trial's folder, which shows it complete or not at all.

        Args:
            folder: The folder.
            moments: Whether the optimiser's moments, which training resumes from, are wanted too.

        Returns:
            Whether there was one.

        Raises:
            UserError: There is none but a damaged one.
            StorageError: It cannot be read now.
        """
        folder.mkdir(parents=True, exist_ok=True)
        return self._looked_for(lambda: self._fetch_newest(folder, moments))

    def _fetch_newest(self, folder: Path, moments: bool) -> bool:
        scratch = folder / ".fetched.partial"  # one process at a time fetches into a folder
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        try:
            name, manifest = self._newest()
            for file in manifest:
                if moments or file != OPTIMIZER_FILE:
                    self._fetch_checked(name, file, manifest, scratch / file)
            if name:
                _take_over(scratch, folder, _CHECKPOINT.fullmatch(name)[1])  # type: ignore[index]
            return bool(name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def reports(self) -> list[dict[str, float]]:
        """The trial's reports up to its latest whole checkpoint, by step.

        Raises:
            UserError: There is none but a damaged one.
            StorageError: It cannot be read now.
        """
        return self._looked_for(self._newest_reports)

    def _newest_reports(self) -> list[dict[str, float]]:
        name, manifest = self._newest()
        if REPORTS_FILE not in manifest:
            return []
        content = self._place.read(f"{name}/{REPORTS_FILE}")
        if hashlib.sha256(content).hexdigest() != manifest[REPORTS_FILE]["sha256"]:
            raise self._damaged(name, f"{REPORTS_FILE} is not as it was written")
        found: list[dict[str, float]] = json.loads(content)
        return found

    def _looked_for[T](self, look: Callable[[], T]) -> T:
        """What is found of the latest checkpoint, looked for again where a newer one takes its place meanwhile."""
        try:
            return retried(look, lambda error: isinstance(error, FileNotFoundError), (0.0,) * (_LOOKS - 1))
        except FileNotFoundError:
            raise StorageError(f"storage '{self._place.url}' changes while it is read") from None

    def put_result(self, folder: Path, steps: int, chips: int) -> None:
        """Store the scores in a trial's folder, taken after so many steps on so many chips.

        Raises:
            StorageError: They cannot be written.
        """
        self._place.write(_result_name(steps, chips), (folder / RESULT_FILE).read_bytes())

    def fetch_result(self, folder: Path, steps: int, chips: int) -> bool:
        """Bring the scores after so many steps on so many chips into a trial's folder; whether there are any.

        Raises:
            StorageError: They cannot be read now.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(folder / RESULT_FILE, self._place.read(_result_name(steps, chips)))
        except FileNotFoundError:
            return False
        return True

    def has(self, steps: int, chips: int) -> bool:
        """Whether an adapter and the scores after so many steps on so many chips are there.

        Raises:
            StorageError: It cannot be read now.
        """
        return _result_name(steps, chips) in self._place.files() and bool(self._newest()[0])

    def keep_adapter(self) -> None:
        """Remove everything but the latest whole checkpoint without its moments, and the scores.

        For a trial that ended. The manifest goes without the moments first, so that a checkpoint is whole at every
        moment.

        Raises:
            StorageError: It cannot be written now; to be repeated.
        """
        with suppress(FileNotFoundError):
            name, manifest = self._newest()
            if OPTIMIZER_FILE in manifest:
                self._write_manifest(name, {file: of for file, of in manifest.items() if file != OPTIMIZER_FILE})
            files = self._place.files()
            if name:
                self._remove(each for each in _checkpoints(files) if each != name)
            self._place.remove(*[file for file in files if file == f"{name}/{OPTIMIZER_FILE}"])

    def remove(self) -> None:
        """Remove all of the trial, manifests first.

        Raises:
            StorageError: It cannot be written now; to be repeated.
        """
        self._place.remove(*[file for file in self._place.files() if file.endswith(f"/{MANIFEST_FILE}")])
        self._place.remove_folder()

    def _newest(self) -> tuple[str, Manifest]:
        """Name and manifest of the latest checkpoint whose files are there in their sizes; empty where there is none.

        Raises:
            UserError: There are some with a manifest, and all of them are damaged.
        """
        files, damage = self._place.files(), ""
        found = {name for name in _checkpoints(files) if f"{name}/{MANIFEST_FILE}" in files}
        for name in sorted(found, key=lambda name: (_step(name), name), reverse=True):
            try:
                manifest: Manifest = json.loads(self._place.read(f"{name}/{MANIFEST_FILE}"))["files"]
            except (ValueError, KeyError, TypeError):
                damage = damage or f"its {MANIFEST_FILE} says nothing sensible"
                continue
            wrong = [
                file
                for file, said in manifest.items()
                if not is_below(file) or files.get(f"{name}/{file}") != said["bytes"]
            ]
            if not wrong:
                return name, manifest
            damage = damage or f"{wrong[0]} is not as it was written"
        if damage:
            raise self._damaged(max(found, key=_step), damage)
        return "", {}

    def _fetch_checked(self, name: str, file: str, manifest: Manifest, path: Path) -> None:
        self._place.fetch(f"{name}/{file}", path)
        if sha256_of(path) != manifest[file]["sha256"]:
            raise self._damaged(name, f"{file} is not as it was written")

    def _damaged(self, name: str, what: str) -> UserError:
        return UserError(
            f"checkpoint '{self._place.url}/{name}' is damaged: {what}", "delete it; the trial starts over"
        )

    def _write_manifest(self, name: str, manifest: Manifest) -> None:
        self._place.write(f"{name}/{MANIFEST_FILE}", json.dumps({"files": manifest}, indent=1).encode())

    def _remove(self, checkpoints: Iterable[str]) -> None:
        """Remove checkpoints, manifests first."""
        for name in checkpoints:
            self._place.remove(f"{name}/{MANIFEST_FILE}")
            self._place.remove_folder(name)


def _checkpoints(files: dict[str, int]) -> list[str]:
    return sorted({name for name in (file.partition("/")[0] for file in files) if _CHECKPOINT.fullmatch(name)})


def _step(name: str) -> int:
    found = _CHECKPOINT.fullmatch(name)
    assert found
    return int(found[2])


def _result_name(steps: int, chips: int) -> str:
    return f"result-{steps:06d}-{chips:05d}.json"


def _take_over(fetched: Path, folder: Path, name: str) -> None:
    """Move a fetched checkpoint into a trial's folder: its own files last, by one rename, and then others go."""
    for beside in _BESIDE:
        if (fetched / beside).exists():
            (fetched / beside).replace(folder / beside)
    shutil.rmtree(folder / name, ignore_errors=True)
    fetched.rename(folder / name)
    for other in folder.glob("step-*"):
        if other.name != name:
            shutil.rmtree(other)


class WorkFolder:
    """Where a worker has the files of its trial: the trial's own folder, or a scratch folder before a storage.

    Args:
        folder: The trial's folder, where there is no storage.
        url: The trial's place in the storage; empty for none.
    """

    def __init__(self, folder: Path, url: str = "") -> None:
        self._folder, self._url = folder, url
        self._storage: TrialStorage | None = None
        self._scratch: _Scratch | None = None

    def fetch(self, goal: Goal) -> Path:
        """The folder, with what the trial needs on its way to a goal; it is fetched the first time.

        Raises:
            UserError: It is damaged, or missing where the trial was trained before.
            StorageError: It cannot be read now.
        """
        if self._url and self._scratch is None:
            storage, scratch = TrialStorage(self._url), _Scratch()
            try:
                self._fetch(storage, scratch.folder, goal)
            except BaseException:
                scratch.remove()
                raise
            self._storage, self._scratch, self._folder = storage, scratch, scratch.folder
        return self._folder

    def _fetch(self, storage: TrialStorage, folder: Path, goal: Goal) -> None:
        trains = not goal.first_chip
        there = storage.fetch_checkpoint(folder, moments=trains)
        if not trains and not (there and storage.fetch_result(folder, goal.steps, goal.first_chip)):
            raise UserError(f"storage '{self._url}' lacks the trial's adapter or its scores")

    def put_checkpoint(self) -> None:
        """Store the latest checkpoint, where there is a storage.

        Raises:
            StorageError: It cannot be written.
        """
        if self._storage:
            self._storage.put_checkpoint(self._folder)

    def put_result(self, goal: Goal) -> None:
        """Store the scores, where there is a storage.

        Raises:
            StorageError: They cannot be written.
        """
        if self._storage:
            self._storage.put_result(self._folder, goal.steps, goal.chip_instances)

    def close(self) -> None:
        """Remove the scratch folder."""
        if self._scratch:
            self._scratch.remove()
            self._scratch = None


class _Scratch:
    """A folder of this process on the machine's own disk. Those of processes that were killed are removed."""

    def __init__(self) -> None:
        _remove_orphans()
        while True:
            self._root = Path(tempfile.mkdtemp(prefix=_SCRATCH))
            (self._root / "lock").touch()
            with suppress(FileNotFoundError):  # another process may take it for an orphan before it is locked
                lock = locked_now(self._root / "lock")
                if lock and self._root.exists():
                    self._lock = lock
                    break
        self.folder = self._root / "trial"
        self.folder.mkdir()

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._lock.close()


def _remove_orphans() -> None:
    for lock_file in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*/lock"):
        with suppress(OSError):  # another user's
            if lock := locked_now(lock_file):
                shutil.rmtree(lock_file.parent, ignore_errors=True)
                lock.close()


def read_adapter(folder: Path) -> dict[str, bytes]:
    """Files of an adapter by name, to be sent where its folder is not."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def prune_folder(folder: Path, *, finished: bool) -> None:
    """Take from the folder of a trial that ended what nobody needs again: moments, or the checkpoint altogether."""
    for partial in folder.glob(".*.partial"):  # of writers that were killed
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    if not finished:
        for checkpoint in folder.glob("step-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
    elif adapter := adapter_folder(folder):
        (adapter.parent / OPTIMIZER_FILE).unlink(missing_ok=True)
