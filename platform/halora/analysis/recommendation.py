"""Which trial of a sweep to take, how sure that is and what is left to do: the sentences above everything else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import floor, hypot
from typing import Any

from halora.analysis.candidates import Standing, preferred
from halora.analysis.formats import number
from halora.analysis.summary import FrontView
from halora.analysis.trials import Objective, RecordedTrial
from halora.evaluation.intervals import share_gain
from halora.hardware.energy import COSTS
from halora.pricing import baseline_energies
from halora.spaces.sweep import SweepConfig

_AS_CHEAP = 0.01
"""Share by which a cost may be higher for a trial to be named beside the one to take."""
_MOST_NAMED = 5


@dataclass(frozen=True)
class Progress:
    """How far a sweep and its adapters are.

    Attributes:
        running: Whether a process runs it.
        simulated: Whether recorded curves stand for training, so that there are no adapters.
        comparison: The closing comparison in plain values; none before there is one.
        certified: Whether a trial's certification was passed, by number, without those that have none; none where
            nobody looked.
    """

    running: bool = False
    simulated: bool = False
    comparison: Mapping[str, Any] | None = None
    certified: Mapping[int, bool] | None = None


@dataclass(frozen=True)
class Recommendation:
    """What to make of a sweep.

    Attributes:
        trial: The trial to take: the candidate that `halora adapter select` would certify first. None without one.
        tied: Numbers of the other candidates that cost at most 1 % more and cannot be told apart from it in any
            score by 95 % intervals, the best first.
        sentences: All of it in words, the most important first.
        command: What to run next; empty where there is nothing.
    """

    trial: RecordedTrial | None
    tied: tuple[int, ...]
    sentences: tuple[str, ...]
    command: str = ""

    @property
    def text(self) -> str:
        """The sentences on one line."""
        return " ".join(self.sentences)


def recommend(
    sweep: SweepConfig, view: FrontView, progress: Progress, baselines: Mapping[str, Mapping[str, float]]
) -> Recommendation:
    """What to make of a sweep.

    Args:
        sweep: The sweep as launched; its gates say which trials qualify.
        view: Its trials, over its objectives.
        progress: How far it is.
        baselines: Energy per token of named baselines in microjoule, by model and name.
    """
    best, standings = preferred(view.groups.all, sweep.gates, view.objectives)
    if best is None:
        return Recommendation(None, (), (_why_none(sweep, view, progress, standings),))
    rivals = [each.point for each in standings.values() if each.qualifies and each.point is not best]
    tied = _tied(best, rivals, view.objectives)
    sentences = [
        _so_far(sweep, view, progress) + _taken(best, view.objectives, baselines),
        *_beside(best, tied, len(rivals), view.objectives),
        *_compared(best, progress.comparison),
        *_left(best, progress),
    ]
    return Recommendation(best, tuple(tied), tuple(sentences), _command(sweep, best, progress))


def named_baselines(sweep: SweepConfig, view: FrontView) -> dict[str, dict[str, float]]:
    """Energy per token of named baselines in microjoule, by the models of the front and name."""
    models = {str(point.labels["model"]) for point in view.groups.feasible if "model" in point.labels}
    return {model: baseline_energies(sweep.resolve({"model": model}), sweep.shape(model)) for model in sorted(models)}


def _so_far(sweep: SweepConfig, view: FrontView, progress: Progress) -> str:
    done = len(view.groups.all) - len(view.groups.open)
    return f"So far, with {done} of {sweep.trials} trials: t" if progress.running else "T"


def _taken(best: RecordedTrial, objectives: tuple[Objective, ...], baselines: Mapping[str, Mapping[str, float]]) -> str:
    kind = [str(best.labels["method"])] if best.labels.get("method") else []
    kind += [f"rank {best.params['lora.rank']}"] if "lora.rank" in best.params else []
    scores = [f"{each.words} {_value(best, each.metric)}" for each in objectives if each.metric not in COSTS]
    costs = [f"{number(best.metrics[name], 3)} {unit}" for name, unit in _UNITS.items() if name in best.metrics]
    said = f"ake trial {best.number}{f' ({", ".join(kind)})' if kind else ''}: {', '.join(scores)}"
    said += f" at {' and '.join(costs[:2])}" if costs else ""
    named = baselines.get(str(best.labels.get("model")), {})
    if named and "energy_uj_per_token" in best.metrics:
        name = min(named, key=named.__getitem__)
        said += f"; {name} takes {number(named[name] / best.energy_uj_per_token, 2)} times the energy"
    return f"{said}."


_UNITS = {"energy_uj_per_token": "µJ per token", "latency_us_per_token": "µs per token"}


def _value(point: RecordedTrial, metric: str) -> str:
    low, high = point.metrics.get(f"{metric}_low"), point.metrics.get(f"{metric}_high")
    ends = "" if low is None or high is None else f" [{number(low, 3)}, {number(high, 3)}]"
    return f"{number(point.metrics[metric], 3)}{ends}"


def _tied(best: RecordedTrial, rivals: list[RecordedTrial], objectives: tuple[Objective, ...]) -> list[int]:
    scores = [each for each in objectives if each.metric not in COSTS]
    costs = [each for each in objectives if each.metric in COSTS]
    found = [
        rival
        for rival in rivals
        if all(_as_cheap(rival, best, each) for each in costs) and not any(_apart(rival, best, s) for s in scores)
    ]
    return [point.number for point in sorted(found, key=lambda p: (*(s.loss(p) for s in scores), p.number))]


def _as_cheap(rival: RecordedTrial, best: RecordedTrial, cost: Objective) -> bool:
    return cost.loss(rival) <= cost.loss(best) + _AS_CHEAP * abs(best.metrics[cost.metric])


def _apart(one: RecordedTrial, other: RecordedTrial, score: Objective) -> bool:
    """Whether the 95 % interval of the difference of two trials' scores leaves out 0."""
    difference = abs(one.metrics[score.metric] - other.metrics[score.metric])
    halves = [_halfwidth(point, score.metric) for point in (one, other)]
    if difference > sum(halves):  # a paired difference varies by no more than the two together
        return True
    ours, theirs = one.correct, other.correct
    paired = ours and theirs and (ours.group, ours.shape) == (theirs.group, theirs.shape)
    if score.metric == "accuracy" and ours and theirs and paired:
        found = share_gain(ours.array[None], theirs.array[None]).interval()
        return difference > (found.high - found.low) / 2
    return difference > hypot(*halves)


