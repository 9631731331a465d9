"""Files that are written atomically, whatever happens to their writer; their digests; files of other people."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from halora.errors import UserError


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file; one that is `durable` is on the disk itself when this returns, power loss or not."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    scratch.replace(path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any, *, durable: bool = False) -> None:
    """Write a JSON file, see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1), durable=durable)


def no_room(error: BaseException) -> bool:
    """Whether a file could not be written as the disk or the quota is full; libraries have their own ways to say so."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(each) in str(error) for each in full)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: Path, most_bytes: int) -> None:
    """Refuse links, devices and pipes, which hang or lead elsewhere, and files of more bytes.

    Raises:
        UserError: It is one of these, or is not there.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file")
    if found.st_size > most_bytes:
        raise UserError(f"{path} has {found.st_size:,} bytes, more than the {most_bytes:,} that such a file may have")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of bounded size, see `check_regular`.

    Raises:
        UserError: It is none, or too large, or cannot be read.
    """
    check_regular(path, most_bytes)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(most_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
