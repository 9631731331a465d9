"""Evaluation of an adapter on chip instances."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from pydantic import ConfigDict

from halora.evaluation.generation import generate, parsed_answer, reference_answers, reference_scores, same_answer
from halora.evaluation.intervals import crossed, seeded, share, share_gain, wilson
from halora.evaluation.scoring import margin, option_scores, per_byte
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.hardware.noise import mean_db
from halora.settings.evaluation import BESIDE, EvaluationSettings
from halora.training.batches import pack
from halora.training.calibration import calibrate
from halora.training.models import BaseModel
from halora.training.rram import RramArray
from halora.training.tasks import Row

_BY_CHIP = ("chip_seeds", "noisy", "noisy_correct", "noisy_beside", "noise_db", "layer_noise_db")
_NO_NOISE_DB = -300.0  # stands for none, its opposite for noise on weights of zero, as JSON has no infinity


@dataclass(frozen=True)
class ChipScores:
    """Margins and right answers of an adapter on clean weights and on every chip instance, over the same rows.

    Margins and answers are those of the way of scoring asked for; where options are scored, the margins of the other
    way are kept beside them. Margins per byte are in nats per byte. The margin of a row scored by generation is the
    mean log-likelihood per token of its reference completion.

    Attributes:
        row_ids: Id of each row.
        tasks: Task of each row.
        chip_seeds: Number of each chip instance in its pool.
        clean: Margin per row in nats, on clean weights and exact converters.
        clean_correct: Whether each row is answered rightly there.
        noisy: Margin per chip and row in nats, `[chip][row]`.
        noisy_correct: Whether each row is answered rightly on each chip, `[chip][row]`.
        noise_db: Mean realised noise-to-signal ratio of the mapped weights in dB, per chip.
        strengths: Other strengths of the programming noise that the chips were scored at.
        strength_correct: Whether each row is answered rightly there, `[strength][chip][row]`; chips of a race are not.
        layers: Canonical names of the layers in RRAM.
        layer_noise_db: Realised noise-to-signal ratio of each one's weights in dB, `[chip][layer]`.
        beside: The other way, see `halora.settings.evaluation.BESIDE`; empty for generation.
        clean_beside: Margin per row by that way, on clean weights.
        noisy_beside: The same per chip and row.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # where somebody else's are read

    row_ids: tuple[str, ...]
    tasks: tuple[str, ...]
    chip_seeds: tuple[int, ...]
    clean: tuple[float, ...]
    clean_correct: tuple[bool, ...]
    noisy: tuple[tuple[float, ...], ...]
    noisy_correct: tuple[tuple[bool, ...], ...]
    noise_db: tuple[float, ...]
    strengths: tuple[float, ...] = ()
    strength_correct: tuple[tuple[tuple[bool, ...], ...], ...] = ()
    layers: tuple[str, ...] = ()
    layer_noise_db: tuple[tuple[float, ...], ...] = ()
    beside: str = ""
    clean_beside: tuple[float, ...] = ()
    noisy_beside: tuple[tuple[float, ...], ...] = ()

    def summary(self) -> dict[str, float]:
        """Accuracy and mean margin, clean and over chips, with 95 % intervals over rows and chips.

        With one chip they are over rows alone, and say nothing about other chips. `drop` is what noise takes of the
        clean accuracy.
        At other strengths of noise the accuracy, as `accuracy_at.STRENGTH`; with more than one task that of each, as
        `accuracy.TASK` and `clean_accuracy.TASK`. By the other way of scoring options, means alone, as
        `accuracy_WAY`, `clean_accuracy_WAY`, `margin_WAY` and `clean_margin_WAY`.
        """
        margins = np.array(self.noisy)  # (chips, rows)
        correct = np.array(self.noisy_correct, dtype=float)
        clean_correct = np.array(self.clean_correct, dtype=float)
        by_chip = np.array(self.accuracy_by_chip)
        accuracy, mean_margin = share(correct), crossed(margins).interval()
        clean = wilson(float(clean_correct.mean()), len(clean_correct))
        drop = share_gain(np.broadcast_to(clean_correct, correct.shape)[None], correct[None]).interval()
        summary = {
            "clean_accuracy": clean.mean,
            "clean_accuracy_low": clean.low,
            "clean_accuracy_high": clean.high,
            "clean_margin": fmean(self.clean),
            "accuracy": accuracy.mean,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "accuracy_std_chips": float(by_chip.std(ddof=1)) if len(by_chip) > 1 else 0.0,
            "accuracy_worst": float(by_chip.min()),
            "drop_low": drop.low,
            "drop_high": drop.high,
            "margin": mean_margin.mean,
            "margin_low": mean_margin.low,
            "margin_high": mean_margin.high,
            "noise_db": fmean(self.noise_db),
        }
        by_way = {"": (clean_correct, correct)}
        if self.beside:
            clean_beside, noisy_beside = np.array(self.clean_beside), np.array(self.noisy_beside)
            by_way[f"_{self.beside}"] = (clean_beside > 0).astype(float), (noisy_beside > 0).astype(float)
            summary |= {
                f"{name}_{self.beside}": float(values.mean())
                for name, values in (
                    ("clean_accuracy", clean_beside > 0),
                    ("clean_margin", clean_beside),
                    ("accuracy", noisy_beside > 0),
                    ("margin", noisy_beside),
                )
            }
        for strength, right in zip(self.strengths, self.strength_correct, strict=True):
            summary[f"accuracy_at.{strength:g}"] = float(np.mean(right))
        if len(names := dict.fromkeys(self.tasks)) > 1:
            for name in names:
                own = np.array([task == name for task in self.tasks])
                for way, (clean_right, right_by_chip) in by_way.items():
                    summary[f"accuracy{way}.{name}"] = float(right_by_chip[:, own].mean())
                    summary[f"clean_accuracy{way}.{name}"] = float(clean_right[own].mean())
        return summary

    def misshapen(self) -> list[str]:
        """Which fields have not a value for each row, chip and layer, as somebody else's scores may."""
        rows, chips, layers = len(self.row_ids), len(self.chip_seeds), len(self.layers)
        beside = rows if self.beside else 0
        wanted: dict[str, tuple[int, ...]] = {
            "tasks": (rows,),
            "clean": (rows,),
            "clean_correct": (rows,),
            "noisy": (chips, rows),
            "noisy_correct": (chips, rows),
            "noise_db": (chips,),
            "strength_correct": (len(self.strengths), chips, rows),
            "layer_noise_db": (chips, layers),
            "clean_beside": (beside,),
            "noisy_beside": (chips, beside),
        }
        problems = [
            f"{name}: not of {' x '.join(map(str, shape))} values, by {rows} rows and {chips} chips"
            for name, shape in wanted.items()
            if not _is_shaped(getattr(self, name), shape)
        ]
        if rows < 2 or not chips or len(set(self.row_ids)) < rows:
            problems.append("two different rows or more are wanted, and a chip")
        if self.beside not in ("", *BESIDE.values()):
            problems.append(f"beside: '{self.beside}' is no way of scoring")
        return problems

    @property
    def answers_follow_margins(self) -> bool:
        """Whether rows are answered rightly where their margin is positive, and nowhere else, as options decide."""
        pairs = [(self.clean, self.clean_correct), *zip(self.noisy, self.noisy_correct, strict=True)]
        return all(
            (value > 0) == right for margins, answers in pairs for value, right in zip(margins, answers, strict=True)
        )

    @property
    def accuracy_by_chip(self) -> list[float]:
        """Accuracy on each chip instance, in their order."""
        return [fmean(row) for row in self.noisy_correct]

    @property
    def nats(self) -> tuple[np.ndarray, np.ndarray]:
        """Margins in nats, whatever way of scoring was asked for: clean `(rows,)` and noisy `(chips, rows)`."""
        summed = self.beside == BESIDE["options_per_byte"]
        chosen = (self.clean_beside, self.noisy_beside) if summed else (self.clean, self.noisy)
        return np.array(chosen[0]), np.array(chosen[1])

    def with_chips_after(self, kept: int, more: "ChipScores") -> "ChipScores":
        """The first `kept` chips of these scores, and then those of another evaluation on the same rows."""
        assert more.row_ids == self.row_ids
        first = self.first_chips(kept)
        return replace(first, **{name: getattr(first, name) + getattr(more, name) for name in _BY_CHIP})

    def first_chips(self, count: int) -> "ChipScores":
        """The scores of the first chips alone."""
        at_strengths = tuple(by_chip[:count] for by_chip in self.strength_correct)
        return replace(self, strength_correct=at_strengths, **{name: getattr(self, name)[:count] for name in _BY_CHIP})

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ChipScores":
        """What `to_json` gave."""
        return cls(**{name: _as_tuple(value) for name, value in content.items()})


