"""Delivers a sweep's event log to MLflow while the sweep runs, and what is left of it afterwards.

A thread of its own reads the event log from where it last got to and delivers in batches. What MLflow does not take now
is tried again, later and later; the trials never wait for it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from halora.events import Event
from halora.records import event_log, tracking
from halora.records.delivery import DeliveryOffset, keep_refused
from halora.records.publishing import Publisher
from halora.records.recorder import SweepRecorder
from halora.records.store import Store, SweepFolder
from halora.records.tracking import MlflowSweep, first_line, is_refusal, is_silence, may_pass
from halora.retries import backoff_s
from halora.spaces.sweep import SweepConfig

_LINES = 500
_PAUSE_S = 0.5
_LONGEST_DELAY_S = 15.0
_PATIENCE_S = 60.0
"""How long the end of a sweep waits for an MLflow that does not answer."""


@contextmanager
def recording(store: Store, sweep: SweepConfig, say: Callable[[str], None]) -> Iterator[SweepRecorder]:
    """A recorder whose event log is delivered while the block runs, and to its end afterwards if MLflow answers.

    Args:
        store: The store, with the server to deliver to.
        sweep: The sweep; its folder exists.
        say: Tells a person one line.
    """
    recorder = SweepRecorder(store.sweep(sweep.name), sweep)
    exporter = MlflowExporter(store, sweep, Publisher(store.sweep(sweep.name), sweep, recorder.recorded), say)
    exporter.start()
    try:
        yield recorder
    finally:
        recorder.close()
        if left := exporter.finish():
            say(
                f"MLflow at {store.tracking_uri} lacks {left} records, which are kept; "
                f"deliver them with: halora sweep resume {sweep.name}"
            )


def _waits_s() -> Iterator[float]:
    return backoff_s(2 * _PAUSE_S, _LONGEST_DELAY_S)


class MlflowExporter(threading.Thread):
    """Delivers an event log.

    Args:
        store: The store, with the server to deliver to.
        sweep: The sweep.
        publisher: Draws the front and the report.
        say: Tells a person one line.
    """

    def __init__(self, store: Store, sweep: SweepConfig, publisher: Publisher, say: Callable[[str], None]) -> None:
        super().__init__(name=f"exporter of {sweep.name}", daemon=True)
        self._folder: SweepFolder = store.sweep(sweep.name)
        self._mlflow, self._remote = MlflowSweep(store, sweep), store.remote
        self._publisher, self._say = publisher, say
        self._delivered = DeliveryOffset(self._folder, store.server)
        self._ending = threading.Event()
        self._gives_up_at = float("inf")
        self._failing_since: float | None = None
        self._silent = False
        self._cannot_draw = False
        self._uploaded = 0

    def run(self) -> None:
        """Deliver until the event log is closed and all of it is delivered, or time is up."""
        delay, waits_s = _PAUSE_S, _waits_s()
        while True:
            ending = self._ending.is_set()  # before the event log is read, so that nothing comes after
            self._draw(ending)
            try:
                moved = self._deliver_some()
                if not moved:
                    self._upload()
                    if ending:
                        self._mlflow.remove_duplicates()
                        return
                self._answered()
                delay, waits_s = _PAUSE_S, _waits_s()
            except Exception as error:  # MLflow, requests and SQLAlchemy raise many kinds
                self._not_delivered(error)
                moved = False
                delay = next(waits_s)
            if time.monotonic() > self._gives_up_at:
                return
            if not moved:
                self._wait(delay)

    def finish(self) -> int:
        """Wait until all is delivered, or until MLflow has not answered for so long; the number of events left."""
        self._gives_up_at = time.monotonic() + _PATIENCE_S
        self._ending.set()
        while self.is_alive():
            if self._failing_since is None:
                self._gives_up_at = time.monotonic() + _PATIENCE_S
            self.join(0.2)
        return self._delivered.left()

    def _wait(self, delay: float) -> None:
        if self._ending.is_set():
            time.sleep(min(delay, 1.0))
        else:
            self._ending.wait(delay)

    def _draw(self, ending: bool) -> None:
        try:
            if ending or self._publisher.due:
                self._publisher.draw()
        except Exception as error:  # a picture is not worth a sweep
            if not self._cannot_draw:
                self._say(f"the report cannot be drawn: {type(error).__name__}: {first_line(error)}")
            self._cannot_draw = True

    def _upload(self) -> None:
        if self._uploaded != self._publisher.drawn:
            drawn = self._publisher.drawn
            with self._answer_awaited():
                self._mlflow.publish(self._folder.published)
            self._uploaded = drawn

    def _deliver_some(self) -> bool:
        """Deliver the next events, if there are any, and remember how far that was."""
        events, after = event_log.read(self._folder.event_log_file, self._delivered.offset, _LINES)
        if after == self._delivered.offset:
            return False
        with self._folder.event_log_file.open("rb") as file:
            os.fsync(file.fileno())  # on this disk before in MLflow
        by_trial: dict[int | None, list[Event]] = {}
        for event in events:
            by_trial.setdefault(event.trial, []).append(event)
        with self._answer_awaited():
            for number, own in by_trial.items():
                self._deliver(number, own)
        self._delivered.move(after)
        return True

    def _deliver(self, number: int | None, events: list[Event]) -> None:
        """Deliver events of one run; where some never can be, all the others, and keep those."""
        try:
            self._mlflow.deliver(number, events)
        except Exception as error:
            if may_pass(error):
                raise
            if len(events) > 1:
                for event in events:
                    self._deliver(number, [event])
                return
            what = f"a record of {'the sweep' if number is None else f'trial {number}'}"
            said = f"MLflow refused {what}" if is_refusal(error) else f"{what} cannot be delivered"
            keep_refused(self._folder, events[0], str(error) or first_line(error))
            self._say(f"{said}, kept in {self._folder.refused_file}: {first_line(error)}")

    @contextmanager
    def _answer_awaited(self) -> Iterator[None]:
        """Tell a person when the server has not answered for long, while it is waited for."""
        longest_s = tracking.ANSWERING_S
        waiting = threading.Timer(longest_s, lambda: self._told_silent(f"no answer within {longest_s:.0f} s"))
        waiting.daemon = True
        if self._remote:
            waiting.start()
        try:
            yield
        finally:
            waiting.cancel()

    def _answered(self) -> None:
        if self._failing_since is not None:
            said = "MLflow answers again" if self._silent else "records are delivered again"
            self._say(f"{said}, after {time.monotonic() - self._failing_since:.0f} s")
        self._failing_since = None

    def _not_delivered(self, error: Exception) -> None:
        if is_silence(error):
            self._told_silent(first_line(error))
        elif self._failing_since is None:
            self._failing_since, self._silent = time.monotonic(), False
            self._say(f"records cannot be delivered now, and wait on disk: {first_line(error)}")

    def _told_silent(self, said: str) -> None:
        if self._failing_since is None:
            self._failing_since, self._silent = time.monotonic(), True
            self._say(f"MLflow does not answer, records wait on disk: {said}")
