"""Scores a recorded adapter again, from what was recorded alone, and says whether the figures agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halora.errors import UserError
from halora.trial import TrialConfig

TOLERANCE_NATS = {"fp32": 0.01, "bf16": 0.1}
"""Mean absolute difference of margins allowed: thread counts and processors change the order of sums."""


@dataclass(frozen=True)
class Recomputed:
    """Logged and recomputed accuracy.

    Attributes:
        logged_accuracy: Mean over chips and rows, as logged.
        accuracy: The same, again.
        margin_difference: Mean absolute difference of the margins over chips and rows, in nats.
        tolerance: Largest difference that still agrees.
    """

    logged_accuracy: float
    accuracy: float
    margin_difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the margins are the same within the tolerance."""
        return self.margin_difference <= self.tolerance

    def describe(self) -> str:
        """Both figures, the difference and the tolerance."""
        return (
            f"{self.logged_accuracy:.4f} logged, {self.accuracy:.4f} again; margins differ by "
            f"{self.margin_difference:.2g} nats in the mean (allowed {self.tolerance:g})"
        )


def recompute(config: TrialConfig, adapter: Path | None, logged: Mapping[str, Any]) -> Recomputed:
    """Score the adapter on the logged chips and rows.

    Raises:
        UserError: The task no longer gives the logged rows.
    """
    from halora.trainable import Workbench

    scores = Workbench().evaluate(config, adapter)
    if list(scores.row_ids) != list(logged["row_ids"]) or list(scores.chip_seeds) != list(logged["chip_seeds"]):
        raise UserError(f"task '{config.task}' no longer gives the rows of this trial", "use the data of the sweep")
    now, then = np.array(scores.noisy), np.array(logged["noisy"])
    return Recomputed(
        logged_accuracy=float(np.mean(logged["noisy_correct"])),
        accuracy=float(np.mean(scores.noisy_correct)),
        margin_difference=float(np.abs(now - then).mean()),
        tolerance=TOLERANCE_NATS[config.training.dtype],
    )
