"""How often 95 % intervals cover what they estimate, and how often two equal methods are called different.

Simulations of the functions that every printed interval comes from, on data whose truth is known; nothing is trained.
docs/statistics.md quotes the tables.

    python -m benchmarks.coverage --simulations 2000
"""

import argparse
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np

from halora.evaluation.intervals import crossed, gain, share, share_gain

CHIPS = (2, 3, 5, 10)
PARTS = {"none": 0.0, "small": 0.1, "medium": 0.5, "large": 0.9, "nothing else": 0.99}
"""Share of the variance of a mean that the differences between chips make."""
MARGIN_ROWS, MARGIN_CHIPS = 120, 10


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=2000)
    count = parser.parse_args().simulations
    print(f"coverage of 95 % intervals, {count} simulations per cell\n")
    print("margins: share of the variance that chips make")
    _table("chips, rows", PARTS, {
        f"{chips}, {rows}": [crossed_coverage(chips, rows, part, count) for part in PARTS.values()]
        for rows in (16, 100) for chips in CHIPS
    })  # fmt: skip
    for accuracy in (0.3, 0.5, 0.9):
        print(f"\naccuracies around {accuracy}, chips that differ somewhat: by rows")
        rows = (16, 48, 100, 150)
        _table("chips", map(str, rows), {
            str(chips): [share_coverage(chips, each, accuracy, 0.3, count) for each in rows] for chips in (1, *CHIPS)
        })  # fmt: skip
    print("\ngains in accuracy of one adapter over another, around 0.5 and 0.9, 48 rows")
    _table("chips", ("0.5", "0.9"), {
        str(chips): [gain_coverage(chips, 48, accuracy, count) for accuracy in (0.5, 0.9)] for chips in CHIPS
    })  # fmt: skip
    print(f"\ntwo equal methods called different in margin, {MARGIN_ROWS} rows x {MARGIN_CHIPS} chips: by seed spread")
    spreads = (0.0, 0.1, 0.2, 0.4)
    _table("seeds", (f"{spread} nats" for spread in spreads), {
        str(seeds): [different(seeds, spread, count) for spread in spreads] for seeds in (1, 2, 3, 5)
    })  # fmt: skip


def crossed_coverage(chips: int, rows: int, part: float, simulations: int, seed: int = 0) -> float:
    """Share of intervals that cover the mean of margins, where chips make `part` of its variance.

    Rows differ as much as what is left once rows and chips are taken off, 1 nat each.
    """
    rng = np.random.default_rng(seed)
    spread = np.sqrt((1 / rows + 1 / (chips * rows)) * part / (1 - part) * chips)
    covered = 0
    for _ in range(simulations):
        values = spread * rng.normal(size=(chips, 1)) + rng.normal(size=rows) + rng.normal(size=(chips, rows))
        found = crossed(values).interval()
        covered += found.low <= 0 <= found.high
    return covered / simulations


def share_coverage(chips: int, rows: int, accuracy: float, spread: float, simulations: int, seed: int = 0) -> float:
    """Share of intervals that cover an accuracy; answers are right where row, chip and rest add up to above a bound.

    Rows have a standard deviation of 1.5 of what is left, chips of `spread`; a single chip is one that has its own
    accuracy, so there the spread is none.
    """
    rng = np.random.default_rng(seed)
    spread = spread if chips > 1 else 0.0
    covered = 0
    for _ in range(simulations):
        found = share(_right(rng, chips, rows, accuracy, spread)[0])
        covered += found.low <= accuracy <= found.high
    return covered / simulations


def gain_coverage(chips: int, rows: int, accuracy: float, simulations: int, seed: int = 0) -> float:
    """Share of intervals that cover the gain, none, of one of two equally good adapters over the other."""
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(simulations):
        ours, theirs = _right(rng, chips, rows, accuracy, 0.3, contestants=2)
        found = share_gain(ours[None], theirs[None]).interval()
        covered += found.low <= 0 <= found.high
    return covered / simulations


def different(seeds: int, spread: float, simulations: int, seed: int = 0) -> float:
    """Share of comparisons that find two equal methods different in margin, where seeds differ by `spread` nats.

    Between two methods chips differ by 0.1 nats, rows by 1 and the rest by 1.5; seeds by chips and by rows by 0.1 and
    0.5.
    """
    rng = np.random.default_rng(seed)
    called = 0
    for _ in range(simulations):
        ours, theirs = (
            spread * rng.normal(size=(seeds, 1, 1))
            + 0.1 / np.sqrt(2) * rng.normal(size=(1, MARGIN_CHIPS, 1))
            + 1 / np.sqrt(2) * rng.normal(size=(1, 1, MARGIN_ROWS))
            + 0.1 * rng.normal(size=(seeds, MARGIN_CHIPS, 1))
            + 0.5 * rng.normal(size=(seeds, 1, MARGIN_ROWS))
            + 1.5 / np.sqrt(2) * rng.normal(size=(seeds, MARGIN_CHIPS, MARGIN_ROWS))
            for _ in range(2)
        )
        called += gain(ours, theirs).p_different < 0.05
    return called / simulations


def _right(
    rng: np.random.Generator, chips: int, rows: int, accuracy: float, spread: float, contestants: int = 1
) -> np.ndarray:
    """Right answers (contestants, chips, rows); chips and rows do to all alike half of what they do."""
    parts = {(contestants, chips, rows): 1.0}
    for shape, deviation in (((chips, 1), spread), ((1, rows), 1.5)):
        own, common = (deviation, 0.0) if contestants == 1 else (deviation / np.sqrt(2),) * 2
        parts |= {(contestants, *shape): own, (1, *shape): common} if contestants > 1 else {(1, *shape): own}
    total = sum(deviation * rng.normal(size=shape) for shape, deviation in parts.items())
    bound = -NormalDist().inv_cdf(accuracy) * np.sqrt(sum(deviation**2 for deviation in parts.values()))
    return np.asarray(total > bound)


def _table(corner: str, columns: Iterable[str], rows: dict[str, list[float]]) -> None:
    names = list(columns)
    print(f"| {corner} | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |", flush=True)


if __name__ == "__main__":
    main()
