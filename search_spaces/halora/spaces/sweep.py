"""A sweep file: read, checked whole, and refused with every mistake at once."""

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError

from halora.errors import UserError, nearest
from halora.hardware.description import Frozen
from halora.hardware.noise_models import NoiseModel
from halora.hardware.noise_settings import noise_fields
from halora.spaces.language import Categorical, Distribution, Range, value_at, with_values
from halora.trial import TrialConfig, trial_energy

SHIPPED = files("halora.spaces") / "sweeps"

_FIXED = ("training.workers", "training.worker_timeout_s")  # a trial's share of the cluster, not its configuration

_Space = Mapping[str, Categorical | Range]
_DISTRIBUTIONS: dict[str, type[BaseModel]] = {"Categorical": Categorical, "Range": Range}

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]


class Comparison(Frozen):
    """The closing comparison of the best adapter with the untrained base, on rows and chips the search did not use."""

    rows: int = Field(ge=2)
    """Validation rows after those the search scores on."""
    chip_instances: int = Field(ge=1)
    """Chip instances of the search pool after those the search scores on."""


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
        return _resolve({"seed": self.seed, **self.trial}, values)


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
        problems += _trial_problems(trial)
        readable = _readable(space)
        problems += _space_problems(trial, space, readable)
        problems += _first_problems(space, readable, data.get("first"))
        problems += _model_and_task_problems(trial, readable)
        evaluation = trial.get("evaluation", {})
        if data.get("comparison") and isinstance(evaluation, dict) and evaluation.get("rows") is None:
            problems.append("comparison: needs trial.evaluation.rows, so that some validation rows are left for it")
    if sweep is not None and not problems:
        problems = _energy_problems(sweep)
    if problems:
        raise UserError(
            [f"{name_or_path}: {problem}" for problem in dict.fromkeys(problems)],
            "mend the file and run again",
        )
    assert sweep is not None
    return sweep


def _read(name_or_path: str) -> dict[str, Any]:
    if name_or_path in shipped_sweeps():
        text = (SHIPPED / f"{name_or_path}.yaml").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        raise UserError(
            f"no sweep '{name_or_path}': neither shipped ({', '.join(shipped_sweeps())}) nor a file"
            + nearest(name_or_path, shipped_sweeps())
        )
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name_or_path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{name_or_path}: a sweep is a mapping of keys to values, got {type(data).__name__}")
    return data


def _trial_problems(trial: dict[str, Any]) -> list[str]:
    try:
        TrialConfig.model_validate(trial)
    except ValidationError as error:
        return describe(error, TrialConfig, "trial.")
    return []


def _resolve(trial: Mapping[str, Any], values: Mapping[str, Any]) -> TrialConfig:
    return TrialConfig.model_validate(with_values(trial, values))


def _readable(space: Mapping[str, Any]) -> _Space:
    """The distributions of a file that are well-formed; the others are told by `describe`."""
    adapter: TypeAdapter[Categorical | Range] = TypeAdapter(Distribution)
    found: dict[str, Categorical | Range] = {}
    for path, given in space.items():
        with suppress(ValidationError):
            found[path] = adapter.validate_python(given)
    return found


def _space_problems(trial: dict[str, Any], space: dict[str, Any], readable: _Space) -> list[str]:
    problems = []
    known_paths = _field_paths(TrialConfig)
    wrong_anyway = {problem.partition(": ")[0] for problem in _trial_problems(trial)}
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
            problems += _probe_problems(trial, readable, path, wrong_anyway)
    return problems


def _probe_problems(trial: dict[str, Any], space: _Space, path: str, wrong_anyway: set[str]) -> list[str]:
    """What a trial would refuse of the searched values, beyond the fields that are wrong already."""
    problems = []
    for value in space[path].probes:
        point = {**space[path].condition, path: value}
        for name, other in space.items():  # what is searched once this value is chosen
            if other.when and name not in point and other.applies(point):
                point[name] = other.probes[0]
        try:
            _resolve(trial, point)
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
                if isinstance(name, str):
                    check(name)
            except UserError as error:
                problems.append(f"trial.{what}: {error}")
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


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One sentence per mistake: path, what is wrong, the value given, the nearest known key."""
    sentences = []
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        path = (prefix + ".".join(part for part in parts if part not in _DISTRIBUTIONS)).removesuffix(".")
        if item["type"] == "extra_forbidden":
            known = _keys(model, parts[:-1])
            sentences.append(f"{path}: unknown key{nearest(parts[-1], known)} (known: {', '.join(sorted(known))})")
        elif item["type"] == "missing":
            sentences.append(f"{path}: required, but missing")
        elif isinstance(cause := item.get("ctx", {}).get("error"), UserError):
            sentences += [f"{path}: {problem}" for problem in cause.problems]
        else:
            message = re.sub(r"^(Value error|Input), ?", "", item["msg"])
            given = item["input"]
            plain = item["type"] != "value_error" and isinstance(given, str | int | float | bool | None)
            shown = f", got {given!r}" if plain else ""
            sentences.append(f"{path}: {message[0].lower()}{message[1:]}{shown}")
    return list(dict.fromkeys(sentences))


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, UnionType):
        return next(filter(None, map(_submodel, get_args(annotation))), None)
    return None


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Keys allowed below `parents`; a distribution's error names its class on the way."""
    for parent in parents:
        if parent in _DISTRIBUTIONS:
            return list(_DISTRIBUTIONS[parent].model_fields)
        field = model.model_fields.get(parent)
        model = (_submodel(field.annotation) if field else None) or model
    return _fields(model)


def _fields(model: type[BaseModel]) -> list[str]:
    """Keys of a section; a noise model has those of every shipped kind."""
    return noise_fields() if model is NoiseModel else list(model.model_fields)


def _field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in model.model_fields.items():
        below = _submodel(field.annotation)
        if below is NoiseModel:
            paths += [f"{prefix}{name}.{key}" for key in noise_fields()]
        else:
            paths += _field_paths(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]
        if name == "chip":
            paths.append(f"{prefix}{name}")
    return paths


def searched_values(sweep: SweepConfig, config: TrialConfig) -> dict[str, Any]:
    """The value of every searched field in a resolved trial."""
    dumped = config.model_dump(mode="json")
    return {path: value_at(dumped, path) for path in sweep.space}
