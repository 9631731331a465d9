"""Tells somebody elsewhere what happens in a sweep: that it ended, that a trial failed, that its front changed.

A thread of its own follows the event log from where it last got to, so that what a driver that was killed had not told
is told by the next. It never holds the sweep up, and never ends it.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from halora.analysis.front import front
from halora.analysis.trials import grouped, sweep_objectives
from halora.errors import UserError
from halora.events import Event, Failed, Reported, SweepFinished, SweepInterrupted
from halora.files import write_whole
from halora.records import event_log
from halora.records.store import SweepFolder
from halora.records.sweep_state import SweepState
from halora.retries import backoff_s, retried
from halora.spaces.sweep import SweepConfig

NOTIFY = "HALORA_NOTIFY"
"""Environment variable: an http(s) URL to post to, or a command line; never written anywhere, as it may be a secret."""
NOTIFY_ON = "HALORA_NOTIFY_ON"
"""Environment variable: some of `KINDS`; all where it is not set."""
KINDS = ("ended", "failed", "front")

_LINES = 500
_POLL_S = 1.0
_LONGEST_S = 20.0  # that a try may take
_TRYING_S = 60.0  # how long one notification is tried
_PATIENCE_S = 30.0  # how long the end of a sweep waits for those that are left


class Channel(Protocol):
    """Where notifications go."""

    def send(self, content: Mapping[str, Any]) -> None:
        """Send one.

        Raises:
            NotSentError: It was not taken.
        """


class NotSentError(Exception):
    """A notification that was not taken; its text has nothing of where it was sent.

    Attributes:
        may_pass: Whether it may be taken later.
    """

    def __init__(self, text: str, *, may_pass: bool = True) -> None:
        super().__init__(text)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Webhook:
    """A URL that notifications are posted to as JSON."""

    url: str

    def send(self, content: Mapping[str, Any]) -> None:
        """Post it; no redirect is followed, and no more of the answer is read than its status."""
        import requests

        half_s, status = _LONGEST_S / 2, 0  # to connect, and to answer
        try:
            with requests.post(self.url, json=content, timeout=half_s, allow_redirects=False, stream=True) as answer:
                status = answer.status_code
        except (requests.RequestException, ValueError) as error:  # its text has the URL
            raise NotSentError(f"no answer ({type(error).__name__})") from None
        if not 200 <= status < 300:
            raise NotSentError(f"answer {status}", may_pass=status >= 500 or status in (408, 429))


@dataclass(frozen=True)
class Command:
    """A program that is given each notification as JSON on its standard input, without a shell."""

    arguments: tuple[str, ...]

    def send(self, content: Mapping[str, Any]) -> None:
        """Run it, with all that it starts, for so long and no longer; what it prints is dropped."""
        try:
            process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise NotSentError(f"it cannot be started: {error.strerror}", may_pass=False) from None
        try:
            process.communicate(json.dumps(content).encode(), timeout=_LONGEST_S)
        except subprocess.TimeoutExpired:
            raise NotSentError(f"it was not done within {_LONGEST_S:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session, begun above
            process.wait()
        if process.returncode:
            raise NotSentError(f"it ended with exit code {process.returncode}")


@dataclass(frozen=True)
class Notify:
    """Who is told, and of what.

    Attributes:
        channel: Where notifications go.
        kinds: Some of `KINDS`.
    """

    channel: Channel
    kinds: frozenset[str]

    @classmethod
    def from_environment(cls) -> "Notify | None":
        """What the environment asks for; nothing where it asks for nothing.

        Raises:
            UserError: With every mistake; what may be a secret is not repeated.
        """
        where, problems = os.environ.get(NOTIFY, "").strip(), list[str]()
        kinds = frozenset(os.environ.get(NOTIFY_ON, "").replace(",", " ").split() or KINDS)
        if unknown := sorted(kinds - set(KINDS)):
            problems.append(f"${NOTIFY_ON}: unknown {', '.join(unknown)}; there are {', '.join(KINDS)}")
        channel: Channel = Webhook(where)
        if where.lower().startswith(("http://", "https://")):
            with suppress(ValueError):
                where = where if urlsplit(where).hostname else ""
            if not where:
                problems.append(f"${NOTIFY} is a URL without a host")
        elif where:
            try:
                channel = Command(tuple(shlex.split(where)))
                found = shutil.which(channel.arguments[0])
            except (ValueError, IndexError):
                found = None
            if not found:
                problems.append(f"${NOTIFY} is no http(s) URL, and no command that is found")
        if problems:
            raise UserError(problems, f"correct the environment, or run `unset {NOTIFY}`")
        return cls(channel, kinds) if where else None


@contextmanager
def notifying(
    folder: SweepFolder, sweep: SweepConfig, notify: Notify | None, say: Callable[[str], None]
) -> Iterator[None]:
    """Have somebody told what the block records, and for a while afterwards.

    Args:
        folder: The sweep's folder.
        sweep: The sweep.
        notify: Who is told; nobody for none.
        say: Told in one line what could not be sent.
    """
    if notify is None:
        yield
        return
    notifier = Notifier(folder, sweep, notify, say)
    notifier.start()
    try:
        yield
    finally:
        notifier.finish()


class Notifier(threading.Thread):
    """Follows an event log and sends what there is to tell.

    How far that is stands in a file of the sweep's folder. Where there is none, all that is recorded by now is old.

    Args:
        folder: The sweep's folder.
        sweep: The sweep.
        notify: Who is told.
        say: Told in one line what could not be sent.
    """

    def __init__(self, folder: SweepFolder, sweep: SweepConfig, notify: Notify, say: Callable[[str], None]) -> None:
        super().__init__(name=f"notifier of {sweep.name}", daemon=True)
        self._log, self._file = folder.event_log_file, folder.notified_file
        self._sweep, self._notify, self._say = sweep, notify, say
        self._objectives = sweep_objectives(sweep)
        self._ending = threading.Event()
        self._recorded, self._members = SweepState(), frozenset[int]()
        self._offset = self._told_before()

    def run(self) -> None:
        """Send until the sweep has ended and all is told."""
        try:
            self._catch_up()
            while self._send_some() or not self._ending.is_set():
                self._ending.wait(_POLL_S)
            self._send_some()  # what came before it ended
        except Exception as error:  # nobody is worth a sweep
            self._say(f"notifications end: {type(error).__name__}")

    def finish(self) -> None:
        """Wait for what is left to be sent, but not for long."""
        self._ending.set()
        self.join(_PATIENCE_S)

    def _told_before(self) -> int:
        end = self._log.stat().st_size if self._log.exists() else 0
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(self._file.read_text(encoding="utf-8"))
            if told["log"] == event_log.identity(self._log):
                return min(int(told["offset"]), end)
        return end

    def _catch_up(self) -> None:
        """Take what was told before as known."""
        if self._offset:
            with self._log.open("rb") as file:
                lines = file.read(self._offset).count(b"\n")
            events, self._offset = event_log.read(self._log, 0, lines)
            self._recorded.take(events)
            self._members = self._front()

    def _send_some(self) -> bool:
        """Tell of the next events; whether there were any."""
        if not self._log.exists():
            return False
        events, after = event_log.read(self._log, self._offset, _LINES)
        for content in self._to_tell(events):
            if content["event"] in self._notify.kinds:
                self._send(content)
        if moved := after != self._offset:
            self._offset = after
            told = {"log": event_log.identity(self._log), "offset": after}
            write_whole(self._file, json.dumps(told), durable=False)  # else some is told again
        return moved

    def _to_tell(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        """What there is to tell of some events; of a front that changed several times where it got to."""
        self._recorded.take(events)
        for event in events:
            if isinstance(event, Failed):
                text = f"trial {event.trial} failed: {event.cause}"
                yield self._content("failed", event.time_ms, text, trial=event.trial, cause=event.cause)
        milestones = [event for event in events if not isinstance(event, Reported)]
        if milestones and (members := self._front()) != self._members:
            joined, left = sorted(members - self._members), sorted(self._members - members)
            self._members = members
            told = [
                f"{word} {', '.join(map(str, of))}" for word, of in (("joined by", joined), ("left by", left)) if of
            ]
            text = f"the front has {len(members)} trials, {' and '.join(told)}"
            more = {"members": sorted(members), "joined": joined, "left": left}
            yield self._content("front", milestones[-1].time_ms, text, **more)
        for event in events:
            if isinstance(event, SweepFinished | SweepInterrupted):
                states = Counter(point.state for point in self._recorded.points())
                text = f"{event.state}: {states['finished']} trials finished, {states['failed']} failed"
                yield self._content("ended", event.time_ms, text, state=event.state, trials=dict(states))

    def _front(self) -> frozenset[int]:
        feasible = grouped(self._recorded.points(), self._objectives).feasible
        return frozenset(point.number for point in front(feasible, self._objectives))

    def _content(self, kind: str, time_ms: int, text: str, **more: Any) -> dict[str, Any]:
        own = {"event": kind, "sweep": self._sweep.name, "launch": self._sweep.launch, "time_ms": time_ms}
        return {**own, "text": f"sweep '{self._sweep.name}': {text}", **more}

    def _send(self, content: Mapping[str, Any]) -> None:
        def may_pass(error: Exception) -> bool:
            return isinstance(error, NotSentError) and error.may_pass and not self._ending.is_set()

        try:
            retried(lambda: self._notify.channel.send(content), may_pass, backoff_s(1.0, 15.0, _TRYING_S))
        except NotSentError as error:
            self._say(f"nobody could be notified of '{content['event']}': {error}")
