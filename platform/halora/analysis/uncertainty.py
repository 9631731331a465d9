"""How sure the front is: the probability of each trial of being non-dominated, given what its scores rest on.

Accuracies rest on a sample of rows and of chip instances. Trials that answered the same rows are resampled together
(rows and chips each with replacement), those on as many chips on the same of them, so that what is common to them
cancels; after a race they are centred on its estimates. A metric with `NAME_low` and `NAME_high` is otherwise drawn
from the two-piece normal with that 95 % interval; one without is taken as exact, as energy is.
"""

from collections.abc import Sequence

import numpy as np

from halora.analysis.front import non_dominated, values
from halora.analysis.trials import DEFAULT_OBJECTIVES, Objective, RecordedTrial

_Z95 = 1.959963984540054


def front_probability(
    points: Sequence[RecordedTrial],
    objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
    *,
    draws: int = 400,
    seed: int = 0,
) -> np.ndarray:
    """Share of `draws` in which each point is on the front, in the shape (points,)."""
    rng = np.random.default_rng(seed)
    tables = np.repeat(values(points, objectives)[None], draws, axis=0)  # (draws, points, objectives)
    for column, each in enumerate(objectives):
        tables[:, :, column] = _draw(points, each.metric, tables[:, :, column], rng)
    return share_on_front(tables, objectives)


def share_on_front(tables: np.ndarray, objectives: Sequence[Objective] = DEFAULT_OBJECTIVES) -> np.ndarray:
    """Share of `tables` (draws, points, objectives) in which each point is on the front, in the shape (points,)."""
    on_front = np.zeros(tables.shape[1])
    reach = _within_reach(tables, objectives)
    for table in tables[:, reach]:
        on_front[reach] += non_dominated(table, objectives)
    return on_front / len(tables)


def _within_reach(tables: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Places of the points that another's worst draws do not beat at their best, in the shape (points within reach,).

    All others are dominated in every draw, so leaving them out changes nothing but the time.
    """
    if not tables.shape[1]:
        return np.zeros(0, dtype=int)
    signs = np.array([1 if each.maximise else -1 for each in objectives])
    gains = tables * signs
    worst, best = gains.min(axis=0), gains.max(axis=0)
    rivals = worst[non_dominated(worst, [Objective(each.metric, maximise=True) for each in objectives])]
    beaten = np.zeros(len(best), dtype=bool)
    for rival in rivals:
        beaten |= (rival >= best).all(axis=1) & (rival > best).any(axis=1)
    return np.flatnonzero(~beaten)


def _draw(points: Sequence[RecordedTrial], metric: str, means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    draws = len(means)
    drawn = means.copy()
    by_group: dict[str, list[int]] = {}
    for place, point in enumerate(points):
        if metric == "accuracy" and point.correct is not None:
            by_group.setdefault(point.correct.group, []).append(place)
        elif f"{metric}_low" in point.metrics and f"{metric}_high" in point.metrics:
            spread = [point.metrics[f"{metric}_{end}"] - point.metrics[metric] for end in ("low", "high")]
            normal = rng.standard_normal(draws)
            drawn[:, place] += np.abs(normal) * np.where(normal < 0, spread[0], spread[1]) / _Z95
    for places in by_group.values():
        drawn[:, places] = _resampled([points[place] for place in places], draws, rng)
        moved = [points[place].accuracy - _measured(points[place]) for place in places]
        drawn[:, places] += np.round(moved, 9)  # else sums in another order would break ties
    return drawn


def _measured(point: RecordedTrial) -> float:
    """Accuracy on the trial's own chips; a race's estimate may be another."""
    assert point.correct is not None
    chips, rows = point.correct.shape
    return int.from_bytes(point.correct.packed).bit_count() / (chips * rows)


def _resampled(points: Sequence[RecordedTrial], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Accuracies of trials that share rows over resampled rows and chips, in the shape (draws, points)."""
    answers = [point.correct for point in points if point.correct is not None]
    rows = answers[0].shape[1]
    row_weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=draws) / rows
    drawn = np.empty((draws, len(answers)))
    for chips in sorted({each.shape[0] for each in answers}):
        places = [place for place, each in enumerate(answers) if each.shape[0] == chips]
        packed = np.frombuffer(b"".join(answers[place].packed for place in places), dtype=np.uint8)
        correct = np.unpackbits(packed.reshape(len(places), -1), axis=1, count=chips * rows)  # (places, chips * rows)
        chip_weights = rng.multinomial(chips, np.full(chips, 1 / chips), size=draws) / chips
        weights = np.einsum("sc,sr->scr", chip_weights, row_weights).reshape(draws, -1).astype(np.float32)
        drawn[:, places] = weights @ correct.T.astype(np.float32)
    return drawn
