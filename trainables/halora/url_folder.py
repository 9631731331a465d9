"""A folder on any fsspec URL: a path of this machine, S3 or what speaks its language, and whatever has a package.

Object stores have no folders and no renames, but show an object complete or not at all. A local path gets the same by a
file written beside and renamed. Credentials come from the environment or the protocol's own files, never from a URL.
"""

import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from halora.errors import StorageError, UserError
from halora.retries import retried
from halora.secret_urls import secrets_in

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

RETRIES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between the tries of an operation that fails in a way which may pass."""
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError, TypeError)
_LOCAL = ("file", "local")


def is_url(text: str) -> bool:
    """Whether a text names a place by its protocol, and not by a path of this machine."""
    return "://" in text


def is_below(name: str) -> bool:
    """Whether a name leads to a place below the folder it is relative to; an object may have any name."""
    return not name.startswith("/") and ".." not in name.split("/")


def checked_url(text: str) -> str:
    """A place as it is kept: a path absolute, a URL without its last slash.

    Raises:
        UserError: It holds a secret, or may.
    """
    if found := secrets_in(text):
        raise UserError(
            f"the storage URL holds {' and '.join(found)}, which would be written to disk",
            "leave it out and set the protocol's own variables, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    return text.rstrip("/") if is_url(text) or not text else str(Path(text).expanduser().absolute())


class UrlFolder:
    """A folder on a URL, which need not exist.

    Args:
        url: A URL of any protocol that fsspec knows, or an absolute path.
        retries_s: Waits between the tries of an operation.

    Raises:
        UserError: fsspec does not know the protocol, or its package is not installed.
    """

    def __init__(self, url: str, retries_s: tuple[float, ...] = RETRIES_S) -> None:
        self.url, self._retries_s = url, retries_s
        self._fs, self._root = _opened(url)
        self._local = bool({*_names(self._fs)} & {*_LOCAL})

    def files(self) -> dict[str, int]:
        """Size in bytes of every file below, by its name relative to the folder; of a folder that is not there none."""

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
            return {name.removeprefix(self._root).lstrip("/"): int(info["size"]) for name, info in found.items()}

        try:
            return self._tried("cannot be read", find)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: There is none of that name.
            StorageError: It cannot be read now.
        """
        return self._tried("cannot be read", lambda: bytes(self._fs.cat_file(self._at(name))))

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to a path of this machine, whose folder is made.

        Raises:
            FileNotFoundError: There is none of that name.
            StorageError: It cannot be read now.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tried("cannot be read", lambda: self._fs.get_file(self._at(name), str(path)))

    def put(self, path: Path, name: str) -> None:
        """Copy a file of this machine here; not a step that is all or nothing on a local path.

        Raises:
            StorageError: It cannot be written.
        """
        self._written(lambda: self._fs.put_file(str(path), self._at(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which is there complete or not at all, or as it was before.

        Raises:
            StorageError: It cannot be written.
        """
        place = self._at(name)
        if not self._local:
            self._written(lambda: self._fs.pipe_file(place, content))
            return
        folder, _, last = place.rpartition("/")
        beside = f"{folder}/.{last}.{secrets.token_hex(4)}.partial"

        def rename() -> None:
            self._fs.pipe_file(beside, content)
            self._fs.mv(beside, place)

        self._written(rename)

    def remove(self, *names: str) -> None:
        """Remove files one after the other; those that are gone already are none the worse.

        Raises:
            StorageError: One cannot be removed.
        """
        for name in names:
            with suppress(FileNotFoundError):
                self._tried("cannot be written", partial(self._fs.rm_file, self._at(name)))

    def remove_folder(self, name: str = "") -> None:
        """Remove whatever is below a name, or the whole folder.

        Raises:
            StorageError: It cannot be removed.
        """
        with suppress(FileNotFoundError):
            self._tried("cannot be written", lambda: self._fs.rm(self._at(name), recursive=True))

    def check_writable(self) -> None:
        """Write a file, read it again and remove it.

        Raises:
            StorageError: One of these cannot be done.
        """
        name = f".write-test-{secrets.token_hex(4)}"
        self.write(name, b"halora")
        try:
            if self.read(name) != b"halora":
                raise FileNotFoundError
        except FileNotFoundError:
            raise StorageError(f"storage '{self.url}' does not give back what was just written") from None
        self.remove(name)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _written(self, call: Callable[[], object]) -> None:
        try:
            self._tried("cannot be written", call)
        except FileNotFoundError as error:  # a bucket that does not exist
            raise self._error("cannot be written", error) from None

    def _tried[T](self, cannot: str, call: Callable[[], T]) -> T:
        """What `call` gives, once it does not fail; errors that do not pass are raised at once."""
        try:
            return retried(call, lambda error: not isinstance(error, _LASTING), self._retries_s)
        except FileNotFoundError:
            raise
        except Exception as error:  # every protocol has errors of its own
            raise self._error(cannot, error) from None

    def _error(self, cannot: str, error: Exception) -> StorageError:
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return StorageError(f"storage '{self.url}' {cannot}: {said}")


def _opened(url: str) -> "tuple[AbstractFileSystem, str]":
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    from fsspec.utils import get_protocol  # type: ignore[import-untyped]

    protocol = get_protocol(url)
    options = {"auto_mkdir": True} if protocol in _LOCAL else {"use_listings_cache": False}
    try:
        fs, root = url_to_fs(url, **options)
    except ImportError as error:
        install = "pip install 'halora-sweep[s3]'" if protocol in ("s3", "s3a") else ""
        raise UserError(f"storage '{url}': a package is missing on this machine: {error}", install) from None
    except ValueError as error:
        raise UserError(
            f"storage '{url}': {error}", "name a path, s3://BUCKET/FOLDER, or a URL that fsspec knows"
        ) from None
    return fs, root.rstrip("/")


def _names(fs: "AbstractFileSystem") -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