def summary_over_seeds(seeds: Sequence[ChipScores]) -> dict[str, float]:
    """The summary of one adapter, or of several that differ in their training seed, on the same rows and chips.

    Of several, means over seeds with intervals over seeds, chips and rows; `accuracy_std_seeds` and `margin_std_seeds`
    are the standard deviations of their means.
    """
    summaries = [each.summary() for each in seeds]
    if len(seeds) == 1:
        return summaries[0]
    summary = {name: fmean(each[name] for each in summaries) for name in summaries[0] if name not in _ENDS}
    accuracy = share(np.array([each.noisy_correct for each in seeds]))
    margin = seeded(np.array([each.noisy for each in seeds])).interval()
    summary |= {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
    summary |= {"margin_low": margin.low, "margin_high": margin.high}
    spreads = {name: stdev(each[name] for each in summaries) for name in ("accuracy", "margin")}
    return summary | {f"{name}_std_seeds": spread for name, spread in spreads.items()}


_ENDS = {f"{name}_{end}" for name in ("clean_accuracy", "drop") for end in ("low", "high")}
"""Ends of intervals that are said of one adapter alone."""


def _is_shaped(values: Sequence[Any], shape: tuple[int, ...]) -> bool:
    first, *inner = shape
    return len(values) == first and (not inner or all(_is_shaped(each, tuple(inner)) for each in values))


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
    series: str = "",
    first_chip: int = 0,
) -> ChipScores:
    """Score the model, with whatever adapter is attached to it, clean and on chip instances.

    Args:
        base: Model; an attached adapter takes part.
        array: Its RRAM layers.
        chip: Description of the chips; their programming noise is at the chip's own strength.
        rows: Rows to score.
        calibration_rows: Training rows that set the ADC ranges.
        settings: Number of chip instances, way of scoring, batch size, converters.
        role: Pool of the chip instances.
        series: Series within the pool of certification, see `NoiseKey`.
        first_chip: Number of the first chip instance.
    """
    score = (_by_generation if settings.scoring == "generation" else _by_options)(base, array, rows, settings)
    array.clear()
    reads = calibrate(base, array, chip, calibration_rows, settings.calibration_tokens, settings.converters)
    clean = score()
    seeds = tuple(range(first_chip, first_chip + settings.chip_instances))
    noisy: list[_Scored] = []
    noise_db: list[float] = []
    layer_noise_db: list[dict[str, float]] = []
    strength_correct: list[list[tuple[bool, ...]]] = [[] for _ in settings.noise_strengths]

    def score_on(seed: int, strength: float) -> _Scored:
        key = NoiseKey(role=role, series=series, chip_seed=seed)
        array.program(ChipInstance(chip, key, strength), reads, digital=True)
        array.materialise()
        return score()

    for seed in seeds:
        noisy.append(score_on(seed, chip.noise.level))
        by_layer = array.noise_db()
        noise_db.append(_finite_db(mean_db(by_layer.values())))
        layer_noise_db.append({layer: _finite_db(ratio_db) for layer, ratio_db in by_layer.items()})
        for strength, right in zip(settings.noise_strengths, strength_correct, strict=True):
            right.append(score_on(seed, strength).correct)
    array.clear()
    return ChipScores(
        row_ids=tuple(row.row_id for row in rows),
        tasks=tuple(row.task for row in rows),
        chip_seeds=seeds,
        clean=clean.margins,
        clean_correct=clean.correct,
        noisy=tuple(scored.margins for scored in noisy),
        noisy_correct=tuple(scored.correct for scored in noisy),
        noise_db=tuple(noise_db),
        strengths=settings.noise_strengths,
        strength_correct=tuple(map(tuple, strength_correct)),
        layers=tuple(layer_noise_db[0]),
        layer_noise_db=tuple(tuple(by_layer.values()) for by_layer in layer_noise_db),
        beside=BESIDE.get(settings.scoring, ""),
        clean_beside=clean.beside,
        noisy_beside=tuple(scored.beside for scored in noisy),
    )


