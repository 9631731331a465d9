"""Trying again what may pass: how long to wait between tries, in one place."""

import time
from collections.abc import Callable, Iterable, Iterator
from math import inf


def backoff_s(first_s: float, longest_s: float, within_s: float = inf) -> Iterator[float]:
    """Waits between tries, each twice the one before up to the longest, until `within_s` have passed in all."""
    end, wait_s = time.monotonic() + within_s, first_s
    while time.monotonic() < end:
        yield wait_s
        wait_s = min(2 * wait_s, longest_s)


def retried[T](
    call: Callable[[], T],
    may_pass: Callable[[Exception], bool],
    waits_s: Iterable[float],
    waiting: Callable[[], None] = lambda: None,
) -> T:
    """What a call returns, once it does not fail.

    Args:
        call: The call.
        may_pass: Whether it may succeed later, by its error.
        waits_s: Waits in seconds between the tries.
        waiting: Told before each wait.

    Raises:
        Exception: The call's last, when it does not pass or the waits are over.
    """
    waits = iter(waits_s)
    while True:
        try:
            return call()
        except Exception as error:
            wait_s = next(waits, None) if may_pass(error) else None
            if wait_s is None:
                raise
        waiting()
        time.sleep(wait_s)
