"""What is wrong with a sweep file beyond the shape of its sections: every mistake, each with its path."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from halora.errors import UserError, nearest
from halora.hardware.chip import Chip, load_chip
from halora.pricing import trial_energy
from halora.settings.trial import TrialConfig
from halora.spaces.language import Categorical, Distribution, Range
from halora.spaces.mistakes import describe, field_paths
from halora.spaces.resolving import fixed_value, formula, resolve_trial

if TYPE_CHECKING:
    from halora.spaces.sweep import SweepConfig

_FIXED = ("training.workers", "training.worker_timeout_s")  # a trial's share of the cluster, not its configuration

_Space = Mapping[str, Categorical | Range]


def file_problems(data: Mapping[str, Any]) -> list[str]:
    """Mistakes of a file's parts, however wrong the others are."""
    trial, space = data.get("trial"), data.get("space")
    if not isinstance(trial, dict) or not isinstance(space, dict):
        return []
    chips = data.get("chips")
    chips = chips if isinstance(chips, dict) else {}
    readable = _readable(space)
    problems = _chip_problems(chips)
    problems += _trial_problems(trial, chips)
    problems += _space_problems(trial, space, readable, chips)
    problems += _derived_problems(trial, space, data.get("derived"))
    problems += _first_problems(space, readable, data.get("first"))
    problems += model_and_task_problems(trial, readable)
    evaluation = trial.get("evaluation", {})
    if data.get("comparison") and isinstance(evaluation, dict) and evaluation.get("rows") is None:
        problems.append("comparison: needs trial.evaluation.rows, so that some validation rows are left for it")
    return problems


def sweep_problems(sweep: "SweepConfig") -> list[str]:
    """Mistakes of a sweep whose parts are right, each for itself."""
    problems = [*_comparison_problems(sweep), *_level_problems(sweep)]
    return problems or _derived_range_problems(sweep) or _energy_problems(sweep)


def _trial_problems(trial: dict[str, Any], chips: Mapping[str, Any]) -> list[str]:
    try:
        resolve_trial(trial, {}, chips)
    except ValidationError as error:
        return describe(error, TrialConfig, "trial.")
    return []


def _readable(space: Mapping[str, Any]) -> _Space:
    """The distributions of a file that are well-formed; the others are told by `describe`."""
    adapter: TypeAdapter[Categorical | Range] = TypeAdapter(Distribution)
    found: dict[str, Categorical | Range] = {}
    for path, given in space.items():
        with suppress(ValidationError):
            found[path] = adapter.validate_python(given)
    return found


