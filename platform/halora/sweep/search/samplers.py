"""What the sampler sees, and what it makes of it.

A suggestion is a function of (sweep seed, trial number, the trials before it): the sampler is made anew for each, over
a view of the study held in memory. The view is bounded, so that a suggestion takes as long after 5,000 trials as after
200; it gives a trial paused or stopped at a rung an accuracy, which the study itself must not, and a configuration that
was never trained for its costs the worst one. At a rung that is the accuracy reached plus the median gain of those
that went on: without it whole trainings look better than they are, and the search stays around them.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from halora.analysis.front import ranks
from halora.analysis.trials import DEFAULT_OBJECTIVES, Objective
from halora.events import Scored
from halora.hardware.addressing import derive_seed
from halora.spaces.language import Categorical, Distribution, chosen_values
from halora.spaces.search import Sampler, total_violation
from halora.sweep.search.problem import Problem, worst_scores
from halora.sweep.search.study import State, Trial, directions_of

BLIND: frozenset[Sampler] = frozenset({"random", "qmc"})
"""Samplers that look at no trial."""

_NEVER_SEEN = {State.FAILED, State.DISCARDED}
_Values = tuple[float, ...]
_FIXED = "fixed_params"  # Optuna's own note of a point it was told to take


@dataclass(frozen=True)
class Proposal:
    """A point of the space as Optuna stores it.

    Attributes:
        values: Searched values by dotted path.
        distributions: What each was chosen from.
        system_attrs: What the sampler wants kept with the trial.
    """

    values: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    system_attrs: dict[str, Any]


def propose(
    space: Mapping[str, Distribution],
    sampler: BaseSampler,
    seen: Sequence[FrozenTrial] = (),
    fixed: Mapping[str, Any] | None = None,
    objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
) -> Proposal:
    """The sampler's next point, given what it sees; fields in `fixed` are taken from there."""
    view = _View(sampler, seen, objectives)
    if fixed:
        view.enqueue_trial(dict(fixed))
    trial = view.ask()
    values = choose(trial, space)
    (kept,) = view.own_trials()
    attrs = {name: value for name, value in kept.system_attrs.items() if name != _FIXED}
    return Proposal(values, dict(trial.distributions), attrs)


def choose(trial: optuna.Trial, space: Mapping[str, Distribution]) -> dict[str, Any]:
    """Values for every searched field whose condition holds, in the order of the sweep file."""

    def suggest(path: str, distribution: Distribution) -> Any:
        if isinstance(distribution, Categorical):
            return trial.suggest_categorical(path, distribution.choices)
        if distribution.kind == "int":
            return trial.suggest_int(path, int(distribution.low), int(distribution.high), log=distribution.log)
        return trial.suggest_float(path, distribution.low, distribution.high, log=distribution.log)

    return chosen_values(space, suggest)


def make_sampler(
    name: Sampler, space: Mapping[str, Distribution], sweep_seed: int, number: int, attempt: int = 0
) -> BaseSampler:
    """The sampler for one trial; a further attempt, after a point that is known already, draws anew."""
    seed = derive_seed("sampler", sweep_seed, number, attempt) % 2**32
    makers: dict[Sampler, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(seed=seed),
        "gp": lambda: GPSampler(seed=seed, warn_independent_sampling=False),
        "nsga2": lambda: NSGAIISampler(seed=seed),
        "nsga3": lambda: NSGAIIISampler(seed=seed),
        "random": lambda: RandomSampler(seed=seed),
        "qmc": lambda: _SobolSampler(list(space), sweep_seed, number),
    }
    return makers[name]()


