"""The closing comparison: the best adapter beside the untrained base, on rows and chips the search did not use."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from halora.errors import UserError
from halora.evaluation.intervals import Interval, crossed_bootstrap
from halora.records.store import SweepFolder
from halora.spaces.language import Categorical
from halora.spaces.sweep import SweepConfig
from halora.sweep.core import Suggestion
from halora.training.tasks import load_rows


@dataclass(frozen=True)
class PairedComparison:
    """Adapter less base on the same chips and rows.

    Attributes:
        number: Trial of the adapter.
        rows: Number of validation rows.
        chip_instances: Number of chip instances.
        adapter: Summary of the adapter's scores.
        base: Summary of the base's scores.
        accuracy_gain: Difference of accuracies, 95 % interval over rows and chips.
        margin_gain: Difference of mean margins in nats, likewise.
    """

    number: int
    rows: int
    chip_instances: int
    adapter: dict[str, float]
    base: dict[str, float]
    accuracy_gain: Interval
    margin_gain: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_rows_left(sweep: SweepConfig) -> None:
    """Refuse a comparison that would find too few rows, before anything is trained.

    Raises:
        UserError: A task has not enough validation rows beyond those the search scores on.
    """
    if sweep.comparison is None:
        return
    searched = sweep.space.get("task")
    used = sweep.trial["evaluation"]["rows"]
    for task in searched.choices if isinstance(searched, Categorical) else (sweep.trial["task"],):
        left = len(load_rows(str(task), "validation")) - used
        if left < sweep.comparison.rows:
            raise UserError(
                f"comparison.rows: {sweep.comparison.rows}, but '{task}' has {max(left, 0)} validation rows beyond "
                f"the {used} of trial.evaluation.rows",
                "lower one of the two",
            )


def compare_with_base(sweep: SweepConfig, folder: SweepFolder, suggestion: Suggestion) -> PairedComparison:
    """Score the trial's adapter and the bare base on fresh validation rows and fresh chips of the search pool.

    Ray has to run, see `halora.sweep.executor.ray_session`.
    """
    from halora.sweep.executor import score_on_workers
    from halora.trainable import ScoringJob, adapter_folder

    assert sweep.comparison is not None
    used = suggestion.config.evaluation
    fresh = used.model_copy(update={"rows": sweep.comparison.rows, "chip_instances": sweep.comparison.chip_instances})
    config = suggestion.config.model_copy(update={"evaluation": fresh})
    adapter, base = score_on_workers(
        sweep,
        [
            ScoringJob(config, weights, first_row=used.rows or 0, first_chip=used.chip_instances)
            for weights in (adapter_folder(folder.trial(suggestion.number)), None)
        ],
    )
    difference = np.array(adapter.noisy) - np.array(base.noisy)
    rightness = (np.array(adapter.noisy) > 0).astype(float) - (np.array(base.noisy) > 0)
    return PairedComparison(
        number=suggestion.number,
        rows=len(adapter.row_ids),
        chip_instances=len(adapter.noisy),
        adapter=adapter.summary(),
        base=base.summary(),
        accuracy_gain=crossed_bootstrap(rightness),
        margin_gain=crossed_bootstrap(difference),
    )
