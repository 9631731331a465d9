"""Points that spend where a chip's ranking of layers says it counts: a start for a search over groups of layers."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from halora.spaces.language import Distribution
from halora.spaces.resolving import group_and_field

if TYPE_CHECKING:
    from halora.spaces.sweep import SweepConfig

FINER: Mapping[str, int] = {
    "adc.bits": 1,
    "coding.replicas": 1,
    "coding.slices": 1,
    "dac.bits": -1,
    "dac.input_bits": 1,
    "digital.input_bits": 1,
    "digital.weight_bits": 1,
    "mapping.outliers.share": 1,
    "read.averaged": 1,
    "sram.input_bits": 1,
    "sram.weight_bits": 1,
    "tile.columns": -1,
    "tile.rows": -1,
    "write_verify.pulses": 1,
}
"""Fields that buy accuracy for cost: with larger values, or with smaller ones."""

_SHARES = (0.25, 0.5, 0.75)


def ranked_points(sweep: "SweepConfig") -> list[dict[str, Any]]:
    """The most sensitive quarter, half and three quarters of the searched groups at their finest, the others coarsest.

    Of the searched fields of groups alone; none where the chip has no ranking (`halora noise sensitivity`), or where
    fewer than two groups are searched.
    """
    config = sweep.resolve({})
    searched = {path: of for path in sweep.space if (of := group_and_field(path)) and of[1] in FINER}
    groups = list(dict.fromkeys(group for group, _ in searched.values()))
    if config.chip.mapping.ranking == "depth" or len(groups) < 2:
        return []
    from halora.training.models import estimated_shape

    sizes = estimated_shape(config.model).sizes
    place = {name: i for i, name in enumerate(config.chip.mapping.ranked(sizes))}
    met = config.chip.on_layers(sizes)
    mean_place = {
        group: fmean(place.get(name, len(place)) for name, layer in met.items() if group in layer.groups)
        for group in groups
    }
    order = sorted(groups, key=mean_place.__getitem__)
    cuts = sorted({min(max(round(share * len(order)), 1), len(order) - 1) for share in _SHARES})
    return [
        {
            path: _end(sweep.space[path], FINER[field] if group in order[:cut] else -FINER[field])
            for path, (group, field) in searched.items()
        }
        for cut in cuts
    ]


def _end(distribution: Distribution, sign: int) -> Any:
    """The largest value, or the smallest."""
    return max(distribution.probes, key=lambda value: sign * value)
