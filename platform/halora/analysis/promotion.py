"""Which trials go on from a rung: an order to promote by, over two or three objectives."""

from collections.abc import Mapping, Sequence
from heapq import heappop, heapreplace
from types import MappingProxyType

import numpy as np

from halora.analysis.front import ranks, volume
from halora.analysis.trials import Objective
from halora.hardware.energy import COSTS


def promotion_order(
    table: np.ndarray,
    objectives: Sequence[Objective],
    reference: Sequence[float],
    most: int,
    floors: Mapping[str, float] = MappingProxyType({}),
) -> list[int]:
    """The points to keep, best first: by rank, and within a rank by the hypervolume each adds to those before it.

    Points no better than the reference in every score come last, by the first score: the cheapest would never be
    dominated, however useless.

    Args:
        table: Objectives, (points, objectives).
        objectives: What they are; one of them is a score.
        reference: Values that hypervolumes are measured from.
        most: How many to keep.
        floors: Other values than the reference's that scores have to exceed, by metric.
    """
    if not len(table):
        return []
    gains = table * [1 if each.maximise else -1 for each in objectives]
    corner = np.array([floors.get(each.metric, value) for each, value in zip(objectives, reference, strict=True)])
    corner = corner * [1 if each.maximise else -1 for each in objectives]
    scores = [i for i, each in enumerate(objectives) if each.metric not in COSTS]
    useful = np.flatnonzero((gains[:, scores] > corner[scores]).all(axis=1))
    worst = gains.min(axis=0)
    worst -= 0.01 * np.abs(worst)  # so that what costs most adds a volume, too
    corner = np.where([each.metric in COSTS for each in objectives], np.minimum(corner, worst), corner)
    rank_of = ranks(table[useful], objectives)
    order: list[int] = []
    for rank in range(rank_of.max(initial=-1) + 1):
        if len(order) >= most:
            break
        order += _by_gain(useful[rank_of == rank], gains, corner)
    useless = np.setdiff1d(np.arange(len(table)), useful)
    return (order + [int(i) for i in useless[np.argsort(-gains[useless, scores[0]], kind="stable")]])[:most]


def _by_gain(members: np.ndarray, gains: np.ndarray, corner: np.ndarray) -> list[int]:
    """Members of one front, each next one the one that adds the largest volume to those chosen.

    What a point adds can only fall as more are chosen, so only what may come next is computed anew.
    """
    aims = [Objective(str(i), maximise=True) for i in range(len(corner))]
    heap = [(-np.inf, place, -1) for place in range(len(members))]
    order: list[int] = []
    chosen, reached = np.zeros((0, len(corner))), 0.0
    while heap:
        added, place, known_at = heap[0]
        member = int(members[place])
        if known_at == len(order):
            heappop(heap)
            order.append(member)
            chosen, reached = np.vstack([chosen, gains[member]]), reached - added
        else:
            with_it = volume(np.vstack([chosen, gains[member]]), list(corner), aims)
            heapreplace(heap, (reached - with_it, place, len(order)))
    return order
