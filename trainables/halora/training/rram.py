"""Frozen linear layers that read their weight from a simulated RRAM chip.

`install` replaces the mapped linear layers of a base model once; afterwards a chip instance is put under the model with
`RramArray.program` and taken away with `clear`. The frozen weights are never written. The programmed copy is made
inside the first forward that needs it, which is where a ZeRO-3 shard is whole, and kept until the next `program`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, canonical_name
from halora.hardware.chip import Chip
from halora.hardware.converters import ConverterModel
from halora.hardware.noise import noise_to_signal_db, programmed_weight
from halora.training.config import LINEAR_NAMES


@dataclass(frozen=True)
class ChipInstance:
    """One programmed chip: its description, its address and the sigma it was programmed with."""

    chip: Chip
    key: NoiseKey
    sigma: float


@dataclass
class _Wiring:
    """What every layer of one model shares: the chip instance under it and the rows in the current batch."""

    instance: ChipInstance | None = None
    converters: Mapping[str, ConverterModel] = field(default_factory=dict)
    examples: Sequence[tuple[str, int]] = ()  # (row id, number of tokens) of each sequence in the batch


class RramLinear(nn.Linear):
    """y = x W*^T with W* as the chip instance holds it, then the converters' error; the bias is added digitally."""

    def __init__(self, linear: nn.Linear, name: str, wiring: _Wiring) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name
        self._wiring = wiring
        self._programmed: Tensor | None = None

    def forget(self) -> None:
        """Drop the programmed copy; the next forward makes it anew."""
        self._programmed = None

    def programmed(self) -> Tensor:
        """The weight under the current chip instance; the frozen weight itself without one."""
        instance = self._wiring.instance
        if instance is None:
            return self.weight
        if self._programmed is None:
            key = instance.key.at(module=self.name, purpose="programming")
            with torch.no_grad():
                self._programmed = programmed_weight(self.weight.detach(), instance.chip, key, instance.sigma)
        return self._programmed

    def forward(self, input: Tensor) -> Tensor:
        """Input (batch, tokens, in_features) -> (batch, tokens, out_features)."""
        converter = self._wiring.converters.get(self.name)
        if converter is None:
            return F.linear(input, self.programmed(), self.bias)
        scaled, error = converter.split(input)
        product = F.linear(scaled, self.programmed(), self.bias)
        return torch.addcmul(product, self._read_noise(product), error)

    def _read_noise(self, like: Tensor) -> Tensor:
        """Zero-mean unit-variance noise of one read, shaped (batch, tokens, out_features).

        Uniform over 256 levels, as quantisation errors are; the same for a row whatever batch it is in.
        """
        instance, examples = self._wiring.instance, self._wiring.examples
        assert instance is not None
        assert len(examples) == like.shape[0], "set the rows of the batch with RramArray.reading"
        levels = np.full(like.shape, 128, dtype=np.uint8)
        for i, (row_id, tokens) in enumerate(examples):
            key = instance.key.at(module=self.name, purpose="adc", example=row_id)
            levels[i, :tokens] = key.uniform_bytes((tokens, self.out_features))
        return (torch.from_numpy(levels).to(like) - 127.5).div_(sqrt((256**2 - 1) / 12))


class RramArray:
    """All RRAM layers of one base model."""

    def __init__(self, layers: Sequence[RramLinear], wiring: _Wiring) -> None:
        self.layers = layers
        self._wiring = wiring

    def program(self, instance: ChipInstance, converters: Mapping[str, ConverterModel] | None = None) -> None:
        """Put a chip instance under the model, with converter models by layer name (none: exact converters)."""
        self.clear()
        self._wiring.instance = instance
        self._wiring.converters = converters or {}

    def clear(self) -> None:
        """Take the chip away: the model computes with its clean weights, and no copy of them is kept."""
        self._wiring.instance = None
        self._wiring.converters = {}
        for layer in self.layers:
            layer.forget()

    @contextmanager
    def reading(self, examples: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Name the rows (id, number of tokens) of the batch about to be read."""
        self._wiring.examples = examples
        try:
            yield
        finally:
            self._wiring.examples = ()

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
        """Realised noise-to-signal ratio of the programmed weights in dB, by layer name."""
        return {layer.name: noise_to_signal_db(layer.weight, layer.programmed()) for layer in self.layers}


def install(causal_lm: Any) -> RramArray:
    """Map every linear layer of the decoder blocks to RRAM, in place.

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
