"""From a sweep's fixed fields and the values of searched ones to the full description of a trial."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from halora.errors import UserError
from halora.hardware.chip import expand_chip, merge
from halora.settings.names import as_sum, located
from halora.settings.trial import TrialConfig
from halora.spaces.expressions import Expression
from halora.spaces.language import with_values

_LOCATED: dict[str, Callable[[Any], Any]] = {"model": located, "task": as_sum}
"""Fields that may name folders, and what gives them by absolute path."""

formula = cache(Expression)
"""A derived value's formula, read once."""


def resolve_trial(
    trial: Mapping[str, Any],
    values: Mapping[str, Any],
    chips: Mapping[str, Any],
    derived: Mapping[str, str] | None = None,
) -> TrialConfig:
    """The trial with searched values set, derived ones computed, and its chip looked up among the sweep's.

    Raises:
        ValidationError: The trial does not allow a value.
        UserError: A path goes through a value that has no keys.
        ValueError: A derived value's formula has no value there.
    """
    described = with_values(trial, {**values, **derived_values(trial, values, derived or {})})
    if "chip" in described:
        described["chip"] = named_chip(described["chip"], chips)
    return TrialConfig.model_validate(described)


def with_absolute_folders(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep file's content, its models' and tasks' folders by absolute path wherever it names them."""

    def value_of(path: str, value: Any) -> Any:
        try:
            return _LOCATED[path](value) if path in _LOCATED else value
        except UserError:  # told when the trial is read
            return value

    def values_of(path: str, values: Any) -> Any:
        return [value_of(path, value) for value in values] if isinstance(values, list) else values

    def values_in(given: Any, change: Callable[[str, Any], Any]) -> Any:
        return {path: change(path, each) for path, each in given.items()} if isinstance(given, Mapping) else given

    def distribution(path: str, given: Any) -> Any:
        def change(key: str, each: Any) -> Any:
            if key == "choices":
                return values_of(path, each)
            return values_in(each, values_of) if key == "when" else each

        return values_in(given, change)

    made = dict(sweep)
    if "trial" in made:
        made["trial"] = values_in(made["trial"], value_of)
    if "space" in made:
        made["space"] = values_in(made["space"], distribution)
    if isinstance(made.get("first"), list):
        made["first"] = [values_in(point, value_of) for point in made["first"]]
    return made


def derived_values(trial: Mapping[str, Any], values: Mapping[str, Any], derived: Mapping[str, str]) -> dict[str, Any]:
    """Derived values by path; one whose formula names a field that is not searched here is left out."""
    known = dict(values)
    for path, text in derived.items():
        named = {name: known[name] if name in known else fixed_value(trial, name) for name in formula(text).names}
        if None not in named.values():
            known[path] = formula(text).value(named)
    return {path: known[path] for path in derived if path in known}


def fixed_value(trial: Mapping[str, Any], path: str) -> Any:
    """A field's value as written in the trial; none where it is not."""
    node: Any = trial
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def named_chip(chip: Any, chips: Mapping[str, Any]) -> Any:
    """A chip's setting, where it names one of the sweep's chips that one with its overrides."""
    overrides = dict(chip) if isinstance(chip, Mapping) else {"preset": chip}
    name = overrides.pop("preset", None)
    if not isinstance(name, str) or name not in chips:
        return chip
    return merge({**expand_chip(chips[name]), "name": name}, overrides)
