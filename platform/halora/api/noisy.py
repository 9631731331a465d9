"""A chip instance under a model of the user's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from halora.api.chip import Chip
from halora.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def noisy(
    model: Any, chip: Any = "halora-2026", instance: int = 0, *, calibration: "Tensor | None" = None
) -> Iterator[Any]:
    """Have a model compute as it would on a chip instance while the block runs; then it is what it was, bit for bit.

    Works for whatever calls the model's forward: scoring, `generate`, a harness. No gradient reaches the frozen
    weights. Noise of reads is drawn anew in every forward pass, and the same whenever the same passes are made.

    Args:
        model: A causal language model of `transformers` of a supported family, or a `PeftModel` with LoRA around one.
        chip: A `Chip`, or what makes one.
        instance: Number of the chip instance in the search pool, as sweeps and `halora evaluate` count them.
        calibration: Token ids `(batch, tokens)`, without padding, that the converters are set on. Left out, each
            layer's are set on the first 128 tokens that it is given.

    Yields:
        The model.

    Raises:
        UserError: The chip is none, or the model is of another family, quantised, or on a chip already.
    """
    from halora.hardware.addressing import NoiseKey, Role
    from halora.hardware.instance import ChipInstance
    from halora.training.on_chip import on_chip

    described = (chip if isinstance(chip, Chip) else Chip(chip)).description
    if instance < 0:
        raise UserError(f"instance: must be 0 or more, got {instance}")
    key = NoiseKey(role=Role.SEARCH, chip_seed=instance)
    with on_chip(model, ChipInstance(described, key, described.noise.level), calibration):
        yield model
