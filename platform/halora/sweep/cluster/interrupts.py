"""SIGTERM and SIGHUP as Ctrl-C: what a batch system sends, or a lost terminal, ends a sweep as a person would."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def signals_as_interrupt() -> None:
    """Have SIGTERM and SIGHUP do from now on whatever SIGINT does when they come. `ray.init` sets handlers of its own.

    Without it a sweep's trials are cut off, and its records stay open until a resume. A SIGHUP that is ignored stays
    ignored, as `nohup` wants it. Outside the main thread, where Python allows no handlers, nothing is done.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, _hang_up)


@contextmanager
def children_ignore_hangups() -> Iterator[None]:
    """Processes started in the block live on when the terminal is lost; their parent ends them in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(signal.SIGINT)  # not raised: a shell ignores it for what it starts in the background
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)


def _hang_up(number: int, frame: FrameType | None) -> None:
    """What is still said goes nowhere: a terminal that is gone answers every write with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if _cannot_be_written(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)
    _interrupt(number, frame)


def _cannot_be_written(stream: int) -> bool:
    try:
        os.write(stream, b"")
    except OSError:
        return True
    return False
