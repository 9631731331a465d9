"""The certifications begun in a store, and what each took of the error level of its test rows.

One file per store, written to the disk before a score is looked at. A certification takes a part of what the earlier
ones on a test split left of the error level, whatever sweep they are of, so all of them together keep it, however many
there will be (docs/decisions/015); on a mixture it takes no more than any of its test splits allows. Each has chips of
its own, drawn from the identity of the launch, and their number is fixed before the first is looked at.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halora.errors import UserError
from halora.files import locked, write_json
from halora.records.store import Store, SweepFolder
from halora.selection.certificate import chips_needed, error_share
from halora.spaces.gates import Gates

_SPEC = ("min_accuracy", "min_yield", "failures", "min_chips", "test_rows", "confidence")
"""Gates that say what is shown, on which chips and rows and how surely; another of these is another attempt."""
_ATTEMPT_FILE = "attempt.json"


@dataclass(frozen=True)
class Spent:
    """What certifications on a test split took of its error level.

    Attributes:
        earlier: Certifications begun.
        error: Sum of their error levels.
    """

    earlier: int
    error: float


@dataclass(frozen=True)
class Attempt:
    """A certification as it was begun.

    Attributes:
        number: Among those of the launch, from 1: names its chips and its folder.
        sweep: Name of the sweep.
        launch: Identity of its launch.
        trial: Number of the trial.
        adapter_sha256: Digest of its adapter's file.
        spec: What was asked, see `_SPEC`.
        splits: What tells the test splits it looks at, see `halora.selection.certification.splits_of`.
        spent: What certifications begun before it in the store took of the error level: of the split that allows least.
        error: Its own error level.
        chips: Number of its chips.
    """

    number: int
    sweep: str
    launch: str
    trial: int
    adapter_sha256: str
    spec: dict[str, Any]
    splits: tuple[str, ...]
    spent: Spent
    error: float
    chips: int

    @property
    def series(self) -> str:
        """Its series within the `certify` pool."""
        return f"{self.launch}/{self.number}"

    def folder(self, sweep: SweepFolder) -> Path:
        """Where its scores and its result are kept."""
        return sweep.selection / f"attempt-{self.number:02d}"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Attempt":
        """What `asdict` gave, through JSON."""
        return cls(**content | {"splits": tuple(content["splits"]), "spent": Spent(**content["spent"])})


def attempts_of(folder: SweepFolder) -> list[Attempt]:
    """Certifications that a sweep has begun, in their order."""
    files = folder.selection.glob(f"attempt-*/{_ATTEMPT_FILE}")
    found = [Attempt.from_json(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(found, key=lambda attempt: attempt.number)


def spent_on(store: Store, splits: Sequence[str], confidence: float) -> Spent:
    """What the certifications begun in a store took of the error level: of the split that allows the next one least."""
    return _spent(_begun(store), splits, confidence)


def chips_by_failures(gates: Gates, spent: Spent) -> dict[int, int]:
    """Chips that the next certification takes if none, one or two of them may fail.

    Raises:
        UserError: Nothing is left of the error level.
    """
    error = _next_error(gates.confidence, spent)
    return {failures: chips_needed(gates.min_yield, error, failures) for failures in range(3)}


@contextmanager
def only_selection(folder: SweepFolder, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the sweep's selection; waits for another process that has it."""
    folder.selection.mkdir(exist_ok=True)
    with locked(folder.selection / "lock", waiting):
        yield


def open_attempt(
    store: Store,
    folder: SweepFolder,
    launch: str,
    trial: int,
    adapter_sha256: str,
    gates: Gates,
    splits: Sequence[str],
) -> Attempt:
    """The attempt that asks this of this adapter, begun now if it was not before.

    Args:
        store: Where it counts.
        folder: The sweep's folder.
        launch: Identity of the sweep's launch.
        trial: Number of the trial.
        adapter_sha256: Digest of its adapter's file.
        gates: What is asked.
        splits: What tells the test splits it looks at; it shares an error level with all that name one of these.

    Raises:
        UserError: Nothing is left of the error level, or the store's file cannot be read or lacks what the sweep's
            folder shows to have been begun.
    """
    spec = gates.model_dump(mode="json", include=set(_SPEC))
    store.root.mkdir(parents=True, exist_ok=True)
    with locked(store.certifications_file.with_suffix(".lock")):
        begun = _begun(store)
        own = [each for each in begun if each.launch == launch]
        asked = (trial, adapter_sha256, spec)
        attempt = next((each for each in own if (each.trial, each.adapter_sha256, each.spec) == asked), None)
        if attempt is None:
            spent = _spent(begun, splits, gates.confidence)
            error = _next_error(gates.confidence, spent)
            chips = max(chips_needed(gates.min_yield, error, gates.failures), gates.min_chips)
            attempt = Attempt(
                number=len(own) + 1,
                sweep=folder.name,
                launch=launch,
                trial=trial,
                adapter_sha256=adapter_sha256,
                spec=spec,
                splits=tuple(splits),
                spent=spent,
                error=error,
                chips=chips,
            )
            if attempt.folder(folder).exists():
                raise UserError(
                    f"'{store.certifications_file}' lacks certification {attempt.number} of sweep '{folder.name}', "
                    f"which was begun ('{attempt.folder(folder)}')",
                    "bring the file back: without it, what is left of the error level is not known",
                )
            write_json(store.certifications_file, [asdict(each) for each in (*begun, attempt)])
    attempt.folder(folder).mkdir(parents=True, exist_ok=True)
    write_json(attempt.folder(folder) / _ATTEMPT_FILE, asdict(attempt))
    return attempt


def _begun(store: Store) -> list[Attempt]:
    file = store.certifications_file
    try:
        return [Attempt.from_json(content) for content in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{file}' cannot be read: {type(error).__name__}: {error}",
            "bring back the file as it was: without it, what is left of the error level is not known",
        ) from None


def _spent(begun: Sequence[Attempt], splits: Sequence[str], confidence: float) -> Spent:
    errors = [[each.error for each in begun if split in each.splits] for split in splits]
    taken = [Spent(len(of_split), sum(of_split)) for of_split in errors]
    return min(taken, key=lambda spent: error_share(confidence, spent.earlier, spent.error))


def _next_error(confidence: float, spent: Spent) -> float:
    """Error level of the next certification.

    Raises:
        UserError: Nothing is left.
    """
    error = error_share(confidence, spent.earlier, spent.error)
    if error <= 0:
        raise UserError(
            f"a confidence of {confidence:g} leaves nothing for another certification on these test rows: the "
            f"{spent.earlier} begun in this store took an error level of {spent.error:.4g} of {1 - confidence:.4g}",
            f"ask for less than --confidence {1 - spent.error:.4g}",
        )
    return error
