"""A sweep file: read, checked whole, and refused with every mistake at once."""

from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from halora.errors import UserError, attempt, nearest
from halora.hardware.chip import Chip, expand_chip, load_chip, merge
from halora.hardware.description import Frozen
from halora.spaces.language import Categorical, Distribution, Range, with_values
from halora.spaces.mistakes import describe, field_paths
from halora.trial import TrialConfig, trial_energy

SHIPPED = files("halora.spaces") / "sweeps"

_FIXED = ("training.workers", "training.worker_timeout_s")  # a trial's share of the cluster, not its configuration

_Space = Mapping[str, Categorical | Range]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]


class Comparison(Frozen):
    """The closing comparison of trained adapters and the untrained base, on rows and chips the search did not use."""

    rows: int = Field(ge=2)
    """Validation rows after those the search scores on."""
    chip_instances: int = Field(ge=1)
    """Chip instances of the search pool after those the search scores on."""
    by: str | None = None
    """A searched field; the best trial of each of its values takes part. The best of all trials when left out."""
    against: str | None = None
    """The value of `by` whose trial gains are measured from; the untrained base when left out."""
    chips: tuple[str, ...] = ()
    """Chips to compare on, each a name of `chips`, a preset or a path; the trials' own when left out."""


class ReferencePoint(Frozen):
    """Corner that hypervolumes are measured from: worse than any trial worth having."""

    accuracy: float = Field(ge=0, le=1)
    energy_uj_per_token: float = Field(gt=0)


class SweepConfig(Frozen):
    """One study: what is fixed, what is searched, and how long."""

    name: Name
    family: Name
    """MLflow experiment; sweeps of a family can be compared."""
    description: str = ""
    seed: int = Field(default=0, ge=0)
    trials: int = Field(ge=1)
    concurrent: int = Field(default=1, ge=1)
    """Trials that run at the same time, each on its share of the cores."""
    chips: dict[str, Any] = Field(default_factory=dict)
    """Chips of this sweep by name, each written as a trial's `chip`, to be named there, in choices and comparisons."""
    trial: dict[str, Any]
    """A trial's fixed fields, and the defaults of the searched ones."""
    space: dict[str, Distribution]
    """Searched fields by dotted path."""
    first: tuple[dict[str, Any], ...] = ()
    """Points to try before the sampler chooses."""
    reference_point: ReferencePoint
    comparison: Comparison | None = None

    @property
    def workers(self) -> int:
        """Workers of every trial."""
        return self.resolve({}).training.workers

    def resolve(self, values: Mapping[str, Any]) -> TrialConfig:
        """The trial that the given values of searched fields describe."""
        return _resolve({"seed": self.seed, **self.trial}, values, self.chips)

    def values_of(self, path: str) -> tuple[Any, ...]:
        """What a top-level field of a trial can be: its choices, or its fixed value."""
        searched = self.space.get(path)
        return searched.choices if isinstance(searched, Categorical) else (self.trial[path],)

    def chip(self, name: str) -> Chip:
        """A chip by its name in this sweep, a preset's name, or a path."""
        return load_chip(_named_chip(name, self.chips))


def shipped_sweeps() -> list[str]:
    """Names of the shipped sweep files."""
    return sorted(item.name.removesuffix(".yaml") for item in SHIPPED.iterdir() if item.name.endswith(".yaml"))


