"""What happens in a sweep, in one vocabulary: worker, decision core, recorder, event log, MLflow and pages share it.

A worker says of its job `Reported`, `Scored`, `WorkerLost`, `OutOfMemory` or `Failed`, and of a bare base `BaseScored`.
The decision core judges by these, the recorder appends them to the event log with what it learns itself, and whoever
reads the log adds them up. In JSON an event is its `kind`, its `trial` and its fields; numbers are read back exactly.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np


@dataclass(frozen=True)
class Answers:
    """Which answers of a trial were right.

    Attributes:
        group: Trials of one group answered the same rows; those of them on as many chips, on the same chips.
        chips: Number of chip instances.
        rows: Number of rows on each.
        bits: The flattened (chips, rows) array, eight answers to a byte, in base 64.
    """

    group: str
    chips: int
    rows: int
    bits: str

    @classmethod
    def of(cls, group: str, correct: np.ndarray) -> Self:
        """From a boolean array (chips, rows)."""
        chips, rows = correct.shape
        return cls(group, chips, rows, base64.b64encode(np.packbits(correct).tobytes()).decode())

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chips and of rows."""
        return self.chips, self.rows

    @property
    def array(self) -> np.ndarray:
        """Whether each answer was right, as booleans (chips, rows)."""
        bits = np.frombuffer(self.packed, dtype=np.uint8)
        return np.unpackbits(bits, count=self.chips * self.rows).astype(bool).reshape(self.shape)

    @cached_property
    def packed(self) -> bytes:
        """The bits as bytes."""
        return base64.b64decode(self.bits)


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


_KINDS: dict[str, type["_Event"]] = {}


