"""Layers with values of their own: groups of a model's layers, by pattern and depth, in which a chip differs.

`on_layers` is where a chip meets a model: it says of every layer where it sits, and what chip it meets there, which has
no groups. Pricing, simulation and calibration of a layer all take that one chip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from halora.errors import UserError, attempt
from halora.hardware.mapping import LM_HEAD, Placement, matches_none
from halora.strict_model import StrictModel

if TYPE_CHECKING:
    from halora.hardware.chip import Chip


class _Changes(StrictModel):
    """Values of which those that are left out stay the chip's."""

    @model_serializer(mode="wrap")
    def _given(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialise(self).items() if value is not None}


def _several(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


class LayerGroup(_Changes):
    """Layers of a model, and what is theirs alone. Both `match` and `depth` have to be met, where both are given."""

    match: Annotated[tuple[str, ...], BeforeValidator(_several, json_schema_input_type=str | tuple[str, ...])] = ()
    """Patterns of canonical names, as `mapping` takes them; one of them has to match."""
    depth: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None
    """Decoder blocks from one share of the depth to another: [0, 0.5] is the first half of the blocks."""

    @model_validator(mode="after")
    def _says_which(self) -> LayerGroup:
        if not self.match and self.depth is None:
            raise ValueError("says of no layers; give it match (patterns of layers), depth, or both")
        if self.depth is not None and self.depth[0] >= self.depth[1]:
            raise ValueError(f"depth goes from a share to a larger one, got {self.depth[0]:g} and {self.depth[1]:g}")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """What it gives, section by section."""
        return self.model_dump(exclude={"match", "depth"})

    @property
    def in_words(self) -> str:
        """Its layers and its values, on a line."""
        depth = "" if self.depth is None else f"{self.depth[0]:g} to {self.depth[1]:g} of the depth"
        which = " of ".join(part for part in (", ".join(self.match), depth) if part)
        values = ", ".join(f"{path} {value}" for path, value in dotted(self.changes).items())
        return f"{which}: {values or 'nothing'}"

    def holds(self, layer: str, blocks: int) -> bool:
        """Whether a layer, by its canonical name, is one of them in a model of so many decoder blocks."""
        if self.match and not any(fnmatchcase(layer, pattern) for pattern in self.match):
            return False
        if self.depth is None:
            return True
        block = block_of(layer)
        return block is not None and self.depth[0] <= (block + 0.5) / blocks < self.depth[1]


def group_of(sections: Mapping[str, tuple[type[BaseModel], Sequence[str]]]) -> type[LayerGroup]:
    """The kind of group that may give these fields of these sections, bounds and descriptions as they are there.

    Args:
        sections: A section's model and the dotted paths of fields in it, by its name.
    """
    return _with_fields("LayerGroup", LayerGroup, {name: _part(*of) for name, of in sections.items()})


def _part(model: type[BaseModel], paths: Sequence[str]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(path.partition(".")[0] for path in paths):
        info = model.model_fields[name]
        below = [path.partition(".")[2] for path in paths if path.startswith(f"{name}.")]
        annotation: Any = info.annotation
        bounded = Annotated[(annotation, *info.metadata)] if info.metadata else annotation
        fields[name] = _part(annotation, below) if below else bounded
    return _with_fields(f"{model.__name__}OfLayers", _Changes, fields, model)


def _with_fields[Model: BaseModel](
    name: str, base: type[Model], fields: Mapping[str, Any], described: type[BaseModel] | None = None
) -> type[Model]:
    of = described.model_fields if described else {}
    optional: dict[str, Any] = {
        each: (kind | None, Field(default=None, description=of[each].description if each in of else None))
        for each, kind in fields.items()
    }
    return create_model(name, __base__=base, __doc__=(described or base).__doc__, **optional)


class OnLayer(NamedTuple):
    """What one layer of a model meets on a chip.

    Attributes:
        place: Where its weights sit.
        chip: The chip as it is there; it has no groups.
        groups: Names of the groups that it is in.
    """

    place: Placement
    chip: Chip
    groups: tuple[str, ...] = ()


def on_layers(chip: Chip, sizes: Mapping[str, int]) -> dict[str, OnLayer]:
    """What every layer of a model meets.

    Args:
        chip: The chip.
        sizes: Number of weights by canonical name, as `Mapping.places` takes them.

    Raises:
        UserError: With every mistake: patterns or depths that hold no layer, a value that two groups give a layer,
            and those of the mapping.
    """
    problems: list[str] = []
    places = attempt(problems, lambda: chip.mapping.places(sizes))
    present = [name for name in sizes if name != LM_HEAD or chip.mapping.lm_head]
    members = _members(chip.layers, present, list(sizes), problems)
    problems += _conflicts(chip.layers, members)
    if problems or places is None:
        raise UserError(problems)
    made: dict[tuple[str, ...], Chip] = {}
    found: dict[str, OnLayer] = {}
    for name, place in places.items():
        groups = tuple(group for group, layers in members.items() if name in layers)
        if groups not in made:
            made[groups] = changed_by(chip, groups)
        own = made[groups]
        whole = place is Placement.RRAM and own.mapping.outliers.share == 1
        found[name] = OnLayer(Placement.SRAM if whole else place, own, groups)
    return found


def _members(
    groups: Mapping[str, LayerGroup], present: Sequence[str], known: Sequence[str], problems: list[str]
) -> dict[str, dict[str, None]]:
    """Layers of each group, in their order; groups without any are problems."""
    blocks = 1 + max((block for block in map(block_of, known) if block is not None), default=0)
    members = {
        name: dict.fromkeys(layer for layer in present if group.holds(layer, blocks)) for name, group in groups.items()
    }
    for name, group in groups.items():
        unmatched = matches_none(group.match, present, known)
        problems += [f"chip.layers.{name}.match: {problem}" for problem in unmatched]
        if not members[name] and not unmatched and group.depth is not None:
            low, high = group.depth
            problems.append(
                f"chip.layers.{name}.depth: none of its layers is between {low:g} and {high:g} of the {blocks} blocks"
            )
    return members


def _conflicts(groups: Mapping[str, LayerGroup], members: Mapping[str, Mapping[str, None]]) -> list[str]:
    """Values that two groups give the same layer, of which neither could come first."""
    problems = []
    for one, other in combinations(groups, 2):
        shared = [layer for layer in members[one] if layer in members[other]]
        both = dotted(groups[one].changes).keys() & dotted(groups[other].changes).keys()
        if shared and both:
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            problems.append(
                f"chip.layers: '{one}' and '{other}' both give {', '.join(sorted(both))} of '{shared[0]}'{more}; "
                "let their patterns or depths not overlap"
            )
    return problems


def dotted(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path of a nested mapping."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def changed_by(chip: Chip, groups: Iterable[str]) -> Chip:
    """The chip as a layer meets it that is in some of its groups, by their names."""
    if not chip.layers:
        return chip
    plain = chip.model_copy(update={"layers": {}})
    for name in groups:
        plain = _changed(plain, chip.layers[name].changes)
    return plain


def _changed[Model: BaseModel](model: Model, changes: Mapping[str, Any]) -> Model:
    """A copy with values of a nested mapping set, which are valid already."""
    new = {
        name: _changed(getattr(model, name), value) if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    return model.model_copy(update=new)


def changed_everywhere(chip: Chip, path: str, value: Any) -> Chip:
    """The chip with a field, by its dotted path, set for all layers, whatever its groups say of it."""

    def nested(value: Any) -> dict[str, Any]:
        for name in reversed(path.split(".")):
            value = {name: value}
        return dict(value)

    groups = {
        name: _changed(group, nested(value)) if path in dotted(group.changes) else group
        for name, group in chip.layers.items()
    }
    return _changed(chip, nested(value)).model_copy(update={"layers": groups})


def block_of(layer: str) -> int | None:
    """Number of a layer's decoder block, e.g. 3 of `model.layers.3.mlp.up_proj`; none outside of the blocks."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), None)
