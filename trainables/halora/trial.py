"""The full, resolved description of one trial: what is logged, hashed and needed to repeat it."""

from typing import Literal

from pydantic import Field, model_validator

from halora.errors import UserError
from halora.evaluation.config import EvaluationSettings
from halora.hardware.chip import ChipSetting
from halora.hardware.description import Frozen
from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.training.config import LoraSettings, TrainingSettings
from halora.training.models import model_shape
from halora.training.tasks import TaskSetting

TRIAL_FILE = "trial.json"
"""The configuration of a trial, in its folder."""
REPORTS_FILE = "reports.json"
"""Its reports while it trained, there."""
RESULT_FILE = "result.json"
"""Its scores at the last goal it reached, there."""


class TrialConfig(Frozen):
    """One configuration trained and evaluated."""

    model: str
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
        problems = [f"training.schedule.{problem}" for problem in self.training.schedule.problems(self.chip)]
        if self.lora.variant == "dora" and self.training.zero_stage == 3:
            problems.append(
                "lora.variant: 'dora' reads frozen weights whole, which training.zero_stage 3 does not keep; "
                "use zero_stage 0 to 2"
            )
        if problems:
            raise UserError(problems)
        return self


def trial_energy(config: TrialConfig) -> EnergyBreakdown:
    """Energy per token of a trial's configuration; exact, and free before training.

    Raises:
        UserError: The model's dimensions cannot be had.
    """
    return energy_per_token(
        model_shape(config.model),
        config.chip,
        rank=config.lora.rank,
        targets=config.lora.targets,
        context_tokens=config.evaluation.context_tokens,
    )
