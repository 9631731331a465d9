"""From a sweep's fixed fields and the values of searched ones to the full description of a trial."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from halora.hardware.chip import expand_chip, merge
from halora.spaces.expressions import Expression
from halora.spaces.language import with_values
from halora.trial import TrialConfig

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
