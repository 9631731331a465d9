"""What is wrong with a sweep file beyond the shape of its sections: every mistake, each with its path."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from halora.errors import UserError, nearest
from halora.hardware.chip import Chip, load_chip
from halora.pricing import trial_energy
from halora.settings.trial import TrialConfig
from halora.spaces.language import Categorical, Distribution, Range
from halora.spaces.mistakes import ANY_NAME, describe, field_paths
from halora.spaces.resolving import NamedChips, fixed_value, formula, group_and_field, resolve_trial

if TYPE_CHECKING:
    from halora.spaces.sweep import SweepConfig

_FIXED = ("training.workers", "training.worker_timeout_s")  # a trial's share of the cluster, not its configuration

_ANY_CHIP = "halora-2026"

_Space = Mapping[str, Categorical | Range]


@dataclass(frozen=True)
class FileChecks:
    """What is wrong with a file's parts, each for itself, and what is left without those that are wrong.

    Attributes:
        problems: One sentence for every mistake.
        right: The file's content without them; a trial that is wrong is none at all.
    """

    problems: list[str]
    right: dict[str, Any]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "FileChecks":
        """Check the content of a sweep file, whatever it is."""
        trial, space, chips, derived = (_mapping(data.get(name)) for name in ("trial", "space", "chips", "derived"))
        readable, by_chip = _readable(space), _chip_problems(chips)
        # A trial with a chip that is wrong is no trial with an unknown chip.
        usable = {name: _ANY_CHIP if by_chip[name] else setting for name, setting in chips.items()}
        named = NamedChips(usable, _mapping(data.get("chips_read")))
        of_trial = _trial_problems(trial, named) if isinstance(data.get("trial"), dict) else []
        by_path = _space_problems(trial, space, readable, named, of_trial)
        of_derived = _derived_problems(trial, space, derived)
        evaluation = trial.get("evaluation", {})
        no_rows = data.get("comparison") and isinstance(evaluation, dict) and evaluation.get("rows") is None
        left = "comparison: needs trial.evaluation.rows, so that some validation rows are left for it"
        problems = [
            *(problem for found in by_chip.values() for problem in found),
            *of_trial,
            *(problem for found in by_path.values() for problem in found),
            *of_derived,
            *_first_problems(space, readable, data.get("first")),
            *model_and_task_problems(trial, readable),
            *([left] if no_rows else []),
        ]
        right = {
            **data,
            "trial": {} if of_trial else trial,
            "space": {path: given for path, given in space.items() if path in readable and not by_path[path]},
            "chips": usable,
            "derived": {} if of_derived else derived,
        }
        return cls(problems, right)


def sweep_problems(sweep: "SweepConfig", data: Mapping[str, Any]) -> list[str]:
    """Mistakes between the parts of a sweep.

    Args:
        sweep: The sweep without the parts that are wrong by themselves, see `FileChecks`.
        data: The file's content, whose other parts a right one may name.
    """
    problems = _comparison_problems(sweep, _mapping(data.get("space")), _mapping(data.get("chips")))
    if not sweep.trial:
        return problems
    of_derived = _derived_range_problems(sweep)
    plain = sweep.model_copy(update={"derived": {}}) if of_derived else sweep
    return [*problems, *_rung_problems(plain), *of_derived, *_energy_problems(plain)]


def _mapping(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _trial_problems(trial: dict[str, Any], chips: NamedChips) -> list[str]:
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


def _chip_problems(chips: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is wrong with each of the sweep's chips."""
    problems: dict[str, list[str]] = {name: [] for name in chips}
    for name, setting in chips.items():
        try:
            load_chip(setting)
        except ValidationError as error:
            problems[name] += describe(error, Chip, f"chips.{name}.")
        except UserError as error:
            problems[name] += [f"chips.{name}: {problem}" for problem in error.problems]
    return problems


