"""Evaluation of an adapter on chip instances."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from halora.evaluation.config import EvaluationSettings
from halora.evaluation.generation import generate, parsed_answer, reference_answers, reference_scores, same_answer
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

_BY_CHIP = ("chip_seeds", "noisy", "noisy_correct", "noise_db", "layer_noise_db")
_NO_NOISE_DB = -300.0  # stands for none, its opposite for noise on weights of zero, as JSON has no infinity


@dataclass(frozen=True)
class ChipScores:
    """Margins and right answers of an adapter on clean weights and on every chip instance, over the same rows.

    The margin of a row scored by generation is the mean log-likelihood per token of its reference completion.

    Attributes:
        row_ids: Id of each row.
        tasks: Task of each row.
        chip_seeds: Number of each chip instance in its pool.
        clean: Margin per row in nats, on clean weights and exact converters.
        clean_correct: Whether each row is answered rightly there.
        noisy: Margin per chip and row in nats, `[chip][row]`.
        noisy_correct: Whether each row is answered rightly on each chip, `[chip][row]`.
        noise_db: Mean realised noise-to-signal ratio of the mapped weights in dB, per chip.
        levels: Other strengths of the programming noise that the chips were scored at.
        level_correct: Whether each row is answered rightly there, `[level][chip][row]`; chips that a race adds are not.
        layers: Canonical names of the layers in RRAM.
        layer_noise_db: Realised noise-to-signal ratio of each one's weights in dB, `[chip][layer]`.
    """

    row_ids: tuple[str, ...]
    tasks: tuple[str, ...]
    chip_seeds: tuple[int, ...]
    clean: tuple[float, ...]
    clean_correct: tuple[bool, ...]
    noisy: tuple[tuple[float, ...], ...]
    noisy_correct: tuple[tuple[bool, ...], ...]
    noise_db: tuple[float, ...]
    levels: tuple[float, ...] = ()
    level_correct: tuple[tuple[tuple[bool, ...], ...], ...] = ()
    layers: tuple[str, ...] = ()
    layer_noise_db: tuple[tuple[float, ...], ...] = ()

    def summary(self) -> dict[str, float]:
        """Accuracy and mean margin, clean and over chips, with 95 % intervals over rows and chips.

        At other strengths of noise the accuracy, as `accuracy_at.LEVEL`; with more than one task the accuracy of each,
        as `accuracy.TASK` and `clean_accuracy.TASK`.
        """
        margins = np.array(self.noisy)  # (chips, rows)
        correct = np.array(self.noisy_correct, dtype=float)
        clean_correct = np.array(self.clean_correct, dtype=float)
        by_chip = np.array(self.accuracy_by_chip)
        accuracy, mean_margin = crossed_bootstrap(correct), crossed_bootstrap(margins)
        summary = {
            "clean_accuracy": float(clean_correct.mean()),
            "clean_margin": fmean(self.clean),
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
        for level, right in zip(self.levels, self.level_correct, strict=True):
            summary[f"accuracy_at.{level:g}"] = float(np.mean(right))
        if len(names := dict.fromkeys(self.tasks)) > 1:
            for name in names:
                own = np.array([task == name for task in self.tasks])
                summary[f"accuracy.{name}"] = float(correct[:, own].mean())
                summary[f"clean_accuracy.{name}"] = float(clean_correct[own].mean())
        return summary

    @property
    def accuracy_by_chip(self) -> list[float]:
        """Accuracy on each chip instance, in their order."""
        return [fmean(row) for row in self.noisy_correct]

    def with_chips_after(self, kept: int, more: "ChipScores") -> "ChipScores":
        """The first `kept` chips of these scores, and then those of another evaluation on the same rows."""
        assert more.row_ids == self.row_ids
        first = self.first_chips(kept)
        return replace(first, **{name: getattr(first, name) + getattr(more, name) for name in _BY_CHIP})

    def first_chips(self, count: int) -> "ChipScores":
        """The scores of the first chips alone."""
        at_levels = tuple(by_chip[:count] for by_chip in self.level_correct)
        return replace(self, level_correct=at_levels, **{name: getattr(self, name)[:count] for name in _BY_CHIP})

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ChipScores":
        """What `to_json` gave."""
        return cls(**{name: _as_tuple(value) for name, value in content.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


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
        settings: Number of chip instances, way of scoring, batch size, converters.
        role: Pool of the chip instances.
        first_chip: Number of the first chip instance.
    """
    score = (_by_generation if settings.scoring == "generation" else _by_options)(base, array, rows, settings)
    array.clear()
    reads = calibrate(base, array, chip, calibration_rows, settings.calibration_tokens, settings.converters)
    clean, clean_correct = score()
    seeds = tuple(range(first_chip, first_chip + settings.chip_instances))
    noisy, noisy_correct, noise_db = [], [], []
    layer_noise_db: list[dict[str, float]] = []
    level_correct: list[list[tuple[bool, ...]]] = [[] for _ in settings.noise_levels]

    def score_on(seed: int, level: float) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        array.program(ChipInstance(chip, NoiseKey(role=role, chip_seed=seed), level), reads)
        array.materialise()
        return score()

    for seed in seeds:
        margins, correct = score_on(seed, chip.noise.level)
        noisy.append(margins)
        noisy_correct.append(correct)
        by_layer = array.noise_db()
        noise_db.append(_finite_db(mean_db(by_layer.values())))
        layer_noise_db.append({layer: _finite_db(ratio_db) for layer, ratio_db in by_layer.items()})
        for level, right in zip(settings.noise_levels, level_correct, strict=True):
            right.append(score_on(seed, level)[1])
    array.clear()
    return ChipScores(
        row_ids=tuple(row.row_id for row in rows),
        tasks=tuple(row.task for row in rows),
        chip_seeds=seeds,
        clean=clean,
        clean_correct=clean_correct,
        noisy=tuple(noisy),
        noisy_correct=tuple(noisy_correct),
        noise_db=tuple(noise_db),
        levels=settings.noise_levels,
        level_correct=tuple(map(tuple, level_correct)),
        layers=tuple(layer_noise_db[0]),
        layer_noise_db=tuple(tuple(by_layer.values()) for by_layer in layer_noise_db),
    )


def _finite_db(ratio_db: float) -> float:
    return max(min(ratio_db, -_NO_NOISE_DB), _NO_NOISE_DB)


_Score = Callable[[], tuple[tuple[float, ...], tuple[bool, ...]]]
"""Scores the rows on the chip under the model: the margin of each, and whether it is answered rightly."""


def _by_options(base: BaseModel, array: RramArray, rows: Sequence[Row], settings: EvaluationSettings) -> _Score:
    packed = [pack(row, base.tokenizer) for row in rows]

    def score() -> tuple[tuple[float, ...], tuple[bool, ...]]:
        scores = option_scores(base.causal_lm, array, packed, settings.batch_size)
        margins = tuple(margin(s, row.answer) for s, row in zip(scores, packed, strict=True))
        return margins, tuple(value > 0 for value in margins)

    return score


def _by_generation(base: BaseModel, array: RramArray, rows: Sequence[Row], settings: EvaluationSettings) -> _Score:
    references = reference_answers(rows, settings.answer_pattern)

    def score() -> tuple[tuple[float, ...], tuple[bool, ...]]:
        texts = generate(base, array, rows, settings.batch_size, settings.max_new_tokens)
        answers = (parsed_answer(text, settings.answer_pattern) for text in texts)
        correct = tuple(same_answer(answer, reference) for answer, reference in zip(answers, references, strict=True))
        return tuple(reference_scores(base, array, rows, settings.batch_size)), correct

    return score
