"""Frozen linear layers that read their weight from a simulated RRAM chip.

`install` replaces the linear layers of a base model once; afterwards a chip instance is put under the model with
`RramArray.program` and taken away with `clear`. The frozen weights are never written. There are two ways to hold what
the chip instance makes of them, with the same results: *materialise* keeps one noisy copy from the first forward that
needs it until the next `program`, for draws that last; *regenerate* makes it inside each forward and again inside the
backward, in memory that all layers share, for large models and for ZeRO-3, whose shards are whole only there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halora.errors import UserError
from halora.hardware.addressing import canonical_name
from halora.hardware.chip import Chip, Products, Tile
from halora.hardware.converter_model import ConverterModel
from halora.hardware.converters import ExactReads
from halora.hardware.draws import coarse_normal
from halora.hardware.families import LINEAR_NAMES, forward_order
from halora.hardware.instance import ChipInstance
from halora.hardware.layers import OnLayer
from halora.hardware.manufactured import Columns
from halora.hardware.mapping import LM_HEAD, Outliers, Placement
from halora.hardware.noise import Programming, noise_to_signal_db
from halora.hardware.outliers import SideMatrix, side_matrix
from halora.hardware.rounding import AS_IT_IS, rounded
from halora.training.attention import forget_attention_bits, is_attention, set_attention_bits
from halora.training.fused import Branch, FrozenLinear

Reads = ExactReads | ConverterModel
"""How a layer is read: every conversion carried out, or their statistical model."""


@dataclass
class _Wiring:
    """What every layer of one model shares: the chip instance under it and the rows in the current batch."""

    instance: ChipInstance | None = None
    regenerate: bool = False
    met: Mapping[str, OnLayer] = field(default_factory=dict)  # what each layer meets on it, by name
    reads: Mapping[str, Reads] = field(default_factory=dict)
    rows: Sequence[tuple[str, int]] = ()  # being read: id, number of tokens
    predicting: Sequence[tuple[str, int]] = ()  # the same for the output projection, which reads some tokens only
    forward: str = ""  # names a forward pass of rows that nobody has named
    digital: bool = False  # whether products outside RRAM have the chip's precision
    workspace: Tensor | None = None  # of the largest weight regenerated so far

    def room_for(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for a weight that is used before the next one is regenerated."""
        room, count = self.workspace, weight.numel()
        if room is None or room.numel() < count or room.dtype != dtype or room.device != weight.device:
            room = self.workspace = torch.empty(count, dtype=dtype, device=weight.device)
        return room[:count].view(weight.shape)


