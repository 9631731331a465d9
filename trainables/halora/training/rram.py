"""Frozen linear layers that read their weight from a simulated RRAM chip.

`install` replaces the linear layers of a base model once; afterwards a chip instance is put under the model with
`RramArray.program` and taken away with `clear`. The frozen weights are never written. There are two ways to hold what
the chip instance makes of them, with the same results: *materialise* keeps one noisy copy from the first forward that
needs it until the next `program`, for draws that last; *regenerate* makes it inside each forward and again inside the
backward, without a copy, for draws that change every step and for ZeRO-3, whose shards are whole only there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halora.errors import UserError
from halora.hardware.addressing import canonical_name
from halora.hardware.chip import Chip
from halora.hardware.converters import ConverterModel, ExactReads
from halora.hardware.instance import ChipInstance
from halora.hardware.mapping import Place
from halora.hardware.noise import noise_to_signal_db, programmed_weight
from halora.training.config import LINEAR_NAMES

Reads = ExactReads | ConverterModel
"""How a layer is read: every conversion carried out, or their statistical model."""


Sequences = Sequence[Sequence[tuple[str, int]]]
"""The rows (id, number of tokens) of each sequence of a batch, in order."""


@dataclass
class _Wiring:
    """What every layer of one model shares: the chip instance under it and the rows in the current batch."""

    instance: ChipInstance | None = None
    regenerate: bool = False
    places: Mapping[str, Place] = field(default_factory=dict)
    reads: Mapping[str, Reads] = field(default_factory=dict)
    sequences: Sequences = ()  # the rows being read


class RramLinear(nn.Linear):
    """y = x W*^T with W* as the chip instance holds it, as its converters read it; the bias is added digitally.

    A layer that the chip's mapping keeps in SRAM or digital logic computes with its clean weight.
    """

    def __init__(self, linear: nn.Linear, name: str, wiring: _Wiring) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name
        self._wiring = wiring
        self._kept: Tensor | None = None

    def forget(self) -> None:
        """Drop the programmed copy; the next forward makes it anew."""
        self._kept = None

    @property
    def noisy(self) -> bool:
        """Whether a chip instance lies under the model and keeps this layer in RRAM."""
        return self._wiring.instance is not None and self._wiring.places[self.name] is Place.RRAM

    def programmed(self) -> Tensor:
        """The weight under the current chip instance; the frozen weight itself where it is not in RRAM."""
        if not self.noisy:
            return self.weight
        if self._kept is not None:
            return self._kept
        instance = self._wiring.instance
        assert instance is not None
        with torch.no_grad():
            weight = programmed_weight(
                self.weight.detach(),
                instance.chip,
                instance.key.at(module=self.name, purpose="programming"),
                instance.level_at(self.name),
            )
        if not self._wiring.regenerate:
            self._kept = weight
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Input (batch, tokens, in_features) -> (batch, tokens, out_features)."""
        reads = self._wiring.reads.get(self.name) if self.noisy else None
        if reads is None:
            return self._product(input, self.bias)
        if isinstance(reads, ExactReads):
            product = reads.product(input, self.programmed(), self._read_noise)
        else:
            driven = reads.drive(input)
            product = self._product(driven.inputs, None)
            product = reads.read(product, driven, self._read_noise(product))
        return product if self.bias is None else product + self.bias

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if self.noisy and self._wiring.regenerate:
            return cast(Tensor, _RegeneratedProduct.apply(input, bias, self))
        return F.linear(input, self.programmed(), bias)

    def _read_noise(self, like: Tensor) -> Tensor:
        """Zero-mean unit-variance noise of one read, shaped (batch, tokens, out_features).

        Uniform over 256 levels, as quantisation errors are; the same for a row whatever batch it is in.
        """
        instance, sequences = self._wiring.instance, self._wiring.sequences
        assert instance is not None
        assert len(sequences) == like.shape[0], "set the rows of the batch with RramArray.reading"
        levels = np.full(like.shape, 128, dtype=np.uint8)
        for i, rows in enumerate(sequences):
            start = 0
            for row_id, tokens in rows:
                key = instance.key.at(module=self.name, purpose="adc", example=row_id)
                levels[i, start : start + tokens] = key.uniform_bytes((tokens, self.out_features))
                start += tokens
        return (torch.from_numpy(levels).to(like) - 127.5).div_(sqrt((256**2 - 1) / 12))


class _RegeneratedProduct(torch.autograd.Function):
    """x W*^T, with W* made in the forward and made again in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: RramLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.programmed(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.programmed(), None, None


class RramArray:
    """All RRAM layers of one base model."""

    def __init__(self, layers: Sequence[RramLinear], wiring: _Wiring) -> None:
        self.layers = layers
        self._wiring = wiring

    def program(
        self,
        instance: ChipInstance,
        reads: Mapping[str, Reads] | None = None,
        *,
        regenerate: bool = False,
    ) -> None:
        """Put a chip instance under the model.

        Args:
            instance: The chip, its address and the level of its noise.
            reads: How each layer is read, by name; none for plain products of the programmed weights.
            regenerate: Make the noisy weights inside every pass instead of keeping a copy.

        Raises:
            UserError: The chip's mapping names layers that the model has not.
        """
        self.clear()
        self._wiring.places = self.places(instance.chip)
        self._wiring.instance = instance
        self._wiring.reads = reads or {}
        self._wiring.regenerate = regenerate

    def places(self, chip: Chip) -> dict[str, Place]:
        """Where the chip's mapping puts every layer."""
        return chip.mapping.places({layer.name: layer.in_features * layer.out_features for layer in self.layers})

    def clear(self) -> None:
        """Take the chip away: the model computes with its clean weights, and no copy of them is kept."""
        self._wiring.instance = None
        self._wiring.reads = {}
        for layer in self.layers:
            layer.forget()

    @contextmanager
    def reading(self, sequences: Sequences) -> Iterator[None]:
        """Name the rows of the batch about to be read."""
        self._wiring.sequences = sequences
        try:
            yield
        finally:
            self._wiring.sequences = ()

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
            layer.name: noise_to_signal_db(layer.weight, layer.programmed()) for layer in self.layers if layer.noisy
        }


def install(causal_lm: Any) -> RramArray:
    """Make every linear layer of the decoder blocks one that a chip can hold, in place.

    Raises:
        UserError: The model has no linear layer with a known name.
    """
    wiring = _Wiring()
    linears = {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEAR_NAMES
    }
    if not linears:
        raise UserError(f"the model has no linear layers named {', '.join(LINEAR_NAMES)}")
    layers = []
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        layer = RramLinear(linear, canonical_name(name), wiring)
        setattr(causal_lm.get_submodule(parent), child, layer)
        layers.append(layer)
    return RramArray(layers, wiring)
