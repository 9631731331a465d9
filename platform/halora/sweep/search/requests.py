"""What a person asks of one trial while its sweep runs, or before it is resumed, from any process.

Each request is one write to the study, which whoever runs the sweep looks at.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from halora.errors import UserError, nearest
from halora.settings.trial import TrialConfig
from halora.spaces.language import chosen_values
from halora.spaces.mistakes import describe
from halora.spaces.sweep import SweepConfig
from halora.sweep.search.problem import problem_of
from halora.sweep.search.study import State, SweepStudy, Trial, point_key

_OPEN = (State.RUNNING, State.PAUSED)


def cut_short(sweep: SweepConfig, study: SweepStudy, number: int) -> None:
    """Have a trial's training end at its next report, or at the rung where it waits, and be scored there as at its end.

    Raises:
        UserError: There is no such trial, or it has ended.
    """
    trial = _trial(sweep, study, number)
    if trial.state not in _OPEN:
        raise UserError(f"trial '{sweep.name}/{number}' is {trial.state}, and has nothing left to stop")
    study.cut_short(number)


def discard(sweep: SweepConfig, study: SweepStudy, number: int) -> None:
    """Take a trial out of the sweep for good: it ends at its next report, and is on no front.

    Raises:
        UserError: There is no such trial, or it was never trained.
    """
    trial = _trial(sweep, study, number)
    if trial.state is State.SKIPPED:
        raise UserError(f"trial '{sweep.name}/{number}' was never trained: {trial.skipped}")
    if trial.state is not State.DISCARDED:
        study.discard(number)


def clone(sweep: SweepConfig, study: SweepStudy, number: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for a trial like another, with some searched values changed; it is begun next.

    Args:
        sweep: The sweep.
        study: Its study.
        number: The other trial.
        changes: Values by dotted path.

    Returns:
        All its values.

    Raises:
        UserError: With every mistake: a field is not searched, a value is outside the space or missing, the values
            contradict each other or break a constraint on costs, or there is such a trial.
    """
    trial, space = _trial(sweep, study, number), sweep.space
    problems = [
        f"{path}: not searched by '{sweep.name}'{nearest(path, space)}" for path in changes if path not in space
    ]
    given = {**trial.values, **{path: value for path, value in changes.items() if path in space}}

    def choose(path: str, distribution: Any) -> Any:
        if path not in given:
            problems.append(f"{path}: searched where the changes apply, and trial {number} has no value of it")
            return None
        own = distribution.own(given[path])
        if own is None:
            problems.append(f"{path}: {given[path]!r} is outside the space of '{sweep.name}'")
        return own

    values = chosen_values(space, choose)
    useless = [path for path in changes if path in space and path not in values]
    problems += [f"{path}: not searched together with the other values" for path in useless]
    if not problems:
        problems = _contradictions(sweep, values)
    if not problems and (same := _same(study, values)):
        problems = [f"{same} has these values already"]
    if problems:
        told = dict.fromkeys(problems)
        raise UserError(list(told), "name searched fields with --set; `halora space show` lists them")
    study.ask_for(values, number)
    return values


def _contradictions(sweep: SweepConfig, values: Mapping[str, Any]) -> list[str]:
    """Why no trial can have these values."""
    try:
        costs = problem_of(sweep).costs(values)
    except UserError as error:
        return error.problems
    except ValidationError as error:
        return describe(error, TrialConfig)
    bounds = [each for each in sweep.constraints if each.metric in costs and each.violation(costs) > 0]
    return [f"{each.metric} would be {costs[each.metric]:.4g}, which breaks {each}" for each in bounds]


def _same(study: SweepStudy, values: Mapping[str, Any]) -> str:
    key = point_key(values)
    for trial in study.trials():
        if trial.key == key and trial.state is not State.SKIPPED:
            return f"trial {trial.number}"
    return "a trial that was asked for" if any(point_key(each.values) == key for each in study.asked()) else ""


def _trial(sweep: SweepConfig, study: SweepStudy, number: int) -> Trial:
    trials = study.trials()
    if not 0 <= number < len(trials):
        raise UserError(
            f"no trial '{sweep.name}/{number}'; it has {len(trials)} so far", "see `halora front show --all`"
        )
    return trials[number]
