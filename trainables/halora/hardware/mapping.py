"""Which linear layer sits where: in RRAM (noisy), in SRAM or plain digital logic (both rounded), or off the chip."""

from collections.abc import Collection, Iterable
from collections.abc import Mapping as MappingOf
from enum import StrEnum
from fnmatch import fnmatchcase
from math import ceil
from typing import Literal

from pydantic import Field

from halora.errors import UserError, nearest
from halora.strict_model import StrictModel

OutlierKind = Literal["weight", "tile", "column", "singular"]
"""What goes to SRAM: the largest weights of the matrix, or of each tile; the inputs with the largest weights, whole;
or the leading singular part."""


class Placement(StrEnum):
    """Where a layer's frozen weights are kept and multiplied."""

    RRAM = "rram"
    SRAM = "sram"
    DIGITAL = "digital"
    HOST = "host"
    """Off the chip: computed as the model has it, and outside every total."""


LM_HEAD = "lm_head"
"""Canonical name of the output projection."""


class Outliers(StrictModel):
    """A small part of every matrix in RRAM that is kept in SRAM instead, so that the rest has a smaller full scale."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the weights; 0 for none. With 1 a layer is one of those in SRAM, like any other there."""
    by: OutlierKind = "weight"
    """What is taken out."""
    weight_bits: int = Field(default=8, ge=2, le=16)
    """Precision of the values in SRAM; 16 leaves them as they are."""


def outlier_count(d_in: int, d_out: int, share: float, by: OutlierKind, tile: tuple[int, int]) -> int:
    """How much of a matrix a share stands for: weights; with `column` whole inputs; with `singular` the rank.

    Args:
        d_in: Inputs of the layer.
        d_out: Its outputs.
        share: Share of its weights.
        by: What is taken out.
        tile: Rows (inputs) and columns (outputs) of a tile.
    """
    match by:
        case "weight":
            return round(share * d_in * d_out)
        case "tile":
            return sum(round(share * r * c) * n for r, c, n in _tile_sizes(d_in, d_out, *tile))
        case "column":
            return round(share * d_in)
        case "singular":
            return min(ceil(share * d_in * d_out / (d_in + d_out)), d_in, d_out)


def _tile_sizes(d_in: int, d_out: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Rows, columns and number of the tiles of each size: whole ones, and those cut at the matrix's ends."""
    heights = [(rows, d_in // rows), (d_in % rows, 1)]
    widths = [(columns, d_out // columns), (d_out % columns, 1)]
    return [(r, c, n * m) for r, n in heights for c, m in widths if r * c * n * m]


class Mapping(StrictModel):
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
    outliers: Outliers = Outliers()
    """What of the matrices in RRAM is kept in SRAM."""

    def places(self, sizes: MappingOf[str, int]) -> dict[str, Placement]:
        """The place of every layer.

        Args:
            sizes: Number of weights by canonical name, of the decoder blocks' linear layers and the output
                projection, in the order of the forward pass.

        Raises:
            UserError: Patterns that match no layer, or ranked names that are no layers; all at once.
        """
        host = {} if self.lm_head else {name: Placement.HOST for name in sizes if name == LM_HEAD}
        sizes = {name: size for name, size in sizes.items() if name not in host}
        patterns = {"sram": self.sram, "digital": self.digital}
        if self.ranking != "depth":
            patterns["ranking"] = self.ranking
        problems = [
            f"chip.mapping.{where}: {problem}"
            for where, group in patterns.items()
            for problem in matches_none(group, sizes, [*sizes, *host])
        ]
        if problems:
            raise UserError(problems)
        places = dict.fromkeys(sizes, Placement.RRAM)
        room = self.sram_fraction * sum(sizes.values())
        for name in self.ranked(sizes):
            if room <= 0:
                break
            if sizes[name] <= room:
                places[name] = Placement.SRAM
                room -= sizes[name]
        for place, group in ((Placement.SRAM, self.sram), (Placement.DIGITAL, self.digital)):
            places |= {name: place for name in sizes if any(fnmatchcase(name, pattern) for pattern in group)}
        return places | host

    def ranked(self, layers: Iterable[str]) -> list[str]:
        """Names of the ranked layers, most sensitive first, each once; `layers` come in the order of the pass."""
        layers = list(layers)
        if self.ranking == "depth":
            return layers
        found = (name for pattern in self.ranking for name in layers if fnmatchcase(name, pattern))
        return list(dict.fromkeys(found))


def matches_none(patterns: Iterable[str], present: Collection[str], known: Collection[str]) -> list[str]:
    """What is wrong with patterns that match none of the layers that are present on a chip, of all that are known."""
    return [
        f"'{pattern}' matches no layer{_hint(pattern, present, known)}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in present)
    ]


def _hint(pattern: str, present: Collection[str], known: Collection[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in known):
        return " of the chip: chip.mapping.lm_head puts the output projection there"
    return nearest(pattern, list(present))
