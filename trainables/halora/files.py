"""Files that are written atomically and durably, whatever happens to their writer; locks and digests of files."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from halora.errors import UnreachableError, causes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that know no fsync of a folder


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file atomically, and to the disk itself: after a power loss it is whole, or as it was before.

    Args:
        path: The file.
        content: All of it; text in UTF-8.
        durable: False for what is made anew at no loss: then a power loss may leave it empty.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # two may write the same file
    try:
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent)


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write a JSON file, see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1), durable=durable)


def sync_folder(folder: Path) -> None:
    """Return once all files and folders below are on the disk itself; before a folder takes its name by a rename."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made, while the block runs; it ends with the process.

    Args:
        path: The folder or file.
        waiting: Told where another holds it, which is waited for.
    """
    lock = os.open(path, os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _took(lock):
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def locked_now(path: Path) -> IO[bytes] | None:
    """A file, locked for as long as it is open; none where another process, or this one, holds its lock."""
    file = path.open("rb")
    if _took(file.fileno()):
        return file
    file.close()
    return None


def _took(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def no_room(error: BaseException) -> bool:
    """Whether a file could not be written as the disk or the quota is full; libraries have their own ways to say so."""
    return _is_one_of(_FULL, error) or "database or disk is full" in str(error)  # SQLite's


def unwritable(error: BaseException) -> UnreachableError | None:
    """What a user is told where a file could not be written, or not be read, which led to an error; else nothing.

    The next step is the same for all: nothing that was recorded before is lost.
    """
    for each in sorted(causes(error), key=lambda each: not isinstance(each, OSError)):  # the plainest text first
        where = f"'{each.filename}'" if isinstance(each, OSError) and each.filename else "a file"
        if no_room(each):
            return UnreachableError(
                f"no space is left on the disk: {where} cannot be written",
                "make room and repeat the command; `halora sweep resume` continues a sweep",
            )
        if _is_one_of(_CLOSED, each) or "attempt to write a readonly database" in str(each):  # SQLite's
            said = each.strerror if isinstance(each, OSError) else str(each).strip().splitlines()[-1][:300]
            return UnreachableError(
                f"{where} cannot be written or read: {said}",
                "give this user the right to write the store, or name another with --store",
            )
    return None


def _is_one_of(numbers: tuple[int, ...], error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in numbers) or any(
        os.strerror(number) in str(error) for number in numbers
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
