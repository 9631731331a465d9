"""Whether scores are reproduced: those on record beside those of the same adapter, rows and chip instances now.

On clean weights only the order of sums differs, by thread count and processor. A conversion that is carried out turns
such a difference into a whole step now and then, and layer after layer these add up: on a noisy chip two right
computations differ by up to a fifth of what the chip itself does to the margins (docs/decisions/003).
"""

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import fmean

import numpy as np

from halora.errors import UserError
from halora.evaluation.chips import ChipScores
from halora.settings.training import Dtype
from halora.settings.trial import TrialConfig

TOLERANCE_NATS: dict[Dtype, float] = {"fp32": 1e-4, "bf16": 0.1}
"""Mean absolute difference of margins that another order of sums explains."""
_CONVERTED_SHARE = 0.5
"""The same where conversions are carried out, as a share of what the chips move the margins."""


@dataclass(frozen=True)
class Agreement:
    """Scores on record and again.

    Attributes:
        recorded_accuracy: Mean over chips and rows, as recorded.
        accuracy: The same, again.
        accuracy_allowed: Largest difference of the two that agrees.
        clean_nats: Mean absolute difference of the margins on clean weights.
        clean_allowed_nats: Largest that agrees.
        noisy_nats: Mean absolute difference of the margins over chips and rows.
        noisy_allowed_nats: Largest that agrees.
    """

    recorded_accuracy: float
    accuracy: float
    accuracy_allowed: float
    clean_nats: float
    clean_allowed_nats: float
    noisy_nats: float
    noisy_allowed_nats: float

    @property
    def share(self) -> float:
        """The largest difference as a share of what is allowed; above 1 they disagree, as where one is not a number."""
        pairs = (
            (abs(self.accuracy - self.recorded_accuracy), self.accuracy_allowed),
            (self.clean_nats, self.clean_allowed_nats),
            (self.noisy_nats, self.noisy_allowed_nats),
        )
        return max(_share(difference, allowed) for difference, allowed in pairs)

    @property
    def agrees(self) -> bool:
        """Whether accuracy and margins are the same within what is allowed."""
        return self.share <= 1

    def __str__(self) -> str:
        return (
            f"{self.recorded_accuracy:.4f} recorded, {self.accuracy:.4f} again (allowed {self.accuracy_allowed:.2g}); "
            f"mean difference of margins in nats: clean {self.clean_nats:.2g} (allowed {self.clean_allowed_nats:g}), "
            f"on chips {self.noisy_nats:.2g} (allowed {self.noisy_allowed_nats:.2g})"
        )


def _share(difference: float, allowed: float) -> float:
    if not (isfinite(difference) and isfinite(allowed)):
        return inf
    if difference == 0:
        return 0.0
    return difference / allowed if allowed else inf


def as_scored(config: TrialConfig, scores: ChipScores) -> TrialConfig:
    """The trial, to be scored on as many rows and chip instances as these scores have, at the chip's own noise."""
    size = {"rows": len(scores.row_ids), "chip_instances": len(scores.chip_seeds)}
    return config.model_copy(update={"evaluation": config.evaluation.at_own_strength().model_copy(update=size)})


def agreement(config: TrialConfig, recorded: ChipScores, again: ChipScores) -> Agreement:
    """Compare scores of one adapter on the same rows and chip instances.

    Accuracy may differ by the share of recorded margins that what is allowed of a margin would take across 0; where
    generated texts decide, by three standard errors where conversions are carried out.

    Raises:
        UserError: The task no longer gives the recorded rows.
    """
    if again.row_ids != recorded.row_ids or again.chip_seeds != recorded.chip_seeds:
        raise UserError(f"task '{config.task}' no longer gives the rows on record", "use the data of the sweep")
    tolerance = TOLERANCE_NATS[config.training.dtype]
    (clean, noisy), (clean_again, noisy_again) = recorded.nats, again.nats
    exact = config.chip.adc.lossless and config.chip.dac.lossless
    moved = 0.0 if exact else float(np.abs(noisy - clean).mean())
    noisy_allowed, accuracy = max(tolerance, _CONVERTED_SHARE * moved), fmean(recorded.accuracy_by_chip)
    if config.evaluation.scoring == "generation":
        near = 0.0 if exact else 3 * sqrt(accuracy * (1 - accuracy) / noisy.size)
    else:
        near = float((np.abs(noisy) <= noisy_allowed).mean())
    return Agreement(
        recorded_accuracy=accuracy,
        accuracy=fmean(again.accuracy_by_chip),
        accuracy_allowed=near,
        clean_nats=float(np.abs(clean_again - clean).mean()),
        clean_allowed_nats=tolerance,
        noisy_nats=float(np.abs(noisy_again - noisy).mean()),
        noisy_allowed_nats=noisy_allowed,
    )
