"""What a token takes on a trial's chip, energy, time and area, and the energy it takes elsewhere."""

from collections.abc import Mapping

from halora.errors import UserError
from halora.hardware.baselines import baselines
from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.hardware.shapes import ModelShape
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


def baseline_energies(config: TrialConfig, shape: ModelShape | None = None) -> dict[str, float]:
    """Energy per token of the named baselines that have a figure for a trial's model, in microjoule.

    Args:
        config: The trial.
        shape: Dimensions of its model; looked up where they are not given, on the hub if need be.
    """
    try:
        shape = shape or model_shape(config.model)
    except UserError:
        return {}
    found = {
        name: baseline.energy_uj_per_token(shape, config.chip, config.evaluation.context_tokens)
        for name, baseline in baselines().items()
    }
    return {name: energy for name, energy in found.items() if energy is not None}
