"""What several comparisons with one reference allow to be said: different, equivalent, or neither."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from halora.evaluation.intervals import Estimate

ENOUGH_SEEDS = 3
"""Training seeds from which on a statement is about a method, not about these adapters."""

_LEVEL = 0.05

Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Gain:
    """A contestant's mean less the reference's, and what it is called.

    Attributes:
        mean: The difference.
        low: Lower end of its 95 % interval, for this difference alone.
        high: Upper end.
        p_different: P-value of no difference, corrected for all differences of the comparison by Holm's procedure.
        p_equivalent: P-value of a difference of the equivalence margin or more, corrected likewise; none without one.
        verdict: `better` or `worse` if `p_different` is below 0.05, else `equivalent` if `p_equivalent` is.
    """

    mean: float
    low: float
    high: float
    p_different: float
    p_equivalent: float | None
    verdict: Verdict


def judged(estimates: Sequence[Estimate], margins: Sequence[float | None]) -> list[Gain]:
    """All differences of one comparison.

    Together they are called different by chance in at most 5 % of comparisons, and equivalent likewise.

    Args:
        estimates: The differences.
        margins: Up to where each counts as no difference; none where it is not asked.
    """
    different = holm([each.p_different for each in estimates])
    asked = [(place, margin) for place, margin in enumerate(margins) if margin is not None]
    tested = holm([estimates[place].p_equivalent(margin) for place, margin in asked])
    equivalent = {place: p for (place, _), p in zip(asked, tested, strict=True)}
    gains = []
    for place, (each, p) in enumerate(zip(estimates, different, strict=True)):
        found = each.interval()
        verdict: Verdict = "undecided"
        if p < _LEVEL:
            verdict = "better" if each.mean > 0 else "worse"
        elif equivalent.get(place, 1.0) < _LEVEL:
            verdict = "equivalent"
        gains.append(Gain(found.mean, found.low, found.high, p, equivalent.get(place), verdict))
    return gains


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979), in their order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = largest
    return adjusted
