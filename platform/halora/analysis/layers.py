"""Figures of a model's layers: sorted by kind and depth, or by the groups that a chip has of them. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

from halora.hardware.chip import Chip
from halora.hardware.layers import dotted
from halora.hardware.mapping import Placement


def by_kind(values: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Depth and value of every layer under its kind, by depth; names are `model.layers.DEPTH. ... .KIND`."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, value in values.items():
        depth = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        kinds.setdefault(name.rpartition(".")[2], []).append((depth, value))
    return {kind: sorted(own) for kind, own in kinds.items()}


@dataclass(frozen=True)
class GroupFigures:
    """Layers that are in the same groups of a chip.

    Attributes:
        groups: Names of the groups; empty for the layers that are in none.
        layers: How many layers.
        weights_share: Their share of the weights on the chip.
        energy_uj: Microjoule per token of their frozen weights.
        values: What they have of their own, by dotted path of the chip's field.
    """

    groups: tuple[str, ...]
    layers: int
    weights_share: float
    energy_uj: float
    values: Mapping[str, object]

    @property
    def name(self) -> str:
        """The groups, in a word."""
        return " + ".join(self.groups) or "the others"

    @property
    def in_words(self) -> str:
        """The values, on a line."""
        return ", ".join(f"{path} {value}" for path, value in self.values.items())


def by_group(chip: Chip, sizes: Mapping[str, int], layers_uj: Mapping[str, float]) -> list[GroupFigures]:
    """Figures of a chip's groups, which add up to those of the model; none where the chip has no groups.

    Args:
        chip: The chip.
        sizes: Number of weights by canonical name, as `Mapping.places` takes them.
        layers_uj: See `EnergyBreakdown.layers_uj`.
    """
    members: dict[tuple[str, ...], list[str]] = {}
    for name, layer in chip.on_layers(sizes).items() if chip.layers else ():
        if layer.place is not Placement.HOST:
            members.setdefault(layer.groups, []).append(name)
    whole = sum(sizes[name] for names in members.values() for name in names)
    return [
        GroupFigures(
            groups,
            len(names),
            sum(sizes[name] for name in names) / whole,
            fsum(layers_uj[name] for name in names),
            {path: value for group in groups for path, value in dotted(chip.layers[group].changes).items()},
        )
        for groups, names in sorted(members.items(), key=lambda item: (not item[0], item[0]))
    ]
