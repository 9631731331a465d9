"""A chip instance: one manufactured and programmed chip, named by the address of its draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from halora.hardware.addressing import NoiseKey
from halora.hardware.chip import Chip
from halora.hardware.manufactured import strength_factor


@dataclass(frozen=True)
class ChipInstance:
    """One programmed chip.

    Attributes:
        chip: Its description.
        key: Its address.
        level: Strength of its noise model, in the model's own measure, before what differs from chip to chip.
        multipliers: What the level is multiplied by, by canonical name of the layer; 1 for the others.
    """

    chip: Chip
    key: NoiseKey
    level: float
    multipliers: Mapping[str, float] = field(default_factory=dict)

    def level_at(self, layer: str) -> float:
        """Strength of the noise of one layer."""
        return self.level * self.multipliers.get(layer, 1.0) * strength_factor(self.chip, self.key)
