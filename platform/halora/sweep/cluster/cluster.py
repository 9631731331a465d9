"""Where a sweep's workers run, as a user names it: this machine, or a Ray cluster."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from halora.errors import UserError
from halora.secret_urls import secrets_in

_FORMS = "auto, HOST:PORT, ray://HOST:PORT or http://HOST:PORT"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, or this machine.

    Attributes:
        address: Ray's address of it; empty for this machine alone.
        wheel: A wheel of this project that all its nodes are to use, instead of what is installed there.
    """

    address: str = ""
    wheel: Path | None = None

    @classmethod
    def at(cls, address: str | None, wheel: Path | None = None) -> "Cluster":
        """The cluster of an address and a wheel, both as typed.

        Raises:
            UserError: One of them is none.
        """
        problems = []
        if address and (found := ["a user"] if "@" in address else secrets_in(address)):  # not repeated
            problems.append(f"--address holds {' and '.join(found)}; a cluster's token comes from $RAY_AUTH_TOKEN")
        elif address and not (address == "auto" or _is_address(address)):
            problems.append(f"--address {address}: write {_FORMS}")
        if wheel and not address:
            problems.append(f"--wheel {wheel}: it is for the nodes of a cluster; name one with --address")
        if wheel and not (wheel.suffix == ".whl" and wheel.is_file()):
            problems.append(f"--wheel {wheel}: no such wheel; build one with `.venv/bin/uv build --wheel`")
        if problems:
            raise UserError(problems)
        return cls(address or "", wheel)

    @property
    def elsewhere(self) -> bool:
        """Whether a command is to be carried out on the cluster's head, and not by the process it was typed into."""
        return self.address.startswith(("http://", "https://", "ray://"))


def _is_address(address: str) -> bool:
    """Whether it has the form of an address, with its port where it needs one."""
    scheme, separator, _ = address.partition("://")
    if not separator:
        return re.fullmatch(r"[^\s/:]+:\d{1,5}", address) is not None
    try:
        parts = urlsplit(address)
        return scheme in ("http", "https", "ray") and bool(parts.hostname) and (bool(parts.port) or scheme != "ray")
    except ValueError:
        return False


LOCAL = Cluster()
"""This machine alone."""

RUNS = "the sweep runs"
"""What a driver says once nothing is left to refuse; whoever launched it may leave then."""

BEGINS = "halora begins"
"""What a command says first that is carried out for another machine; what stands before it is Ray's."""
