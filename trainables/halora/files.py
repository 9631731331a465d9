"""Files that appear whole or not at all, whatever happens to their writer; and their digests."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a text file."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    scratch.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    write_whole(path, json.dumps(content, indent=1))


def no_room(error: BaseException) -> bool:
    """Whether a file could not be written as the disk or the quota is full; libraries have their own ways to say so."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(each) in str(error) for each in full)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