def _chip_problems(chips: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, setting in chips.items():
        try:
            load_chip(setting)
        except ValidationError as error:
            problems += describe(error, Chip, f"chips.{name}.")
        except UserError as error:
            problems += [f"chips.{name}: {problem}" for problem in error.problems]
    return problems


def _space_problems(
    trial: dict[str, Any], space: dict[str, Any], readable: _Space, chips: Mapping[str, Any]
) -> list[str]:
    problems = []
    known_paths = field_paths(TrialConfig)
    wrong_anyway = {problem.partition(": ")[0] for problem in _trial_problems(trial, chips)}
    searched_before: list[str] = []
    for path in space:
        conditions = readable[path].when if path in readable else {}
        strange = [name for name in conditions if name not in searched_before]
        searched_before.append(path)
        if path not in known_paths:
            problems.append(f"space.{path}: a trial has no such field{nearest(path, known_paths)}")
        elif path in _FIXED:
            problems.append(f"space.{path}: cannot be searched, every trial has the same; set trial.{path}")
        elif strange:
            problems += [
                f"space.{path}.when: '{name}' is not searched before it{nearest(name, searched_before)}"
                for name in strange
            ]
        elif path in readable:
            never = _condition_problems(readable, path)
            problems += never or _probe_problems(trial, readable, path, wrong_anyway, chips)
    return problems


def _condition_problems(space: _Space, path: str) -> list[str]:
    return [
        f"space.{path}.when: '{name}' is never {value!r}"
        for name, allowed in space[path].when.items()
        if name in space
        for value in allowed
        if not space[name].contains(value)
    ]


def _probe_problems(
    trial: dict[str, Any], space: _Space, path: str, wrong_anyway: set[str], chips: Mapping[str, Any]
) -> list[str]:
    """What a trial would refuse of the searched values, beyond the fields that are wrong already."""
    problems = []
    for value, point in _probes(space, path):
        try:
            resolve_trial(trial, point, chips)
        except ValidationError as error:
            found = [
                text for text in describe(error, TrialConfig) if f"trial.{text}".partition(": ")[0] not in wrong_anyway
            ]
            problems += [f"space.{path}: {value}: {text}" for text in found]
        except UserError:  # the point sets a field of something that is not a mapping, which is told already
            pass
    return problems


def _first_problems(space: dict[str, Any], readable: _Space, first: Any) -> list[str]:
    problems = []
    for i, point in enumerate(first if isinstance(first, list) else []):
        for path, value in point.items() if isinstance(point, dict) else ():
            if path not in space:
                problems.append(f"first[{i}].{path}: not searched{nearest(path, space)}")
            elif path in readable and not readable[path].contains(value):
                problems.append(f"first[{i}].{path}: {value} is outside the space")
    return problems


def _derived_problems(trial: Mapping[str, Any], space: Mapping[str, Any], derived: Any) -> list[str]:
    problems: list[str] = []
    known_paths = field_paths(TrialConfig)
    known_names = list(space)
    for path, text in derived.items() if isinstance(derived, dict) else ():
        if path in space:
            problems.append(f"derived.{path}: is searched already; leave it out of one of the two")
        elif path not in known_paths or path in _FIXED:
            problems.append(f"derived.{path}: a trial has no such field{nearest(path, known_paths)}")
        try:
            names = formula(text).names if isinstance(text, str) else ()
        except ValueError:  # told by `describe`
            names = ()
        problems += [
            f"derived.{path}: '{name}' is neither searched, nor derived before it, nor written in trial"
            + nearest(name, [*known_names, *known_paths])
            for name in sorted(names)
            if name not in known_names and fixed_value(trial, name) is None
        ]
        known_names.append(path)
    return problems


def _derived_range_problems(sweep: "SweepConfig") -> list[str]:
    """Derived values that a trial would refuse at an end of a searched range."""
    problems = []
    for path in sweep.space if sweep.derived else ():
        for value, point in _probes(sweep.space, path):
            try:
                sweep.resolve(point)
            except ValidationError as error:
                problems += [f"derived, with {path} {value}: {text}" for text in describe(error, TrialConfig)]
            except ValueError as error:
                problems.append(f"derived, with {path} {value}: {error}")
    return problems


def _probes(space: _Space, path: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Values of a field whose validity implies that of all, each with a point it can be chosen in."""
    for value in space[path].probes:
        point = {**space[path].condition(space), path: value}
        for name, other in space.items():  # what is searched once this value is chosen
            if other.when and name not in point and other.applies(point):
                point[name] = other.probes[0]
        yield value, point


def _level_problems(sweep: "SweepConfig") -> list[str]:
    """Rungs that are no smaller than the whole trial, and a race that adds nothing."""
    own = sweep.resolve({}).evaluation
    steps = sweep.space.get("training.steps")
    least = min(steps.probes) if steps else sweep.resolve({}).training.steps
    problems = []
    for i, rung in enumerate(sweep.early_stopping.rungs if sweep.early_stopping else ()):
        at = f"early_stopping.rungs[{i}]"
        if rung.steps >= least:
            problems.append(f"{at}.steps: {rung.steps}, but a trial has {least} steps; a rung comes before its end")
        if rung.rows and own.rows and rung.rows > own.rows:
            problems.append(f"{at}.rows: {rung.rows}, more than the {own.rows} of trial.evaluation.rows")
        if rung.chip_instances and rung.chip_instances > own.chip_instances:
            of_trial = f"the {own.chip_instances} of trial.evaluation.chip_instances"
            problems.append(f"{at}.chip_instances: {rung.chip_instances}, more than {of_trial}")
    if sweep.racing and sweep.racing.most <= own.chip_instances:
        problems.append(
            f"racing.most: {sweep.racing.most}, but every trial has {own.chip_instances} chip instances already"
        )
    return problems


def model_and_task_problems(trial: dict[str, Any], readable: _Space) -> list[str]:
    """Models and tasks, fixed or searched, that do not exist."""
    from halora.training.models import model_shape
    from halora.training.tasks import check_task

    problems = []
    for what, check in (("model", model_shape), ("task", check_task)):
        searched = readable.get(what)
        for name in searched.choices if isinstance(searched, Categorical) else (trial.get(what),):
            try:
                if isinstance(name, str) or (what == "task" and isinstance(name, Mapping)):
                    check(name)
            except UserError as error:
                problems.append(f"trial.{what}: {error}")
    return problems


def _comparison_problems(sweep: "SweepConfig") -> list[str]:
    comparison = sweep.comparison
    if comparison is None:
        return []
    problems = []
    searched = sweep.space.get(comparison.by) if comparison.by else None
    values = [str(value) for value in searched.choices] if isinstance(searched, Categorical) else []
    if comparison.by and not values:
        listed = [path for path, distribution in sweep.space.items() if isinstance(distribution, Categorical)]
        problems.append(
            f"comparison.by: '{comparison.by}' is not searched over choices{nearest(comparison.by, listed)}"
        )
    elif comparison.against is not None and comparison.against not in values:
        known = f"choices: {', '.join(values)}" if values else "there is no comparison.by"
        problems.append(f"comparison.against: '{comparison.against}' is not a value of comparison.by ({known})")
    for i, name in enumerate(comparison.chips):
        try:
            sweep.chip(name)
        except UserError as error:
            problems.append(f"comparison.chips[{i}]: {error}{nearest(name, sweep.chips)}")
    if comparison.by and not comparison.chips and any(path.partition(".")[0] == "chip" for path in sweep.space):
        problems.append("comparison.chips: required with comparison.by, as the trials' own chips differ")
    return problems


def _energy_problems(sweep: "SweepConfig") -> list[str]:
    """What cannot be priced: layers that a chip maps and the model has not, converters that no table covers."""
    problems: dict[str, str] = {}  # by what is wrong, told where it is met first
    priced = {p: d for p, d in sweep.space.items() if p.partition(".")[0] in ("model", "chip", "lora")}
    for point in ({}, *({**d.condition(sweep.space), path: value} for path, d in priced.items() for value in d.probes)):
        try:
            trial_energy(sweep.resolve(point), estimated=True)
        except UserError as error:
            at = ", ".join(f"{path} {value}" for path, value in point.items())
            for problem in error.problems:
                problems.setdefault(problem, f"trial.{problem}" + (f" (with {at})" if at else ""))
    return list(problems.values())