@dataclass(frozen=True, kw_only=True)
class _Event:
    """Something that happened.

    Attributes:
        kind: Its class, in snake case.
        state: Where its trial, or the sweep, stands from then on; empty where it leaves that as it was.
        time_ms: When it was recorded, in milliseconds since 1970; 0 before.
    """

    kind: ClassVar[str]
    state: ClassVar[str] = ""
    time_ms: int = 0

    def __init_subclass__(cls) -> None:
        cls.kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        _KINDS[cls.kind] = cls

    def to_json(self) -> dict[str, Any]:
        """Kind, trial and fields, those left at their default apart, in plain JSON."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        told = {each.name: own[each.name] for each in fields(self) if own[each.name] != _default(each)}
        if isinstance(told.get("answers"), Answers):
            told["answers"] = asdict(told["answers"])
        return {"kind": self.kind, "trial": own["trial"], "time_ms": self.time_ms} | told

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """An event of this kind.

        Raises:
            TypeError: A field is unknown or missing.
        """
        told = {name: value for name, value in content.items() if name != "kind"}
        if told.get("answers"):
            told["answers"] = Answers(**told["answers"])
        return cls(**told)


@dataclass(frozen=True, kw_only=True)
class TrialEvent(_Event):
    """Something that happened to a trial.

    Attributes:
        trial: Its number.
    """

    trial: int


@dataclass(frozen=True, kw_only=True)
class SweepEvent(_Event):
    """Something that happened to a sweep as a whole."""

    trial: None = None


type Event = TrialEvent | SweepEvent


def event_of(content: Mapping[str, Any]) -> Event:
    """The event that some JSON is.

    Raises:
        KeyError: There is no such kind.
        TypeError: A field is unknown or missing.
    """
    return cast(Event, _KINDS[content["kind"]].from_json(content))


# What a worker says of its job.


@dataclass(frozen=True, kw_only=True)
class Reported(TrialEvent):
    """A trial took optimiser steps.

    Attributes:
        step: The last of them.
        metrics: Means over the steps since the last report, by name.
        node: Address of the worker's node, where it is known.
    """

    step: int
    metrics: Mapping[str, float]
    node: str = ""

    @classmethod
    def of(cls, trial: int, report: Mapping[str, float]) -> Self:
        """From a trial's own file of reports, where the step stands beside the metrics."""
        metrics = {name: value for name, value in report.items() if name != "step"}
        return cls(trial=trial, step=int(report["step"]), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Scored(TrialEvent):
    """A trial was brought to its goal and scored.

    Attributes:
        step: Optimiser step of the adapter.
        metrics: Scores by name, on all chips so far, see `ChipScores.summary`; none for a training that is not scored.
        accuracy_by_chip: In the order of the chips.
        rows: Rows it was scored on; none for all of its task.
        final: Whether its training ends there; else it is at a rung of early stopping.
        answers: Which answers were right; none for a simulated trial. From here on the recorder adds what files say.
        layer_noise_db: Noise to signal of its layers, (depth, dB) by kind; empty for a simulated trial.
        scores_file: The scores in full, in the sweep's folder.
        adapter: Folder of the adapter there; empty where there is none.
    """

    step: int
    metrics: Mapping[str, float]
    accuracy_by_chip: Sequence[float]
    rows: int | None = None
    final: bool = True
    answers: Answers | None = None
    layer_noise_db: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    scores_file: str = ""
    adapter: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerLost(TrialEvent):
    """The worker of a trial ended, hung, or lost its storage; the trial resumes from its checkpoint."""

    cause: str


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(TrialEvent):
    """A trial ran out of memory; it resumes from its checkpoint with half the micro-batch."""

    state: ClassVar[str] = "running"
    cause: str


@dataclass(frozen=True, kw_only=True)
class Failed(TrialEvent):
    """A trial failed."""

    state: ClassVar[str] = "failed"
    cause: str


@dataclass(frozen=True, kw_only=True)
class Discarded(TrialEvent):
    """Somebody took a trial out of the sweep: it is on no front, whatever it scored."""

    state: ClassVar[str] = "discarded"


type JobEvent = Reported | Scored | WorkerLost | OutOfMemory | Failed | Discarded
"""What can become of a job."""


@dataclass(frozen=True, kw_only=True)
class BaseScored(SweepEvent):
    """A bare base was scored; not recorded by itself, see `BasesProbed`.

    Attributes:
        scores: Its `ChipScores`, in plain JSON.
    """

    scores: Mapping[str, Any]


# What the recorder learns besides.


@dataclass(frozen=True, kw_only=True)
class Began(TrialEvent):
    """A trial began.

    Attributes:
        params: Searched values by dotted path.
        labels: What it is, by the names of `halora.records.names.LABELS`.
        metrics: Energy, in all and by component.
        chip_hash: Digest of its chip's description.
        config: Its resolved configuration.
        datasets: Rows it trains on and is scored on, by `name`, `split`, `rows` and `digest`.
        program: Version and commit of this program.
        clone_of: The trial that somebody had it begun like, with some values changed; none for what the search chose.
    """

    state: ClassVar[str] = "running"
    params: Mapping[str, Any]
    labels: Mapping[str, Any]
    metrics: Mapping[str, float]
    chip_hash: str
    config: Mapping[str, Any]
    datasets: Sequence[Mapping[str, str]]
    program: Mapping[str, str]
    clone_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Resumed(TrialEvent):
    """A trial that was interrupted runs again."""

    state: ClassVar[str] = "running"


@dataclass(frozen=True, kw_only=True)
class Finished(TrialEvent):
    """A trial's scores are recorded."""

    state: ClassVar[str] = "finished"


@dataclass(frozen=True, kw_only=True)
class Stopped(TrialEvent):
    """Early stopping ended a trial."""

    state: ClassVar[str] = "stopped"


@dataclass(frozen=True, kw_only=True)
class CutShort(TrialEvent):
    """Somebody ended a trial's training before its last step; it is scored as it is there.

    Attributes:
        step: Its last optimiser step.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class Interrupted(TrialEvent):
    """A trial was left unfinished; a later resume continues it."""

    state: ClassVar[str] = "interrupted"


@dataclass(frozen=True, kw_only=True)
class Estimated(TrialEvent):
    """A race compares a trial by another accuracy than the one on its own chips.

    Attributes:
        step: Optimiser step of its scores.
        metrics: That accuracy and the intervals that move along.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Placed(TrialEvent):
    """How likely a trial is on the Pareto front.

    Attributes:
        step: Number of finished trials.
        metrics: The probability.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SweepStarted(SweepEvent):
    """A process runs the sweep."""

    state: ClassVar[str] = "running"


@dataclass(frozen=True, kw_only=True)
class SweepFinished(SweepEvent):
    """The sweep came to its end."""

    state: ClassVar[str] = "finished"


@dataclass(frozen=True, kw_only=True)
class SweepInterrupted(SweepEvent):
    """The process that ran the sweep ended before it did."""

    state: ClassVar[str] = "interrupted"


@dataclass(frozen=True, kw_only=True)
class FrontMoved(SweepEvent):
    """Another trial finished.

    Attributes:
        step: Number of finished trials.
        metrics: That number, size and hypervolume of the Pareto front.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Compared(SweepEvent):
    """The closing comparison was made.

    Attributes:
        comparison: Its outcome.
    """

    comparison: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BasesProbed(SweepEvent):
    """All untrained bases were scored on the sweep's chips.

    Attributes:
        outcomes: What each lost, see `halora.evaluation.damage.described`.
    """

    outcomes: Sequence[Mapping[str, Any]]
