"""The decision core: what to do next, and what to make of a report. It knows no Ray; its only state is the study.

It hands out jobs. A job brings one trial to one goal: to a rung, to the end of its training, or, in a race, to more
chips. A trial that reaches a rung pauses there with its checkpoint, and is promoted once it is among the best of the
rung (asynchronous successive halving, Li et al., MLSys 2020, with non-dominated ranks as in Schmucker et al., 2021), by
a new job that any worker may carry out. Every decision is written to the study before it is acted on, so that a new
core continues where another ended.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import ceil, floor, isfinite

from halora.analysis.promotion import promotion_order
from halora.events import Discarded, Failed, JobEvent, OutOfMemory, Reported, Scored, WorkerLost
from halora.hardware.energy import COSTS
from halora.settings.trial import Goal
from halora.spaces.language import grid, size
from halora.sweep.search.jobs import Decision, Job
from halora.sweep.search.problem import Problem, worst_scores
from halora.sweep.search.race import Race, objectives_of
from halora.sweep.search.samplers import BLIND, History, Proposal, make_sampler, propose
from halora.sweep.search.spending import Spending
from halora.sweep.search.study import AskedPoint, State, SweepStudy, Trial, point_key

_RE_ASKS = 20  # points that are skipped, or known already, before one is drawn at random
_RANDOM_DRAWS = 200
_ENOUGH_TRIALS = 10  # finished ones, before a configuration is called unreachable
MOST_LOST = 3  # workers a trial may lose without a report between; the last of them fails it


class DecisionCore:
    """Hands out jobs and judges what comes of them.

    Args:
        problem: What is searched.
        study: Its study; everything decided is in there.
        earlier: Trials of earlier studies that the sampler sees from the start, see `fitting_trials`.
        clock_s: Seconds since some moment; budgets of hours go by it.
    """

    def __init__(
        self,
        problem: Problem,
        study: SweepStudy,
        earlier: Sequence[Trial] = (),
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._problem, self._study = problem, study
        self._scores = worst_scores(problem.objectives, problem.reference)
        self._history = History(problem.settings.history, problem.objectives, problem.reference, earlier)
        self._in_flight: dict[int, Job] = {}
        self._goals: dict[int, Sequence[Goal]] = {}
        self.spending = Spending(problem.budget, study, clock_s)
        """What the search has spent; its GPUs are those set aside for one job."""
        self._over, self._completed = False, False
        self._out_of_race: set[int] = set()

    def suggest(self) -> Job | None:
        """The next job: trials an earlier run left unfinished, then promotions, new trials, and at the end the race.

        None when there is none now; `waiting` tells whether there may be one once a running job ends.
        """
        if self._study.stopping:
            return None
        self.spending.count(len(self._in_flight))
        if not self._completed:
            self.complete()
        self._heed(self._study.trials())
        trials = self._study.trials()
        job = self._unfinished(trials)
        if job is None and self._within_budget(trials):
            job = self._asked_for() or self._promotion(trials) or self._new(trials)
        if job is None and not self._in_flight:
            job = self._promotion(trials, search_ends=True) if self._within_budget(trials) else None
        if job is None and not self._in_flight:
            for trial in trials:
                if trial.state is State.PAUSED:
                    self._study.stopped(trial)
            job = self._race(self._study.trials())
        if job is not None:
            self._in_flight[job.number] = job
        self._over = job is None and not self._in_flight
        return job

    def complete(self) -> None:
        """Tell Optuna's own record the end of finished trials that a process which ended meanwhile had not told yet."""
        for trial in self._study.trials():
            if trial.state is State.FINISHED and not trial.told:
                self._tell(trial)
        self._completed = True

    def _heed(self, trials: Sequence[Trial]) -> None:
        """Do with trials that no worker has what somebody asked for."""
        to_cut = self._study.to_cut
        for trial in trials:
            if trial.state is State.DISCARDED and not trial.told and trial.number not in self._in_flight:
                self._study.stopped(trial)
            elif trial.state is State.PAUSED and trial.number in to_cut:
                self._study.end_at(trial, trial.scores[-1].step)

    @property
    def waiting(self) -> bool:
        """Whether jobs are running whose end may bring new ones."""
        return bool(self._in_flight) and not self._study.stopping

    @property
    def over(self) -> bool:
        """Whether the search came to its end: nothing is left to do."""
        return self._over

    def judged(self, event: JobEvent) -> JobEvent:
        """What an event amounts to: one worker lost too many, or an objective that is not a number, is a failure.

        Whatever happens to a trial that somebody has discarded, it is that.
        """
        if event.trial in self._study.discarded:
            return Discarded(trial=event.trial)
        match event:
            case Scored():
                for name in dict.fromkeys(("accuracy", *self._scores)):
                    if not isfinite(value := event.metrics[name]):
                        cause = f"its {name.replace('_', ' ')} is {value}, not a number"
                        return Failed(trial=event.trial, cause=cause)
            case WorkerLost():
                trial = self.trial(event.trial)
                if trial.state is State.FINISHED or trial.lost_workers + 1 >= MOST_LOST:
                    return Failed(trial=event.trial, cause=event.cause)
        return event

    def take(self, event: JobEvent) -> Decision:
        """Take a judged event. A finished trial whose race failed stays as it was."""
        trial = self.trial(event.trial)
        if isinstance(event, Reported):
            return self._take_report(trial, event)
        self.spending.count(len(self._in_flight))
        job = self._in_flight.pop(event.trial, None)
        match event:
            case Discarded():
                if not trial.told:
                    self._study.stopped(trial)
                return Decision.PAUSE
            case Scored() if trial.state is State.FINISHED:
                self._study.raced(trial, event)
            case Scored() if job and job.final:
                self._study.finished(trial, event)
                self._tell(self.trial(trial.number))
            case Scored():
                self._study.scored(trial, event)
            case WorkerLost():
                self._study.count_lost_workers(trial, trial.lost_workers + 1)
            case OutOfMemory():
                self._study.halved(trial)
            case Failed() if trial.state is State.FINISHED:
                self._out_of_race.add(trial.number)
            case Failed():
                self._study.failed(trial.number)
        return Decision.CONTINUE

    def _take_report(self, trial: Trial, event: Reported) -> Decision:
        self.spending.count_running(len(self._in_flight))
        if trial.lost_workers:
            self._study.count_lost_workers(trial, 0)
        if self._study.stopping:
            return Decision.PAUSE
        job = self._in_flight.get(trial.number)
        ends = trial.number in self._study.to_cut and trial.state is State.RUNNING and trial.last_step is None
        if job is None or not ends or (job.final and event.step >= job.goal.steps):
            return Decision.CONTINUE
        self._study.end_at(trial, event.step)
        del self._in_flight[trial.number]  # to be scored by a job of its own
        return Decision.PAUSE

    def trial(self, number: int) -> Trial:
        """A trial that was begun before."""
        return self._study.trial(number)

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return self._study.trials()

    def holds(self, number: int) -> bool:
        """Whether a job of a trial is in hand."""
        return number in self._in_flight

    @property
    def discarded(self) -> frozenset[int]:
        """Trials that somebody took out."""
        return self._study.discarded

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the trials that were begun and have not ended."""
        return [trial.number for trial in self.trials() if trial.state in (State.RUNNING, State.PAUSED)]

    @property
    def stopping(self) -> bool:
        """Whether someone asked the sweep to stop."""
        return self._study.stopping

    def request_stop(self, stop: bool = True) -> None:
        """Ask the process that runs the sweep to pause its trials and end; from any process."""
        self._study.request_stop(stop)

    def counts(self) -> dict[str, int]:
        """Number of trials by state; `waiting` are those not begun yet."""
        trials = self.trials()
        states = [trial.state for trial in trials]
        waiting = 0 if self._study.ended else max(self._problem.trials - _begun(trials), 0)
        return {
            "finished": states.count(State.FINISHED),
            "failed": states.count(State.FAILED),
            "stopped": states.count(State.STOPPED),
            "skipped": states.count(State.SKIPPED),
            "unfinished": states.count(State.RUNNING) + states.count(State.PAUSED),
            "discarded": states.count(State.DISCARDED),
            "waiting": waiting + len(self._study.asked()),
        }

    @property
    def ended(self) -> str:
        """Why fewer trials were begun than the sweep asks for; else empty."""
        return self._study.ended

    def steps_taken(self) -> int:
        """Optimiser steps over all trials, those of running jobs counted whole."""
        return self._steps(self.trials())

    def steps_unstopped(self) -> int:
        """Optimiser steps that the trials begun so far take where none is stopped at a rung."""
        return sum(self._goals_of(trial)[-1].steps for trial in self.trials() if trial.state is not State.SKIPPED)

    def _unfinished(self, trials: Sequence[Trial]) -> Job | None:
        for trial in trials:
            if trial.state is State.RUNNING and trial.number not in self._in_flight:
                return self._job(trial)
        return None

    def _promotion(self, trials: Sequence[Trial], *, search_ends: bool = False) -> Job | None:
        """The best paused trial of the highest rung that has one among those to go on."""
        for rung in sorted({trial.rung for trial in trials if trial.state is State.PAUSED}, reverse=True):
            reached = [t for t in trials if len(t.scores) > rung and t.state not in (State.FAILED, State.DISCARDED)]
            quota = (ceil if search_ends else floor)(len(reached) / self._problem.reduction_factor)
            if sum(trial.rung > rung for trial in reached) >= quota:
                continue  # else every newcomer that reorders the best would promote one more
            table = objectives_of(self._problem, [replace(trial, scores=trial.scores[: rung + 1]) for trial in reached])
            floors = dict.fromkeys(islice(self._scores, 1), self._problem.accuracy_floor)
            for i in promotion_order(table, self._problem.objectives, self._problem.reference, quota, floors):
                trial = reached[i]
                if trial.state is State.PAUSED and trial.rung == rung:
                    self._study.head_for(trial, rung + 1)
                    return self._job(replace(trial, rung=rung + 1))
        return None

    def _asked_for(self) -> Job | None:
        """The next point that somebody asked for; one more than the sweep's number of trials."""
        for asked in self._study.asked()[:1]:
            trials, space = self._study.trials(), self._problem.space
            sampler = make_sampler("random", space, self._problem.seed, len(trials))
            proposal = propose(space, sampler, fixed=asked.values)
            return self._job(self.trial(self._begin(proposal, self._problem.costs(proposal.values), asked=asked)))
        return None

    def _new(self, trials: Sequence[Trial]) -> Job | None:
        if _begun(trials) >= self._problem.trials or self._study.ended:
            return None
        known = {trial.key for trial in trials}
        asked = _skipped_last(trials)  # of these, by an earlier process: what is suggested follows from the study alone
        repeated = 0
        while asked + repeated < _RE_ASKS:
            proposal = self._proposal(trials, repeated)
            if point_key(proposal.values) in known and _chosen(trials) >= len(self._problem.first):
                repeated += 1
                continue
            costs, refused = self._priced(proposal)
            reason = refused or self._reason_to_skip(costs, trials)
            number = self._begin(proposal, costs, reason)
            trials = self._study.trials()
            if not reason:
                return self._job(trials[number])
            known.add(point_key(proposal.values))
            asked, repeated = asked + 1, 0
        return self._untried(trials, known)

    def _untried(self, trials: Sequence[Trial], known: set[str]) -> Job | None:
        """A point drawn at random, or the first of a small space, that is new and keeps the constraints on costs."""
        space = self._problem.space
        for draw in range(_RANDOM_DRAWS):
            proposal = propose(space, make_sampler("random", space, self._problem.seed, len(trials), _RE_ASKS + draw))
            if job := self._if_allowed(proposal, known):
                return job
        if (count := size(space)) is not None:
            for values in islice(grid(space), min(count, 100_000)):
                if point_key(values) not in known:
                    fixed = propose(space, make_sampler("random", space, 0, 0), fixed=values)
                    if job := self._if_allowed(fixed, known):
                        return job
        self._study.end("no configuration is left that is new, possible, and keeps the constraints on costs")
        return None

    def _if_allowed(self, proposal: Proposal, known: set[str]) -> Job | None:
        costs, refused = self._priced(proposal)
        if point_key(proposal.values) in known or refused or self._over_constraint(costs):
            return None
        number = self._begin(proposal, costs)
        return self._job(self._study.trial(number))

    def _priced(self, proposal: Proposal) -> tuple[Mapping[str, float], str]:
        """Costs of a configuration, and why no trial can have it; such a one stands at those of the reference."""
        try:
            return self._problem.costs(proposal.values), ""
        except ValueError as error:  # of a derived value, or a user's mistake
            at = zip(self._problem.objectives, self._problem.reference, strict=True)
            return {each.metric: value for each, value in at if each.metric in COSTS}, str(error)

    def _proposal(self, trials: Sequence[Trial], attempt: int) -> Proposal:
        problem, number = self._problem, len(trials)
        sampler = make_sampler(problem.settings.sampler, problem.space, problem.seed, number, attempt)
        chosen = _chosen(trials)
        first = problem.first[chosen] if chosen < len(problem.first) else None
        seen = () if problem.settings.sampler in BLIND else self._history.seen(trials)
        return propose(problem.space, sampler, seen, fixed=first, objectives=problem.objectives)

    def _begin(
        self, proposal: Proposal, costs: Mapping[str, float], skipped: str = "", asked: AskedPoint | None = None
    ) -> int:
        constraints = {str(c): c.violation(costs) for c in self._problem.constraints if c.metric in costs}
        return self._study.begin(
            proposal.values,
            proposal.distributions,
            costs,
            system_attrs=proposal.system_attrs,
            constraints=constraints,
            skipped=skipped,
            asked=asked,
        )

    def _reason_to_skip(self, costs: Mapping[str, float], trials: Sequence[Trial]) -> str:
        """Why a configuration of these costs need not be trained; empty if it should be."""
        if over := self._over_constraint(costs):
            return over
        finished = [trial for trial in trials if trial.state is State.FINISHED and trial.violation <= 0]
        if not self._problem.settings.skip_unreachable or len(finished) < _ENOUGH_TRIALS:
            return ""
        reachable = max(_clean_at_best(trial.scores[-1].metrics) for trial in finished)
        aims = [each for each in self._problem.objectives if each.metric in COSTS]
        for trial in finished:
            gains = [(costs[each.metric] - trial.costs[each.metric]) * (-1 if each.maximise else 1) for each in aims]
            cheaper = min(gains, default=-1.0) >= 0 and any(gains)
            if cheaper and all(trial.metrics[name] >= reachable for name in self._scores):
                return f"trial {trial.number} has at less cost what clean weights may reach at most, {reachable:.3g}"
        return ""

    def _over_constraint(self, costs: Mapping[str, float]) -> str:
        broken = [c for c in self._problem.constraints if c.metric in costs and c.violation(costs) > 0]
        return " and ".join(f"{costs[c.metric]:.4g} breaks {c}" for c in broken)

    def _tell(self, trial: Trial) -> None:
        self._study.tell(trial, {str(each): each.violation(trial.metrics) for each in self._problem.constraints})

    def _race(self, trials: Sequence[Trial]) -> Job | None:
        """More chips for the finished trial that may decide most about the front."""
        race = Race(self._problem, trials, lambda trial: self._goals_of(trial)[-1])
        found = race.next_goal(self._out_of_race)
        if found is None:
            return None
        trial, goal = found
        name = f"{trial.number:05d}-chips-{goal.chip_instances}"
        return Job(trial.number, trial.values, trial.costs, goal, True, name, trial.halvings)

    def estimates(self) -> dict[int, float]:
        """Accuracies of finished trials as the race compares them, see `Race.estimates`."""
        return Race(self._problem, self._study.trials(), lambda trial: self._goals_of(trial)[-1]).estimates()

    def _job(self, trial: Trial) -> Job:
        goals = self._goals_of(trial)
        final = trial.rung == len(goals) - 1
        name = f"{trial.number:05d}" if final else f"{trial.number:05d}-rung-{trial.rung}"
        if cut_short := trial.last_step is not None:
            name = f"{trial.number:05d}-step-{trial.last_step}"
        goal = goals[trial.rung]
        return Job(
            trial.number, trial.values, trial.costs, goal, final, name, trial.halvings, cut_short, trial.clone_of
        )

    def _goals_of(self, trial: Trial) -> Sequence[Goal]:
        if trial.number not in self._goals:
            self._goals[trial.number] = self._problem.goals(trial.values)
        goals = self._goals[trial.number]
        return goals if trial.last_step is None else [*goals[: trial.rung], replace(goals[-1], steps=trial.last_step)]

    def _within_budget(self, trials: Sequence[Trial]) -> bool:
        if spent := self.spending.over(self._steps(trials)):
            self._study.end(spent)
        return not spent

    def _steps(self, trials: Sequence[Trial]) -> int:
        return sum(
            self._in_flight[t.number].goal.steps if t.number in self._in_flight else t.scores[-1].step
            for t in trials
            if t.scores or t.number in self._in_flight
        )


def _chosen(trials: Sequence[Trial]) -> int:
    """Number of points that the search chose, skipped ones too."""
    return sum(trial.clone_of is None for trial in trials)


def _begun(trials: Sequence[Trial]) -> int:
    """Number of trials that count for how many the sweep asks for."""
    return sum(trial.clone_of is None and trial.state is not State.SKIPPED for trial in trials)


def _skipped_last(trials: Sequence[Trial]) -> int:
    """Number of trials that were skipped since one was trained."""
    return next((i for i, trial in enumerate(reversed(trials)) if trial.state is not State.SKIPPED), len(trials))


def _clean_at_best(metrics: Mapping[str, float]) -> float:
    """Upper end of the interval of a clean accuracy; the accuracy where it has none, as in a simulation."""
    return float(metrics.get("clean_accuracy_high", metrics["clean_accuracy"]))
