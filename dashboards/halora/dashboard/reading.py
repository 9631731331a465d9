"""Sweeps of a store as the pages show them, kept in memory until their event logs grow."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from halora.analysis.recommendation import Progress, Recommendation, named_baselines, recommend
from halora.analysis.summary import FrontView, view_front, volumes
from halora.analysis.trials import ACCURACY, Objective, RecordedTrial, sweep_objectives
from halora.errors import UserError
from halora.evaluation.damage import described
from halora.records import event_log
from halora.records.index import read_sweep_state
from halora.records.store import Store, SweepFolder
from halora.records.sweep_state import SweepState
from halora.selection.certification import certified_trials
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.state import is_running, load_sweep_of

_MOST_KEPT = 32
"""Sweeps in memory."""
_TAIL_BYTES = 64 * 1024
CLEAN = Objective("clean_accuracy", maximise=True)


class Snapshot:
    """A sweep as its event log had it at one moment.

    Args:
        folder: Where it is.
        sweep: The sweep as launched.
        recorded: What its event log adds up to; not changed any more.
        version: Differs once there is anything new.
        running: Whether a process ran it.
    """

    def __init__(
        self, folder: SweepFolder, sweep: SweepConfig, recorded: SweepState, version: str, running: bool
    ) -> None:
        self.folder, self.sweep, self.recorded, self.version, self.running = folder, sweep, recorded, version, running
        self.points = recorded.points()
        self.by_number = {point.number: point for point in self.points}
        self._recommended: tuple[dict[int, bool], Recommendation] | None = None

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.folder.name

    @property
    def state(self) -> str:
        """running, finished or interrupted; launched before there is a record."""
        return "running" if self.running else self.recorded.sweep_state.replace("running", "interrupted") or "launched"

    @cached_property
    def damage(self) -> list[str]:
        """What the chips do to the untrained bases, in lines; warnings among them."""
        return described(self.recorded.damage or ())

    @cached_property
    def view(self) -> FrontView:
        """The front over the sweep's objectives."""
        return view_front(self.points, sweep_objectives(self.sweep))

    def recommendation(self) -> Recommendation | None:
        """Which trial to take, how sure that is and what is left to do; none where certifications cannot be read."""
        try:
            certified = certified_trials(self.folder)
        except UserError:
            return None
        if self._recommended is None or self._recommended[0] != certified:
            progress = Progress(self.running, self.folder.simulated, self.recorded.comparison, certified)
            found = recommend(self.sweep, self.view, progress, named_baselines(self.sweep, self.view))
            self._recommended = certified, found
        return self._recommended[1]

    @cached_property
    def clean_view(self) -> FrontView:
        """The front with clean accuracy in the place of that under noise."""
        objectives = self.view.objectives
        if CLEAN in objectives:
            return self.view
        return view_front(self.points, [CLEAN if each == ACCURACY else each for each in objectives])

    @cached_property
    def plain_view(self) -> FrontView:
        """The front of accuracy under noise against energy, whatever the sweep's objectives are."""
        return view_front(self.points)

    @property
    def plain_reference(self) -> tuple[float, float]:
        """Accuracy and energy that a hypervolume of `plain_view` is measured from."""
        point, trials = self.sweep.reference_point, self.plain_view.groups.feasible
        dearest = max((each.energy_uj_per_token for each in trials), default=1.0)
        return point.get("accuracy", 0.0), point.get("energy_uj_per_token", dearest)

    @property
    def reference(self) -> tuple[float, ...]:
        """Objectives that the hypervolume is measured from."""
        return self.sweep.reference

    @cached_property
    def volumes(self) -> list[float]:
        """The hypervolume after each feasible trial, in the order they ended."""
        return volumes(self.view, self.reference)

    @cached_property
    def spent_s(self) -> float:
        """Seconds from begin to end, summed over trials that ended."""
        return sum(max(p.ended_ms - p.began_ms, 0) for p in self.points if p.began_ms and p.ended_ms) / 1000

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Number of trials by state, and of those on the front."""
        groups = self.view.groups
        return {
            "finished": len(groups.feasible) + len(groups.violating) + len(groups.unscored),
            "failed": len(groups.failed),
            "stopped": len(groups.stopped),
            "discarded": len(groups.discarded),
            "open": len(groups.open),
            "front": len(self.view.members),
        }

    def point(self, number: int) -> RecordedTrial:
        """A trial.

        Raises:
            UserError: There is none of that number.
        """
        if number not in self.by_number:
            raise UserError(f"no trial {number} in sweep '{self.name}'")
        return self.by_number[number]


@dataclass(frozen=True)
class Unreadable:
    """A sweep whose files cannot be read.

    Attributes:
        name: Its name.
        problem: Why.
    """

    name: str
    problem: str


class SweepReader:
    """Reads a store's sweeps; used by many threads.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._kept: dict[str, Snapshot] = {}
        self._lock = threading.Lock()

    def snapshot(self, name: str) -> Snapshot:
        """A sweep as it stands.

        Raises:
            UserError: There is none of that name, or its files are damaged.
        """
        folder = self.store.existing(name)
        running = is_running(folder)
        version = f"{event_log.identity(folder.event_log_file)}-{_size(folder)}-{int(running)}"
        with self._lock:
            kept = self._kept.pop(name, None)
            if kept is None or kept.version != version:
                kept = Snapshot(folder, load_sweep_of(folder), read_sweep_state(self.store, name), version, running)
            self._kept[name] = kept
            while len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return kept

    def all(self) -> list[Snapshot | Unreadable]:
        """All sweeps, newest first."""
        found: list[Snapshot | Unreadable] = []
        for name in reversed(self.store.sweeps()):
            try:
                found.append(self.snapshot(name))
            except UserError as error:
                found.append(Unreadable(name, "; ".join(error.problems)))
        return found


def tail(path: Path, lines: int) -> str:
    """The last lines of a file that may be large and may be growing; empty where it says nothing."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:]) if text.strip() else ""


def _size(folder: SweepFolder) -> int:
    try:
        return folder.event_log_file.stat().st_size
    except FileNotFoundError:
        return 0
