"""The closing comparison: chosen adapters and the untrained base, on rows and chips the search did not use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from halora.analysis.front import best
from halora.analysis.trials import TrialPoint
from halora.errors import UserError
from halora.evaluation.chips import ChipScores
from halora.evaluation.intervals import Interval, gain, share_gain
from halora.records.store import SweepFolder
from halora.spaces.sweep import Comparison, SweepConfig
from halora.sweep.core import DecisionCore
from halora.trial import adapter_folder

UNTRAINED = "untrained"
"""The bare base among the contestants."""


@dataclass(frozen=True)
class Cell:
    """One contestant on one description of chips.

    Attributes:
        contestant: `untrained`, or what the trial was chosen for.
        number: The trial; none for the untrained base.
        chip: Name of the description.
        summary: Its scores, see `ChipScores.summary`.
        accuracy_gain: Accuracy less the reference's on the same chips and rows, 95 % interval; none for the reference.
        margin_gain: Difference of mean margins in nats, likewise.
    """

    contestant: str
    number: int | None
    chip: str
    summary: dict[str, float]
    accuracy_gain: Interval | None
    margin_gain: Interval | None

    @property
    def better(self) -> bool:
        """Whether a gain's interval lies above 0."""
        return any(gain is not None and gain.low > 0 for gain in (self.accuracy_gain, self.margin_gain))


@dataclass(frozen=True)
class ClosingComparison:
    """Contestants by chips, all on the same rows and chip instances.

    Attributes:
        reference: The contestant that gains are measured from.
        rows: Number of validation rows.
        chip_instances: Number of chip instances of every description.
        cells: Every contestant on every chip.
    """

    reference: str
    rows: int
    chip_instances: int
    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_rows_left(sweep: SweepConfig) -> None:
    """Refuse a comparison that would find too few rows, before anything is trained.

    Raises:
        UserError: A task has not enough validation rows beyond those the search scores on.
    """
    from halora.training.tasks import as_sum, load_rows

    if sweep.comparison is None:
        return
    used = sweep.trial["evaluation"]["rows"]
    for task in sweep.values_of("task"):
        left = len(load_rows(as_sum(task), "validation")) - used
        if left < sweep.comparison.rows:
            raise UserError(
                f"comparison.rows: {sweep.comparison.rows}, but '{task}' has {max(left, 0)} validation rows beyond "
                f"the {used} of trial.evaluation.rows",
                "lower one of the two",
            )


def contestants(comparison: Comparison, points: Sequence[TrialPoint]) -> dict[str, TrialPoint]:
    """The best trial, or the best of every value of the field that the comparison goes by."""
    if comparison.by is None:
        groups = {"best": list(points)}
    else:
        groups = {}
        for point in points:
            groups.setdefault(str(point.params.get(comparison.by)), []).append(point)
    return {name: chosen for name, group in groups.items() if (chosen := best(group))}


def compare(
    sweep: SweepConfig, folder: SweepFolder, core: DecisionCore, chosen: dict[str, TrialPoint]
) -> ClosingComparison:
    """Score the chosen trials' adapters and the bare base on fresh validation rows and fresh chip instances.

    Ray has to run, see `halora.sweep.session.ray_session`.
    """
    from halora.sweep.executor import score_on_workers
    from halora.trainable import ScoringJob

    comparison = sweep.comparison
    assert comparison is not None
    numbers: dict[str, int | None] = {UNTRAINED: None, **{name: point.number for name, point in chosen.items()}}
    places, jobs = [], []
    for name, number in numbers.items():
        config = sweep.resolve(core.trial(number if number is not None else next(iter(chosen.values())).number).values)
        used = config.evaluation.at_own_level()
        fresh = used.model_copy(update={"rows": comparison.rows, "chip_instances": comparison.chip_instances})
        weights = None if number is None else adapter_folder(folder.trial(number))
        for chip in [sweep.chip(named) for named in comparison.chips] or [config.chip]:
            on_chip = config.model_copy(update={"evaluation": fresh, "chip": chip})
            places.append((name, chip.name))
            jobs.append(ScoringJob(on_chip, weights, first_row=used.rows or 0, first_chip=sweep.chips_searched))
    scores = dict(zip(places, score_on_workers(sweep, jobs), strict=True))
    reference = comparison.against or UNTRAINED
    cells = tuple(
        _cell(name, numbers[name], chip, found, None if name == reference else scores.get((reference, chip)))
        for (name, chip), found in scores.items()
    )
    return ClosingComparison(reference, comparison.rows, comparison.chip_instances, cells)


def _cell(name: str, number: int | None, chip: str, scores: ChipScores, reference: ChipScores | None) -> Cell:
    accuracy = margin = None
    if reference is not None:
        accuracy = share_gain(np.array([scores.noisy_correct]), np.array([reference.noisy_correct])).interval()
        margin = gain(np.array([scores.noisy]), np.array([reference.noisy])).interval()
    return Cell(name, number, chip, scores.summary(), accuracy, margin)
