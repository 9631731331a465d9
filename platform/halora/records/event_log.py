"""A sweep's event log: what happened, an event per line as JSON, on disk before anything else hears of it.

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
from halora.events import Event, event_of

_VERSION = 3


class EventLog:
    """The writing end, held by the one process that runs the sweep.

    Args:
        path: The file, made if it is not there.
        launch: Identity of the launch it is of.

    Raises:
        UserError: It is of another launch.
    """

    def __init__(self, path: Path, launch: str) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _cut_torn_line(self._file)
        if os.fstat(self._file).st_size == 0:
            self._append({"log": uuid.uuid4().hex, "version": _VERSION, "launch": launch})
            self.sync()
        elif (written := _header(path)["launch"]) != launch:
            os.close(self._file)
            raise UserError(f"event log '{path}' is of launch {written}, not of {launch}", "bring the sweep's own back")

    def append(self, event: Event) -> None:
        """Add an event atomically.

        Raises:
            OSError: The disk is full or gone.
        """
        self._append(event.to_json())

    def _append(self, content: Mapping[str, Any]) -> None:
        line = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
        append_line(self._file, line)

    def sync(self) -> None:
        """Return once all lines are on the disk itself."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._file)


def append_line(file: int, line: bytes) -> None:
    """Add whole lines to a file of lines, or nothing; a line that a crash cut off goes.

    Args:
        file: Descriptor of the file, for reading and writing; no other process writes it now.
        line: The lines, with their ends.

    Raises:
        OSError: The disk is full or gone.
    """
    before = end = _cut_torn_line(file)
    try:
        while line:
            written = os.pwrite(file, line, end)
            line, end = line[written:], end + written
    except OSError:
        with suppress(OSError):
            os.truncate(file, before)
        raise


def _cut_torn_line(file: int) -> int:
    """Take a line without its end from a file; the file's size then."""
    size = os.fstat(file).st_size
    end = size
    while end and os.pread(file, 1, end - 1) != b"\n":
        start = max(end - 65536, 0)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.truncate(file, end)
    return end


def read(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[Event], int]:
    """Whole events from a place on, and the place after them.

    Args:
        path: The event log's file.
        offset: Byte where a line begins; 0 for the first.
        limit: Largest number of lines to read.

    Raises:
        UserError: The file cannot be read, or a line is not an event.
    """
    events: list[Event] = []
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in islice(file, limit):
                if not line.endswith(b"\n"):
                    break
                content = json.loads(line.decode("utf-8", "surrogatepass"))
                if "kind" in content:  # not the header
                    events.append(event_of(content))
                offset += len(line)
    except OSError as error:
        raise UserError(f"event log '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"event log '{path}' is damaged at byte {offset}", "restore the file from a backup") from None
    return events, offset


def events_of(path: Path, trial: int) -> list[Event]:
    """The events of one trial; only their lines are parsed. None where the file is not there.

    Raises:
        UserError: The file cannot be read, or one of these lines is not an event.
    """
    wanted = re.compile(rb'"trial": ?%d[,}]' % trial)
    events: list[Event] = []
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and wanted.search(line):
                    content = json.loads(line.decode("utf-8", "surrogatepass"))
                    if content.get("trial") == trial:  # not merely in a text of another's
                        events.append(event_of(content))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"event log '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"event log '{path}' is damaged", "restore the file from a backup") from None
    return events


def identity(path: Path) -> str:
    """What tells this event log from another that was in its place before; empty where there is none.

    Raises:
        UserError: It is of another version of the program, or no event log.
    """
    return _header(path)["log"]


def _header(path: Path) -> dict[str, str]:
    """Identities of the event log and of its launch; empty ones where there is none."""
    try:
        with path.open("rb") as file:
            line = file.readline()
        if not line.endswith(b"\n"):
            return {"log": "", "launch": ""}
        header = json.loads(line)
        if header["version"] == _VERSION:
            return {name: str(header[name]) for name in ("log", "launch")}
    except FileNotFoundError:
        return {"log": "", "launch": ""}
    except OSError as error:
        raise UserError(f"event log '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"'{path}' is not an event log") from None
    raise UserError(f"event log '{path}' is of version {header['version']}, this program reads {_VERSION}")