def _finite_db(ratio_db: float) -> float:
    return max(min(ratio_db, -_NO_NOISE_DB), _NO_NOISE_DB)


class _Scored(NamedTuple):
    """The rows on the chip under the model.

    Attributes:
        margins: Margin of each.
        correct: Whether each is answered rightly.
        beside: Margin of each by the other way of scoring options; none for generation.
    """

    margins: tuple[float, ...]
    correct: tuple[bool, ...]
    beside: tuple[float, ...]


_Score = Callable[[], _Scored]


def _by_options(base: BaseModel, array: RramArray, rows: Sequence[Row], settings: EvaluationSettings) -> _Score:
    packed = [pack(row, base.tokenizer) for row in rows]

    def score() -> _Scored:
        found = option_scores(base.causal_lm, array, packed, settings.batch_size)
        summed = tuple(margin(scores, row.answer) for scores, row in zip(found, rows, strict=True))
        per_length = tuple(margin(per_byte(s, row.options), row.answer) for s, row in zip(found, rows, strict=True))
        chosen, other = (summed, per_length) if settings.scoring == "options" else (per_length, summed)
        return _Scored(chosen, tuple(value > 0 for value in chosen), other)

    return score


def _by_generation(base: BaseModel, array: RramArray, rows: Sequence[Row], settings: EvaluationSettings) -> _Score:
    references = reference_answers(rows, settings.answer_pattern)

    def score() -> _Scored:
        texts = generate(base, array, rows, settings.batch_size, settings.max_new_tokens)
        answers = (parsed_answer(text, settings.answer_pattern) for text in texts)
        correct = tuple(same_answer(answer, reference) for answer, reference in zip(answers, references, strict=True))
        return _Scored(tuple(reference_scores(base, array, rows, settings.batch_size)), correct, ())

    return score
