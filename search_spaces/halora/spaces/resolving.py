"""From a sweep's fixed fields and the values of searched ones to the full description of a trial."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from halora.errors import UserError
from halora.hardware.cell_models import MeasuredNoise
from halora.hardware.chip import Chip
from halora.hardware.chip_files import expand_chip, merge
from halora.settings.names import as_sum, located
from halora.settings.trial import TrialConfig
from halora.spaces.expressions import Expression
from halora.spaces.language import with_values

_LOCATED: dict[str, Callable[[Any], Any]] = {"model": located, "task": as_sum}
"""Fields that may name folders, and what gives them by absolute path."""

_OF_GROUP = re.compile(r"chip\.layers\.([\w-]+)\.(.+)")

formula = cache(Expression)
"""A derived value's formula, read once."""


class NamedChips(NamedTuple):
    """What a sweep's chips are by the names it has for them."""

    own: Mapping[str, Any]
    """Those of the sweep, which have their key for a name."""
    read: Mapping[str, Any] = {}
    """Presets and files as they were read, by what the sweep calls them."""


def resolve_trial(
    trial: Mapping[str, Any],
    values: Mapping[str, Any],
    chips: NamedChips,
    derived: Mapping[str, str] | None = None,
) -> TrialConfig:
    """The trial with searched values set, derived ones computed, and its chip looked up among those that are known.

    Raises:
        ValidationError: The trial does not allow a value.
        UserError: A path goes through a value that has no keys.
        ValueError: A derived value's formula has no value there.
    """
    described = with_values(trial, {**values, **derived_values(trial, values, derived or {})})
    if "chip" in described:
        described["chip"] = named_chip(described["chip"], chips)
    return TrialConfig.model_validate(described)


def described(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep file's content with what it names as that is now, so that nothing has to be looked up again.

    Folders are named by absolute path; presets, chip files and tables are read. What cannot be read is left as it is,
    to be told with the other mistakes. A description stays as it is.
    """
    return _with_chips_read(_with_absolute_folders(sweep))


def _with_absolute_folders(sweep: Mapping[str, Any]) -> dict[str, Any]:

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


def _with_chips_read(sweep: dict[str, Any]) -> dict[str, Any]:
    trial, chips, known = (sweep.get(key) for key in ("trial", "chips", "chips_read"))
    own = {name: _read(setting) for name, setting in chips.items()} if isinstance(chips, Mapping) else {}
    read = (
        {name: chip for name, chip in known.items() if isinstance(chip, Mapping)} if isinstance(known, Mapping) else {}
    )
    for name in _chip_names(sweep):
        if name not in own and name not in read and isinstance(found := _read(name), dict):
            read[name] = found
    made = dict(sweep)
    if own:
        made["chips"] = own
    if read:
        made["chips_read"] = read
    if isinstance(trial, Mapping) and isinstance(trial.get("chip"), Mapping):
        made["trial"] = {**trial, "chip": _with_tables(trial["chip"])}
    return made


def _chip_names(sweep: Mapping[str, Any]) -> Iterator[str]:
    """Every text by which a sweep may name a chip."""

    def below(node: Any, *keys: str) -> Any:
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    first = sweep.get("first")
    found = [below(sweep, "trial", "chip"), below(sweep, "trial", "chip", "preset")]
    found += [below(point, "chip") for point in first] if isinstance(first, list | tuple) else []
    for listed in (below(sweep, "space", "chip", "choices"), below(sweep, "comparison", "chips")):
        found += listed if isinstance(listed, list | tuple) else []
    yield from (name for name in found if isinstance(name, str))


def _read(setting: Any) -> Any:
    """The whole description of a chip that needs no file; as it is where it cannot be read or is none."""
    try:
        chip = expand_chip(setting)
    except UserError:
        return setting
    try:
        return Chip.model_validate(chip).model_dump(mode="json")
    except ValidationError:  # perhaps whole with what the trial or the search adds
        return _with_tables(chip)


def _with_tables(chip: Any) -> Any:
    """A chip's description, tables of measured states read into it."""
    if not isinstance(chip, Mapping):
        return chip
    noise = chip.get("noise")
    if not isinstance(noise, Mapping) or "path" not in noise:
        return dict(chip)
    try:
        return {**chip, "noise": MeasuredNoise.with_states(dict(noise))}
    except UserError:
        return dict(chip)


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


def default_value(described: Mapping[str, Any], path: str) -> Any:
    """A field's value in a whole trial; of a group of layers that gives none, the chip's. None where there is none."""
    value, of_group = fixed_value(described, path), group_and_field(path)
    return fixed_value(described, f"chip.{of_group[1]}") if value is None and of_group else value


def group_and_field(path: str) -> tuple[str, str] | None:
    """Name of a group of a chip's layers and field that a path names; none for other paths."""
    found = _OF_GROUP.match(path)
    return (found[1], found[2]) if found else None


def named_chip(chip: Any, chips: NamedChips) -> Any:
    """A chip's setting, where it names one of the known chips that one with its overrides."""
    overrides = dict(chip) if isinstance(chip, Mapping) else {"preset": chip}
    name = overrides.pop("preset", None)
    if not isinstance(name, str):
        return chip
    if name in chips.own:
        return merge({**expand_chip(chips.own[name]), "name": name}, overrides)
    return merge(dict(chips.read[name]), overrides) if name in chips.read else chip
