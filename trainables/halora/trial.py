"""The full, resolved description of one trial: what is logged, hashed and needed to repeat it; and its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from halora.errors import UserError
from halora.evaluation.config import EvaluationSettings
from halora.hardware.chip import ChipSetting
from halora.hardware.description import Frozen
from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.training.config import LoraSettings, TrainingSettings
from halora.training.models import ModelSetting, estimated_shape, model_shape
from halora.training.tasks import TaskSetting

TRIAL_FILE = "trial.json"
"""The configuration of a trial, in its folder."""
REPORTS_FILE = "reports.json"
"""Its reports while it trained, there."""
RESULT_FILE = "result.json"
"""Its scores at the last goal it reached, there."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The adapter's weights in its folder, as PEFT names them."""
OPTIMIZER_FILE = "optimizer.safetensors"
"""The optimiser's moments, in a checkpoint."""


class TrialConfig(Frozen):
    """One configuration trained and evaluated."""

    model: ModelSetting
    """A known model's name, a hub id, or a local folder."""
    task: TaskSetting
    """A known task's name, a hub data set id, or a folder of JSONL files; or a mixture: the name of one, a sum, or a
    mapping of tasks to their weights in training."""
    prompt_format: Literal["plain", "chat"] = "plain"
    """The prompt as it is, or as the user's message in the tokenizer's chat template."""
    chip: ChipSetting
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: int = Field(default=0, ge=0)
    """Seeds adapter initialisation, data order and training noise; chip instances do not depend on it."""

    @model_validator(mode="after")
    def _parts_suit_each_other(self) -> "TrialConfig":
        training, schedule = self.training, self.training.schedule
        unmet: list[str] = []
        if training.noisy and schedule.redraw_steps != "epoch":  # the length of an epoch is known with the rows only
            unmet = schedule.unmet(training.steps, schedule.redraw_steps)
        problems = [f"training.schedule.{problem}" for problem in [*schedule.problems(self.chip), *unmet]]
        if 0 < training.steps <= training.warmup_steps:
            never = f"but the training has {training.steps} steps and would never meet its learning rate"
            problems.append(f"training.warmup_steps: {training.warmup_steps}, {never}; {training.steps - 1} at most")
        if self.lora.variant == "dora" and self.training.zero_stage == 3:
            problems.append(
                "lora.variant: 'dora' reads frozen weights whole, which training.zero_stage 3 does not keep; "
                "use zero_stage 0 to 2"
            )
        if problems:
            raise UserError(problems)
        return self

    def with_micro_batch_halved(self, times: int) -> "TrialConfig":
        """The same trial, trained in smaller micro-batches; its results are the same up to rounding."""
        return self.model_copy(update={"training": self.training.with_micro_batch_halved(times)})


@dataclass(frozen=True)
class Goal:
    """What a trial is to be brought to.

    Attributes:
        steps: Optimiser steps taken by then.
        chip_instances: Chip instances scored by then, 0 .. n-1; none for a training that is scored elsewhere.
        rows: Validation rows scored; all of them for none.
        first_chip: First chip instance to score; those before it are scored already.
    """

    steps: int
    chip_instances: int
    rows: int | None = None
    first_chip: int = 0

    def config(self, config: TrialConfig) -> TrialConfig:
        """The trial, to be scored on the rows and the number of chips that are left.

        Other strengths of noise are for the end of the training, and for the chips that every trial has.
        """
        left = {"rows": self.rows, "chip_instances": self.chip_instances - self.first_chip}
        whole = self.steps >= config.training.steps and not self.first_chip
        evaluation = config.evaluation if whole else config.evaluation.at_own_level()
        return config.model_copy(update={"evaluation": evaluation.model_copy(update=left)})


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below a trial's folder."""
    found = sorted(folder.glob("step-*/progress.json"))
    return found[-1].parent if found else None


def adapter_folder(folder: Path) -> Path | None:
    """The trained adapter in a trial's folder, in PEFT's format."""
    checkpoint = latest_checkpoint(folder)
    return checkpoint / "adapter" if checkpoint else None


def past_reports(folder: Path) -> list[dict[str, float]]:
    """Reports of a trial up to its latest checkpoint, by step; whoever asked for them may have ended meanwhile."""
    checkpoint, written = latest_checkpoint(folder), folder / REPORTS_FILE
    if checkpoint is None or not written.exists():
        return []
    reached = json.loads((checkpoint / "progress.json").read_text())["step"]
    return [report for report in json.loads(written.read_text()) if report["step"] <= reached]


def trial_energy(
    config: TrialConfig, *, estimated: bool = False, ranks: Mapping[str, int] | None = None
) -> EnergyBreakdown:
    """Energy per token of a trial's configuration; exact, and free before training.

    Args:
        config: The trial.
        ranks: Rank of each adapted layer by its canonical name, of an adapter that is not the configuration's.
        estimated: Do without the model's weights, see `estimated_shape`: enough to tell what can be priced.

    Raises:
        UserError: The model's dimensions cannot be had.
    """
    shape_of = estimated_shape if estimated else model_shape
    return energy_per_token(
        shape_of(config.model),
        config.chip,
        rank=config.lora.rank if ranks is None else ranks,
        targets=config.lora.targets if ranks is None else (),
        context_tokens=config.evaluation.context_tokens,
    )
