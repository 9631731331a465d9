"""Figures of a model's layers, sorted by kind and depth. Pure."""

from collections.abc import Mapping


def by_kind(values: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Depth and value of every layer under its kind, by depth; names are `model.layers.DEPTH. ... .KIND`."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, value in values.items():
        depth = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        kinds.setdefault(name.rpartition(".")[2], []).append((depth, value))
    return {kind: sorted(own) for kind, own in kinds.items()}
