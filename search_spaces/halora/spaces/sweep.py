"""A sweep file: read, checked whole, and refused with all errors together."""

import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, field_validator

from halora.errors import UserError, attempt, nearest
from halora.hardware.chip import Chip, load_chip
from halora.hardware.shapes import ModelShape
from halora.pricing import trial_energy
from halora.reading import decoded, is_file
from halora.settings.trial import TrialConfig
from halora.spaces.checks import FileChecks, model_and_task_problems, sweep_problems
from halora.spaces.gates import Gates
from halora.spaces.language import Categorical, Distribution, Value, with_values
from halora.spaces.mistakes import describe
from halora.spaces.resolving import NamedChips, described, formula, named_chip, resolve_trial
from halora.spaces.search import Budget, Constraint, EarlyStopping, Racing, SearchSettings
from halora.strict_model import StrictModel
from halora.yaml_files import parse_yaml, read_yaml

SHIPPED = files("halora.spaces") / "sweeps"

_LEAST: dict[str, Any] = {
    "name": "nameless",
    "family": "nameless",
    "trials": 1,
    "trial": {},
    "space": {},
    "reference_point": {"accuracy": 0, "energy_uj_per_token": 1},
}
"""What every sweep has."""

Formula = Annotated[str, AfterValidator(lambda text: formula(text).text)]

_OF_A_LAUNCH = ("launch", "folders", "shapes")
"""What a description says of the launch it was written for, which another launch does not take over."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]


class EquivalenceMargin(StrictModel):
    """Up to where two contestants count as equal, either way."""

    accuracy: float | None = Field(default=None, gt=0, lt=1)
    margin: float | None = Field(default=None, gt=0)
    """Mean margin in nats."""


class Comparison(StrictModel):
    """The closing comparison of trained adapters and the untrained base, on rows and chips the search did not use."""

    rows: int = Field(ge=2)
    """Validation rows after those the search scores on."""
    chip_instances: int = Field(ge=1)
    """Chip instances of the search pool after those the search scores on."""
    by: str | None = None
    """A searched field; the best trial of each of its values takes part. The best of all trials when left out."""
    against: Value | None = None
    """The value of `by` whose trial gains are measured from; the untrained base when left out."""
    chips: tuple[str, ...] = ()
    """Chips to compare on, each a name of `chips`, a preset or a path; the trials' own when left out."""
    seeds: int = Field(default=1, ge=1)
    """Adapters of every contestant. With 1 the chosen trial's own takes part, and what is said is about that adapter;
    with more the configuration is trained anew so many times with other seeds, and the trial's own, whose seed was
    chosen with it, does not count. From 3 on statements are about methods."""
    equivalence_margin: EquivalenceMargin = EquivalenceMargin()
    """Asks for an equivalence test beside that of a difference."""


class Probe(StrictModel):
    """What the sweep's chips do to its untrained bases, scored on a few rows before anything is trained."""

    rows: int = Field(default=16, ge=2)
    """Validation rows; no more than a trial has."""
    chip_instances: int = Field(default=2, ge=1)
    """Chip instances of the search pool."""
    most: int = Field(default=4, ge=1)
    """Most pairs of a base and a chip: the fixed ones, then those of `first`, then choices and named chips."""


class ReferencePoint(StrictModel):
    """Corner that hypervolumes are measured from: worse than any trial worth having."""

    accuracy: float = Field(ge=0, le=1)
    energy_uj_per_token: float = Field(gt=0)


class Resources(StrictModel):
    """What Ray sets aside for every worker of a trial, and how long one may be silent."""

    cpus: int | None = Field(default=None, ge=1)
    """Cores and threads. Left out, the workers share the cores of one machine, and have one each on a cluster."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs; a fraction lets several workers share one. Left out, the workers share those that are there."""
    heartbeat_s: float = Field(default=60.0, gt=0)
    """Seconds after which a worker that says nothing counts as hung and is ended; its trial resumes elsewhere."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_a_part(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus is a part of one GPU or a whole number of them, got {gpus:g}")
        return gpus


class SweepConfig(StrictModel):
    """One study: what is fixed, what is searched, and how long."""

    name: Name
    family: Name
    """MLflow experiment; sweeps of a family can be compared."""
    launch: str = ""
    """Identity of the launch, drawn at each whatever a file says; the name is for people."""
    description: str = ""
    seed: int = Field(default=0, ge=0)
    trials: int = Field(ge=1)
    concurrent: int = Field(default=1, ge=1)
    """Trials that run at the same time."""
    resources: Resources = Resources()
    chips: dict[str, Any] = Field(default_factory=dict)
    """Chips of this sweep by name, each written as a trial's `chip`, to be named there, in choices and comparisons."""
    chips_read: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Presets and chip files that the sweep names, as they were when it was read; no file has to say it."""
    folders: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the models' and tasks' folders that the sweep names, by their path, as they were at its launch."""
    shapes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Dimensions of its models as they were then, see `ModelShape.dimensions`."""
    trial: dict[str, Any]
    """A trial's fixed fields, and the defaults of the searched ones."""
    space: dict[str, Distribution]
    """Searched fields by dotted path."""
    derived: dict[str, Formula] = Field(default_factory=dict)
    """Fields by dotted path that follow from others by a formula (`training.warmup_steps: training.steps // 10`)."""
    first: tuple[dict[str, Any], ...] = ()
    """Points to try before the sampler chooses; the paper's recipe and a tuned plain LoRA follow them in any case."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds a trial has to keep, e.g. `clean_accuracy >= 0.6`; one on energy is checked before training."""
    search: SearchSettings = SearchSettings()
    early_stopping: EarlyStopping | None = None
    racing: Racing | None = None
    budget: Budget = Budget()
    reference_point: ReferencePoint
    comparison: Comparison | None = None
    probe: Probe | None = Probe()
    """None trains without looking."""
    gates: Gates = Gates()
    """What an adapter of this sweep has to pass before it may be deployed, see `halora adapter select`."""

    @property
    def workers(self) -> int:
        """Workers of every trial."""
        return self.resolve({}).training.workers

    def resolve(self, values: Mapping[str, Any]) -> TrialConfig:
        """The trial that the given values of searched fields describe."""
        return resolve_trial({"seed": self.seed, **self.trial}, values, self._named_chips, self.derived)

    @property
    def chips_searched(self) -> int:
        """Chip instances of the pool that the search may look at."""
        own = self.resolve({}).evaluation.chip_instances
        return max(own, self.racing.most) if self.racing else own

    def values_of(self, path: str) -> tuple[Any, ...]:
        """What a top-level field of a trial can be: its choices, or its fixed value."""
        searched = self.space.get(path)
        return searched.choices if isinstance(searched, Categorical) else (self.trial[path],)

    def shape(self, model: str) -> ModelShape | None:
        """Dimensions of one of its models as it was launched with it; none before that, or if nothing was known."""
        return ModelShape.from_config(self.shapes[model]) if model in self.shapes else None

    def chip(self, name: str) -> Chip:
        """A chip by its name in this sweep, a preset's name, or a path."""
        return load_chip(named_chip(name, self._named_chips))

    @property
    def _named_chips(self) -> NamedChips:
        return NamedChips(self.chips, self.chips_read)


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
    return sweep_from(_read(name_or_path), name_or_path, overrides)