class History:
    """The trials of a study as a sampler sees them.

    Args:
        limit: How many ended trials it sees at most: half of them the best, by rank, the others the latest.
        objectives: What they are compared by.
        reference: Values of the objectives; its scores are those of a configuration that was never trained.
        earlier: Trials of earlier sweeps, seen as if they were the first of this one.
    """

    def __init__(
        self,
        limit: int,
        objectives: Sequence[Objective],
        reference: Sequence[float],
        earlier: Sequence[Trial] = (),
    ) -> None:
        self._limit, self._objectives, self._worst = limit, objectives, worst_scores(objectives, reference)
        self._earlier = earlier
        self._entries: dict[tuple[int, int, _Values | None], FrozenTrial] = {}

    def seen(self, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """What the sampler sees of these trials."""
        # The trial to suggest is number 0 of the view.
        shown = [(1 + place, trial) for place, trial in enumerate(self._earlier)]
        first = 1 + len(shown)
        shown += [(first + trial.number, trial) for trial in trials if trial.state not in _NEVER_SEEN]
        to_come = {name: _gains_to_come(trials, name) for name in self._worst}
        values = [self._values(trial, to_come) for _, trial in shown]
        latest = range(max(len(shown) - self._limit // 2, 0), len(shown))
        bounded = sorted({*self._best([trial for _, trial in shown], values), *latest})
        view = [(*shown[i], values[i]) for i in bounded]
        self._entries = {(n, len(trial.scores), value): self._entry(n, trial, value) for n, trial, value in view}
        return list(self._entries.values())

    def _values(self, trial: Trial, to_come: Mapping[str, Sequence[float]]) -> _Values | None:
        """The objectives a trial is taken to end with: at a rung what it reached, and what others gained from there."""
        if trial.state is State.SKIPPED:
            known = self._worst | dict(trial.costs)
        elif not trial.scores:
            return None
        elif trial.state is State.FINISHED:
            known = trial.metrics
        else:
            level = len(trial.scores) - 1
            known = trial.metrics | {name: trial.metrics[name] + gains[level] for name, gains in to_come.items()}
        return tuple(known[each.metric] for each in self._objectives)

    def _best(self, shown: Sequence[Trial], values: Sequence[_Values | None]) -> list[int]:
        if len(shown) <= self._limit:
            return list(range(len(shown)))
        valued = [i for i, trial in enumerate(shown) if trial.scores and trial.violation <= 0]
        table = np.array([values[i] for i in valued], dtype=float)
        by_rank = np.argsort(ranks(table, self._objectives), kind="stable")
        return [valued[i] for i in by_rank[: self._limit // 2]]

    def _entry(self, number: int, trial: Trial, values: _Values | None) -> FrozenTrial:
        if known := self._entries.get((number, len(trial.scores), values)):
            return known
        entry = optuna.create_trial(
            state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
            values=values,
            params=dict(trial.values),
            distributions=trial.frozen.distributions,
            system_attrs={k: v for k, v in trial.frozen.system_attrs.items() if not k.startswith("constraints")},
            constraints=dict(trial.frozen.constraints) or None,
        )
        entry.number = entry._trial_id = number
        return entry


def _gains_to_come(trials: Sequence[Trial], score: str) -> list[float]:
    """Median gain in a score from each goal to the last, of the trials that went on from it."""
    reached = max((len(trial.scores) for trial in trials), default=0)
    gains = [
        [t.scores[rung + 1].metrics[score] - t.scores[rung].metrics[score] for t in trials if len(t.scores) > rung + 1]
        for rung in range(reached)
    ]
    medians = [median(gain) if gain else 0.0 for gain in gains]
    return [sum(medians[rung:]) for rung in range(reached)]


class _View(optuna.Study):
    """A study in memory that shows given trials beside the one that is asked for."""

    def __init__(self, sampler: BaseSampler, seen: Sequence[FrozenTrial], objectives: Sequence[Objective]) -> None:
        storage = InMemoryStorage()
        directions = directions_of(objectives)
        name = storage.get_study_name_from_id(storage.create_new_study(directions, "view"))
        super().__init__(name, storage, sampler=sampler)
        self._seen = seen

    def own_trials(self) -> list[FrozenTrial]:
        """Those asked for here."""
        return super()._get_trials(deepcopy=False)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        own = super()._get_trials(deepcopy=deepcopy, states=states, use_cache=use_cache)
        return [*(trial for trial in self._seen if states is None or trial.state in states), *own]


class _SobolSampler(BaseSampler):
    """Point `number` of a scrambled Sobol sequence, a coordinate per searched field."""

    def __init__(self, paths: Sequence[str], seed: int, number: int) -> None:
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(paths), rng=seed)
        point = (sequence.fast_forward(number) if number else sequence).random(1)[0]
        self._coordinates = dict(zip(paths, map(float, point), strict=True))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None: fields are set one by one."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The field's coordinate, spread over its values."""
        u = self._coordinates[param_name]
        match param_distribution:
            case CategoricalDistribution(choices=choices):
                return choices[int(u * len(choices))]
            case IntDistribution(low=low, high=high, log=log):
                return min(int(_between(low, high + 1, u, log)), high)
            case FloatDistribution(low=low, high=high, log=log):
                return _between(low, high, u, log)
        raise AssertionError(param_distribution)


def _between(low: float, high: float, u: float, log: bool) -> float:
    return float(low * (high / low) ** u) if log else low + u * (high - low)


def kept_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What another sweep needs to start warm from these trials, in plain JSON: values and scores of finished ones."""
    return [
        {"values": dict(trial.values), "scores": trial.scores[-1].to_json()}
        for trial in trials
        if trial.state is State.FINISHED
    ]


def fitting_trials(problem: Problem, kept: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials of earlier sweeps, see `kept_of`, that are points of this space, at this problem's energies."""
    found: list[Trial] = []
    for earlier in kept:
        values = {path: earlier["values"][path] for path in problem.space if path in earlier["values"]}
        try:
            proposal = propose(problem.space, make_sampler("random", problem.space, 0, 0), fixed=values)
        except ValueError:
            continue
        if proposal.values == values:
            found.append(_moved_here(problem, len(found), proposal, Scored.from_json(earlier["scores"])))
    return found


def _moved_here(problem: Problem, number: int, proposal: Proposal, scores: Scored) -> Trial:
    costs = problem.costs(proposal.values)
    metrics = {**scores.metrics, **costs}
    constraints = {str(c): c.violation(metrics) for c in problem.constraints}
    frozen = optuna.create_trial(
        values=[float(metrics[each.metric]) for each in problem.objectives],
        params=proposal.values,
        distributions=proposal.distributions,
        constraints=constraints or None,
    )
    return Trial(
        number=number,
        values=proposal.values,
        costs=costs,
        state=State.FINISHED,
        rung=0,
        scores=(scores,),
        skipped="",
        lost_workers=0,
        halvings=0,
        violation=total_violation(constraints.values()),
        frozen=frozen,
    )
