"""One adapter, or an untrained base, scored on chip instances outside a sweep, by the code that a sweep runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halora.errors import UserError
from halora.pricing import trial_energy
from halora.reading import read_object
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import load_trial, trial_from
from halora.training.adapter_config import ADAPTER_CONFIG
from halora.training.saved_lora import read_saved_lora
from halora.trial_folder import ADAPTER_WEIGHTS, TRIAL_FILE, adapter_folder

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.evaluation.damage import Damage
    from halora.evaluation.harness import HarnessScore


@dataclass(frozen=True)
class Evaluation:
    """Scores of an adapter on chip instances of the search pool.

    Attributes:
        adapter: Folder of the adapter; none for the bare base.
        config: The trial as it was scored.
        scores: Margins and right answers, by chip and row.
        costs: Energy and time per token, throughput, power and area, by metric.
        damage: What the chip does to the bare base; none for an adapter.
    """

    adapter: Path | None
    config: TrialConfig
    scores: "ChipScores"
    costs: Mapping[str, float]
    damage: "Damage | None"

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracy and margin, clean and on chips, with 95 % intervals over rows and chips, and the costs."""
        return {**self.scores.summary(), **self.costs}

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `halora evaluate --format json` prints them."""
        answer = {
            "adapter": str(self.adapter) if self.adapter else None,
            "chip": self.config.chip.name,
            "chip_hash": self.config.chip.content_hash,
            "rows": len(self.scores.row_ids),
            "chip_instances": len(self.scores.chip_seeds),
            **self.metrics,
        }
        if self.damage is None:
            return answer
        worst = self.damage.worst[0] if self.damage.worst else (None, None)
        return answer | {
            "chance": self.damage.chance,
            "lost": self.damage.lost,
            "worst_layer": worst[0],
            "worst_layer_noise_db": worst[1],
            "layers_overwhelmed": self.damage.overwhelmed,
        }


def evaluated(
    adapter: Path,
    *,
    chip: str | Path | None = None,
    task: str | None = None,
    instances: int | None = None,
    rows: int | None = None,
    first_chip: int = 0,
    first_row: int = 0,
    overrides: Mapping[str, Any] | None = None,
    base: bool = False,
) -> Evaluation:
    """Score an adapter, or the untrained base, by its trial or as told here; see `halora.Adapter.evaluate`.

    Args:
        adapter: A trial's folder, or a PEFT folder; with `base` also a trial's file or a sweep.
        chip: A preset's name or a YAML file; the trial's where left out.
        task: The trial's where left out.
        instances: Number of chip instances.
        rows: Number of validation rows.
        first_chip: Number of the first chip instance of the search pool.
        first_row: Validation rows to leave out.
        overrides: Other values of the trial, by dotted path.
        base: Score the untrained base alone.

    Raises:
        UserError: There is no adapter, too little is known of its trial, or the trial is wrong.
    """
    folder, config = _as_told(adapter, base, chip, instances, overrides, {"task": task, "evaluation.rows": rows})
    ranks = read_saved_lora(folder).ranks if folder else None
    costs = trial_energy(config, ranks=ranks).metrics  # refused before anything is loaded

    from halora.evaluation.damage import Damage
    from halora.trial_runner import TrialRunner

    runner = TrialRunner()
    found = runner.evaluate(config, folder, first_row=first_row, first_chip=first_chip)
    damage = None
    if base:
        scored, name = runner.scored_rows(config, first_row), f"{config.model} on {config.chip.name}"
        damage = Damage.of(name, found, scored, config.evaluation.scoring)
    return Evaluation(folder, config, found, costs, damage)


def evaluated_by_harness(
    adapter: Path,
    tasks: Sequence[str],
    *,
    chip: str | Path | None = None,
    instances: int | None = None,
    documents: int | None = None,
    first_chip: int = 0,
    overrides: Mapping[str, Any] | None = None,
    base: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> "list[HarnessScore]":
    """Score an adapter, or the untrained base, by tasks of lm-evaluation-harness; see `evaluated`.

    Args:
        adapter: A trial's folder, a PEFT folder or a bundle; with `base` also a trial's file or a sweep.
        tasks: Names of the harness's tasks, or paths of their YAML files.
        chip: A preset's name or a YAML file; the trial's where left out.
        instances: Number of chip instances.
        documents: Documents of each task; all where left out.
        first_chip: Number of the first chip instance of the search pool.
        overrides: Other values of the trial, by dotted path.
        base: Score the untrained base alone.
        say: Told of the progress.

    Raises:
        UserError: `lm-eval` is not installed, there is no such task, or as `evaluated`.
    """
    from halora.evaluation.harness import check_tasks, harness_scores

    check_tasks(tasks)
    folder, config = _as_told(adapter, base, chip, instances, overrides)

    from halora.trial_runner import TrialRunner

    runner, settings = TrialRunner(), config.evaluation
    calibration_rows = runner.training_rows(config, settings.calibration_tokens)
    with runner.adapted(config, folder) as (model, array):
        return harness_scores(
            model,
            array,
            config.chip,
            calibration_rows,
            settings,
            tasks,
            documents=documents,
            first_chip=first_chip,
            say=say,
        )


def _as_told(
    adapter: Path,
    base: bool,
    chip: str | Path | None,
    instances: int | None,
    overrides: Mapping[str, Any] | None,
    others: Mapping[str, Any] | None = None,
) -> tuple[Path | None, TrialConfig]:
    """The adapter's folder, none for the base alone, and the trial with what is told; `overrides` win."""
    told = {"chip": chip and str(chip), "evaluation.chip_instances": instances, **(others or {})}
    values = {path: value for path, value in told.items() if value is not None} | dict(overrides or {})
    return base_alone(adapter, values) if base else adapter_and_trial(adapter, values)


