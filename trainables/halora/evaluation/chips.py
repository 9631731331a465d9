"""Evaluation of an adapter on chip instances."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from halora.evaluation.config import EvaluationSettings
from halora.evaluation.intervals import crossed_bootstrap
from halora.evaluation.scoring import margin, option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.hardware.noise import mean_db
from halora.training.batches import pack
from halora.training.models import BaseModel
from halora.training.reads import calibrate
from halora.training.rram import RramArray
from halora.training.tasks import Row

_NO_NOISE_DB = -300.0  # stands for none, as JSON has no infinity


@dataclass(frozen=True)
class ChipScores:
    """Margins of an adapter on clean weights and on every chip instance, over the same rows.

    Attributes:
        row_ids: Id of each row.
        chip_seeds: Number of each chip instance in its pool.
        clean: Margin per row in nats, on clean weights and exact converters.
        noisy: Margin per chip and row in nats, `[chip][row]`.
        noise_db: Mean realised noise-to-signal ratio of the mapped weights in dB, per chip.
    """

    row_ids: tuple[str, ...]
    chip_seeds: tuple[int, ...]
    clean: tuple[float, ...]
    noisy: tuple[tuple[float, ...], ...]
    noise_db: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Accuracy and mean margin, clean and over chips, with 95 % intervals over rows and chips."""
        margins = np.array(self.noisy)  # (chips, rows)
        correct = (margins > 0).astype(float)
        by_chip = correct.mean(axis=1)
        accuracy, mean_margin = crossed_bootstrap(correct), crossed_bootstrap(margins)
        clean = np.array(self.clean)
        return {
            "clean_accuracy": float((clean > 0).mean()),
            "clean_margin": float(clean.mean()),
            "accuracy": accuracy.mean,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "accuracy_std_chips": float(by_chip.std(ddof=1)) if len(by_chip) > 1 else 0.0,
            "accuracy_worst": float(by_chip.min()),
            "margin": mean_margin.mean,
            "margin_low": mean_margin.low,
            "margin_high": mean_margin.high,
            "noise_db": fmean(self.noise_db),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for a JSON file."""
        return asdict(self)


def evaluate(
    base: BaseModel,
    array: RramArray,
    chip: Chip,
    rows: Sequence[Row],
    calibration_rows: Sequence[Row],
    settings: EvaluationSettings,
    *,
    role: Role = Role.SEARCH,
    first_chip: int = 0,
) -> ChipScores:
    """Score the model, with whatever adapter is attached to it, clean and on chip instances.

    Args:
        base: Model; an attached adapter takes part.
        array: Its RRAM layers.
        chip: Description of the chips; their programming noise is at the chip's own level.
        rows: Rows to score.
        calibration_rows: Training rows that set the ADC ranges.
        settings: Number of chip instances, batch size, converters.
        role: Pool of the chip instances.
        first_chip: Number of the first chip instance.
    """
    packed = [pack(row, base.tokenizer) for row in rows]

    def margins() -> tuple[float, ...]:
        scores = option_scores(base.causal_lm, array, packed, settings.batch_size)
        return tuple(margin(s, row.answer) for s, row in zip(scores, packed, strict=True))

    array.clear()
    reads = calibrate(base, array, chip, calibration_rows, settings.calibration_tokens, settings.converters)
    clean = margins()
    seeds = tuple(range(first_chip, first_chip + settings.chip_instances))
    noisy, noise_db = [], []
    for seed in seeds:
        array.program(ChipInstance(chip, NoiseKey(role=role, chip_seed=seed), chip.noise.level), reads)
        noisy.append(margins())
        noise_db.append(max(mean_db(array.noise_db().values()), _NO_NOISE_DB))
    array.clear()
    return ChipScores(tuple(row.row_id for row in rows), seeds, clean, tuple(noisy), tuple(noise_db))
