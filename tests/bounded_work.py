"""Work that a child process is given, some of which it cannot finish; imported by the child."""

import os
import signal
import time

from halora.errors import UserError


def behave(how, say, reading):
    """Do something in the block or after it; what it is called tells which."""
    say(f"told to {how}")
    with reading("reading it"):
        if how == "spin":
            while True:
                pass
        if how == "exhaust":
            return len(bytes(8 << 30))
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "refuse":
            raise UserError(["first", "second"], "do this")
        if how == "break":
            raise KeyError("x" * 10_000)
    if how == "sleep":
        time.sleep(3600)
    return len(bytes(2 << 30)) if how == "grow later" else os.getpid()
