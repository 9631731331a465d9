"""What the events of a log add up to: every trial as it stands."""

from collections.abc import Iterable, Set
from dataclasses import asdict
from typing import Any

from halora.analysis.trials import RecordedTrial
from halora.events import Answers, BasesProbed, Began, Compared, CutShort, Event, FrontMoved, Reported, Scored
from halora.records.names import metrics_of

Content = dict[str, Any]
"""A trial as it stands, in plain JSON."""


_SWEEP = -1
"""The sweep itself, among the numbers of its trials."""


class SweepState:
    """A sweep and its trials, built event by event.

    Args:
        contents: What stood after the events taken so far, by trial number.
    """

    def __init__(self, contents: dict[int, Content] | None = None) -> None:
        self.contents = contents or {}
        self._steps: dict[int, set[int]] = {}  # each grows in its place, as there may be very many
        self._points: dict[int, tuple[Content, RecordedTrial]] = {}
        self.milestones = 0
        """Number of events taken that change more than a curve."""

    def take(self, events: Iterable[Event]) -> set[int]:
        """Add events in their order; the keys of `contents` they change."""
        touched = set()
        for event in events:
            key = _SWEEP if event.trial is None else event.trial
            self.contents[key] = _after(self.contents.get(key), event)
            if isinstance(event, Reported):
                self._steps.setdefault(key, set()).add(event.step)
            touched.add(key)
            self.milestones += not isinstance(event, Reported)
        return touched

    def points(self) -> list[RecordedTrial]:
        """All trials, by number."""
        return [self.point(number) for number in sorted(self.contents.copy()) if number != _SWEEP]

    @property
    def sweep_state(self) -> str:
        """State of the sweep when its last process recorded one: running, finished or interrupted; empty for none."""
        return str(self.contents.get(_SWEEP, {}).get("state", ""))

    @property
    def sweep_metrics(self) -> dict[str, float]:
        """Latest value of each of the sweep's own metrics."""
        return dict(self.contents.get(_SWEEP, {}).get("metrics", {}))

    @property
    def front_step(self) -> int:
        """Number of finished trials when the front was last recorded."""
        return int(self.contents.get(_SWEEP, {}).get("front_step", 0))

    @property
    def comparison(self) -> dict[str, Any] | None:
        """The closing comparison, once it is recorded."""
        return self.contents.get(_SWEEP, {}).get("comparison")

    @property
    def damage(self) -> list[dict[str, Any]] | None:
        """What the chips do to the untrained bases, once it is recorded; see `halora.evaluation.damage.described`."""
        return self.contents.get(_SWEEP, {}).get("damage")

    def point(self, number: int) -> RecordedTrial:
        """One trial."""
        content = self.contents[number]  # replaced whenever it changes, see `_after`
        if number not in self._points or self._points[number][0] is not content:
            self._points[number] = (content, _point(number, content))
        return self._points[number][1]

    def begun(self, number: int) -> bool:
        """Whether the trial's beginning is recorded."""
        return "params" in self.contents.get(number, {})

    def state(self, number: int) -> str:
        """The trial's state, empty for one that is not recorded."""
        return str(self.contents.get(number, {}).get("state", ""))

    def steps(self, number: int) -> Set[int]:
        """Steps of the trial's reports among the events taken."""
        return self._steps.get(number, frozenset())

    def last_step(self, number: int) -> int:
        """The last of the trial's recorded reports; 0 before the first."""
        return int(self.contents.get(number, {}).get("last_step", 0))

    def metrics(self, number: int) -> dict[str, float]:
        """Latest value of each of the trial's metrics."""
        return dict(self.contents.get(number, {}).get("metrics", {}))

    def measured(self, number: int) -> dict[str, float]:
        """The trial's scores on its own chips, whatever a race made of them; none before it is scored."""
        return dict(self.contents.get(number, {}).get("measured", {}))

    def scored_step(self, number: int) -> int:
        """Optimiser step at which the trial was scored last; 0 before it is."""
        return int(self.contents.get(number, {}).get("scored_step", 0))

    def rungs(self, number: int) -> set[int]:
        """Steps of the rungs of early stopping at which the trial's scores are recorded."""
        return set(self.contents.get(number, {}).get("rungs", ()))

    def last_step_asked(self, number: int) -> int | None:
        """Where somebody ended the trial's training; none where nobody did."""
        return self.contents.get(number, {}).get("cut_short_at")

    def answers(self, number: int) -> Answers | None:
        """The answers behind the trial's recorded scores; none before it is scored, or where it was simulated."""
        return _answers(self.contents.get(number, {}))


def _after(content: Content | None, event: Event) -> Content:
    """A trial after one more event; what was there is not changed, as another thread may be reading it."""
    now: Content = {"state": "running", "cause": "", "metrics": {}, **(content or {})}
    now["metrics"] = now["metrics"] | metrics_of(event)
    match event:
        case Began():
            now |= {"params": event.params, "labels": event.labels, "began_ms": event.time_ms}
            now |= {"clone_of": event.clone_of}
        case CutShort():
            now["cut_short_at"] = event.step
        case Reported():
            now["last_step"] = max(now.get("last_step", 0), event.step)
        case Scored(final=False):
            now["rungs"] = [*now.get("rungs", ()), event.step]
        case Scored():
            answers = event.answers and asdict(event.answers)
            now |= {"answers": answers, "measured": event.metrics, "scored_step": event.step}
        case FrontMoved():
            now["front_step"] = event.step
        case Compared():
            now["comparison"] = event.comparison
        case BasesProbed():
            now["damage"] = event.outcomes
    if event.state:
        now |= {"state": event.state, "cause": getattr(event, "cause", ""), "ended_ms": event.time_ms}
    return now


def _answers(content: Content) -> Answers | None:
    return Answers(**content["answers"]) if content.get("answers") else None


def _point(number: int, content: Content) -> RecordedTrial:
    return RecordedTrial(
        number=number,
        state=content["state"],
        cause=content["cause"],
        params=content.get("params", {}),
        labels=content.get("labels", {}),
        metrics=content["metrics"],
        began_ms=content.get("began_ms", 0),
        ended_ms=content.get("ended_ms", 0),
        correct=_answers(content),
        clone_of=content.get("clone_of"),
        cut_short_at=content.get("cut_short_at"),
    )
