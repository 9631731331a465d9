"""The certifications that a sweep has begun: they share one error level, so they are remembered in its folder.

Every attempt has chips of its own in the `certify` pool, and their number is fixed before the first is looked at.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halora.errors import UserError
from halora.files import write_json
from halora.records.store import SweepFolder
from halora.selection.certificate import chips_needed, error_per_attempt
from halora.spaces.gates import Gates

_BOOK = "attempts.json"
_SPEC = ("min_accuracy", "min_yield", "failures", "min_chips", "test_rows")
"""Gates that say what is shown on which chips and rows; another of these is another attempt."""


class ErrorSpent(UserError):
    """A sweep has begun as many certifications as share its error level."""


@dataclass(frozen=True)
class Attempt:
    """A certification as it was begun.

    Attributes:
        number: From 1.
        trial: Number of the trial.
        adapter_sha256: Digest of its adapter's file.
        spec: What was asked, see `_SPEC`.
        first_chip: Number of its first chip in the `certify` pool.
        chips: Number of its chips.
    """

    number: int
    trial: int
    adapter_sha256: str
    spec: Mapping[str, Any]
    first_chip: int
    chips: int

    def folder(self, sweep: SweepFolder) -> Path:
        """Where its scores and its result are kept."""
        return sweep.selection / f"attempt-{self.number:02d}"


def attempts_of(folder: SweepFolder) -> list[Attempt]:
    """Certifications that a sweep has begun, in their order."""
    return [Attempt(**content) for content in _book(folder).get("attempts", ())]


def chips_by_failures(gates: Gates) -> dict[int, int]:
    """Chips that the wanted yield takes if none, one or two of them may fail."""
    error = error_per_attempt(gates.confidence, gates.candidates)
    return {failures: chips_needed(gates.min_yield, error, failures) for failures in range(3)}


@contextmanager
def only_selection(folder: SweepFolder, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the sweep's selection; waits for another process that has it."""
    folder.selection.mkdir(exist_ok=True)
    with (folder.selection / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _book(folder: SweepFolder) -> dict[str, Any]:
    file = folder.selection / _BOOK
    return dict(json.loads(file.read_text())) if file.exists() else {}


def open_attempt(folder: SweepFolder, sweep: str, trial: int, adapter_sha256: str, gates: Gates) -> Attempt:
    """The attempt that asks this of this adapter, begun now if it was not before.

    Raises:
        ErrorSpent: As many are begun as share the error level.
        UserError: They share it otherwise than asked.
    """
    book = _book(folder)
    shared = {"confidence": gates.confidence, "candidates": gates.candidates}
    begun = [Attempt(**content) for content in book.get("attempts", ())]
    if begun and book["shared"] != shared:
        was = book["shared"]
        raise UserError(
            f"the certifications of '{sweep}' share an error level fixed with the first of them: confidence "
            f"{was['confidence']:g} over {was['candidates']}, not {gates.confidence:g} over {gates.candidates}",
            f"ask with --confidence {was['confidence']:g} --set candidates={was['candidates']}",
        )
    spec = gates.model_dump(mode="json", include=set(_SPEC))
    for attempt in begun:
        if (attempt.trial, attempt.adapter_sha256, dict(attempt.spec)) == (trial, adapter_sha256, spec):
            return attempt
    if len(begun) >= gates.candidates:
        tried = ", ".join(f"trial {attempt.trial}" for attempt in begun)
        raise ErrorSpent(
            f"the error level of '{sweep}' is spent: {len(begun)} of {gates.candidates} certifications begun ({tried})",
            "no further adapter of it can be certified; launch another sweep, with more gates.candidates",
        )
    needed = chips_needed(gates.min_yield, error_per_attempt(gates.confidence, gates.candidates), gates.failures)
    first_chip = sum(attempt.chips for attempt in begun)
    number = len(begun) + 1
    attempt = Attempt(number, trial, adapter_sha256, spec, first_chip, max(needed, gates.min_chips))
    attempt.folder(folder).mkdir(exist_ok=True)
    write_json(folder.selection / _BOOK, {"shared": shared, "attempts": [asdict(each) for each in (*begun, attempt)]})
    return attempt
