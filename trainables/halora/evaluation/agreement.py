"""Whether scores can be had again: those on record beside those of the same adapter, rows and chip instances now."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from halora.errors import UserError
from halora.evaluation.chips import ChipScores
from halora.training.config import Dtype
from halora.trial import TrialConfig

TOLERANCE_NATS: dict[Dtype, float] = {"fp32": 0.01, "bf16": 0.1}
"""Mean absolute difference of margins allowed: thread counts and processors change the order of sums."""


@dataclass(frozen=True)
class Agreement:
    """Scores on record and again.

    Attributes:
        recorded_accuracy: Mean over chips and rows, as recorded.
        accuracy: The same, again.
        difference_nats: Mean absolute difference of the margins over chips and rows.
        tolerance_nats: Largest difference that still agrees.
    """

    recorded_accuracy: float
    accuracy: float
    difference_nats: float
    tolerance_nats: float

    @property
    def agrees(self) -> bool:
        """Whether the margins are the same within the tolerance."""
        return self.difference_nats <= self.tolerance_nats

    def __str__(self) -> str:
        return (
            f"{self.recorded_accuracy:.4f} recorded, {self.accuracy:.4f} again; margins differ by "
            f"{self.difference_nats:.2g} nats in the mean (allowed {self.tolerance_nats:g})"
        )


def as_scored(config: TrialConfig, scores: ChipScores) -> TrialConfig:
    """The trial, to be scored on as many rows and chip instances as these scores have."""
    size = {"rows": len(scores.row_ids), "chip_instances": len(scores.chip_seeds)}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=size)})


def agreement(config: TrialConfig, recorded: ChipScores, again: ChipScores) -> Agreement:
    """Compare scores of one adapter on the same rows and chip instances.

    Raises:
        UserError: The task no longer gives the recorded rows.
    """
    if again.row_ids != recorded.row_ids or again.chip_seeds != recorded.chip_seeds:
        raise UserError(f"task '{config.task}' no longer gives the rows on record", "use the data of the sweep")
    return Agreement(
        recorded_accuracy=fmean(recorded.accuracy_by_chip),
        accuracy=fmean(again.accuracy_by_chip),
        difference_nats=float(np.abs(np.array(again.noisy) - np.array(recorded.noisy)).mean()),
        tolerance_nats=TOLERANCE_NATS[config.training.dtype],
    )
