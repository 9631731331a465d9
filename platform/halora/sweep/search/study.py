"""The study of a sweep: every trial and all that was decided about it, in Optuna's storage and nowhere else.

A trial's number there is its identity everywhere: in Ray, in MLflow, in its checkpoint folder. Optuna's own states are
kept true: RUNNING until a trial ends, COMPLETE with all objectives, PRUNED for one that was stopped early or never
trained for its energy, FAIL. What Optuna has no word for is in the trial's attributes.

Every decision is one write. A trial is finished once its final scores are written; that Optuna has it COMPLETE follows
from them, so whoever finds it missing tells it then (docs/decisions/021).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any
from uuid import uuid4

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from halora.analysis.trials import DEFAULT_OBJECTIVES, Objective
from halora.events import Scored
from halora.hardware.energy import ENERGY
from halora.spaces.search import total_violation

optuna.logging.set_verbosity(optuna.logging.WARNING)

_COSTS = "costs"  # what a trial takes, known before it is trained, by metric
_RUNG = "rung"  # index of the goal a trial heads for
_SCORES = "scores {index}"  # what a rung gave
_FINAL_SCORES = "final scores"  # what the last goal gave: the trial is finished
_SKIPPED = "skipped"  # why a trial was never trained
_LOST = "lost_workers"  # that a trial lost since its last report
_HALVINGS = "halvings"  # of its micro-batch
_RACED = "raced "  # and a number, of the study: scores of a finished trial on more chips
_LAST_STEP = "last step"  # where somebody ended its training
_CLONE = "clone"  # of which trial it is, and the request's key
_TO_CUT = "cut short "  # and a number, of the study: its training is to end at its next report
_DISCARDED = "discarded "  # and a number, of the study
_ASKED = "asked "  # and a key, of the study: a point that somebody asked for
_STOP = "stop_requested"
_HOURS = "hours"
_GPU_HOURS = "gpu hours"
_ENDED = "ended"


class State(StrEnum):
    """Where a trial stands."""

    RUNNING = "running"
    """Begun, and heading for its next goal; its process may have ended."""
    PAUSED = "paused"
    """At a rung, until it is promoted or the search ends."""
    FINISHED = "finished"
    STOPPED = "stopped"
    """Left at a rung when the search ended."""
    SKIPPED = "skipped"
    """Never trained, for its energy or because its values contradict each other."""
    FAILED = "failed"
    DISCARDED = "discarded"
    """Taken out by somebody, wherever it stood."""


@dataclass(frozen=True)
class AskedPoint:
    """A point that somebody asked for beside those that the search chooses.

    Attributes:
        key: Tells it from all others.
        values: Its values by dotted path.
        clone_of: The trial it is like.
    """

    key: str
    values: Mapping[str, Any]
    clone_of: int


@dataclass(frozen=True)
class Trial:
    """A trial as its study has it.

    Attributes:
        number: Its identity in the sweep.
        values: Searched values by dotted path.
        costs: Energy, time and what else is known before it is trained, by metric.
        state: Where it stands.
        rung: Index of the goal it heads for or has ended at; all but the last are rungs.
        scores: What each goal it reached gave; for a finished trial the last with all chips scored since.
        skipped: Why it was never trained, else empty.
        lost_workers: How many ended under it since its last report.
        halvings: How often its micro-batch was halved, as it ran out of memory.
        violation: Sum by which it breaks its constraints, as far as known.
        frozen: Optuna's own record.
        last_step: Where somebody ended its training; none where it goes as far as the sweep says.
        clone_of: The trial that somebody had it begun like; none for a point of the search's own.
        asked_as: Key of that request, else empty.
    """

    number: int
    values: Mapping[str, Any]
    costs: Mapping[str, float]
    state: State
    rung: int
    scores: tuple[Scored, ...]
    skipped: str
    lost_workers: int
    halvings: int
    violation: float
    frozen: FrozenTrial
    last_step: int | None = None
    clone_of: int | None = None
    asked_as: str = ""

    @cached_property
    def key(self) -> str:
        """The same for two trials of the same values."""
        return point_key(self.values)

    @property
    def energy_uj_per_token(self) -> float:
        """Its energy per token in microjoule."""
        return self.costs[ENERGY]

    @property
    def metrics(self) -> dict[str, Any]:
        """Its costs, and its scores at the last goal reached."""
        return {**(self.scores[-1].metrics if self.scores else {}), **self.costs}

    @property
    def told(self) -> bool:
        """Whether Optuna's own record has the trial's end."""
        return self.frozen.state.is_finished()

    @cached_property
    def accuracy(self) -> float | None:
        """Mean accuracy over chips at the last goal reached."""
        return float(self.scores[-1].metrics["accuracy"]) if self.scores else None


def directions_of(objectives: Sequence[Objective]) -> list[StudyDirection]:
    """Optuna's word for them."""
    return [StudyDirection.MAXIMIZE if each.maximise else StudyDirection.MINIMIZE for each in objectives]