def load_sweep(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> SweepConfig:
    """Read and check a sweep.

    Args:
        name_or_path: A shipped sweep's name, or the path of a YAML file.
        overrides: Values by dotted path that replace those of the file.

    Raises:
        UserError: With every mistake found: unknown keys, values out of range, searched fields that do not exist,
            points outside the space, a model or task that does not exist.
    """
    raw = _read(name_or_path)
    data = with_values(raw, overrides or {})
    problems: list[str] = []
    sweep: SweepConfig | None = None
    try:
        sweep = SweepConfig.model_validate(data)
    except ValidationError as error:
        problems += describe(error, SweepConfig)
    trial, space = data.get("trial"), data.get("space")
    if isinstance(trial, dict) and isinstance(space, dict):  # whatever else is wrong
        chips = data.get("chips")
        chips = chips if isinstance(chips, dict) else {}
        problems += _chip_problems(chips)
        problems += _trial_problems(trial, chips)
        readable = _readable(space)
        problems += _space_problems(trial, space, readable, chips)
        problems += _first_problems(space, readable, data.get("first"))
        problems += _model_and_task_problems(trial, readable)
        evaluation = trial.get("evaluation", {})
        if data.get("comparison") and isinstance(evaluation, dict) and evaluation.get("rows") is None:
            problems.append("comparison: needs trial.evaluation.rows, so that some validation rows are left for it")
    if sweep is not None and not problems:
        problems = _comparison_problems(sweep) or _energy_problems(sweep)
    if problems:
        raise UserError(
            [f"{name_or_path}: {problem}" for problem in dict.fromkeys(problems)],
            "mend the file and run again",
        )
    assert sweep is not None
    return sweep


def load_trial(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> TrialConfig:
    """Read and check a single trial.

    Args:
        name_or_path: The path of a trial's YAML file; or a sweep, whose fixed values are taken.
        overrides: Values by dotted path that replace those of the file.

    Raises:
        UserError: With every mistake found.
    """
    data = _read(name_or_path, "trial")
    if isinstance(trial := data.get("trial"), dict):
        return trial_from({"seed": data.get("seed", 0), **trial}, name_or_path, overrides, data.get("chips"))
    return trial_from(data, name_or_path, overrides)


def trial_from(
    data: dict[str, Any],
    where: str,
    overrides: Mapping[str, Any] | None = None,
    chips: Mapping[str, Any] | None = None,
) -> TrialConfig:
    """Check the description of a single trial, whose chip may be one of `chips`; `where` is told with its mistakes.

    Raises:
        UserError: With every mistake found.
    """
    problems: list[str] = []
    try:
        config = _resolve(data, overrides or {}, chips or {})
    except ValidationError as error:
        problems += describe(error, TrialConfig)
    named = _model_and_task_problems(with_values(data, overrides or {}), {})
    problems += [problem.removeprefix("trial.") for problem in named]
    if not problems:
        attempt(problems, lambda: trial_energy(config))
    if problems:
        raise UserError([f"{where}: {problem}" for problem in problems], "mend it and run again")
    return config


def _read(name_or_path: str, what: str = "sweep") -> dict[str, Any]:
    if name_or_path in shipped_sweeps():
        text = (SHIPPED / f"{name_or_path}.yaml").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        raise UserError(
            f"no {what} '{name_or_path}': neither a shipped sweep ({', '.join(shipped_sweeps())}) nor a file"
            + nearest(name_or_path, shipped_sweeps())
        )
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name_or_path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{name_or_path}: a {what} is a mapping of keys to values, got {type(data).__name__}")
    return data


def _trial_problems(trial: dict[str, Any], chips: Mapping[str, Any]) -> list[str]:
    try:
        _resolve(trial, {}, chips)
    except ValidationError as error:
        return describe(error, TrialConfig, "trial.")
    return []


def _resolve(trial: Mapping[str, Any], values: Mapping[str, Any], chips: Mapping[str, Any]) -> TrialConfig:
    described = with_values(trial, values)
    if "chip" in described:
        described["chip"] = _named_chip(described["chip"], chips)
    return TrialConfig.model_validate(described)


def _named_chip(chip: Any, chips: Mapping[str, Any]) -> Any:
    """A chip's setting, where it names one of the sweep's chips that one with its overrides."""
    overrides = dict(chip) if isinstance(chip, Mapping) else {"preset": chip}
    name = overrides.pop("preset", None)
    if not isinstance(name, str) or name not in chips:
        return chip
    return merge({**expand_chip(chips[name]), "name": name}, overrides)


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
            problems += _probe_problems(trial, readable, path, wrong_anyway, chips)
    return problems


def _probe_problems(
    trial: dict[str, Any], space: _Space, path: str, wrong_anyway: set[str], chips: Mapping[str, Any]
) -> list[str]:
    """What a trial would refuse of the searched values, beyond the fields that are wrong already."""
    problems = []
    for value in space[path].probes:
        point = {**space[path].condition, path: value}
        for name, other in space.items():  # what is searched once this value is chosen
            if other.when and name not in point and other.applies(point):
                point[name] = other.probes[0]
        try:
            _resolve(trial, point, chips)
        except ValidationError as error:
            found = [
                text for text in describe(error, TrialConfig) if f"trial.{text}".partition(": ")[0] not in wrong_anyway
            ]
            problems += [f"space.{path}: {value}: {text}" for text in found]
        except UserError:  # the point sets a field of something that is no mapping, which is told already
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


def _model_and_task_problems(trial: dict[str, Any], readable: _Space) -> list[str]:
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


def _comparison_problems(sweep: SweepConfig) -> list[str]:
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
        problems.append(f"comparison.against: '{comparison.against}' is no value of comparison.by ({known})")
    for i, name in enumerate(comparison.chips):
        try:
            sweep.chip(name)
        except UserError as error:
            problems.append(f"comparison.chips[{i}]: {error}{nearest(name, sweep.chips)}")
    if comparison.by and not comparison.chips and any(path.partition(".")[0] == "chip" for path in sweep.space):
        problems.append("comparison.chips: required with comparison.by, as the trials' own chips differ")
    return problems


def _energy_problems(sweep: SweepConfig) -> list[str]:
    """What cannot be priced: layers that a chip maps and the model has not, converters that no table covers."""
    problems: dict[str, str] = {}  # by what is wrong, told where it is met first
    priced = {p: d for p, d in sweep.space.items() if p.partition(".")[0] in ("model", "chip", "lora")}
    for point in ({}, *({**d.condition, path: value} for path, d in priced.items() for value in d.probes)):
        try:
            trial_energy(sweep.resolve(point))
        except UserError as error:
            at = ", ".join(f"{path} {value}" for path, value in point.items())
            for problem in error.problems:
                problems.setdefault(problem, f"trial.{problem}" + (f" (with {at})" if at else ""))
    return list(problems.values())
