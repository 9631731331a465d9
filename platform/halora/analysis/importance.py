"""Which searched fields matter for an objective. Computed by Optuna (PED-ANOVA, Watanabe et al., IJCAI 2023)."""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from halora.analysis.summary import FrontView
from halora.analysis.trials import Objective, RecordedTrial

optuna.logging.set_verbosity(optuna.logging.WARNING)

_FEWEST = 8
"""Trials below which an importance would say nothing."""
_BETTER = 0.25
"""Share of the trials whose settings are told apart from those of all."""


def importances(points: Sequence[RecordedTrial], objective: Objective) -> dict[str, float]:
    """Share of each searched field in whether a trial is among the better quarter; they sum to 1, largest first.

    A field that is searched in some trials only counts by these. Empty with fewer than eight trials, or where the
    objective or all fields never vary.
    """
    columns: dict[str, list[Any]] = {}
    for point in points:
        for path, value in point.params.items():
            columns.setdefault(path, []).append(value)
    distributions = {path: _distribution(values) for path, values in columns.items() if len(set(map(repr, values))) > 1}
    outcomes = [point.metrics[objective.metric] for point in points]
    if len(points) < _FEWEST or not distributions or len(set(outcomes)) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if objective.maximise else "minimize")
    for point, outcome in zip(points, outcomes, strict=True):
        own = {path: distributions[path] for path in point.params if path in distributions}
        chosen = {path: _chosen(point.params[path], own[path]) for path in own}
        study.add_trial(optuna.trial.create_trial(params=chosen, distributions=own, value=outcome))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BETTER)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def importance_of(view: FrontView) -> dict[str, dict[str, float]]:
    """Shares of the searched fields for each objective, over all trials that have it."""
    scored = [*view.groups.feasible, *view.groups.violating]
    return {each.metric: importances(scored, each) for each in view.objectives}


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = min(values), max(values)
    log = low > 0 and high / low >= 100  # searched over decades
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _chosen(value: Any, distribution: BaseDistribution) -> Any:
    return str(value) if isinstance(distribution, CategoricalDistribution) else value
