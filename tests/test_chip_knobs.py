"""Oracle: physics' sign. Every chip knob costs energy and buys accuracy, on SmolLM2's own weights and activations."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip, load_chip, merge
from halora.hardware.energy import energy_per_token
from halora.hardware.instance import ChipInstance
from halora.trainable import task_rows
from halora.training.adapter import rounded
from halora.training.batches import Batch, lay_out, pack_answer
from halora.training.config import LoraSettings
from halora.training.models import BaseModel, load_base
from halora.training.reads import ConverterMode, calibrate
from halora.training.rram import RramArray, install

CHIP = {
    "preset": "halora-2026",
    "noise": {"kind": "wan-2022", "strength": 0.15},
    "coding": {"scale": "channel_max"},
    "write_verify": {"pulses": 8.52, "reference_pulses": 8.52},
    "retention": {"refresh_interval_s": 86_400.0},
    "cells": {"read_time_ns": 0.02},
    "read": {"white_us": 0.5, "thermal": True},
    "boundary": {"programming": True},
}
"""A chip on which every imperfection is large enough to be seen beside the others."""


def _at(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


TOKENS = 64

KNOBS = [  # path, cheap, dear
    ("adc.bits", 5, 8),
    ("dac.input_bits", 4, 8),
    ("dac.input_bits", 8, 16),
    ("dac.bits", 8, 4),
    ("dac.bits", 4, 1),
    ("tile.rows", 512, 64),
    ("read.averaged", 1, 4),
    ("coding.slices", 1, 2),
    ("coding.replicas", 1, 4),
    ("write_verify.pulses", 1.0, 20.0),
    ("cells.read_time_ns", 0.01, 1.0),
    ("mapping.sram_fraction", 0.0, 0.5),
    ("retention.refresh_interval_s", 100_000.0, 10.0),
]


@dataclass(frozen=True)
class _Blocks:
    """The first decoder block of SmolLM2 with real tokens."""

    base: BaseModel
    array: RramArray
    batches: list[Batch]

    @torch.no_grad()
    def outputs(self) -> torch.Tensor:
        """Hidden states after the block, (tokens, hidden)."""
        hidden = []
        for batch in self.batches:
            with self.array.reading(batch.rows):
                hidden.append(batch.hidden(self.base.causal_lm)[0])
        return torch.cat(hidden)

    def error(self, chip: Chip, converters: ConverterMode = "exact") -> float:
        """Relative error of the outputs on one chip instance."""
        self.array.clear()
        clean = self.outputs()
        reads = calibrate(self.base, self.array, chip, task_rows("arc-easy", "train", 64), TOKENS, converters)
        key = NoiseKey(role=Role.SEARCH, chip_seed=0)
        self.array.program(ChipInstance(chip, key, chip.noise.level), reads)
        error = self.outputs() - clean
        self.array.clear()
        return (error.norm() / clean.norm()).item()


@pytest.fixture(scope="module")
def blocks() -> _Blocks:
    """SmolLM2 cut to its first block."""
    base = load_base("smollm2-135m-instruct", "fp32")
    del base.causal_lm.model.layers[1:]
    rows = task_rows("arc-easy", "validation", 2)
    return _Blocks(base, install(base.causal_lm), [lay_out([pack_answer(row, base.tokenizer)]) for row in rows])


def _energy(chip: Chip, base: BaseModel) -> float:
    targets = LoraSettings().targets
    return energy_per_token(base.shape, chip, rank=8, targets=targets, context_tokens=128).total_uj_per_token


@pytest.mark.parametrize(("path", "cheap", "dear"), KNOBS, ids=[knob[0] for knob in KNOBS])
def test_a_knob_costs_energy_and_buys_accuracy(blocks, path, cheap, dear):
    cheap_chip, dear_chip = (load_chip(merge(CHIP, _at(path, value))) for value in (cheap, dear))
    assert _energy(dear_chip, blocks.base) > _energy(cheap_chip, blocks.base)
    cheap_error, dear_error = blocks.error(cheap_chip), blocks.error(dear_chip)
    print(f"{path}: {cheap} -> {dear}: error {cheap_error:.3f} -> {dear_error:.3f}")
    assert dear_error < 0.97 * cheap_error


FINER_INPUTS = [(8, 8), (8, 4), (8, 1)], [(8, 8), (16, 8)]  # input_bits, bits driven at once


@pytest.mark.parametrize("steps", FINER_INPUTS, ids=str)
def test_more_conversions_of_an_input_never_raise_the_error(blocks, steps):
    """On the paper's chip, whose ADC has 8 bits: its error rose from 0.180 to 0.218, and to 0.264 with 16 bits."""
    chips = [load_chip({"preset": "halora-2026", "dac": {"input_bits": i, "bits": b}}) for i, b in steps]
    energies = [_energy(chip, blocks.base) for chip in chips]
    assert energies == sorted(energies)
    errors = [blocks.error(chip) for chip in chips]
    print(dict(zip(steps, zip(errors, energies, strict=True), strict=True)))
    assert errors == sorted(errors, reverse=True)
    modelled = [blocks.error(chip, "statistical") for chip in chips]
    assert modelled == pytest.approx(errors, rel=0.03)


def test_lora_precision_costs_energy_and_buys_accuracy(blocks):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 576, generator=generator), torch.randn(192, 8, generator=generator)
    errors, energies = [], []
    for bits in (3, 8):
        errors.append((rounded(b, bits, dim=0) @ rounded(a, bits, dim=1) - b @ a).norm().item())
        energies.append(_energy(load_chip(merge(CHIP, {"lora": {"weight_bits": bits}})), blocks.base))
    assert errors[1] < errors[0] / 10
    assert energies[1] > energies[0]
