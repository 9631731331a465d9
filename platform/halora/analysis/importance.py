"""Which searched fields matter for an objective. Computed by Optuna (PED-ANOVA, Watanabe et al., IJCAI 2023)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from halora.analysis.summary import FrontView
from halora.analysis.trials import Objective, RecordedTrial

optuna.logging.set_verbosity(optuna.logging.WARNING)

_FEWEST = 8
"""Trials below which an importance would say nothing."""
_ENOUGH = 30
"""Trials from which on shares keep their order from seed to seed, about: a quarter of them is the better part."""
_RARE = 0.1
"""Share of the trials below which a value counts as hardly tried."""
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
    scored = view.groups.scored
    return {each.metric: importances(scored, each) for each in view.objectives}


def doubts(view: FrontView) -> list[str]:
    """Why the shares may mislead, in words: too few trials, or values that the sampler hardly tried."""
    scored = view.groups.scored
    if not scored:
        return []
    said = [] if len(scored) >= _ENOUGH else [f"{len(scored)} trials are few: another seed may order the fields anew."]
    counts: dict[str, Counter[str]] = {}
    for point in scored:
        for path, value in point.params.items():
            if isinstance(value, str | bool):
                counts.setdefault(path, Counter())[str(value)] += 1
    for path, tried in sorted(counts.items()):
        rare = [f"'{value}' {count}" for value, count in sorted(tried.items()) if count < _RARE * tried.total()]
        if rare and len(tried) > 1:
            said.append(
                f"Of {tried.total()} trials with {path}, so few have {', '.join(rare)}: a value that the sampler left "
                "early hardly counts, however bad or good it is."
            )
    return said


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
