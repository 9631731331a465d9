"""Searchers and rungs on analytic problems with known fronts. `make bench-search` runs it and keeps what it prints.

Protocol, fixed before the first run:

- Problems: ZDT1 and DTLZ2 with 5 variables and two objectives, BNH with its two constraints, and in part A DTLZ2 and
  DTLZ7 with 6 variables and three objectives, as in `benchmarks.analytic`, with the reference points given there:
  (1.1, 4.0), (1.5, 1.5), (140, 1.0), (1.5, 1.5, 1.5), (1.1, 1.1, 30) in the objectives that are made small.
  Hypervolumes are those of noise-free objectives after a whole training, of trials that were trained whole and keep all
  constraints, whatever the search saw.
- 20 seeds, numbers 0 to 19, unless a part says otherwise. Shown: median and quartiles.
- A. Same as Optuna: 80 trials one after the other, no noise, no rungs; our core beside a study of Optuna's asked and
  told directly, with the same sampler at its defaults: once made for the whole study, once made anew for every trial
  with the seed that ours has there, so that only what our core does can differ. Seeds 0 to 59, as the medians of 20,
  which were run first, could not tell 2 % from chance. Aim: medians within 2 %, no more violations.
- B. Fewer steps: training of 27 steps, 4 chips with noise (standard deviation 0.02 of the reference's loss), 4 workers.
  `plain`: Ray's OptunaSearch at its defaults, told the noisy mean, every trial trained whole, 40 trials (1,080 steps).
  `random`: the same with random points. `whole`: our core without rungs. `rungs`: our core with rungs at 3 and 9 steps
  on 2 chips, a third going on, up to 1,080 steps. Counted: steps until the hypervolume reaches the median that plain
  (random) has at its end. Aim: at most a half of plain's 1,080 steps, at most a third of random's. On `saturating`
  curves rungs rank trials as their ends do; on `crossing` curves the better the end the slower the start, where rungs
  may lose. What the sampler sees of a trial at a rung was changed once after these seeds had been seen, in a way that
  was tried on seeds 200 to 219 alone; docs/lab.md has the figures before.
- C. Racing: 40 random points of ZDT1, noise of 1.5 over chips, 240 evaluations on one chip in all: 6 chips for every
  point, or 3 for every point and 120 handed out by the race. Counted: F1 of the front by estimated means against the
  true front of these points. The rule of the race was changed once after it had been seen on seeds 0 to 19
  (docs/lab.md), so seeds 100 to 119, which were not looked at before, decide.
- D. Long studies: milliseconds of an ask with 5,000 trials in the journal, peak memory of the process, and what the
  bound on the history costs in hypervolume (ZDT1, 200 trials, 5 seeds). Aim: 50 ms, 1 GiB.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.search.optuna import OptunaSearch

from benchmarks.analytic import FUNCTIONS, OF_THREE, AnalyticCurves
from halora.analysis.front import ranks
from halora.analysis.front import volume as front_volume
from halora.analysis.racing import chip_estimates
from halora.events import Failed, JobEvent, Reported, Scored
from halora.hardware.energy import ENERGY
from halora.settings.trial import Goal
from halora.spaces.search import Racing, Sampler, SearchSettings
from halora.sweep.search.core import DecisionCore
from halora.sweep.search.jobs import Job
from halora.sweep.search.problem import Problem
from halora.sweep.search.samplers import make_sampler
from halora.sweep.search.study import State, SweepStudy, directions_of
from halora.sweep.simulation.simulator import SimulatedClock, simulate

SEEDS = range(20)
MORE_SEEDS = range(60)
FRESH_SEEDS = range(100, 120)
WORKERS, WHOLE_TRIALS = 4, 40
RUNGS = [Goal(3, 2), Goal(9, 2), Goal(27, 4)]

optuna.logging.set_verbosity(optuna.logging.ERROR)

Point = dict[str, Any]
"""Values by the name of the variable."""


def hypervolume(points: Iterable[Sequence[float]], problem: Problem) -> float:
    """Area or volume between points, by their objectives, and the problem's reference."""
    return front_volume(np.array(list(points)), problem.reference, problem.objectives)


def feasible(curves: AnalyticCurves, values: dict[str, Any]) -> bool:
    """Whether a point keeps the function's constraints."""
    return all(curves.clean(values, curves.steps)[metric] >= 0 for metric in curves.function.constraints)


