"""A trial as the analysis sees it, and which trials take part: objectives, filters, and the groups kept apart."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite
from typing import Any

from halora.errors import UserError, nearest
from halora.events import Answers
from halora.hardware.energy import COSTS
from halora.hardware.energy import ENERGY as ENERGY_METRIC
from halora.spaces.sweep import SweepConfig

STRENGTH_METRIC = "accuracy_at."
"""Followed by a strength of noise other than the chip's own: accuracy there."""
OTHER_ACCURACY = {"accuracy_per_byte": "accuracy per byte", "accuracy_summed": "accuracy, summed"}
"""Accuracy by the way of scoring options that was not asked for, and its name for people; a trial has at most one."""
WORDS = {
    "accuracy": "accuracy under noise",
    "accuracy_worst": "accuracy of the worst chip",
    ENERGY_METRIC: "energy per token (µJ)",
    "latency_us_per_token": "time per token (µs)",
    "tokens_per_s": "tokens per second",
    "power_w": "power (W)",
    "area_mm2": "area (mm²)",
}
"""Metrics for people, with their units."""
VIOLATION = "constraint_violation"
"""The metric that says by how much a trial breaks its sweep's constraints, above 0 if it does; or `.NAME` after it."""

_LESS_IS_BETTER = re.compile(r"energy|loss|_std|drop|latency|power|area|bytes|seconds|violation")
_MORE_IS_BETTER = re.compile(r"accuracy|margin|tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class RecordedTrial:
    """A trial with what is recorded of it.

    Attributes:
        number: Number of the trial in its sweep.
        state: running, finished, stopped (early), failed, interrupted or discarded (by somebody).
        cause: Why it failed, else empty.
        params: Searched values by dotted path.
        labels: What it is, by `method`, `model`, `chip`, `task`, `noise` and `noise_strength`.
        metrics: Latest value by metric name.
        began_ms: When it first began, in milliseconds since 1970; 0 where not recorded.
        ended_ms: When it last ended.
        correct: What it answered rightly, to resample its accuracy with that of others; none where not recorded.
        clone_of: The trial that somebody had it begun like; none for a point of the search's own.
        cut_short_at: Optimiser step at which somebody ended its training; none where nobody did.
    """

    number: int
    state: str = "finished"
    cause: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    began_ms: int = 0
    ended_ms: int = 0
    correct: Answers | None = None
    clone_of: int | None = None
    cut_short_at: int | None = None

    @property
    def accuracy(self) -> float:
        """Mean accuracy over chip instances."""
        return self.metrics["accuracy"]

    @property
    def energy_uj_per_token(self) -> float:
        """Energy per token in microjoule."""
        return self.metrics[ENERGY_METRIC]

    @property
    def accuracy_by_strength(self) -> dict[float, float]:
        """Accuracy by strength of the chip's programming noise: its own, and others it was scored at."""
        at = len(STRENGTH_METRIC)
        found = {float(name[at:]): value for name, value in self.metrics.items() if name.startswith(STRENGTH_METRIC)}
        own = self.labels.get("noise_strength")
        if isinstance(own, int | float) and "accuracy" in self.metrics:
            found[float(own)] = self.accuracy
        return found

    @property
    def drop(self) -> float | None:
        """What noise costs: clean less noisy accuracy; none where one of them is not recorded."""
        clean, noisy = self.metrics.get("clean_accuracy"), self.metrics.get("accuracy")
        return None if clean is None or noisy is None else clean - noisy

    @property
    def violated(self) -> dict[str, float]:
        """Constraints that the trial breaks, by name, and by how much."""
        broken = {name: value for name, value in self.metrics.items() if name.startswith(VIOLATION) and value > 0}
        return {name.removeprefix(VIOLATION).removeprefix(".") or "constraints": by for name, by in broken.items()}


@dataclass(frozen=True)
class Objective:
    """A recorded metric to be as large, or as small, as it can be."""

    metric: str
    maximise: bool

    @property
    def words(self) -> str:
        """For people, with its unit."""
        return WORDS.get(self.metric, self.metric.replace("_", " "))

    def loss(self, point: RecordedTrial) -> float:
        """A trial's value, with the sign that makes less of it better."""
        value = point.metrics[self.metric]
        return -value if self.maximise else value


ACCURACY = Objective("accuracy", maximise=True)
ENERGY = Objective(ENERGY_METRIC, maximise=False)
DEFAULT_OBJECTIVES = (ACCURACY, ENERGY)


def objective(text: str) -> Objective:
    """An objective from `METRIC`, or from `METRIC:max` or `METRIC:min` where its name does not tell its direction.

    Raises:
        UserError: The direction is not clear.
    """
    metric, colon, direction = text.rpartition(":")
    if colon and direction in ("max", "min"):
        return Objective(metric, maximise=direction == "max")
    if _LESS_IS_BETTER.search(text):
        return Objective(text, maximise=False)
    if _MORE_IS_BETTER.search(text):
        return Objective(text, maximise=True)
    raise UserError(f"objective '{text}': say whether more is better, '{text}:max' or '{text}:min'")


def projections(objectives: Sequence[Objective]) -> list[tuple[Objective, Objective]]:
    """Every two of the objectives as what is drawn upwards and what is drawn to the right, scores upwards."""
    pairs = combinations(objectives, 2)
    return [(b, a) if a.metric in COSTS and b.metric not in COSTS else (a, b) for a, b in pairs]


def sweep_objectives(sweep: SweepConfig) -> tuple[Objective, ...]:
    """What a sweep's trials are compared by."""
    return tuple(objective(name) for name in sweep.objectives)


def check_objectives(points: Sequence[RecordedTrial], objectives: Sequence[Objective]) -> None:
    """Refuse what no front can be drawn over.

    Raises:
        UserError: There are not two or three different objectives, or there are finished trials and none has a value
            of one.
    """
    names = [each.metric for each in objectives]
    if len(set(names)) != len(names) or not 2 <= len(names) <= 3:
        raise UserError(f"a front needs two or three different objectives, got: {', '.join(names) or 'none'}")
    finished = [point for point in points if point.state == "finished"]
    known = {metric for point in finished for metric in point.metrics}
    unknown = [name for name in names if finished and name not in known]
    if unknown:
        raise UserError([f"no trial has a metric '{name}'{nearest(name, known)}" for name in unknown])


@dataclass(frozen=True)
class Groups:
    """Trials by what the front makes of them; a trial is in one group.

    Attributes:
        feasible: They have every objective and break no constraint: the front is made of these.
        violating: They have every objective and break a constraint.
        unscored: Finished with an objective that is missing or not a number.
        failed: They ended in a failure.
        stopped: Early stopping ended them before their scores.
        discarded: Somebody took them out.
        open: Not ended yet, or interrupted.
    """

    feasible: list[RecordedTrial]
    violating: list[RecordedTrial]
    unscored: list[RecordedTrial]
    failed: list[RecordedTrial]
    stopped: list[RecordedTrial]
    discarded: list[RecordedTrial]
    open: list[RecordedTrial]

    @property
    def scored(self) -> list[RecordedTrial]:
        """Those that have every objective, the feasible first."""
        return [*self.feasible, *self.violating]

    @property
    def all(self) -> list[RecordedTrial]:
        """All of them, by number."""
        parts = (self.feasible, self.violating, self.unscored, self.failed, self.stopped, self.discarded, self.open)
        return sorted((point for part in parts for point in part), key=lambda point: point.number)


def grouped(points: Sequence[RecordedTrial], objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> Groups:
    """Trials apart by how they stand."""
    groups = Groups([], [], [], [], [], [], [])
    for point in points:
        if point.state == "failed":
            groups.failed.append(point)
        elif point.state == "stopped":
            groups.stopped.append(point)
        elif point.state == "discarded":
            groups.discarded.append(point)
        elif point.state != "finished":
            groups.open.append(point)
        elif not all(isfinite(point.metrics.get(each.metric, float("nan"))) for each in objectives):
            groups.unscored.append(point)
        elif point.violated:
            groups.violating.append(point)
        else:
            groups.feasible.append(point)
    return groups


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def filtered(points: Sequence[RecordedTrial], conditions: Sequence[str]) -> list[RecordedTrial]:
    """Trials that meet every condition `FIELD OP VALUE`, such as `method=halora`, `rank>=4` or `noise_strength<0.02`.

    A field is a label, a searched value by its dotted path or, where no other field shares it, the last part of that, a
    metric, or `drop` (clean less noisy accuracy). `=` and `!=` take several values, as `rank=4|8`. Numbers compare as
    numbers, `true` and `false` as booleans. A trial without the field meets only `!=`.

    Raises:
        UserError: A condition is malformed, no trial has its field, the last part names several, or the value is none
            that the field could have.
    """
    if not conditions:
        return list(points)
    problems: list[str] = []
    tests = []
    fields = [_fields(point) for point in points]
    known = {key for own in fields for key in own}
    paths: dict[str, set[str]] = {}
    for path in {path for point in points for path in point.params}:
        paths.setdefault(path.rpartition(".")[2], set()).add(path)
    for condition in conditions:
        parts = condition_parts(condition)
        if not parts:
            problems.append(f"filter '{condition}': write FIELD=VALUE, or with one of != < <= > >=")
            continue
        name, comparison, wanted = parts
        if points and name not in known:
            problems.append(f"filter '{condition}': no trial has a field '{name}'{nearest(name, known)}")
        if len(meant := sorted(paths.get(name, ()))) > 1:
            problems.append(f"filter '{condition}': '{name}' may be {' or '.join(meant)}; write it whole")
        elif problem := _unlike(name, comparison, wanted, [own[name] for own in fields if own.get(name) is not None]):
            problems.append(f"filter '{condition}': {problem}")
        tests.append((name, comparison, wanted))
    if problems:
        raise UserError(problems)
    return [point for point, own in zip(points, fields, strict=True) if all(_meets(own, *test) for test in tests)]


def _unlike(name: str, comparison: str, wanted: str, values: Sequence[Any]) -> str:
    """What is wrong with a value that is compared with those of a field; empty where nothing is."""
    if wanted[:1] in ("<", ">", "=", "!"):
        return f"write {name}{wanted[0]}={wanted[1:]}" if wanted[0] != "=" else f"write {name}={wanted[1:]}"
    alternatives = wanted.split("|") if comparison in ("=", "!=") else [wanted]
    if not values or wanted in map(str, values):
        return ""
    if all(isinstance(value, bool) for value in values):
        wrong = [each for each in alternatives if each.lower() not in ("true", "false")]
        return f"'{wrong[0]}' is neither true nor false" if wrong else ""
    if all(isinstance(value, int | float) for value in values):
        wrong = [each for each in alternatives if not _is_number(each)]
        return f"'{wrong[0]}' is not a number" if wrong else ""
    known = {str(value) for value in values}
    wrong = [each for each in alternatives if each not in known] if comparison in ("=", "!=") else []
    return f"no trial has the value '{wrong[0]}'{nearest(wrong[0], known)}" if wrong else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def condition_parts(condition: str) -> tuple[str, str, str] | None:
    """Field, comparison and value of a condition; none where it is malformed."""
    match = re.fullmatch(r"\s*(.+?)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", condition)
    return (match[1], match[2], match[3]) if match else None


def _fields(point: RecordedTrial) -> dict[str, Any]:
    short = {path.rpartition(".")[2]: value for path, value in point.params.items()}
    drop = {} if point.drop is None else {"drop": point.drop}
    return {
        **point.metrics,
        **drop,
        **short,
        **point.params,
        **point.labels,
        "trial": point.number,
        "state": point.state,
    }


def _meets(fields: Mapping[str, Any], name: str, comparison: str, wanted: str) -> bool:
    value = fields.get(name)
    if value is None:
        return comparison == "!="
    if comparison in ("=", "!=") and "|" in wanted and str(value) != wanted:
        same = any(_meets(fields, name, "=", each) for each in wanted.split("|"))
        return same == (comparison == "=")
    if isinstance(value, bool) and comparison in ("=", "!="):
        return _COMPARISONS[comparison](str(value).lower(), wanted.lower())
    if not isinstance(value, bool) and (isinstance(value, int | float) or comparison not in ("=", "!=")):
        try:
            return _COMPARISONS[comparison](float(value), float(wanted))
        except ValueError:
            return comparison == "!="
    return _COMPARISONS[comparison](str(value), wanted)
