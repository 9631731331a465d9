"""The full, resolved description of one trial: what is logged, hashed and needed to repeat it."""

from pydantic import Field, model_validator

from halora.evaluation.config import EvaluationSettings
from halora.hardware.chip import ChipSetting
from halora.hardware.description import Frozen
from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.training.config import LoraSettings, TrainingSettings
from halora.training.models import model_shape


class TrialConfig(Frozen):
    """One configuration trained and evaluated."""

    model: str
    """A known model's name, a hub id, or a local folder."""
    task: str
    """A known task's name, a hub data set id, or a folder of JSONL files."""
    chip: ChipSetting
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: int = Field(default=0, ge=0)
    """Seeds adapter initialisation, data order and training noise; chip instances do not depend on it."""

    @model_validator(mode="after")
    def _dora_reads_whole_weights(self) -> "TrialConfig":
        if self.lora.variant == "dora" and self.training.zero_stage == 3:
            raise ValueError(
                "lora.variant 'dora' reads frozen weights whole, which training.zero_stage 3 does not keep; "
                "use zero_stage 0 to 2"
            )
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
