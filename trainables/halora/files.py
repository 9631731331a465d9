"""Files that are written atomically, whatever happens to their writer; and their digests."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halora.errors import UnreachableError, causes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES)


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file; one that is `durable` is on the disk itself when this returns, power loss or not."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # two may write the same file
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any, *, durable: bool = False) -> None:
    """Write a JSON file, see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1), durable=durable)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; others wait for it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


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
