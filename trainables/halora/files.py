"""Files that appear whole or not at all, whatever happens to their writer; and their digests."""

import errno
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


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


def no_room(error: BaseException) -> bool:
    """Whether a file could not be written as the disk or the quota is full; libraries have their own ways to say so."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(each) in str(error) for each in full)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
