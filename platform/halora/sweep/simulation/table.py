"""Tables of recorded learning curves, which a simulated sweep takes its results from.

A CSV file with a line per trial and step: columns `trial`, `step`, `accuracy` and `clean_accuracy`, one per searched
field by its dotted path (empty where the trial had none), and where known `seconds` since the trial began,
`chip_seconds` to score one chip, `accuracy_std_chips`, `train_loss`, `margin`, `clean_margin`. A configuration that the
table lacks is answered by its nearest trial, or by a random forest over all of them.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isfinite, log
from pathlib import Path
from typing import Any

import numpy as np

from halora.errors import UserError, nearest
from halora.hardware.addressing import derive_seed
from halora.reading import read_csv
from halora.spaces.language import Categorical, Distribution
from halora.spaces.sweep import SweepConfig
from halora.yaml_files import parse_yaml

_REQUIRED = ("trial", "step", "accuracy", "clean_accuracy")
_OPTIONAL = ("seconds", "chip_seconds", "accuracy_std_chips", "train_loss", "margin", "clean_margin")
_TREES = 50


def read_table(path: Path, sweep: SweepConfig) -> "Table":
    """Read a table of curves over a sweep's space.

    Raises:
        UserError: With every mistake: columns that are missing or unknown, cells that are no numbers or no values of
            their field, no line at all.
    """
    lines = read_csv(path, str(path))
    columns, rows = lines[0] if lines else [], lines[1:]
    known = [*_REQUIRED, *_OPTIONAL, *sweep.space]
    problems = [f"{path}: column '{name}' is missing" for name in _REQUIRED if name not in columns]
    problems += [
        f"{path}: column '{name}' is neither a score nor a searched field{nearest(name, known)}"
        for name in columns
        if name not in known
    ]
    problems += [f"{path}: column '{name}' is given twice" for name in sorted(set(columns)) if columns.count(name) > 1]
    problems += [] if any(rows) or problems else [f"{path}: no line but the head"]
    numbers: list[dict[str, float]] = []
    points: list[dict[str, Any]] = []
    for i, cells in enumerate(rows, start=2):
        if not cells:
            continue
        row, scores, values = dict(zip(columns, cells, strict=False)), dict[str, float](), dict[str, Any]()
        if len(cells) > len(columns):
            problems.append(f"{path}, line {i}: more cells than the head has columns; is a comma a decimal point?")
        for name, text in row.items():
            if not text or name not in known:
                continue
            try:
                read = parse_yaml(text, name) if name in sweep.space else _score(name, text)
            except UserError:
                problems.append(f"{path}, line {i}: {name} is '{text}', not a number")
                continue
            except ValueError as error:
                problems.append(f"{path}, line {i}: {name} is '{text}', {error}")
                continue
            if name not in sweep.space:
                scores[name] = read
                continue
            if isinstance(read, float) and read.is_integer() and not sweep.space[name].contains(read):
                read = int(read)  # 8.0 of a field of whole numbers
            if sweep.space[name].contains(read):
                values[name] = read
            else:
                problems.append(f"{path}, line {i}: {name} is '{text}', outside the sweep's space")
        if lacking := [name for name in _REQUIRED if name in columns and not row.get(name)]:
            problems.append(f"{path}, line {i}: {', '.join(lacking)} left empty")
        numbers.append(scores)
        points.append(values)
    if problems:
        raise UserError(problems, "fix the table")
    return Table(sweep.space, numbers, points, forest=sweep.search.surrogate == "forest")


def _score(name: str, text: str) -> float:
    """A score as a table writes it.

    Raises:
        ValueError: Why it is not one.
    """
    try:
        number = float(text)
    except ValueError:
        raise ValueError("not a number") from None
    if not isfinite(number):
        raise ValueError("which is not a finite number")
    if "accuracy" in name and not 0 <= number <= 1:
        raise ValueError("not a share between 0 and 1")
    if name in ("trial", "step") and not (number.is_integer() and number >= 0):
        raise ValueError("not a whole number from 0 up")
    return number


class Table:
    """Recorded curves as something to simulate.

    Args:
        space: Searched fields.
        rows: Scores by name of every line.
        points: Values of the searched fields of every line.
        forest: Whether a forest over all lines answers instead of the nearest trial's.
    """

    def __init__(
        self,
        space: Mapping[str, Distribution],
        rows: Sequence[Mapping[str, float]],
        points: Sequence[Mapping[str, Any]],
        *,
        forest: bool = False,
    ) -> None:
        self._space = space
        by_trial: dict[float, list[int]] = {}
        for i in sorted(range(len(rows)), key=lambda i: rows[i]["step"]):
            by_trial.setdefault(rows[i]["trial"], []).append(i)
        self._curves = [[rows[i] for i in lines] for lines in by_trial.values()]
        self._points = np.array([self._encoded(points[lines[0]]) for lines in by_trial.values()])
        self._forest = _Forest(self._points, self._curves) if forest else None
        self._nearest = lru_cache(maxsize=1024)(self._nearest_curve)

    def step_s(self, values: Mapping[str, Any]) -> float:
        """Seconds per optimiser step; 1 where the table does not say."""
        last = self._curve(values)[-1]
        return last["seconds"] / last["step"] if last.get("seconds") and last["step"] else 1.0

    def chip_s(self, values: Mapping[str, Any]) -> float:
        """Seconds to score one chip instance; 0 where the table does not say."""
        return self._curve(values)[-1].get("chip_seconds", 0.0)

    def report(self, values: Mapping[str, Any], step: int) -> dict[str, float]:
        """The training loss, where the table has it."""
        return {name: found for name in ("train_loss",) if (found := self._at(values, step, name)) is not None}

    def accuracy(self, values: Mapping[str, Any], step: int, chip: int) -> float:
        """Accuracy at a step, with the recorded spread over chips where there is one, half of it all trials' alike."""
        mean = self._at(values, step, "accuracy")
        assert mean is not None
        spread = self._at(values, step, "accuracy_std_chips") or 0.0
        shared, own = _normal(chip), _normal(chip, *sorted(values.items()))
        return min(max(mean + spread * (shared + own) / 2**0.5, 0.0), 1.0)

    def clean(self, values: Mapping[str, Any], step: int) -> dict[str, float]:
        """Clean accuracy, and the margins where the table has them."""
        found = {name: self._at(values, step, name) for name in ("clean_accuracy", "clean_margin", "margin")}
        return {name: value for name, value in found.items() if value is not None}

    def _at(self, values: Mapping[str, Any], step: int, name: str) -> float | None:
        if self._forest and name in _Forest.SCORES:
            return self._forest.predict(self._encoded(values), step, name)
        known = [row for row in self._curve(values) if name in row]
        if not known:
            return None
        return float(np.interp(step, [row["step"] for row in known], [row[name] for row in known]))

    def _curve(self, values: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
        return self._curves[self._nearest(tuple(self._encoded(values)))]

    def _nearest_curve(self, point: tuple[float, ...]) -> int:
        return int(np.abs(self._points - np.array(point)).sum(axis=1).argmin())

    def _encoded(self, values: Mapping[str, Any]) -> list[float]:
        """Place in each field's range from 0 to 1, -1 for a field that is not searched; choices one by one."""
        numbers = []
        for path, distribution in self._space.items():
            value = values.get(path)
            if isinstance(distribution, Categorical):
                numbers += [0.5 * (choice == value) for choice in distribution.choices]
            elif value is None:
                numbers.append(-1.0)
            elif distribution.log:
                numbers.append(log(value / distribution.low) / log(distribution.high / distribution.low))
            else:
                numbers.append((value - distribution.low) / (distribution.high - distribution.low))
        return numbers


class _Forest:
    """Scores over encoded point and step, learned from every line of a table."""

    SCORES = ("accuracy", "clean_accuracy")

    def __init__(self, points: np.ndarray, curves: Sequence[Sequence[Mapping[str, float]]]) -> None:
        from sklearn.ensemble import RandomForestRegressor

        features = [[*point, row["step"]] for point, rows in zip(points, curves, strict=True) for row in rows]
        targets = [[row[name] for name in self.SCORES] for rows in curves for row in rows]
        self._model = RandomForestRegressor(_TREES, random_state=0).fit(features, targets)

    def predict(self, point: Sequence[float], step: int, name: str) -> float:
        return float(self._model.predict([[*point, step]])[0][self.SCORES.index(name)])


def _normal(*address: object) -> float:
    return float(np.random.default_rng(derive_seed("chip", *address)).standard_normal())
