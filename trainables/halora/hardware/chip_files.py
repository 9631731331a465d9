"""Descriptions of chips as files: presets, files of a user's own, and values laid over either."""

from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from halora.errors import UserError, nearest
from halora.reading import is_file
from halora.yaml_files import read_yaml

PRESETS = files("halora.hardware") / "presets"


def preset_names() -> list[str]:
    """Names of the shipped chips."""
    return sorted(item.name.removesuffix(".yaml") for item in PRESETS.iterdir() if item.name.endswith(".yaml"))


def expand_chip(value: Any) -> Any:
    """Turn a preset's name, a YAML path, or `{preset: NAME, overrides...}` into the full mapping of a chip.

    Raises:
        UserError: There is no such preset or file.
    """
    if isinstance(value, str):
        return _read(value)
    if isinstance(value, dict) and "preset" in value:
        overrides = {key: item for key, item in value.items() if key != "preset"}
        return merge(_read(str(value["preset"])), overrides)
    return value


def _read(name: str) -> dict[str, Any]:
    """The mapping of a preset or of a file, which may itself lay overrides over a preset."""
    if name in preset_names():
        return _preset(name)
    if name.endswith((".yaml", ".yml")) and is_file(name):
        content = read_yaml(Path(name), f"chip '{name}'")
        if not isinstance(content, dict):
            raise UserError(f"chip '{name}': a chip is a mapping of keys to values, got {type(content).__name__}")
        base = content.pop("preset", None)
        if base is not None and base not in preset_names():
            raise UserError(f"chip '{name}': no preset '{base}'{nearest(str(base), preset_names())}")
        return content if base is None else merge(_preset(base), content)
    known = ", ".join(preset_names())
    raise UserError(f"no chip '{name}': neither a preset ({known}) nor a YAML file{nearest(name, preset_names())}")


def _preset(name: str) -> dict[str, Any]:
    """The mapping of a preset, which may itself lay overrides over another."""
    return deepcopy(_preset_as_written(name))


@cache
def _preset_as_written(name: str) -> dict[str, Any]:
    content = dict(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))
    base = content.pop("preset", None)
    return content if base is None else merge(_preset(base), content)


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, mapping by mapping; a mapping of another `kind` replaces the whole."""
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            value = merge(old, value)
        merged[key] = value
    return merged
