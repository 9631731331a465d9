"""How far the noise of each layer alone moves the scores: which layers to keep out of RRAM first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from halora.evaluation.scoring import option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.hardware.layers import changed_everywhere
from halora.hardware.mapping import Placement, outlier_count
from halora.settings.evaluation import EvaluationSettings
from halora.training.batches import pack
from halora.training.calibration import calibrate
from halora.training.models import BaseModel
from halora.training.rram import RramArray
from halora.training.tasks import Row


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer in RRAM does while all others are exact.

    Attributes:
        name: Canonical name of the layer.
        weights: Number of its weights.
        noise_db: Realised noise-to-signal ratio of its programmed weights in dB; -inf without error.
        change_nats: Mean absolute change of the options' log-likelihoods, in nats.
        outliers: Number of its weights, inputs or ranks that an outlier share puts into SRAM; none where not asked.
        change_with_outliers_nats: The change that is left then.
    """

    name: str
    weights: int
    noise_db: float
    change_nats: float
    outliers: int | None = None
    change_with_outliers_nats: float | None = None

    @property
    def by_outliers(self) -> dict[str, float]:
        """What the outliers save, in nats, and per thousand of them; empty where not asked."""
        if not self.outliers or self.change_with_outliers_nats is None:
            return {}
        saved = self.change_nats - self.change_with_outliers_nats
        return {
            "outliers": self.outliers,
            "saved_nats": saved,
            "saved_per_thousand_outliers": saved / self.outliers * 1e3,
        }

    @property
    def rank(self) -> float:
        """What layers are ranked by, largest first."""
        return self.by_outliers.get("saved_per_thousand_outliers", self.change_per_million_weights)

    @property
    def change_per_million_weights(self) -> float:
        """Change in nats over the weights it would take to avoid it, in millions."""
        return self.change_nats / self.weights * 1e6


def layer_sensitivity(
    base: BaseModel,
    array: RramArray,
    chip: Chip,
    rows: Sequence[Row],
    calibration_rows: Sequence[Row],
    settings: EvaluationSettings,
    *,
    chip_seed: int = 0,
    outliers: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSensitivity]:
    """Put one layer after the other in RRAM, alone, and score the rows: one forward per layer and batch.

    Layers that the mapping's patterns keep out of RRAM stay out; its `sram_fraction`, which a ranking serves, is left
    aside.

    Args:
        base: Model; an attached adapter takes part.
        array: Its RRAM layers.
        chip: The chip; its programming noise is at the chip's own strength.
        rows: Rows to score.
        calibration_rows: Training rows that set the converters' ranges.
        settings: Batch size and calibration tokens.
        chip_seed: Number of the chip instance in the search pool.
        outliers: Score each layer once more with this share of its weights in SRAM, taken out as the chip says.
        progress: Called with the number of layers done and of all.

    Returns:
        The layers, most sensitive per weight first, or those whose outliers save most per value: the order that
        `chip.mapping.ranking` takes.
    """
    packed = [pack(row, base.tokenizer) for row in rows]

    def scores() -> list[list[float]]:
        return option_scores(base.causal_lm, array, packed, settings.batch_size)

    array.clear()
    chip = changed_everywhere(chip, "mapping.sram_fraction", 0.0)
    reads = calibrate(base, array, chip, calibration_rows, settings.calibration_tokens, settings.converters)
    with_outliers = None
    if outliers is not None:
        with_outliers = changed_everywhere(chip, "mapping.outliers.share", outliers)
        reads_beside = calibrate(
            base, array, with_outliers, calibration_rows, settings.calibration_tokens, settings.converters
        )
    clean = scores()
    met = array.on_layers(chip)
    candidates = [layer for layer in array.layers if met[layer.name].place is Placement.RRAM]
    key = NoiseKey(role=Role.SEARCH, chip_seed=chip_seed)
    found: list[LayerSensitivity] = []
    try:
        for layer in candidates:
            array.program(ChipInstance(chip, key, chip.noise.level), reads, alone=layer.name)
            change, noise_db = mean_change(clean, scores()), array.noise_db()[layer.name]
            weights = layer.in_features * layer.out_features
            measured = LayerSensitivity(layer.name, weights, noise_db, change)
            if with_outliers is not None:
                array.program(ChipInstance(with_outliers, key, chip.noise.level), reads_beside, alone=layer.name)
                own = array.on_layers(with_outliers)[layer.name].chip
                setting, tile = own.mapping.outliers, (own.tile.rows, own.tile.columns)
                count = outlier_count(layer.in_features, layer.out_features, setting.share, setting.by, tile)
                left = mean_change(clean, scores())
                measured = replace(measured, outliers=count, change_with_outliers_nats=left)
            found.append(measured)
            progress(len(found), len(candidates))
    finally:
        array.clear()
    return sorted(found, key=lambda layer: layer.rank, reverse=True)


def mean_change(clean: Sequence[Sequence[float]], noisy: Sequence[Sequence[float]]) -> float:
    """Mean absolute change in nats over all options of all rows."""
    pairs = zip(clean, noisy, strict=True)
    return fmean(abs(after - before) for row, moved in pairs for before, after in zip(row, moved, strict=True))
