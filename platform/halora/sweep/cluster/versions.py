"""What runs here: this project's code by its digest, and the libraries that have to be the same on every node."""

import hashlib
import platform
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("ray", "torch", "transformers", "peft", "deepspeed", "safetensors", "numpy")

CLIENT = "HALORA_CLIENT_CODE"
"""Environment variable: the code of the machine a command was typed on, where it is carried out on another."""


def own_versions() -> dict[str, str]:
    """Python, the libraries and the code of this process, each by what tells it from another."""
    found = {"python": platform.python_version().rpartition(".")[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return {**found, "halora": own_code()}


def own_code() -> str:
    """Digest of the package's files, whichever way it is installed."""
    files: dict[str, Path] = {}
    for portion in map(Path, import_module("halora").__path__):
        for path in portion.rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                files.setdefault(path.relative_to(portion).as_posix(), path)
    return code_digest({name: path.read_bytes() for name, path in files.items()})


def code_digest(files: Mapping[str, bytes]) -> str:
    """Digest of a package's files by their paths within it."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:12]
