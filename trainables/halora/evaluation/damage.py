"""What chips do to a base that nobody has trained: its score clean and on chips, and the layers that suffer most."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.training.tasks import Row

_WORST = 3  # layers that are named


@dataclass(frozen=True)
class Damage:
    """The untrained base on clean weights and on chip instances of the search pool, the same rows.

    Attributes:
        base: Which base on which chip, in words.
        rows: Number of rows scored.
        chip_instances: Number of chip instances.
        chance: Accuracy of a guess; 0 where an answer is generated.
        clean_accuracy: On clean weights and exact converters.
        accuracy: Mean over the chips.
        clean_margin: Mean margin on clean weights, in nats.
        margin: Mean margin over the chips, in nats.
        noise_db: Mean noise-to-signal power ratio of the weights over layers and chips, in dB.
        worst: Name and noise-to-signal ratio in dB, its mean over the chips, of the noisiest layers, worst first.
        layers: Number of layers in RRAM.
        overwhelmed: Number of those whose noise has more power than their weights (above 0 dB).
    """

    base: str
    rows: int
    chip_instances: int
    chance: float
    clean_accuracy: float
    accuracy: float
    clean_margin: float
    margin: float
    noise_db: float
    worst: tuple[tuple[str, float], ...]
    layers: int
    overwhelmed: int

    @classmethod
    def of(cls, base: str, scores: "ChipScores", rows: "Sequence[Row]", scoring: str) -> "Damage":
        """What the scores of a bare base show.

        Args:
            base: Which base on which chip, in words.
            scores: Of the base, at the chips' own noise.
            rows: The rows scored.
            scoring: How they were, as in `EvaluationSettings.scoring`.
        """
        from halora.hardware.noise import mean_db  # imports torch, which the records do without

        by_layer = {
            layer: mean_db(ratios_db)
            for layer, ratios_db in zip(scores.layers, zip(*scores.layer_noise_db, strict=True), strict=True)
        }
        noisiest = sorted(by_layer.items(), key=lambda item: -item[1])
        return cls(
            base=base,
            rows=len(scores.row_ids),
            chip_instances=len(scores.chip_seeds),
            chance=0.0 if scoring == "generation" else fmean(1 / len(row.options) for row in rows),
            clean_accuracy=fmean(scores.clean_correct),
            accuracy=fmean(scores.accuracy_by_chip),
            clean_margin=fmean(scores.clean),
            margin=fmean(map(fmean, scores.noisy)),
            noise_db=mean_db(scores.noise_db),
            worst=tuple(noisiest[:_WORST]),
            layers=len(by_layer),
            overwhelmed=sum(ratio_db > 0 for ratio_db in by_layer.values()),
        )

    @property
    def lost(self) -> float | None:
        """Share of the clean score above chance that is lost on the chips; none where there is none to lose."""
        above = self.clean_accuracy - self.chance
        return (self.clean_accuracy - self.accuracy) / above if above > 0 else None

    @property
    def said(self) -> str:
        """The figures in a line."""
        lost = "" if self.lost is None else f" ({self.lost:.0%} of the score above chance lost)"
        layers = ", ".join(f"{name} {ratio_db:+.1f}" for name, ratio_db in self.worst)
        return (
            f"{self.base}, untrained, {self.rows} rows, {self.chip_instances} chips: "
            f"accuracy {self.clean_accuracy:.3f} clean, {self.accuracy:.3f} on chips{lost}; "
            f"margin {self.clean_margin:+.2f}, {self.margin:+.2f} nats; noise {self.noise_db:+.1f} dB, "
            f"worst layers {layers}"
        )

    @property
    def warning(self) -> str:
        """What is told where noise exceeds the signal of a layer; else empty."""
        if not self.overwhelmed:
            return ""
        name, ratio_db = self.worst[0]
        return (
            f"warning: {self.base}: noise exceeds the signal in {self.overwhelmed} of {self.layers} layers, most in "
            f"{name} ({ratio_db:+.1f} dB): the reference of the noise does not suit these weights, or it is too strong"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Damage":
        """What `to_json` gave."""
        worst = tuple((str(name), float(ratio_db)) for name, ratio_db in content["worst"])
        return cls(**{**content, "worst": worst})


def described(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Outcomes of a probe in lines: of each the damage and its warning, or (`base`, `cause`) of one that failed."""
    lines = []
    for outcome in outcomes:
        if "cause" in outcome:
            lines.append(f"{outcome['base']}: what its chips do to it is not known: {outcome['cause']}")
        else:
            damage = Damage.from_json(outcome)
            lines += [damage.said, *filter(None, [damage.warning])]
    return lines
