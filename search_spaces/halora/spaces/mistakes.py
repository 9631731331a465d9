"""What a validation error says to a person: path, what is wrong, the value given, the nearest known key."""

import re
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from halora.errors import UserError, nearest
from halora.hardware.noise_models import NoiseModel
from halora.hardware.noise_settings import noise_fields
from halora.spaces.language import Categorical, Range

ANY_NAME = "NAME"
"""Stands in a path for a name of one's own, as of a group of layers."""

_DISTRIBUTIONS: dict[str, type[BaseModel]] = {"Categorical": Categorical, "Range": Range}


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One sentence per mistake: path, what is wrong, the value given, the nearest known key."""
    sentences = []
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        path = prefix + ".".join(part for part in parts if part not in _DISTRIBUTIONS)
        if item["type"] == "extra_forbidden":
            known = _keys(model, parts[:-1])
            sentences.append(f"{path}: unknown key{nearest(parts[-1], known)} (known: {', '.join(sorted(known))})")
        elif item["type"] == "missing":
            sentences.append(f"{path}: required, but missing")
        elif isinstance(cause := item.get("ctx", {}).get("error"), UserError):
            at = f"{path}: " if parts else path  # a check of the whole says itself where
            sentences += [f"{at}{problem}" for problem in cause.problems]
        else:
            message = re.sub(r"^(Value error|Input), ?", "", item["msg"])
            given = item["input"]
            plain = item["type"] != "value_error" and isinstance(given, str | int | float | bool | None)
            shown = f", got {given!r}" if plain else ""
            sentences.append(f"{path}: {message[0].lower()}{message[1:]}{shown}")
    return list(dict.fromkeys(sentences))


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, UnionType):
        return next(filter(None, map(_submodel, get_args(annotation))), None)
    return None


def _valued(annotation: Any) -> type[BaseModel] | None:
    """What every value of a mapping is, whose keys are names of one's own."""
    return _submodel(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Keys allowed below `parents`; a distribution's error names its class on the way."""
    left = iter(parents)
    for parent in left:
        if parent in _DISTRIBUTIONS:
            return list(_DISTRIBUTIONS[parent].model_fields)
        field = model.model_fields.get(parent)
        if field is not None and (below := _valued(field.annotation)):
            next(left, None)  # the name
            model = below
        else:
            model = (_submodel(field.annotation) if field else None) or model
    return _fields(model)


def _fields(model: type[BaseModel]) -> list[str]:
    """Keys of a section; a noise model has those of every shipped kind."""
    return noise_fields() if model is NoiseModel else list(model.model_fields)


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of every field below a model, with `ANY_NAME` for names of one's own."""
    paths = []
    for name, field in model.model_fields.items():
        if valued := _valued(field.annotation):
            paths += field_paths(valued, f"{prefix}{name}.{ANY_NAME}.")
        below = _submodel(field.annotation)
        if below is NoiseModel:
            paths += [f"{prefix}{name}.{key}" for key in noise_fields()]
        else:
            paths += field_paths(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]
        if name == "chip":
            paths.append(f"{prefix}{name}")
    return paths