def _halfwidth(point: RecordedTrial, metric: str) -> float:
    low, high = (point.metrics.get(f"{metric}_{end}", point.metrics[metric]) for end in ("low", "high"))
    return (high - low) / 2


def _beside(best: RecordedTrial, tied: list[int], rivals: int, objectives: tuple[Objective, ...]) -> Iterator[str]:
    scores = [each for each in objectives if each.metric not in COSTS]
    if not rivals or not any(_halfwidth(best, each.metric) for each in scores):
        return
    words = " and ".join(each.words for each in scores)
    if not tied:
        yield f"No other candidate that costs as little comes within the 95 % interval of its {words}."
        return
    named = ", ".join(map(str, tied[:_MOST_NAMED])) + (", ..." if len(tied) > _MOST_NAMED else "")
    most = f"at most {100 * _AS_CHEAP:g} % more"
    who = f"Trial {named}, which costs {most}, is" if len(tied) == 1 else f"{len(tied)} trials that cost {most} are"
    yield f"{who} statistically tied with it in {words}{'' if len(tied) == 1 else f' ({named})'}."


def _compared(best: RecordedTrial, comparison: Mapping[str, Any] | None) -> Iterator[str]:
    """What the closing comparison says of it, or of another."""
    if comparison is None:
        return
    cells = [cell for cell in comparison["cells"] if cell["accuracy_gain"] is not None]
    own = [cell for cell in cells if cell["number"] == best.number]
    on = f"the closing comparison, on {comparison['chip_instances']} fresh chips and {comparison['rows']} fresh rows,"
    if cells and not own:
        numbers = sorted({cell["number"] for cell in cells if cell["number"] is not None})
        which = f"trial{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}" if numbers else "others"
        yield f"The closing comparison was of {which}."
    for cell in own:
        gain = cell["accuracy_gain"]
        words = {"better": "is better than", "worse": "is worse than", "equivalent": "is equivalent to"}
        verdict = words.get(gain["verdict"], "cannot be told apart from")
        ends = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        yield f"In {on} it {verdict} '{comparison['reference']}' in accuracy: {ends} on {cell['chip']}."


def _left(best: RecordedTrial, progress: Progress) -> Iterator[str]:
    if progress.simulated:
        yield "Simulated from recorded curves: there is no adapter to deploy."
    elif progress.certified is not None:
        words = {True: "Certified.", False: "It failed its certification.", None: "Not certified."}
        yield words[progress.certified.get(best.number)]


def _command(sweep: SweepConfig, best: RecordedTrial, progress: Progress) -> str:
    if progress.simulated or progress.running:
        return ""
    if progress.certified and progress.certified.get(best.number):
        return f"halora adapter register {sweep.name}/{best.number}"
    command = f"halora adapter select {sweep.name} --trial {best.number}"
    if sweep.gates.min_accuracy:
        return command
    reached = best.metrics.get("accuracy_low", best.metrics.get("accuracy", 0.5))
    return f"{command} --min-accuracy {max(floor(100 * reached) / 100, 0.01):g}"


def _why_none(sweep: SweepConfig, view: FrontView, progress: Progress, standings: Mapping[int, Standing]) -> str:
    groups = view.groups
    prefix = "So far n" if progress.running else "N"
    if scored := groups.scored:

        def distance(point: RecordedTrial) -> tuple[int, float]:
            score = point.metrics.get("accuracy", 0.0)
            return len(standings[point.number].reasons), -score

        nearest = min(scored, key=distance)
        reasons = "; ".join(standings[nearest.number].reasons)
        return f"{prefix}o trial qualifies. Trial {nearest.number} comes nearest: {reasons}."
    if groups.failed and not (groups.open or groups.unscored or groups.stopped or groups.discarded):
        last = max(groups.failed, key=lambda point: point.ended_ms)
        return (
            f"{prefix}othing to recommend: all {len(groups.failed)} trials failed, the last of them with: {last.cause}."
        )
    if groups.unscored:
        return f"{prefix}othing to recommend: no finished trial has a score that is a number."
    return f"{prefix}othing to recommend yet: no trial has finished."
