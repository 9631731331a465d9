"""The closing comparison: chosen adapters and the untrained base, on rows and chips the search did not use.

With several training seeds the chosen configurations are trained anew: a search chooses a configuration together with
its seed's luck, so the chosen trial's own adapter is a biased sample of what the configuration gives.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halora.analysis.front import best
from halora.analysis.trials import RecordedTrial
from halora.errors import UserError, check_all
from halora.evaluation.chips import ChipScores, summary_over_seeds
from halora.evaluation.decisions import Gain, judged
from halora.evaluation.intervals import Estimate, gain, share_gain
from halora.files import sha256_of, write_json
from halora.reading import is_folder
from halora.records.provenance import program
from halora.records.store import ComparisonFolder, SweepFolder
from halora.settings.trial import TrialConfig
from halora.spaces.language import Categorical
from halora.spaces.sweep import Comparison, SweepConfig
from halora.sweep.run.seeds import SeedTraining, Trained, train_seeds
from halora.sweep.search.core import DecisionCore
from halora.trial_folder import ADAPTER_WEIGHTS, adapter_folder

if TYPE_CHECKING:
    from halora.training.tasks import Split
    from halora.trial_runner import ScoringJob

UNTRAINED = "untrained"
"""The bare base among the contestants."""


@dataclass(frozen=True)
class Cell:
    """One contestant on one description of chips.

    Attributes:
        contestant: `untrained`, or what the trial was chosen for.
        number: The trial; none for the untrained base.
        chip: Name of the description.
        seeds: Number of adapters behind it; 0 for the untrained base.
        summary: Its scores, see `summary_over_seeds`.
        accuracy_gain: Accuracy less the reference's on the same chips and rows; none for the reference.
        margin_gain: Difference of mean margins in nats, likewise.
    """

    contestant: str
    number: int | None
    chip: str
    seeds: int
    summary: dict[str, float]
    accuracy_gain: Gain | None
    margin_gain: Gain | None


@dataclass(frozen=True)
class ClosingComparison:
    """Contestants by chips, all on the same rows and chip instances.

    Attributes:
        reference: The contestant that gains are measured from.
        rows: Number of validation rows.
        chip_instances: Number of chip instances of every description.
        seeds: Adapters of every contestant that the sweep asks for.
        equivalence_margin: Up to where two count as equal, by endpoint; none where it is not asked.
        cells: Every contestant on every chip.
        adapters: Where each adapter is from: contestant, trial, seed, digest, cause if its training failed.
        program: Which program and commit took it.
    """

    reference: str
    rows: int
    chip_instances: int
    seeds: int
    equivalence_margin: Mapping[str, float | None]
    cells: tuple[Cell, ...]
    adapters: tuple[Mapping[str, Any], ...]
    program: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_rows(sweep: SweepConfig) -> None:
    """Refuse tasks whose rows are a user's own files and have mistakes, before anything is trained.

    Raises:
        UserError: With the first of the bad rows, of every split that a trial reads.
    """
    from halora.settings.names import as_sum, task_weights
    from halora.training.tasks import load_rows

    tasks = dict.fromkeys(name for task in sweep.values_of("task") for name in task_weights(as_sum(task)))
    splits: tuple[Split, ...] = ("train", "validation")
    check_all(*(partial(load_rows, task, split) for task in filter(is_folder, tasks) for split in splits))


def check_rows_left(sweep: SweepConfig) -> None:
    """Refuse a comparison that would find too few rows, before anything is trained.

    Raises:
        UserError: A task has not enough validation rows beyond those the search scores on.
    """
    from halora.settings.names import as_sum
    from halora.training.tasks import load_rows

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


def contestants(comparison: Comparison, points: Sequence[RecordedTrial]) -> dict[str, RecordedTrial]:
    """The best trial, or the best of every value of the field that the comparison goes by."""
    if comparison.by is None:
        groups = {"best": list(points)}
    else:
        groups = {}
        for point in points:
            groups.setdefault(str(point.params.get(comparison.by)), []).append(point)
    return {name: chosen for name, group in groups.items() if (chosen := best(group))}


def compare(
    sweep: SweepConfig,
    folder: SweepFolder,
    core: DecisionCore,
    chosen: Mapping[str, RecordedTrial],
    say: Callable[[str], None],
) -> ClosingComparison | None:
    """Score the chosen trials' adapters and the bare base on fresh validation rows and fresh chip instances.

    What was trained and scored before, by a process that was interrupted, is not repeated. Ray has to run, see
    `halora.sweep.cluster.session.ray_session`.

    Args:
        sweep: The sweep, with a comparison.
        folder: Its folder.
        core: Knows the trials' values.
        chosen: Trials by what they were chosen for, at least one.
        say: Told of the progress.

    Returns:
        The comparison; none if it was interrupted.
    """
    from halora.trial_runner import ScoringJob  # imports Ray

    comparison = sweep.comparison
    assert comparison is not None
    trainings = _trainings(sweep, core, chosen)
    trained = train_seeds(sweep, folder, trainings, lambda: core.stopping, say) if comparison.seeds > 1 else []
    if trained is None:
        return None
    adapters: dict[str, list[Path | None]] = {UNTRAINED: [None]}
    adapters |= {name: [] for name in chosen}
    for training, found in zip(trainings, trained, strict=False):
        if found.adapter:
            adapters[training.contestant].append(found.adapter)
    if comparison.seeds == 1:
        adapters |= {name: [adapter_folder(folder.trial(point.number))] for name, point in chosen.items()}
    say(f"comparing trial {', '.join(str(p.number) for p in chosen.values())} with the untrained base on fresh chips")
    places, jobs = [], []
    for name, folders in adapters.items():
        number = (chosen.get(name) or next(iter(chosen.values()))).number
        config = sweep.resolve(core.trial(number).values)
        for chip in [sweep.chip(named) for named in comparison.chips] or [config.chip]:
            fresh = _fresh(config.model_copy(update={"chip": chip}), comparison)
            for adapter in folders:
                places.append((name, chip.name))
                jobs.append(ScoringJob(fresh, adapter, config.evaluation.rows or 0, sweep.chips_searched))
    by_place: dict[tuple[str, str], list[ChipScores]] = {}
    for place, scores in zip(places, _scored(sweep, folder.comparison, jobs, say), strict=True):
        by_place.setdefault(place, []).append(scores)
    by = sweep.space.get(comparison.by or "")
    against = by.named(comparison.against) if isinstance(by, Categorical) else None
    reference = UNTRAINED if against is None else str(against)
    return ClosingComparison(
        reference=reference,
        rows=comparison.rows,
        chip_instances=comparison.chip_instances,
        seeds=comparison.seeds,
        equivalence_margin=comparison.equivalence_margin.model_dump(),
        cells=_cells(by_place, reference, chosen, comparison),
        adapters=tuple(_origin(sweep, folder, core, chosen, trainings, trained)),
        program=program(),
    )


def _trainings(sweep: SweepConfig, core: DecisionCore, chosen: Mapping[str, RecordedTrial]) -> list[SeedTraining]:
    """Seed by seed over all contestants, so that an early end leaves each with as many."""
    assert sweep.comparison is not None
    values = {name: core.trial(point.number).values for name, point in chosen.items()}
    return [
        SeedTraining(name, point.number, values[name], sweep.resolve(values[name]).seed + 1 + i)
        for i in range(sweep.comparison.seeds if sweep.comparison.seeds > 1 else 0)
        for name, point in chosen.items()
    ]


def _fresh(config: TrialConfig, comparison: Comparison) -> TrialConfig:
    own = config.evaluation.at_own_strength()
    size = {"rows": comparison.rows, "chip_instances": comparison.chip_instances}
    return config.model_copy(update={"evaluation": own.model_copy(update=size)})


def _scored(
    sweep: SweepConfig, own: ComparisonFolder, jobs: "Sequence[ScoringJob]", say: Callable[[str], None]
) -> list[ChipScores]:
    """Scores of all jobs, each kept in a file as soon as it is there, and read where it was kept before."""
    from halora.sweep.run.executor import score_on_workers  # imports Ray

    own.scores.mkdir(parents=True, exist_ok=True)
    files = [own.scores / f"{_digest(job)}.json" for job in jobs]
    left = [place for place, file in enumerate(files) if not file.exists()]
    done = len(jobs) - len(left)

    def scored(place: int, scores: ChipScores) -> None:
        nonlocal done
        write_json(files[left[place]], scores.to_json())
        done += 1
        say(f"comparison: {done} of {len(jobs)} evaluations")

    score_on_workers(sweep, [jobs[place] for place in left], scored)
    return [ChipScores.from_json(json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _digest(job: "ScoringJob") -> str:
    """What tells an evaluation from every other."""
    adapter = sha256_of(job.adapter / ADAPTER_WEIGHTS) if job.adapter else None
    asked = [job.config.model_dump(mode="json"), adapter, job.first_row, job.first_chip]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]


def _cells(
    by_place: Mapping[tuple[str, str], Sequence[ChipScores]],
    reference: str,
    chosen: Mapping[str, RecordedTrial],
    comparison: Comparison,
) -> tuple[Cell, ...]:
    compared = [(name, chip) for name, chip in by_place if name != reference and (reference, chip) in by_place]
    estimates: list[Estimate] = []
    for name, chip in compared:
        ours, theirs = by_place[name, chip], by_place[reference, chip]
        estimates.append(share_gain(*(np.array([one.noisy_correct for one in each]) for each in (ours, theirs))))
        estimates.append(gain(*(np.array([one.noisy for one in each]) for each in (ours, theirs))))
    margins = comparison.equivalence_margin
    gains = judged(estimates, [margins.accuracy, margins.margin] * len(compared))
    by_cell = {place: gains[2 * i : 2 * i + 2] for i, place in enumerate(compared)}
    return tuple(
        Cell(
            contestant=name,
            number=chosen[name].number if name in chosen else None,
            chip=chip,
            seeds=len(scores) if name in chosen else 0,
            summary=summary_over_seeds(scores),
            accuracy_gain=by_cell.get((name, chip), (None, None))[0],
            margin_gain=by_cell.get((name, chip), (None, None))[1],
        )
        for (name, chip), scores in by_place.items()
    )


def _origin(
    sweep: SweepConfig,
    folder: SweepFolder,
    core: DecisionCore,
    chosen: Mapping[str, RecordedTrial],
    trainings: Sequence[SeedTraining],
    trained: Sequence[Trained],
) -> list[dict[str, Any]]:
    found = [(of.contestant, of.trial, of.seed, each) for of, each in zip(trainings, trained, strict=True)]
    if not trainings:
        for name, point in chosen.items():
            seed = sweep.resolve(core.trial(point.number).values).seed
            found.append((name, point.number, seed, Trained(adapter_folder(folder.trial(point.number)))))
    return [
        {
            "contestant": name,
            "trial": number,
            "seed": seed,
            "adapter_sha256": sha256_of(each.adapter / ADAPTER_WEIGHTS) if each.adapter else None,
            "folder": str(each.adapter.relative_to(folder.root)) if each.adapter else None,
            "cause": each.cause,
        }
        for name, number, seed, each in found
    ]
