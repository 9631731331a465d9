"""Which trials go on from a rung: an order to promote by, over accuracy and energy."""

import numpy as np

from halora.analysis.front import ranks


def promotion_order(accuracy: np.ndarray, energy: np.ndarray, reference: tuple[float, float], most: int) -> list[int]:
    """The points to keep, best first: by rank, and within a rank by the hypervolume each adds to those before it.

    Points no better than the reference in accuracy come last, by falling accuracy: the cheapest would never be
    dominated, however useless.

    Args:
        accuracy: Larger is better, (points,).
        energy: Smaller is better, (points,).
        reference: Accuracy and energy that hypervolumes are measured from.
        most: How many to keep.
    """
    worst_energy = max(reference[1], float(energy.max(initial=0.0)) * 1.01)
    useful = np.flatnonzero(accuracy > reference[0])
    rank_of = ranks(np.column_stack([accuracy[useful], energy[useful]]))
    order: list[int] = []
    for rank in range(rank_of.max(initial=-1) + 1):
        if len(order) >= most:
            break
        order += _by_gain(useful[rank_of == rank], accuracy, energy, (reference[0], worst_energy))
    useless = np.flatnonzero(accuracy <= reference[0])
    return (order + [int(i) for i in useless[np.argsort(-accuracy[useless], kind="stable")]])[:most]


def _by_gain(
    members: np.ndarray, accuracy: np.ndarray, energy: np.ndarray, reference: tuple[float, float]
) -> list[int]:
    """Members of one front, each next one the one that adds the largest area to those chosen."""
    left = [int(i) for i in members[np.argsort(energy[members], kind="stable")]]
    chosen: list[int] = []  # by rising energy, so by rising accuracy
    order: list[int] = []
    while left:

        def gain(i: int) -> float:
            below = [accuracy[j] for j in chosen if energy[j] <= energy[i]]
            above = [energy[j] for j in chosen if energy[j] > energy[i]]
            height = accuracy[i] - max(below, default=reference[0])
            return float(height * (min(above, default=reference[1]) - energy[i]))

        best = max(left, key=gain)
        left.remove(best)
        chosen.append(best)
        order.append(best)
    return order
