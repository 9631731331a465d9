"""What a trial's configuration takes per token: energy and time, and the chip's area."""

from collections.abc import Mapping

from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.settings.trial import TrialConfig
from halora.training.models import estimated_shape, model_shape


def trial_energy(
    config: TrialConfig, *, estimated: bool = False, ranks: Mapping[str, int] | None = None
) -> EnergyBreakdown:
    """Energy per token of a trial's configuration with its time and area; exact, and free before training.

    Args:
        config: The trial.
        ranks: Rank of each adapted layer by its canonical name, of an adapter that is not the configuration's.
        estimated: Do without the model's weights, see `estimated_shape`: enough to tell what can be priced.

    Raises:
        UserError: The model's dimensions are not available.
    """
    shape_of = estimated_shape if estimated else model_shape
    return energy_per_token(
        shape_of(config.model),
        config.chip,
        rank=config.lora.rank if ranks is None else ranks,
        targets=config.lora.targets if ranks is None else (),
        context_tokens=config.evaluation.context_tokens,
        phase=config.evaluation.phase,
        sequences=config.evaluation.sequences,
    )