def search(problem: Problem, curves: AnalyticCurves, workers: int = WORKERS) -> DecisionCore:
    """Run our core to its end."""
    clock = SimulatedClock()
    core = DecisionCore(problem, SweepStudy(problem.name, InMemoryStorage(), problem.objectives), clock_s=clock)
    simulate(core, curves, clock, concurrent=workers)
    return core


def values_found(core: DecisionCore, curves: AnalyticCurves) -> list[Point]:
    """Points trained whole that keep the constraints."""
    return [dict(t.values) for t in core.trials() if t.state is State.FINISHED and feasible(curves, dict(t.values))]


def volume(points: Iterable[Point], problem: Problem, curves: AnalyticCurves) -> float:
    """Hypervolume of the points' true objectives."""
    return hypervolume((curves.true_objectives(values) for values in points), problem)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], method="closest_observation")
    return f"{middle:{form}} ({low:{form}} .. {high:{form}})"


def same_as_optuna() -> None:
    """Part A."""
    trials = 80
    print(f"\nA. hypervolume after {trials} trials, and violations among {trials * len(MORE_SEEDS)}\n")
    for function, tested in {**FUNCTIONS, **OF_THREE}.items():
        curves = AnalyticCurves(tested, steps=1)
        for name, sampler in _SAMPLERS.items():
            found: dict[str, list[list[Point]]] = {"ours": [], "Optuna": [], "Optuna, seeded as ours": []}
            for seed in MORE_SEEDS:
                settings = SearchSettings(sampler=name, skip_unreachable=False)
                problem = curves.problem("a", trials=trials, seed=seed, settings=settings)
                found["ours"].append([dict(trial.values) for trial in search(problem, curves, workers=1).trials()])
                one = repeat(sampler(seed), trials)
                anew = (make_sampler(name, problem.space, seed, number) for number in range(trials))
                found["Optuna"].append(_optuna_directly(problem, curves, one))
                found["Optuna, seeded as ours"].append(_optuna_directly(problem, curves, anew))
            _compare(f"{function} {name}", found, problem, curves)


_SAMPLERS: dict[Sampler, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
}


def _compare(what: str, found: dict[str, list[list[Point]]], problem: Problem, curves: AnalyticCurves) -> None:
    """Print hypervolumes and violations of all ways, and our median over theirs with its bootstrap interval."""
    ours: np.ndarray | None = None
    rng = np.random.default_rng(0)
    for way, studies in found.items():
        kept = [[point for point in points if feasible(curves, point)] for points in studies]
        volumes = np.array([volume(points, problem, curves) for points in kept])
        broken = sum(map(len, studies)) - sum(map(len, kept))
        ours = volumes if ours is None else ours
        draws = rng.integers(len(volumes), size=(2000, len(volumes)))
        low, high = np.quantile(np.median(ours[draws], axis=1) / np.median(volumes[draws], axis=1), [0.025, 0.975])
        ratio = np.median(ours) / np.median(volumes)
        told = "" if volumes is ours else f"  ours to it {ratio:.3f} [{low:.3f}, {high:.3f}]"
        print(f"{what:18} {way:22} {spread(list(volumes))}  violations {broken}{told}", flush=True)


def _optuna_directly(
    problem: Problem, curves: AnalyticCurves, samplers: Iterable[optuna.samplers.BaseSampler]
) -> list[Point]:
    study = optuna.create_study(directions=directions_of(problem.objectives))
    for study.sampler in samplers:
        trial = study.ask()
        values = {path: trial.suggest_float(path, d.low, d.high) for path, d in problem.space.items()}  # type: ignore[union-attr]
        for metric in curves.function.constraints:
            trial.set_constraint(metric, -curves.clean(values, curves.steps)[metric])
        study.tell(trial, list(curves.true_objectives(values)))
    return [dict(trial.params) for trial in study.trials]