class RramLinear(FrozenLinear):
    """y = x W*^T with W* as the chip instance holds it, as its converters read it; the bias is added digitally.

    A layer that the chip's mapping keeps in SRAM or digital logic has its clean weight, and where the wiring says so
    the precision of the products there; so has a low-rank branch.
    """

    def __init__(self, linear: nn.Linear, name: str, wiring: _Wiring) -> None:
        super().__init__(linear)
        self.name = name
        self._wiring = wiring
        self._kept: Tensor | None = None
        self._spare: Tensor | None = None  # memory of the copy before
        self._apart: Tensor | None = None  # slices and replicas, where they are converted one by one
        self._columns: tuple[Columns | None] | None = None  # of the chip instance, once they are drawn
        self._programming: Programming | None = None
        self._known_side: tuple[tuple[Outliers, Tile], SideMatrix | None] | None = None  # with what it was made for

    def reprogram(self) -> None:
        """Have the next forward make the programmed copy anew, in the memory of this one."""
        if self._kept is not None and self._kept.data_ptr() != self.weight.data_ptr():
            self._spare = self._kept
        self._kept = self._apart = self._columns = None

    def forget(self) -> None:
        """Drop the programmed copy and its memory."""
        self._kept = self._spare = self._apart = self._columns = None

    @property
    def noisy(self) -> bool:
        """Whether a chip instance lies under the model and keeps this layer in RRAM."""
        return self._wiring.instance is not None and self._wiring.met[self.name].place is Placement.RRAM

    @property
    def _chip(self) -> Chip:
        """The chip under the model as this layer meets it."""
        return self._wiring.met[self.name].chip

    @property
    def _products(self) -> Products | None:
        """Precision of the frozen products, where they are rounded."""
        if self._wiring.instance is None or not self._wiring.digital:
            return None
        place, chip, _ = self._wiring.met[self.name]
        return {Placement.SRAM: chip.sram, Placement.DIGITAL: chip.digital}.get(place)

    @property
    def branch_bits(self) -> int:
        """That of the chip under the model, where it is scored."""
        instance = self._wiring.instance
        return instance.chip.lora.input_bits if instance is not None and self._wiring.digital else AS_IT_IS

    def effective_weight(self) -> Tensor:
        """The weight under the current chip instance; elsewhere the frozen weight, to the chip's bits if asked.

        A regenerated one lasts until another layer's is asked for.
        """
        if self._kept is not None:
            return self._kept
        if (products := self._products) is not None:
            weight = rounded(self.weight.detach(), products.weight_bits, dim=1).to(self.product_dtype)
            if not self._wiring.regenerate:
                self._kept = weight
            return weight
        if not self.noisy:
            return super().effective_weight()
        instance = self._wiring.instance
        assert instance is not None
        key = instance.key.at(module=self.name, purpose="programming")
        regenerate, dtype = self._wiring.regenerate, self.product_dtype
        with torch.no_grad():
            room = self._wiring.room_for(self.weight, dtype) if regenerate else self._spare
            rest, side = self.split(self._chip)
            weight = self._programmed(instance, rest).held(rest, key, dtype, into=room)
            if side is not None and self._side_apart is None:
                side.add_to(weight)
        if not regenerate:
            self._kept, self._spare = weight, None
        return weight

    def held_weight(self) -> Tensor:
        """The weight under the current chip instance, of RRAM and SRAM together."""
        weight, side = self.effective_weight(), self._side_apart
        if side is not None:
            weight = weight.clone()
            side.add_to(weight)
        return weight

    def split(self, chip: Chip) -> tuple[Tensor, SideMatrix | None]:
        """What a chip, as this layer meets it, programs into RRAM of the weight, and what it keeps of it in SRAM."""
        weight, side = self.weight.detach(), self._side(chip)
        return (weight, None) if side is None else (side.rest_of(weight), side)

    def _side(self, chip: Chip) -> SideMatrix | None:
        """What a chip keeps of the weight in SRAM; the last one again, for another chip that keeps the same."""
        wanted = chip.mapping.outliers, chip.tile
        if self._known_side is None or self._known_side[0] != wanted:
            self._known_side = wanted, side_matrix(self.weight.detach(), *wanted)
        return self._known_side[1]

    @property
    def _side_apart(self) -> SideMatrix | None:
        """The side matrix where it is multiplied separately: beside converters, or at the precision of SRAM."""
        apart = self._wiring.digital or self.name in self._wiring.reads
        return self._side(self._chip) if self.noisy and apart else None

    def _programmed(self, instance: ChipInstance, rest: Tensor) -> Programming:
        """The last one again, for another instance of the same chip."""
        known, chip, level = self._programming, self._chip, instance.level_at(self.name)
        if known is not None and known.chip == chip and known.noise.level == level:
            return known
        programming = Programming.of(rest, chip, level)
        small = programming.spread is None or programming.spread.numel() < self.weight.numel()
        self._programming = programming if small else None
        return programming

    def _copies(self) -> Tensor:
        """What slices and replicas hold, `(replicas, slices, d_out, d_in)`, see `Programming.copies`."""
        instance = self._wiring.instance
        assert instance is not None
        if self._chip.coding.copies == 1:
            return self.effective_weight()[None, None]
        if self._apart is not None:
            return self._apart
        key = instance.key.at(module=self.name, purpose="programming")
        with torch.no_grad():
            rest, _ = self.split(self._chip)
            copies = self._programmed(instance, rest).copies(rest, key)
        if not self._wiring.regenerate:
            self._apart = copies
        return copies

    def product(self, input: Tensor, branch: Branch | None = None) -> Tensor:
        """The product as it is read, and the branch's output, which is computed off the array."""
        reads = self._wiring.reads.get(self.name) if self.noisy else None
        products, bits = self._products, self.branch_bits
        side = self._side_apart
        if reads is None and products is None and side is None and bits >= AS_IT_IS:
            return super().product(input, branch)
        if reads is not None:
            product = self._read(input, reads)
        else:
            seen = input if products is None else rounded(input, products.input_bits, dim=-1)
            product = super().product(seen)
        if side is not None:
            side_bits = self._chip.sram.input_bits if self._wiring.digital else AS_IT_IS
            product = product + side.product(rounded(input, side_bits, dim=-1))
        return product if branch is None else product + branch.output(input, bits)

    def _read(self, input: Tensor, reads: Reads) -> Tensor:
        columns = self._drawn_columns()
        if isinstance(reads, ExactReads):
            return reads.product(input, self._copies(), self._read_noise, columns)
        driven = reads.drive(input, columns)
        product = super().product(driven.inputs)
        return reads.read(product, driven, self._read_noise(product))

    def _drawn_columns(self) -> Columns | None:
        """What the columns' ADCs of the chip instance err by, see `Columns`."""
        if self._columns is None:
            instance = self._wiring.instance
            assert instance is not None
            key = instance.key.at(module=self.name, purpose="programming")
            self._columns = (Columns.of(self._chip, key, self.weight),)
        return self._columns[0]

    def _read_noise(self, like: Tensor) -> Tensor:
        """Standard normal draws of one read, shaped as the product; the same for a row in any batch if it is named."""
        instance, outputs = self._wiring.instance, like.shape[-1]
        rows = self._wiring.predicting if self.name == LM_HEAD else self._wiring.rows
        read, longest = like.shape[:-1].numel(), like.shape[-2]
        if self._wiring.forward:
            rows = [(f"{self._wiring.forward}, row {i}", longest) for i in range(read // longest)]
        assert instance is not None
        assert sum(tokens for _, tokens in rows) == read, "name the rows read with RramArray.reading"
        draws = [
            coarse_normal(instance.key.at(module=self.name, purpose="read", example=row_id), (tokens, outputs))
            for row_id, tokens in rows
        ]
        return torch.from_numpy(np.concatenate(draws)).to(like.device).view(like.shape)


class RramArray:
    """All RRAM layers of one base model."""

    def __init__(
        self,
        layers: Sequence[RramLinear],
        wiring: _Wiring,
        attentions: Sequence[nn.Module] = (),
        replaced: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.layers = layers
        self._wiring = wiring
        self._attentions = attentions
        self._replaced = replaced or {}

    def program(
        self,
        instance: ChipInstance,
        reads: Mapping[str, Reads] | None = None,
        *,
        regenerate: bool = False,
        digital: bool = False,
        alone: str | None = None,
    ) -> None:
        """Put a chip instance under the model.

        Args:
            instance: The chip, its address and the level of its noise.
            reads: How each layer is read, by name; none for plain products of the programmed weights.
            regenerate: Make the noisy weights inside every pass instead of keeping a copy.
            digital: Compute what is not in RRAM (other layers, low-rank branches, attention) at the chip's precision,
                as it is scored; no gradient passes the rounding, so training leaves it out.
            alone: The one layer to put on the chip; all others are then computed as the model has them.

        Raises:
            UserError: The chip's mapping names layers that the model has not.
        """
        self._wiring.instance = None
        self._wiring.met = {
            name: layer if alone in (None, name) else layer._replace(place=Placement.HOST)
            for name, layer in self.on_layers(instance.chip).items()
        }
        self._wiring.digital = digital
        for layer in self.layers:
            if regenerate:
                layer.forget()
            else:
                layer.reprogram()
        self._wiring.instance = instance
        self._wiring.reads = {} if reads is None else reads  # which may grow
        self._wiring.regenerate = regenerate
        set_attention_bits(self._attentions, instance.chip.attention.bits if digital else AS_IT_IS)

    def on_layers(self, chip: Chip) -> dict[str, OnLayer]:
        """Where the chip has every layer, and what it is there."""
        return chip.on_layers({layer.name: layer.in_features * layer.out_features for layer in self.layers})

    def mapped(self, chip: Chip) -> list[RramLinear]:
        """The layers that are on the chip, in the order of the forward pass."""
        met = self.on_layers(chip)
        return [layer for layer in self.layers if met[layer.name].place is not Placement.HOST]

    def clear(self) -> None:
        """Take the chip away: the model computes with its clean weights, and no copy of them is kept."""
        self._wiring.instance = self._wiring.workspace = None
        self._wiring.reads = {}
        set_attention_bits(self._attentions, AS_IT_IS)
        for layer in self.layers:
            layer.forget()

    def materialise(self) -> None:
        """Make the copies of all programmed layers now, on all threads, instead of in the first forward."""
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(RramLinear.effective_weight, [layer for layer in self.layers if layer.noisy]))

    @contextmanager
    def reading(self, rows: Sequence[tuple[str, int]], predicting: Sequence[tuple[str, int]] = ()) -> Iterator[None]:
        """Name the rows of the batch about to be read, end to end.

        Args:
            rows: Id and number of tokens of each.
            predicting: Id and number (one) of each token that the output projection reads, see `Batch.predicting`.
        """
        self._wiring.rows, self._wiring.predicting = rows, predicting
        try:
            yield
        finally:
            self._wiring.rows = self._wiring.predicting = ()

    def name_forward(self, name: str) -> None:
        """Name the forward pass that is about to begin, whose rows have no names of their own."""
        self._wiring.forward = name

    def remove_from(self, causal_lm: Any) -> None:
        """Take the chip away, and give the model back the very layers that `install` replaced."""
        self.clear()
        for module in self._attentions:
            forget_attention_bits(module)
        for name, layer in self._replaced.items():
            causal_lm.set_submodule(name, layer)

    @contextmanager
    def watching_inputs(self, seen: Callable[[RramLinear, Tensor], None]) -> Iterator[None]:
        """Call `seen(layer, input)` for every layer read inside the block."""
        handles = [layer.register_forward_pre_hook(lambda module, args: seen(module, args[0])) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def noise_db(self) -> dict[str, float]:
        """Realised noise-to-signal ratio of the programmed weights in dB, by name of the layers in RRAM."""
        return {
            layer.name: noise_to_signal_db(layer.weight, layer.held_weight()) for layer in self.layers if layer.noisy
        }


def install(causal_lm: Any) -> RramArray:
    """Make every linear layer of the decoder blocks, and the output projection, one that a chip can hold, in place.

    They are in the order of the forward pass, in which modules need not be: so a chip's mapping ranks them.

    Raises:
        UserError: The model has no linear layer with a known name.
    """
    wiring = _Wiring()
    linears = {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and canonical_name(name).rpartition(".")[2] in (*LINEAR_NAMES, LM_HEAD)
    }
    if not linears:
        raise UserError(f"the model has no linear layers named {', '.join(LINEAR_NAMES)}")
    layers = []
    for name, linear in linears.items():
        layer = RramLinear(linear, canonical_name(name), wiring)
        causal_lm.set_submodule(name, layer)
        layers.append(layer)
    layers.sort(key=lambda layer: forward_order(layer.name))
    attentions = [module for module in causal_lm.modules() if is_attention(module)]
    return RramArray(layers, wiring, attentions, linears)
