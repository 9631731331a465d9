"""Work on somebody else's files in a process of its own, which is ended where it takes more than it may."""

import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil

from halora.errors import UserError

READING_S = 60
"""Processor time that reading may take, in seconds."""
READING_BYTES = 1 << 30
"""Memory that reading may take beside the program."""
_STARTING_S = 900.0
_WAITING_FACTOR = 10  # of reading, on a busy machine


def in_child[T](
    work: Callable[..., T],
    arguments: dict[str, Any],
    say: Callable[[str], None],
    *,
    timeout_s: float,
    reading_s: int = READING_S,
) -> T:
    """What `work` gives, called in a new process.

    Args:
        work: Called with the arguments, with `say`, and with `reading`: a context within which its processor time and
            memory are bounded. A function of a module.
        arguments: Of it.
        say: Told what it says.
        timeout_s: Longest it may take beside reading, in seconds.
        reading_s: Processor time that reading may take, in seconds.

    Raises:
        UserError: What it raises; or it took too long or too much memory, or broke.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_carry_out, args=(sender, work, arguments, reading_s), daemon=True)
    process.start()
    sender.close()
    what, deadline = "starting", time.monotonic() + _STARTING_S
    try:
        while True:
            if not receiver.poll(max(deadline - time.monotonic(), 0)):
                raise UserError(
                    f"{what} took too long and was ended", "give it more with --timeout, or do not trust it"
                )
            try:
                kind, value = receiver.recv()
            except EOFError:
                raise _died(process, what, reading_s) from None
            match kind:
                case "say":
                    say(value)
                case "begins":
                    what, left_s = value
                    deadline = time.monotonic() + (left_s or timeout_s)
                case "gives":
                    found: T = value
                    return found
                case _:
                    raise value
    finally:
        process.kill()
        process.join()
        receiver.close()


def _died(process: Any, what: str, reading_s: int) -> UserError:
    process.join()
    code = process.exitcode or 0
    if code == -signal.SIGXCPU:
        return UserError(f"{what} took more than {reading_s} s of processor time and was ended")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return UserError(f"{what} ended its process ({how}): it takes too much memory, or breaks what reads it")


def _carry_out(sender: Connection, work: Callable[..., Any], arguments: dict[str, Any], reading_s: int) -> None:
    warnings.simplefilter("ignore")

    @contextmanager
    def reading(what: str) -> Iterator[None]:
        sender.send(("begins", (what, reading_s * _WAITING_FACTOR)))
        with _limited(reading_s):
            yield
        sender.send(("begins", ("the check", None)))

    try:
        sender.send(("gives", work(**arguments, say=lambda text: sender.send(("say", text)), reading=reading)))
    except UserError as error:
        sender.send(("raises", error))
    except MemoryError:
        sender.send(("raises", UserError("it takes too much memory")))
    except Exception as error:  # whatever a library makes of files that were made to break it
        sender.send(("raises", UserError(f"the check broke: {type(error).__name__}: {error}")))


@contextmanager
def _limited(reading_s: int) -> Iterator[None]:
    """Bounds on what this process takes of processor time and memory while the block runs."""
    own = psutil.Process()
    used_s = sum(own.cpu_times()[:2])
    wanted = {
        resource.RLIMIT_CPU: int(used_s) + reading_s,
        resource.RLIMIT_AS: own.memory_info().vms + READING_BYTES,
    }
    before = {kind: resource.getrlimit(kind) for kind in wanted}
    for kind, most in wanted.items():
        soft, hard = before[kind]
        resource.setrlimit(kind, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    finally:
        for kind, limits in before.items():
            resource.setrlimit(kind, limits)
