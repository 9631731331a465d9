"""How an adapter is scored."""

from typing import Literal

from pydantic import Field

from halora.hardware.description import Frozen


class EvaluationSettings(Frozen):
    """Chips of the search pool and validation rows a trial is scored on."""

    chip_instances: int = Field(default=5, ge=1)
    """Chip instances 0 .. n-1 of the search pool."""
    rows: int | None = Field(default=None, ge=2)
    """Use only the first validation rows, in a fixed shuffled order; all of them when left out."""
    batch_size: int = Field(default=16, ge=1)
    converters: Literal["exact", "statistical"] = "exact"
    """Carry out every conversion, or draw their errors from the model: cheaper for inputs driven bit by bit."""
    calibration_tokens: int = Field(default=128, ge=8)
    """Training tokens that set the converters' ranges."""
    context_tokens: int = Field(default=512, ge=1)
    """Tokens each token attends to, for its energy."""
