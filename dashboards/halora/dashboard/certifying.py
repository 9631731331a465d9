"""Certifications that are started from the page: `halora adapter select`, one at a time, in a process of its own."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from halora.dashboard.reading import tail
from halora.errors import UserError
from halora.records.store import Store

_LOG = "page.log"
_TAIL_LINES = 30
_GRACE_S = 20.0


@dataclass(frozen=True)
class Certifying:
    """A certification that the page started.

    Attributes:
        sweep: The sweep.
        trial: Number of the trial.
        process: What carries it out.
        log: What it said.
    """

    sweep: str
    trial: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.process.poll() is None

    @property
    def outcome(self) -> str:
        """How it ended, in words; empty while it runs."""
        ended = {None: "", 0: "passed and registered", 1: "no certificate: a gate was not passed"}
        code = self.process.poll()
        return ended.get(code, "cancelled" if code in (130, -15) else "ended with an error")

    @property
    def tail(self) -> str:
        """The last lines of its log."""
        return tail(self.log, _TAIL_LINES)

    @property
    def version(self) -> str:
        """Differs once there is anything new of it."""
        return f"{self.process.pid}.{self.log.stat().st_size}.{self.process.poll()}"


class Certifier:
    """Starts certifications and ends them with the server; used by many threads.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: Certifying | None = None
        self._lock = threading.Lock()

    @property
    def last(self) -> Certifying | None:
        """The one that was started last; none before the first."""
        return self._last

    def start(self, sweep: str, trial: int, min_accuracy: float | None) -> None:
        """Begin to certify a trial; what it has done stays, however it ends, and it goes on from there.

        Args:
            sweep: The sweep.
            trial: Number of the trial.
            min_accuracy: Accuracy that a chip needs; that of the sweep's gates for none.

        Raises:
            UserError: Another one is running.
        """
        with self._lock:
            if self._last and self._last.running:
                raise UserError(f"trial {self._last.sweep}/{self._last.trial} is being certified; wait, or cancel that")
            store = self._store.serving(sweep)
            command = [sys.executable, "-m", "halora.cli.main", "adapter", "select", sweep, "--trial", str(trial)]
            command += ["--store", str(store.root)]
            command += [] if min_accuracy is None else ["--min-accuracy", repr(min_accuracy)]
            folder = store.sweep(sweep).selection
            folder.mkdir(exist_ok=True)
            with (folder / _LOG).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1"},
                    start_new_session=True,  # Ctrl-C is for the server, which ends it in its own time
                )
            self._last = Certifying(sweep, trial, process, folder / _LOG)

    def cancel(self) -> None:
        """End the one that is running, if there is one; chips that are scored are kept."""
        with self._lock:
            if self._last is None or not self._last.running:
                return
            self._last.process.terminate()
            try:
                self._last.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._last.process.kill()
                self._last.process.wait()
