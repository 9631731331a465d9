"""A chip to look at: what a model takes on it, and what its noise does."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from halora.errors import UserError
from halora.hardware import chip as hardware
from halora.hardware.chip_files import expand_chip
from halora.spaces.language import with_values
from halora.spaces.mistakes import describe

if TYPE_CHECKING:
    from halora.api.energy import ModelEnergy
    from halora.api.noise import Noise


class Chip:
    """A chip by a preset, a YAML file or a mapping, with overrides.

    Args:
        source: A preset's name, the path of a YAML file, a mapping as such a file holds, or another `Chip`.
        overrides: Values by dotted path, e.g. `{"adc.bits": 6}`.

    Attributes:
        description: All of its values, frozen; see docs/hardware.md.

    Raises:
        UserError: With every mistake.
    """

    def __init__(
        self,
        source: "str | Path | Mapping[str, Any] | Chip" = "halora-2026",
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        given = source.description.model_dump(mode="json") if isinstance(source, Chip) else source
        self.description: hardware.Chip = _described(str(given) if isinstance(given, Path) else given, overrides or {})

    @property
    def name(self) -> str:
        """Its name."""
        return self.description.name

    @property
    def hash(self) -> str:
        """Twelve hex digits that change with any value but the name."""
        return self.description.content_hash

    def energy(
        self,
        model: Any,
        *,
        rank: int = 4,
        tokens: int = 512,
        sequences: int = 1,
        phase: str = "prefill",
        baseline: str | None = None,
    ) -> "ModelEnergy":
        """Energy and time by component, power, area, and the ratio to a named baseline, without the model's weights.

        Args:
            model: A known model (`llama-3.2-1b`, ...), a folder, a `config.json`, a hub id, or a loaded model.
            rank: LoRA rank on q, k, v, up and down; 0 for no adapter.
            tokens: Tokens the totals are for, and that each attends to.
            sequences: Sequences that the chip works on at once, for time and power.
            phase: `prefill`: tokens of a prompt; `decode`: generated one by one.
            baseline: What to compare with; the paper's figure where it has one, else one of the phase.

        Raises:
            UserError: With every mistake.
        """
        from halora.api.energy import model_energy

        return model_energy(
            model,
            lambda: self.description,
            rank=rank,
            tokens=tokens,
            sequences=sequences,
            phase=phase,
            baseline=baseline,
        )

    def noise(self, model: Any = None) -> "Noise":
        """Errors of cells and weights as the chip's models state them, or the realised noise of a model's layers.

        Args:
            model: An embedded model, a folder, a hub id or a loaded model, which is not changed; none for the chip
                alone.

        Raises:
            UserError: There is no such model, or the chip's mapping names layers that it has not.
        """
        from halora.api.noise import chip_noise

        return chip_noise(self.description, model)

    def __repr__(self) -> str:
        return f"Chip({self.name!r}, hash {self.hash})"


def _described(source: Any, overrides: Mapping[str, Any]) -> hardware.Chip:
    try:
        content = expand_chip(source)
        if not isinstance(content, Mapping):
            raise UserError(f"a chip is a name, a path or a mapping, got {type(source).__name__}")
        return hardware.Chip.model_validate(with_values(content, overrides))
    except ValidationError as error:
        raise UserError([f"chip.{problem}" for problem in describe(error, hardware.Chip)]) from None