def sweep_from(content: Mapping[str, Any], where: str, overrides: Mapping[str, Any] | None = None) -> SweepConfig:
    """Check the content of a sweep file; `where` is told with its mistakes.

    Args:
        content: The content.
        where: What it is called.
        overrides: See `load_sweep`.

    Raises:
        UserError: With every mistake found.
    """
    data, problems = _overridden(dict(content), overrides or {})
    data = {key: value for key, value in described(data).items() if key not in _OF_A_LAUNCH}
    sweep: SweepConfig | None = None
    try:
        sweep = SweepConfig.model_validate(data)
    except ValidationError as error:
        problems += describe(error, SweepConfig)
    checks = FileChecks.of(data)
    problems += checks.problems
    right = _without_mistakes(checks.right) if problems or sweep is None else sweep
    problems += sweep_problems(right, data)
    if problems:
        raise UserError(
            [f"{where}: {problem}" for problem in dict.fromkeys(problems)],
            "fix the file and run again",
        )
    assert sweep is not None
    return sweep


def _overridden(data: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a file with values by dotted path set, and what is wrong with those that cannot be."""
    problems: list[str] = []
    for path, value in overrides.items():
        data = attempt(problems, lambda: with_values(data, {path: value})) or data  # noqa: B023 (called at once)
    return data, problems


def _without_mistakes(data: Mapping[str, Any]) -> SweepConfig:
    """A sweep of whatever is right in a file's content; its trial is empty where that is not."""
    content = _LEAST | {key: value for key, value in data.items() if key in SweepConfig.model_fields}
    while True:
        try:
            return SweepConfig.model_validate(content)
        except ValidationError as error:
            wrong = {str(item["loc"][0]) for item in error.errors(include_url=False)}
            content = {key: value for key, value in content.items() if key not in wrong}
            content |= {key: _LEAST[key] for key in wrong & _LEAST.keys()}


def load_trial(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> TrialConfig:
    """Read and check a single trial.

    Args:
        name_or_path: The path of a trial's YAML file; or a sweep, whose fixed values are taken.
        overrides: Values by dotted path that replace those of the file.

    Raises:
        UserError: With every mistake found.
    """
    data = _read(name_or_path, "trial")
    if not isinstance(trial := data.get("trial"), dict):
        return trial_from(data, name_or_path, overrides)
    chips = FileChecks.of({"chips": data.get("chips")})
    if chips.problems:
        raise UserError([f"{name_or_path}: {problem}" for problem in chips.problems], "correct the file and run again")
    return trial_from({"seed": data.get("seed", 0), **trial}, name_or_path, overrides, chips.right["chips"])


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
    data, problems = _overridden(data, overrides or {})
    try:
        config = resolve_trial(data, {}, NamedChips(chips or {}))
    except ValidationError as error:
        problems += describe(error, TrialConfig)
    named = model_and_task_problems(data, {})
    problems += [problem.removeprefix("trial.") for problem in named]
    if not problems:
        attempt(problems, lambda: trial_energy(config, estimated=True))
    if problems:
        raise UserError([f"{where}: {problem}" for problem in problems], "fix it and run again")
    return config


def _read(name_or_path: str, what: str = "sweep") -> dict[str, Any]:
    where = f"{what} '{name_or_path}'"
    if name_or_path in shipped_sweeps():
        data = parse_yaml((SHIPPED / f"{name_or_path}.yaml").read_text(encoding="utf-8"), where)
    elif name_or_path == "-":
        where = f"the {what} on standard input"
        data = parse_yaml(decoded(sys.stdin.buffer.read(), where, "YAML"), where)
    elif is_file(name_or_path):
        data = read_yaml(Path(name_or_path), where)
    else:
        raise UserError(
            f"no {what} '{name_or_path}': neither a shipped sweep ({', '.join(shipped_sweeps())}) nor a file"
            + nearest(name_or_path, shipped_sweeps())
        )
    if not isinstance(data, dict):
        raise UserError(f"{name_or_path}: a {what} is a mapping of keys to values, got {type(data).__name__}")
    return data
