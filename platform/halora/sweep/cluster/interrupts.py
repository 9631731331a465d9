"""SIGTERM as Ctrl-C: what a batch system, a container or `kill` sends ends a sweep as a person at a terminal does."""

import signal
import threading
from types import FrameType


def sigterm_as_interrupt() -> None:
    """Have SIGTERM do from now on whatever SIGINT does when it comes. `ray.init` sets its own handler.

    Without it a sweep's trials are cut off, and its records stay open until a resume. Outside the main thread, where
    Python allows no handlers, nothing is done.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(signal.SIGINT)  # not raised: a shell ignores it for what it starts in the background
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
