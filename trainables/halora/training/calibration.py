"""Calibration: how every layer's converters are set, on the inputs that the clean model gives them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from halora.hardware.chip import Chip
from halora.hardware.converter_model import fit_converters
from halora.hardware.converters import ExactReads, reads_are_exact
from halora.hardware.mapping import Placement
from halora.hardware.read_noise import ReadNoise, read_noise
from halora.training.batches import PackedRow, lay_out, pack_answer
from halora.training.models import BaseModel
from halora.training.rram import Reads, RramArray, RramLinear
from halora.training.tasks import Row

ConverterMode = Literal["exact", "statistical"]
"""Carry out every conversion, or draw their errors from the model."""


@torch.no_grad()
def calibrate(
    base: BaseModel, array: RramArray, chip: Chip, rows: Sequence[Row], num_tokens: int, converters: ConverterMode
) -> dict[str, Reads]:
    """How every layer in RRAM is read, its converters set on the first tokens of `rows`; empty for perfect reads."""
    if reads_are_exact(chip):
        return {}
    taken: list[PackedRow] = []
    for row in rows:
        taken.append(pack_answer(row, base.tokenizer))
        if sum(len(row.tokens) for row in taken) >= num_tokens:
            break
    batch, reads = lay_out(taken), dict[str, Reads]()
    with setting_converters(array, chip, converters, reads, num_tokens):
        hidden = batch.hidden(base.causal_lm)
        if chip.mapping.lm_head:
            base.causal_lm.get_output_embeddings()(hidden)
    return reads


def setting_converters(
    array: RramArray, chip: Chip, converters: ConverterMode, reads: dict[str, Reads], num_tokens: int
) -> AbstractContextManager[None]:
    """While it is entered, set how a layer in RRAM is read when it gets its first input, before it is read.

    Args:
        array: The layers.
        chip: Their chip.
        converters: See `ConverterMode`.
        reads: Filled, by name of the layer; what it holds already stays.
        num_tokens: Tokens of the input to set a layer's converters on at most.
    """
    met = array.on_layers(chip)
    fitted = ExactReads.calibrated if converters == "exact" else fit_converters

    @torch.no_grad()
    def fit(layer: RramLinear, x: Tensor) -> None:
        place, own, _ = met[layer.name]
        if layer.name not in reads and place is Placement.RRAM:
            seen = x.flatten(0, -2)[:num_tokens].float()
            reads[layer.name] = fitted(seen, layer.split(own)[0].float(), own)

    return array.watching_inputs(fit)


@torch.no_grad()
def at_age(reads: Mapping[str, Reads], array: RramArray, chip: Chip) -> dict[str, Reads]:
    """The reads of the same chip at the age of `chip`: converters stay as they are set, read noise may grow."""
    if chip.read.slow == "none":
        return dict(reads)
    met = array.on_layers(chip)

    def noise(layer: RramLinear) -> ReadNoise | None:
        own = met[layer.name].chip
        return read_noise(layer.split(own)[0].float(), own)

    return {layer.name: replace(reads[layer.name], noise=noise(layer)) for layer in array.layers if layer.name in reads}
