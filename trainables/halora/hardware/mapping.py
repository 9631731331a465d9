"""Which linear layer sits where: in RRAM (noisy), in SRAM or plain digital logic (both rounded), or off the chip."""

from collections.abc import Iterable
from collections.abc import Mapping as MappingOf
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from halora.errors import UserError, nearest
from halora.hardware.description import Frozen


class Place(StrEnum):
    """Where a layer's frozen weights are kept and multiplied."""

    RRAM = "rram"
    SRAM = "sram"
    DIGITAL = "digital"
    HOST = "host"
    """Off the chip: computed as the model has it, and outside every total."""


LM_HEAD = "lm_head"
"""Canonical name of the output projection."""


class Mapping(Frozen):
    """Placement by pattern, by explicit name, or by fraction; everything else goes to RRAM.

    A pattern is a layer's canonical name with shell wildcards, for example `model.layers.0.*` or `*.v_proj`.
    """

    lm_head: bool = False
    """Whether the output projection is one of the chip's layers, the last of them, named `lm_head`; else the host
    computes it, outside every total. Where it is tied to the embedding the chip holds a copy: the look-up stays."""
    sram: tuple[str, ...] = ()
    """Patterns of layers kept in SRAM compute-in-memory macros."""
    digital: tuple[str, ...] = ()
    """Patterns of layers computed by digital logic that reads its weights from SRAM; wins over `sram`."""
    sram_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the linear weights moved to SRAM, whole layers in the order of `ranking` as long as they fit."""
    ranking: Literal["depth"] | tuple[str, ...] = "depth"
    """Most sensitive layers first: `depth` (the first block first), or names as `halora noise sensitivity` gives."""

    def places(self, sizes: MappingOf[str, int]) -> dict[str, Place]:
        """The place of every layer.

        Args:
            sizes: Number of weights by canonical name, of the decoder blocks' linear layers and the output
                projection, in the order of the forward pass.

        Raises:
            UserError: Patterns that match no layer, or ranked names that are no layers; all at once.
        """
        host = {} if self.lm_head else {name: Place.HOST for name in sizes if name == LM_HEAD}
        sizes = {name: size for name, size in sizes.items() if name not in host}
        patterns = {"sram": self.sram, "digital": self.digital}
        if self.ranking != "depth":
            patterns["ranking"] = self.ranking
        problems = [
            f"chip.mapping.{where}: '{pattern}' matches no layer{_hint(pattern, sizes, host)}"
            for where, group in patterns.items()
            for pattern in group
            if not any(fnmatchcase(name, pattern) for name in sizes)
        ]
        if problems:
            raise UserError(problems)
        places = dict.fromkeys(sizes, Place.RRAM)
        room = self.sram_fraction * sum(sizes.values())
        for name in self.ranked(sizes):
            if room <= 0:
                break
            if sizes[name] <= room:
                places[name] = Place.SRAM
                room -= sizes[name]
        for place, group in ((Place.SRAM, self.sram), (Place.DIGITAL, self.digital)):
            places |= {name: place for name in sizes if any(fnmatchcase(name, pattern) for pattern in group)}
        return places | host

    def ranked(self, layers: Iterable[str]) -> list[str]:
        """Names of the ranked layers, most sensitive first; `layers` come in the order of the forward pass."""
        layers = list(layers)
        if self.ranking == "depth":
            return layers
        return [name for pattern in self.ranking for name in layers if fnmatchcase(name, pattern)]


def _hint(pattern: str, sizes: MappingOf[str, int], host: MappingOf[str, Place]) -> str:
    if any(fnmatchcase(name, pattern) for name in host):
        return " of the chip: chip.mapping.lm_head puts the output projection there"
    return nearest(pattern, list(sizes))
