"""A sweep's journal: what was learned, one JSON object per line, on disk before anything else hears of it.

A line that was cut off by a crash is not there; a writer removes it. A process that is killed loses nothing it
appended; a machine that loses power loses nothing up to the last `sync`.
"""

import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from halora.errors import UserError

Entry = dict[str, Any]
"""A line of the journal, with its `kind` and the time `time_ms` it was learned."""

_VERSION = 1


class Journal:
    """The writing end, held by the one process that runs the sweep.

    Args:
        path: The file, made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()
        if os.fstat(self._file).st_size == 0:
            self.append({"journal": uuid.uuid4().hex, "version": _VERSION})
            self.sync()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line atomically.

        Raises:
            OSError: The disk is full or gone.
        """
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
        before = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError:
            with suppress(OSError):
                os.truncate(self._file, before)
            raise

    def sync(self) -> None:
        """Return once all lines are on the disk itself."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._file)

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = size
        while end:
            start = max(end - 65536, 0)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.truncate(self._file, end)


def read(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[Entry], int]:
    """Whole entries from a place on, and the place after them.

    Args:
        path: The journal's file.
        offset: Byte where an entry begins; 0 for the first.
        limit: Largest number of lines to read.

    Raises:
        UserError: The file cannot be read, or a line is not an entry.
    """
    entries: list[Entry] = []
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in islice(file, limit):
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line.decode("utf-8", "surrogatepass"))
                if "kind" in entry:
                    entries.append(entry)
                offset += len(line)
    except OSError as error:
        raise UserError(f"journal '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UserError(f"journal '{path}' is damaged at byte {offset}", "restore the file from a backup") from None
    return entries, offset


def entries_of(path: Path, trial: int) -> list[Entry]:
    """The entries of one trial; only their lines are parsed. None where the file is not there.

    Raises:
        UserError: The file cannot be read, or one of these lines is not an entry.
    """
    wanted = re.compile(rb'"trial": ?%d[,}]' % trial)
    entries = []
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and wanted.search(line):
                    entry = json.loads(line.decode("utf-8", "surrogatepass"))
                    if entry.get("trial") == trial:  # not merely in a text of another's
                        entries.append(entry)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"journal '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"journal '{path}' is damaged", "restore the file from a backup") from None
    return entries


def identity(path: Path) -> str:
    """What tells this journal from another that was in its place before; empty where there is none.

    Raises:
        UserError: It is of another version of the program, or no journal.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
        header = json.loads(line) if line.endswith(b"\n") else {"journal": "", "version": _VERSION}
        if header["version"] == _VERSION:
            return str(header["journal"])
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"journal '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"'{path}' is not a journal") from None
    raise UserError(f"journal '{path}' is of version {header['version']}, this program reads {_VERSION}")
