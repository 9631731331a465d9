"""The study of a sweep: every trial and all that was decided about it, in Optuna's storage and nowhere else.

A trial's number there is its identity everywhere: in Ray, in MLflow, in its checkpoint folder. Optuna's own states are
kept true: RUNNING until a trial ends, COMPLETE with both objectives, PRUNED for one that was stopped early or never
trained for its energy, FAIL. What Optuna has no word for is in the trial's attributes.

Every decision is one write. A trial is finished once its final scores are written; that Optuna has it COMPLETE follows
from them, so whoever finds it missing tells it then (docs/decisions/021).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from halora.events import Scored
from halora.spaces.search import total_violation

optuna.logging.set_verbosity(optuna.logging.WARNING)

_ENERGY = "energy_uj_per_token"
_RUNG = "rung"  # index of the goal a trial heads for
_SCORES = "scores {index}"  # what a rung gave
_FINAL_SCORES = "final scores"  # what the last goal gave: the trial is finished
_SKIPPED = "skipped"  # why a trial was never trained
_LOST = "lost_workers"  # that a trial lost since its last report
_HALVINGS = "halvings"  # of its micro-batch
_RACED = "raced "  # and a number, of the study: scores of a finished trial on more chips
_STOP = "stop_requested"
_HOURS = "hours"
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


@dataclass(frozen=True)
class Trial:
    """A trial as its study has it.

    Attributes:
        number: Its identity in the sweep.
        values: Searched values by dotted path.
        energy_uj_per_token: Known before it is trained.
        state: Where it stands.
        rung: Index of the goal it heads for or has ended at; all but the last are rungs.
        scores: What each goal it reached gave; for a finished trial the last with all chips scored since.
        skipped: Why it was never trained, else empty.
        lost_workers: How many ended under it since its last report.
        halvings: How often its micro-batch was halved, as it ran out of memory.
        violation: Sum by which it breaks its constraints, as far as known.
        frozen: Optuna's own record.
    """

    number: int
    values: Mapping[str, Any]
    energy_uj_per_token: float
    state: State
    rung: int
    scores: tuple[Scored, ...]
    skipped: str
    lost_workers: int
    halvings: int
    violation: float
    frozen: FrozenTrial

    @cached_property
    def key(self) -> str:
        """The same for two trials of the same values."""
        return point_key(self.values)

    @property
    def told(self) -> bool:
        """Whether Optuna's own record has the trial's end."""
        return self.frozen.state.is_finished()

    @cached_property
    def accuracy(self) -> float | None:
        """Mean accuracy over chips at the last goal reached."""
        return float(self.scores[-1].metrics["accuracy"]) if self.scores else None


def point_key(values: Mapping[str, Any]) -> str:
    """Values of a point as text, whatever their order."""
    return repr(sorted(values.items()))


class SweepStudy:
    """What the decision core knows, read from storage and written there at once.

    Args:
        name: Name of the study.
        storage: Where the study lives; it is created if it is new.
    """

    def __init__(self, name: str, storage: BaseStorage) -> None:
        try:
            self._study = optuna.load_study(study_name=name, storage=storage)  # writes nothing
        except KeyError:
            self._study = optuna.create_study(
                study_name=name, storage=storage, directions=["maximize", "minimize"], load_if_exists=True
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
        energy_uj_per_token: float,
        *,
        system_attrs: Mapping[str, Any],
        constraints: Mapping[str, float],
        skipped: str = "",
    ) -> int:
        """Write a new trial, running or skipped, all its values at once; its number."""
        attrs: dict[str, Any] = {_ENERGY: energy_uj_per_token, _RUNG: 0}
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
        self._study.tell(trial.number, [trial.scores[-1].metrics["accuracy"], trial.energy_uj_per_token])

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
        energy_uj_per_token=float(attrs[_ENERGY]),
        state=state,
        rung=rung,
        scores=scores,
        skipped=str(attrs.get(_SKIPPED, "")),
        lost_workers=int(attrs.get(_LOST, 0)),
        halvings=int(attrs.get(_HALVINGS, 0)),
        violation=total_violation(frozen.constraints.values()),
        frozen=frozen,
    )


def _scores(attrs: Mapping[str, Any]) -> tuple[Scored, ...]:
    found: list[Scored] = []
    while (key := _SCORES.format(index=len(found))) in attrs:
        found.append(Scored.from_json(attrs[key]))
    if _FINAL_SCORES in attrs:
        found.append(Scored.from_json(attrs[_FINAL_SCORES]))
    return tuple(found)
