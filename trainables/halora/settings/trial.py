"""The full, resolved description of one trial: logged, hashed, and enough to repeat it; and what to bring it to."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from halora.errors import UserError
from halora.hardware.chip import ChipSetting
from halora.settings.evaluation import EvaluationSettings
from halora.settings.names import ModelSetting, TaskSetting
from halora.settings.training import LoraSettings, TrainingSettings
from halora.strict_model import StrictModel


class TrialConfig(StrictModel):
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
        evaluation = config.evaluation if whole else config.evaluation.at_own_strength()
        return config.model_copy(update={"evaluation": evaluation.model_copy(update=left)})