def point_key(values: Mapping[str, Any]) -> str:
    """Values of a point as text, whatever their order."""
    return repr(sorted(values.items()))


class SweepStudy:
    """What the decision core knows, read from storage and written there at once.

    Args:
        name: Name of the study.
        storage: Where the study lives; it is created if it is new.
        objectives: What its trials are told by.
    """

    def __init__(self, name: str, storage: BaseStorage, objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> None:
        self._objectives = objectives
        try:
            self._study = optuna.load_study(study_name=name, storage=storage)  # writes nothing
        except KeyError:
            self._study = optuna.create_study(
                study_name=name, storage=storage, directions=directions_of(objectives), load_if_exists=True
            )
        self._known: dict[int, Trial] = {}
        self._open: dict[int, object] = {}
        """What was last seen of each trial that has not ended, by its number; those that have ended never change."""

    def trials(self) -> list[Trial]:
        """Every trial, by number."""
        frozen = self._study.get_trials(deepcopy=False)
        for number in (*self._open, *range(len(self._known), len(frozen))):
            self._look_at(frozen[number])
        trials = list(self._known.values())
        for name, scores in self._study.user_attrs.items():
            if name.startswith(_RACED):
                trial = trials[int(name.removeprefix(_RACED))]
                trials[trial.number] = replace(trial, scores=(*trial.scores[:-1], Scored.from_json(scores)))
        for number in self.discarded:
            trials[number] = replace(trials[number], state=State.DISCARDED)
        return trials

    def trial(self, number: int) -> Trial:
        """One trial."""
        return self.trials()[number]

    def _look_at(self, frozen: FrozenTrial) -> None:
        attrs = frozen.user_attrs
        seen = (len(attrs), attrs[_RUNG], attrs.get(_LOST), attrs.get(_HALVINGS))
        if frozen.state.is_finished():
            self._open.pop(frozen.number, None)
        elif self._open.get(frozen.number) == seen:
            return
        else:
            self._open[frozen.number] = seen
        self._known[frozen.number] = _read(frozen)

    def begin(
        self,
        values: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        costs: Mapping[str, float],
        *,
        system_attrs: Mapping[str, Any],
        constraints: Mapping[str, float],
        skipped: str = "",
        asked: AskedPoint | None = None,
    ) -> int:
        """Write a new trial, running or skipped, all its values at once; its number."""
        attrs: dict[str, Any] = {_COSTS: dict(costs), _RUNG: 0}
        if asked:
            attrs[_CLONE] = {"of": asked.clone_of, "key": asked.key}
        if skipped:
            attrs[_SKIPPED] = skipped
        trial = optuna.create_trial(
            state=TrialState.PRUNED if skipped else TrialState.RUNNING,
            params=dict(values),
            distributions=dict(distributions),
            user_attrs=attrs,
            system_attrs=dict(system_attrs),
            constraints=dict(constraints) or None,
        )
        self._study.add_trial(trial)
        return self._study.get_trials(deepcopy=False)[-1].number

    def head_for(self, trial: Trial, rung: int) -> None:
        """Promote a paused trial."""
        self._opened(trial).set_user_attr(_RUNG, rung)

    def scored(self, trial: Trial, scores: Scored) -> None:
        """Keep what the rung a trial headed for gave; it pauses there."""
        self._opened(trial).set_user_attr(_SCORES.format(index=trial.rung), scores.to_json())

    def count_lost_workers(self, trial: Trial, count: int) -> None:
        """Keep how many workers a trial lost since its last report."""
        self._opened(trial).set_user_attr(_LOST, count)

    def halved(self, trial: Trial) -> None:
        """Keep that a trial continues with half its micro-batch."""
        self._opened(trial).set_user_attr(_HALVINGS, trial.halvings + 1)

    def raced(self, trial: Trial, scores: Scored) -> None:
        """Keep a finished trial's scores on more chips."""
        self._study.set_user_attr(f"{_RACED}{trial.number}", scores.to_json())

    def finished(self, trial: Trial, scores: Scored) -> None:
        """Keep the final scores of a trial, which finishes it; `tell` is to follow."""
        self._opened(trial).set_user_attr(_FINAL_SCORES, scores.to_json())

    def tell(self, trial: Trial, constraints: Mapping[str, float]) -> None:
        """Have Optuna's own record say that a finished trial is complete, with its objectives and constraints."""
        opened = self._opened(trial)
        known = opened.constraints
        for name, violation in constraints.items():
            if name not in known:
                opened.set_constraint(name, violation)
        self._study.tell(trial.number, [trial.metrics[each.metric] for each in self._objectives])

    def end_at(self, trial: Trial, step: int) -> None:
        """Keep that a trial's training ends at a step; what is left is to score it there."""
        self._opened(trial).set_user_attr(_LAST_STEP, step)

    def stopped(self, trial: Trial) -> None:
        """Tell a trial pruned; it carries no values."""
        self._study.tell(trial.number, state=TrialState.PRUNED)

    def failed(self, number: int) -> None:
        """Tell a trial failed."""
        self._study.tell(number, state=TrialState.FAIL)

    @property
    def stopping(self) -> bool:
        """Whether someone asked the sweep to stop."""
        return bool(self._study.user_attrs.get(_STOP, False))

    def request_stop(self, stop: bool) -> None:
        """Ask whoever runs the sweep to pause its trials and end."""
        if self.stopping != stop:
            self._study.set_user_attr(_STOP, stop)

    @property
    def to_cut(self) -> frozenset[int]:
        """Trials whose training somebody asked to end at the next report."""
        return self._numbers(_TO_CUT)

    def cut_short(self, number: int) -> None:
        """Ask whoever runs the sweep to end a trial's training at its next report."""
        self._study.set_user_attr(f"{_TO_CUT}{number}", True)

    @property
    def discarded(self) -> frozenset[int]:
        """Trials that somebody took out."""
        return self._numbers(_DISCARDED)

    def discard(self, number: int) -> None:
        """Take a trial out, wherever it stands; for good."""
        self._study.set_user_attr(f"{_DISCARDED}{number}", True)

    def _numbers(self, prefix: str) -> frozenset[int]:
        return frozenset(int(name.removeprefix(prefix)) for name in self._study.user_attrs if name.startswith(prefix))

    def asked(self) -> list[AskedPoint]:
        """Points that somebody asked for and that are not begun, in the order they were asked for."""
        begun = {trial.asked_as for trial in self.trials()}
        found = [
            (request["at_ms"], name.removeprefix(_ASKED), request)
            for name, request in self._study.user_attrs.items()
            if name.startswith(_ASKED)
        ]
        return [
            AskedPoint(key, request["values"], int(request["clone_of"]))
            for _, key, request in sorted(found, key=lambda each: each[:2])
            if key not in begun
        ]

    def ask_for(self, values: Mapping[str, Any], clone_of: int) -> None:
        """Ask whoever runs the sweep to begin a trial of these values next."""
        request = {"values": dict(values), "clone_of": clone_of, "at_ms": int(time.time() * 1000)}
        self._study.set_user_attr(f"{_ASKED}{uuid4().hex}", request)

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the sweep's trials so far."""
        return float(self._study.user_attrs.get(_GPU_HOURS, 0.0))

    def spend_gpus(self, hours: float) -> None:
        """Set the GPU hours of the sweep's trials."""
        self._study.set_user_attr(_GPU_HOURS, hours)

    @property
    def hours(self) -> float:
        """Hours the sweep has run so far."""
        return float(self._study.user_attrs.get(_HOURS, 0.0))

    def spend(self, hours: float) -> None:
        """Set the hours the sweep has run."""
        self._study.set_user_attr(_HOURS, hours)

    @property
    def ended(self) -> str:
        """Why no trial is begun any more although the sweep asks for more; empty while there is no reason."""
        return str(self._study.user_attrs.get(_ENDED, ""))

    def end(self, reason: str) -> None:
        """Keep why no trial is begun any more."""
        if self.ended != reason:
            self._study.set_user_attr(_ENDED, reason)

    def _opened(self, trial: Trial) -> optuna.Trial:
        return optuna.Trial(self._study, trial.frozen._trial_id)


def _read(frozen: FrozenTrial) -> Trial:
    attrs = frozen.user_attrs
    scores = _scores(attrs)
    rung = int(attrs.get(_RUNG, 0))
    if (last_step := attrs.get(_LAST_STEP)) is not None:
        rung = len(scores) - (_FINAL_SCORES in attrs)  # its next goal is the last
    clone = attrs.get(_CLONE, {})
    match frozen.state:
        case TrialState.FAIL:
            state = State.FAILED
        case TrialState.PRUNED:
            state = State.SKIPPED if _SKIPPED in attrs else State.STOPPED
        case _ if _FINAL_SCORES in attrs:
            state = State.FINISHED
        case _:
            state = State.PAUSED if len(scores) > rung else State.RUNNING
    return Trial(
        number=frozen.number,
        values=frozen.params,
        costs=attrs[_COSTS],
        state=state,
        rung=rung,
        scores=scores,
        skipped=str(attrs.get(_SKIPPED, "")),
        lost_workers=int(attrs.get(_LOST, 0)),
        halvings=int(attrs.get(_HALVINGS, 0)),
        violation=total_violation(frozen.constraints.values()),
        frozen=frozen,
        last_step=last_step,
        clone_of=clone.get("of"),
        asked_as=str(clone.get("key", "")),
    )


def _scores(attrs: Mapping[str, Any]) -> tuple[Scored, ...]:
    found: list[Scored] = []
    while (key := _SCORES.format(index=len(found))) in attrs:
        found.append(Scored.from_json(attrs[key]))
    if _FINAL_SCORES in attrs:
        found.append(Scored.from_json(attrs[_FINAL_SCORES]))
    return tuple(found)
