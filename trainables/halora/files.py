"""Files that appear whole or not at all, whatever happens to their writer; and their digests."""

import hashlib
import json
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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