def _space_problems(
    trial: dict[str, Any], space: dict[str, Any], readable: _Space, chips: NamedChips, of_trial: list[str]
) -> dict[str, list[str]]:
    """What is wrong with each searched field; what its distribution itself lacks is told by `describe`."""
    by_path: dict[str, list[str]] = {}
    known_paths = field_paths(TrialConfig)
    wrong_anyway = {problem.partition(": ")[0] for problem in of_trial}
    searched_before: list[str] = []
    for path in space:
        problems = by_path.setdefault(path, [])
        conditions = readable[path].when if path in readable else {}
        unknown = [name for name in conditions if name not in searched_before]
        searched_before.append(path)
        if _as_listed(path) not in known_paths:
            problems.append(f"space.{path}: a trial has no such field{nearest(path, known_paths)}")
        elif path in _FIXED:
            problems.append(f"space.{path}: cannot be searched, every trial has the same; set trial.{path}")
        elif unknown:
            problems += [
                f"space.{path}.when: '{name}' is not searched before it{nearest(name, searched_before)}"
                for name in unknown
            ]
        elif path in readable:
            never = _condition_problems(readable, path)
            problems += never or _probe_problems(trial, readable, path, wrong_anyway, chips)
    return by_path


def _as_listed(path: str) -> str:
    """The field that a path names, as `field_paths` lists it."""
    of_group = group_and_field(path)
    return f"chip.layers.{ANY_NAME}.{of_group[1]}" if of_group else path


def _condition_problems(space: _Space, path: str) -> list[str]:
    return [
        f"space.{path}.when: '{name}' is never {value!r}"
        for name, allowed in space[path].when.items()
        if name in space
        for value in allowed
        if not space[name].contains(value)
    ]


def _probe_problems(
    trial: dict[str, Any], space: _Space, path: str, wrong_anyway: set[str], chips: NamedChips
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
        elif _as_listed(path) not in known_paths or path in _FIXED:
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


def _rung_problems(sweep: "SweepConfig") -> list[str]:
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
    if sweep.racing and ("accuracy" not in sweep.objectives or "accuracy_worst" in sweep.objectives):
        problems.append(
            "racing: compares accuracies over chips; name accuracy among the objectives, not accuracy_worst"
        )
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


def _comparison_problems(sweep: "SweepConfig", space: Mapping[str, Any], chips: Mapping[str, Any]) -> list[str]:
    """Mistakes of the comparison, which may name searched fields and chips that are wrong themselves."""
    comparison = sweep.comparison
    if comparison is None:
        return []
    problems = []
    own_chips = any(path.partition(".")[0] == "chip" for path in space)
    if comparison.by and not comparison.chips and own_chips:
        problems.append("comparison.chips: required with comparison.by, as the trials' own chips differ")
    searched = sweep.space.get(comparison.by) if comparison.by else None
    choices = searched if isinstance(searched, Categorical) else None
    if comparison.by in space and searched is None:
        pass  # told with the field
    elif comparison.by and not choices:
        listed = [path for path, distribution in sweep.space.items() if isinstance(distribution, Categorical)]
        problems.append(
            f"comparison.by: '{comparison.by}' is not searched over choices{nearest(comparison.by, listed)}"
        )
    elif comparison.against is not None and (choices is None or choices.named(comparison.against) is None):
        known = f"choices: {', '.join(map(str, choices.choices))}" if choices else "there is no comparison.by"
        problems.append(f"comparison.against: '{comparison.against}' is not a value of comparison.by ({known})")
    for i, name in enumerate(comparison.chips):
        try:
            sweep.chip(name)
        except UserError as error:
            problems.append(f"comparison.chips[{i}]: {error}{nearest(name, chips)}")
        except ValidationError as error:  # of a file
            problems += describe(error, Chip, f"comparison.chips[{i}].")
    return problems


def _energy_problems(sweep: "SweepConfig") -> list[str]:
    """What cannot be priced: layers that a chip maps and the model has not, converters that no table covers."""
    problems: dict[str, str] = {}  # by what is wrong, told where it is met first
    priced = {p: d for p, d in sweep.space.items() if p.partition(".")[0] in ("model", "chip", "lora")}
    for point in ({}, *({**d.condition(sweep.space), path: value} for path, d in priced.items() for value in d.probes)):
        if (config := _with_known_model(sweep, point)) is None:
            continue
        try:
            trial_energy(config, estimated=True)
        except UserError as error:
            at = ", ".join(f"{path} {value}" for path, value in point.items())
            for problem in error.problems:
                problems.setdefault(problem, f"trial.{problem}" + (f" (with {at})" if at else ""))
    return list(problems.values())


def _with_known_model(sweep: "SweepConfig", point: Mapping[str, Any]) -> TrialConfig | None:
    """The trial at a point; none where there is none, or its model is not known, which is told already."""
    from halora.training.models import estimated_shape

    try:
        config = sweep.resolve(point)
        estimated_shape(config.model)
    except ValueError:
        return None
    return config
