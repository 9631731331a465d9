"""How an adapter is scored."""

import re
from typing import Literal

from pydantic import Field, field_validator

from halora.strict_model import StrictModel

Scoring = Literal["options", "options_per_byte", "generation"]
BESIDE: dict[Scoring, str] = {"options": "per_byte", "options_per_byte": "summed"}
"""The other way to choose an option, told beside the one asked for: a suffix of its metrics' names."""


class EvaluationSettings(StrictModel):
    """Chips of the search pool and validation rows a trial is scored on."""

    chip_instances: int = Field(default=5, ge=1)
    """Chip instances 0 .. n-1 of the search pool."""
    noise_strengths: tuple[float, ...] = ()
    """Other strengths of the chip's programming noise, in its model's measure, that the same chips are scored at."""
    rows: int | None = Field(default=None, ge=2)
    """Use only the first validation rows, in a fixed shuffled order; all of them when left out."""
    batch_size: int = Field(default=16, ge=1)
    scoring: Scoring = "options"
    """Choose the option of the largest log-likelihood, or of the largest per byte of its text; or generate greedily and
    compare the answer in the text."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens generated at most; read by `generation` only."""
    answer_pattern: str = r"-?\d[\d,]*(?:\.\d+)?"
    """Regular expression whose last match, or its group, is the answer, by default a number; for `generation` only."""
    converters: Literal["exact", "statistical"] = "exact"
    """Carry out every conversion, or draw their errors from the model: cheaper for inputs driven bit by bit."""
    calibration_tokens: int = Field(default=128, ge=8)
    """Training tokens that set the converters' ranges."""
    context_tokens: int = Field(default=512, ge=1)
    """Tokens each token attends to, for its energy."""

    @field_validator("noise_strengths")
    @classmethod
    def _different_strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(strengths)) < len(strengths) or any(strength < 0 for strength in strengths):
            raise ValueError(f"noise_strengths are different and not negative, got {', '.join(map(str, strengths))}")
        return strengths

    def at_own_strength(self) -> "EvaluationSettings":
        """The same without the other strengths of noise."""
        return self.model_copy(update={"noise_strengths": ()})

    @field_validator("answer_pattern")
    @classmethod
    def _one_group_at_most(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern is not a regular expression: {error}") from None
        if groups > 1:
            raise ValueError(f"answer_pattern has {groups} groups; one at most, write others as (?:...)")
        return pattern
