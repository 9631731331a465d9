"""What the entries of an event log add up to: every trial as it stands."""

import base64
from collections.abc import Iterable, Set
from typing import Any

from halora.analysis.trials import Answers, RecordedTrial
from halora.records.event_log import Entry

Content = dict[str, Any]
"""A trial as it stands, in plain JSON."""


_SWEEP = -1
"""The sweep itself, among the numbers of its trials."""


class SweepState:
    """A sweep and its trials, built entry by entry.

    Args:
        contents: What stood after the entries taken so far, by trial number.
    """

    def __init__(self, contents: dict[int, Content] | None = None) -> None:
        self.contents = contents or {}
        self._steps: dict[int, set[int]] = {}  # each grows in its place, as there may be very many
        self._points: dict[int, tuple[Content, RecordedTrial]] = {}
        self.milestones = 0
        """Number of entries taken that change more than a curve."""

    def take(self, entries: Iterable[Entry]) -> set[int]:
        """Add entries in their order; the keys of `contents` they change."""
        touched = set()
        for entry in entries:
            key = _SWEEP if entry["trial"] is None else entry["trial"]
            self.contents[key] = _after(self.contents.get(key), entry)
            if entry["kind"] == "report":
                self._steps.setdefault(key, set()).add(entry["step"])
            touched.add(key)
            self.milestones += entry["kind"] != "report"
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
        """Steps of the trial's reports among the entries taken."""
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

    def answers(self, number: int) -> dict[str, Any] | None:
        """The answers behind the trial's recorded scores; none before it is scored, or where it was simulated."""
        return self.contents.get(number, {}).get("correct")


def _after(content: Content | None, entry: Entry) -> Content:
    """A trial after one more entry; what was there is not changed, as another thread may be reading it."""
    now: Content = {"state": "running", "cause": "", "metrics": {}, **(content or {})}
    now["metrics"] = now["metrics"] | entry.get("metrics", {})
    match entry["kind"]:
        case "begin":
            now |= {"params": entry["params"], "labels": entry["labels"], "began_ms": entry["time_ms"]}
        case "report":
            now["last_step"] = max(now.get("last_step", 0), entry["step"])
        case "rung":
            now["rungs"] = [*now.get("rungs", ()), entry["step"]]
        case "scores":
            now |= {"correct": entry["correct"], "measured": entry["metrics"], "scored_step": entry["step"]}
        case "front":
            now["front_step"] = entry["step"]
        case "comparison" | "damage":
            now[entry["kind"]] = entry["content"]
        case "state":
            now |= {"state": entry["state"], "cause": entry["cause"], "ended_ms": entry["time_ms"]}
    return now


def _point(number: int, content: Content) -> RecordedTrial:
    correct = content.get("correct")
    return RecordedTrial(
        number=number,
        state=content["state"],
        cause=content["cause"],
        params=content.get("params", {}),
        labels=content.get("labels", {}),
        metrics=content["metrics"],
        began_ms=content.get("began_ms", 0),
        ended_ms=content.get("ended_ms", 0),
        correct=correct
        and Answers(correct["group"], (correct["chips"], correct["rows"]), base64.b64decode(correct["bits"])),
    )