def fewer_steps() -> None:
    """Part B."""
    budget = WHOLE_TRIALS * RUNGS[-1].steps
    print(f"\nB. steps until the hypervolume that plain (random) has after {budget} steps; 'never' is beyond them\n")
    for function in ("zdt1", "dtlz2"):
        for kind in ("saturating", "crossing"):
            noise = 0.02 * FUNCTIONS[function].reference[-1]
            runs: dict[str, list[list[tuple[int, float]]]] = {"plain": [], "random": [], "whole": [], "rungs": []}
            for seed in SEEDS:
                curves = AnalyticCurves(FUNCTIONS[function], curve=kind, chip_std=noise, seed=seed)
                runs["plain"].append(_ray_optuna_search(curves, seed))
                for name in ("random", "whole", "rungs"):
                    runs[name].append(_history(curves, seed, name, budget))
            targets = {name: float(np.median([run[-1][1] for run in runs[name]])) for name in ("plain", "random")}
            print(f"{function} {kind}: hypervolume of plain {targets['plain']:.4f}, of random {targets['random']:.4f}")
            for name, histories in runs.items():
                ends = spread([history[-1][1] for history in histories])
                reached = {
                    target: [_steps_to(history, volume) for history in histories] for target, volume in targets.items()
                }
                told = "  ".join(f"to {target}'s {_counted(steps, budget)}" for target, steps in reached.items())
                print(f"  {name:7} end {ends}  {told}", flush=True)


def _history(curves: AnalyticCurves, seed: int, name: str, budget: int) -> list[tuple[int, float]]:
    """(Steps taken by all jobs ended so far, hypervolume) after every whole training, of our core."""
    rungs = name == "rungs"
    problem = curves.problem(
        "b",
        trials=10_000 if rungs else WHOLE_TRIALS,
        seed=seed,
        chip_instances=RUNGS[-1].chip_instances,
        goals=lambda values: RUNGS if rungs else RUNGS[-1:],
        reduction_factor=3,
        settings=SearchSettings(sampler="random" if name == "random" else "tpe", skip_unreachable=False),
    )
    watch = _Watch(curves, problem, budget)
    clock = SimulatedClock()
    core = DecisionCore(problem, SweepStudy("b", InMemoryStorage()), clock_s=clock)
    watch.core = core
    simulate(core, curves, clock, concurrent=WORKERS, listener=watch)
    return watch.history


class _Watch:
    """Counts steps as they are taken, and asks the search to stop once the budget is spent."""

    core: DecisionCore

    def __init__(self, curves: AnalyticCurves, problem: Problem, budget: int) -> None:
        self._curves, self._problem, self._budget = curves, problem, budget
        self._reached: dict[int, int] = {}
        self._points: list[Sequence[float]] = []
        self.history: list[tuple[int, float]] = [(0, 0.0)]

    def began(self, job: Job) -> None:
        """Nothing."""

    def told(self, job: Job, event: JobEvent) -> None:
        """Count."""
        if isinstance(event, Reported):
            return
        assert isinstance(event, Scored), event
        self._reached[job.number] = job.goal.steps
        steps = sum(self._reached.values())
        if steps > self._budget:
            self.core.request_stop()
        elif job.final:
            self._points.append(self._curves.true_objectives(job.values))
            self.history.append((steps, hypervolume(self._points, self._problem)))


def _ray_optuna_search(curves: AnalyticCurves, seed: int) -> list[tuple[int, float]]:
    """The same of Ray's OptunaSearch at its defaults, with trials that begin and end in turn."""
    problem = curves.problem("b", trials=WHOLE_TRIALS)
    searcher = OptunaSearch(
        space=lambda trial: {p: trial.suggest_float(p, d.low, d.high) for p, d in problem.space.items()} and None,  # type: ignore[union-attr]
        metric=["accuracy", "energy"],
        mode=["max", "min"],
        seed=seed,
    )
    history, points, running = [(0, 0.0)], [], []
    for number in range(WHOLE_TRIALS + WORKERS):
        if number < WHOLE_TRIALS:
            running.append((str(number), searcher.suggest(str(number))))
        if number >= WORKERS - 1 and running:
            name, values = running.pop(0)
            accuracy = float(np.mean([curves.accuracy(values, curves.steps, chip) for chip in range(4)]))
            searcher.on_trial_complete(name, {"accuracy": accuracy, "energy": problem.costs(values)[ENERGY]})
            points.append(curves.true_objectives(values))
            history.append((len(points) * curves.steps, hypervolume(points, problem)))
    return history


def _steps_to(history: list[tuple[int, float]], target: float) -> float:
    return next((float(steps) for steps, reached in history if reached >= target), float("inf"))


def _counted(steps: list[float], budget: int) -> str:
    low, middle, high = (
        "never" if np.isinf(q) else f"{q:.0f}"
        for q in np.quantile(steps, [0.25, 0.5, 0.75], method="closest_observation")
    )
    share = float(np.quantile(steps, 0.5, method="closest_observation")) / budget
    return f"{middle} ({low} .. {high}) = {share:.2f}"


