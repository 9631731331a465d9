"""What happened to a sweep, a JSON object per line: time, level, sweep, and trial and node where there are some."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

_POLL_S = 0.5
_LEVELS = {"failed": "error"}


class Watcher(Protocol):
    """Shows a person the progress of a sweep."""

    def say(self, text: str) -> None:
        """One line about what happens now."""

    def trial(self, number: int, state: str, text: str = "", node: str = "") -> None:
        """A trial began, reported, was lost, finished or failed; and the address of its node, where it is known."""


class DriverLog:
    """A watcher that writes the log, and passes everything on to another.

    Args:
        path: The log's file; it is added to.
        sweep: Name of the sweep.
        beside: The other watcher.
    """

    def __init__(self, path: Path, sweep: str, beside: Watcher) -> None:
        self._path, self._sweep, self._beside = path, sweep, beside

    def say(self, text: str) -> None:
        """Log and pass on."""
        self._write("info", {"message": text})
        self._beside.say(text)

    def trial(self, number: int, state: str, text: str = "", node: str = "") -> None:
        """Log and pass on."""
        where = {"node": node} if node else {}
        self._write(_LEVELS.get(state, "info"), {"trial": number, "state": state, **where, "message": text})
        self._beside.trial(number, state, text, node)

    def _write(self, level: str, content: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "level": level, "sweep": self._sweep, **content}, ensure_ascii=False)
        with (
            suppress(OSError),
            self._path.open("a", encoding="utf-8") as file,
        ):  # a full disk stops the sweep by its event log, not by this
            file.write(line + "\n")


def read_log(path: Path, *, follow: bool = False) -> Iterator[dict[str, Any]]:
    """The log's lines as they are, and with `follow` those to come."""
    if not path.exists() and not follow:
        return
    while not path.exists():
        time.sleep(_POLL_S)
    with path.open(encoding="utf-8") as file:
        text = ""
        while True:
            text += file.readline()
            if text.endswith("\n"):
                try:
                    line = json.loads(text)
                except ValueError:  # two lines in one, the first cut off as the disk was full
                    line = None
                if line is not None:
                    yield line
                text = ""
            elif follow:
                time.sleep(_POLL_S)
            else:
                return