def base_alone(where: Path, overrides: Mapping[str, Any]) -> tuple[None, TrialConfig]:
    """No adapter, and the trial that a run's folder, an adapter's, a trial's file or a sweep tells of.

    Raises:
        UserError: It tells of none, or of a wrong one.
    """
    if not where.is_dir():
        return None, load_trial(str(where), overrides)
    if (where / TRIAL_FILE).is_file():
        return None, trial_from(described_trial(where / TRIAL_FILE), str(where), overrides)
    return None, adapter_and_trial(where, overrides)[1]


def adapter_and_trial(adapter: Path, overrides: Mapping[str, Any]) -> tuple[Path, TrialConfig]:
    """The folder of the weights, and the trial that made them as far as it is known.

    Raises:
        UserError: There is no adapter, or too little is known of its trial.
    """
    folder, trial = found_adapter(adapter)
    if trial:
        return folder, trial_from(described_trial(trial), str(adapter), overrides)
    saved = read_saved_lora(folder)
    lora = {"rank": saved.rank, "targets": saved.targets, "variant": saved.variant}
    described = {"lora": lora | {"alpha_over_rank": saved.alpha / saved.rank}, "training": {"steps": 0}}
    if saved.base:
        described["model"] = saved.base
    return folder, trial_from(described, str(adapter), overrides)


def found_adapter(adapter: Path) -> tuple[Path, Path | None]:
    """The folder of an adapter's weights, and the file of the trial that made it, where there is one.

    Raises:
        UserError: There is no adapter.
    """
    folder = adapter_folder(adapter) or adapter
    if not (folder / ADAPTER_WEIGHTS).is_file() or not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"no adapter in '{adapter}': neither a trial's folder nor {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        )
    trials = (parent / TRIAL_FILE for parent in (folder, *folder.parents[:2]))
    return folder, next((trial for trial in trials if trial.is_file()), None)


def base_of(adapter: Path) -> str:
    """The base model of an adapter, by its trial or by PEFT.

    Raises:
        UserError: There is no adapter, or neither says.
    """
    folder, trial = found_adapter(adapter)
    named = str(described_trial(trial).get("model") or "") if trial else read_saved_lora(folder).base
    if not named:
        raise UserError(f"'{adapter}' does not say which base model it is of", "name it")
    return named


def described_trial(trial: Path) -> dict[str, Any]:
    """The content of a trial's file.

    Raises:
        UserError: It cannot be read.
    """
    return read_object(trial, f"'{trial}'")