def racing() -> None:
    """Part C."""
    print("\nC. front of 40 noisy points identified with 240 chip evaluations, F1\n")
    for seeds in (SEEDS, FRESH_SEEDS):
        print(f"  seeds {seeds.start} to {seeds.stop - 1}")
        found = {name: [_identified(seed, *ways) for seed in seeds] for name, ways in _WAYS.items()}
        for name, scores in found.items():
            print(f"    {name:18} {spread(scores, '.3f')}  mean {np.mean(scores):.3f}")
        fixed, raced = found.values()
        wins = np.sign(np.subtract(raced, fixed))
        told = f"racing better on {sum(wins > 0)} seeds, equal on {sum(wins == 0)}, worse on {sum(wins < 0)}"
        print(f"    {told}; mean gain {np.mean(np.subtract(raced, fixed)):+.3f}", flush=True)


_WAYS: dict[str, tuple[int, Racing | None]] = {
    "6 chips each": (6, None),
    "3 each, 120 raced": (3, Racing(extra=120, most=40)),
}


def _identified(seed: int, chips: int, race: Racing | None) -> float:
    """F1 of the front that one search ends with."""
    curves = AnalyticCurves(FUNCTIONS["zdt1"], steps=1, chip_std=1.5, seed=seed)
    settings = SearchSettings(sampler="random", skip_unreachable=False)
    problem = curves.problem("c", trials=40, seed=seed, chip_instances=chips, settings=settings, racing=race)
    trials = search(problem, curves).trials()
    energy = np.array([trial.energy_uj_per_token for trial in trials])
    true = np.array([curves.true_objectives(trial.values)[0] for trial in trials])
    by_chip = [trial.scores[-1].accuracy_by_chip for trial in trials]
    assert sum(map(len, by_chip)) <= 240
    estimated = chip_estimates(by_chip)[0]
    return _f1(*(ranks(np.column_stack([accuracy, energy])) == 0 for accuracy in (estimated, true)))


def _f1(found: np.ndarray, true: np.ndarray) -> float:
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def long_studies() -> None:
    """Part D."""
    print("\nD. long studies\n")
    curves = AnalyticCurves(FUNCTIONS["zdt1"], steps=1)
    with TemporaryDirectory() as folder:
        storage = JournalStorage(JournalFileBackend(str(Path(folder) / "journal")))
        settings = SearchSettings(sampler="random", skip_unreachable=False)
        clock = SimulatedClock()
        problem = curves.problem("d", trials=5000, settings=settings)
        began = time.perf_counter()
        simulate(DecisionCore(problem, SweepStudy("d", storage), clock_s=clock), curves, clock, concurrent=WORKERS)
        took = time.perf_counter() - began
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"  5,000 simulated trials in a journal: {took:.0f} s, peak of the process {peak_kib / 2**10:.0f} MiB")
        for history in (100, 200, 500):
            changed = curves.problem(
                "d", trials=10_000, settings=SearchSettings(history=history, skip_unreachable=False)
            )
            core = DecisionCore(changed, SweepStudy("d", storage))
            asks = []
            for _ in range(21):
                wall, processor = time.perf_counter(), time.process_time()
                job = core.suggest()
                asks.append((time.perf_counter() - wall, time.process_time() - processor))
                assert job is not None
                core.take(Failed(trial=job.number, cause="not trained"))
            told, of_it = (spread([1000 * ask[clock] for ask in asks[1:]], ".1f") for clock in (0, 1))
            print(f"  an ask that looks at {history} of them: {told} ms, processor time {of_it} ms", flush=True)
    volumes: dict[int, list[float]] = {50: [], 100: [], 200: [], 10_000: []}
    for seed in range(5):
        for history in volumes:
            bounded = SearchSettings(history=history, skip_unreachable=False)
            problem = curves.problem("d", trials=200, seed=seed, settings=bounded)
            volumes[history].append(volume(values_found(search(problem, curves, 1), curves), problem, curves))
    for history, found in volumes.items():
        print(f"  hypervolume after 200 trials, looking at {history} at most: {spread(found)}", flush=True)


if __name__ == "__main__":
    parts = {"a": same_as_optuna, "b": fewer_steps, "c": racing, "d": long_studies}
    for part in sys.argv[1:] or parts:
        start = time.perf_counter()
        parts[part]()
        print(f"  [{time.perf_counter() - start:.0f} s]", flush=True)
