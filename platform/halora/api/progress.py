"""How a sweep tells of its progress: a bar on a terminal, a line per event in a notebook and elsewhere."""

import time
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from halora.analysis.formats import duration

talk = Console(stderr=True)


def say(text: str) -> None:
    """A line on stderr as it is: no markup, no colours, not broken."""
    talk.print(text, markup=False, highlight=False, soft_wrap=True)


def shown_progress(
    wanted: bool, trials: int, finished: int = 0, failed: int = 0
) -> "AbstractContextManager[SweepProgress | Quiet]":
    """Progress of a sweep, of whose trials some ended in earlier runs; one that shows nothing where none is wanted."""
    return SweepProgress(trials, finished, failed) if wanted else nullcontext(Quiet())


class Quiet:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def trial(self, number: int, state: str, text: str = "", node: str = "") -> None:
        """Nothing."""


class SweepProgress:
    """Progress of a sweep: a bar on a terminal, a line per event elsewhere.

    Args:
        trials: How many there will be.
        finished: Those of earlier runs that finished.
        failed: Those that failed.
    """

    def __init__(self, trials: int, finished: int = 0, failed: int = 0) -> None:
        self._trials, self._done, self._failed = trials, finished, failed
        self._running: set[int] = set()
        self._paused: set[int] = set()
        self._began, self._ended_here = time.monotonic(), 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=talk,
            disable=not talk.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("trials", total=trials, state="")
        if finished or failed:
            self._refresh()

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line about what happens now."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def trial(self, number: int, state: str, text: str = "", node: str = "") -> None:
        """A trial began, reported, paused at a rung, finished or failed."""
        self._running.discard(number)
        self._paused.discard(number)
        if state in ("finished", "failed"):
            self._done += state == "finished"
            self._failed += state == "failed"
            self._ended_here += 1
        else:
            (self._paused if state == "paused" else self._running).add(number)
        self._refresh()
        if state != "training" or not talk.is_terminal:
            self.say(f"trial {number:>3} {state:<9} {text}{self._left()}")

    def _refresh(self) -> None:
        paused = f"{len(self._paused)} paused, " if self._paused else ""
        state = f"{len(self._running)} running, {paused}{self._failed} failed{self._left()}"
        self._bar.update(self._task, completed=self._done + self._failed + len(self._paused), state=state)

    def _left(self) -> str:
        if not self._ended_here or self._paused:  # early stopping makes the rest a guess
            return ""
        remaining = self._trials - self._done - self._failed
        seconds = (time.monotonic() - self._began) / self._ended_here * remaining
        return f" · about {duration(seconds)} left" if remaining else ""
