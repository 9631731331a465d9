"""How far the noise of each layer alone moves the scores: which layers to keep out of RRAM first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from halora.evaluation.config import EvaluationSettings
from halora.evaluation.scoring import option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.hardware.mapping import Place
from halora.training.batches import pack
from halora.training.models import BaseModel
from halora.training.reads import calibrate
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
    """

    name: str
    weights: int
    noise_db: float
    change_nats: float

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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSensitivity]:
    """Put one layer after the other in RRAM, alone, and score the rows: one forward per layer and batch.

    Layers that the mapping's patterns keep out of RRAM stay out; its `sram_fraction`, which a ranking serves, is left
    aside.

    Args:
        base: Model; an attached adapter takes part.
        array: Its RRAM layers.
        chip: The chip; its programming noise is at the chip's own level.
        rows: Rows to score.
        calibration_rows: Training rows that set the converters' ranges.
        settings: Batch size and calibration tokens.
        chip_seed: Number of the chip instance in the search pool.
        progress: Called with the number of layers done and of all.

    Returns:
        The layers, most sensitive per weight first: the order that `chip.mapping.ranking` takes.
    """
    packed = [pack(row, base.tokenizer) for row in rows]

    def scores() -> list[list[float]]:
        return option_scores(base.causal_lm, array, packed, settings.batch_size)

    array.clear()
    chip = with_mapping(chip, sram_fraction=0.0)
    reads = calibrate(base, array, chip, calibration_rows, settings.calibration_tokens, settings.converters)
    clean = scores()
    places = array.places(chip)
    candidates = [layer for layer in array.layers if places[layer.name] is Place.RRAM]
    instance = ChipInstance(chip, NoiseKey(role=Role.SEARCH, chip_seed=chip_seed), chip.noise.level)
    found: list[LayerSensitivity] = []
    try:
        for layer in candidates:
            array.program(instance, reads, alone=layer.name)
            change = mean_change(clean, scores())
            weights = layer.in_features * layer.out_features
            found.append(LayerSensitivity(layer.name, weights, array.noise_db()[layer.name], change))
            progress(len(found), len(candidates))
    finally:
        array.clear()
    return sorted(found, key=lambda layer: layer.change_per_million_weights, reverse=True)


def with_mapping(chip: Chip, **changes: object) -> Chip:
    """The chip with some fields of its mapping changed."""
    return chip.model_copy(update={"mapping": chip.mapping.model_copy(update=changes)})


def mean_change(clean: Sequence[Sequence[float]], noisy: Sequence[Sequence[float]]) -> float:
    """Mean absolute change in nats over all options of all rows."""
    pairs = zip(clean, noisy, strict=True)
    return fmean(abs(after - before) for row, moved in pairs for before, after in zip(row, moved, strict=True))
