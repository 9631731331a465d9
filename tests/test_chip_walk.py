"""Oracle: physics' sign. Every field of the chip's description says what it does to the energy, to the time of a
token, to the area and to the error of real products, or why one of them has no sign; all of them, on every shipped
chip, with SmolLM2's weights and tokens.

A new field fails `test_every_field_is_declared` until it is in `FIELDS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isclose
from typing import Any, get_args

import pydantic
import pytest
import torch

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import LAYER_FIELDS, Chip, load_chip
from halora.hardware.chip_files import merge, preset_names
from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.hardware.instance import ChipInstance
from halora.hardware.layers import dotted
from halora.hardware.mapping import Placement
from halora.hardware.noise_settings import _model, noise_kinds
from halora.hardware.rounding import rounded
from halora.hardware.shapes import ModelShape, known_shape
from halora.settings.training import LoraSettings
from halora.spaces.ranked import FINER
from halora.training.adapter import attach, lora_pairs
from halora.training.batches import Batch, lay_out, pack_answer
from halora.training.calibration import calibrate
from halora.training.models import BaseModel, load_base
from halora.training.rram import RramArray, install
from halora.trial_runner import task_rows

WAN = {"kind": "wan-2022", "strength": 0.15}
CHIP = {
    "preset": "halora-2026",
    "noise": WAN,
    "coding": {"scale": "channel_max"},
    "write_verify": {"pulses": 8.52, "reference_pulses": 8.52},
    "cells": {"read_time_ns": 0.02},
    "read": {"white_us": 0.5},
}
"""A chip on which every imperfection is large enough to be seen beside the others."""

UP, DOWN, NONE = 1, -1, 0
_SIGNS = {UP: "up", DOWN: "down", NONE: "none"}


@dataclass(frozen=True)
class Walk:
    """What a field does when it goes from `low` to `high`.

    Attributes:
        low: A value.
        high: Another.
        energy: Sign of the energy's change; without one, `why` says why none can be said.
        error: Sign of the error's change; likewise.
        why: Why a side is `NONE` or cannot be said.
        where: What the chip is set to besides, so that the field acts.
        latency: Sign of the change of a token's path, nothing else on the chip and all of it on one die. None where
            `why` says that none can be said.
        area: Sign of the area's change; likewise.
        energy_of: Presets whose energy changes the other way, for the reason given.
        latency_of: Presets whose time changes otherwise, for the reason given.
        area_of: Presets whose area changes otherwise, for the reason given.
        head: Look at the logits, not at the block's output.
        chips: Chip instances over which the error's power is averaged.
    """

    low: Any
    high: Any
    energy: int | None
    error: int | None
    why: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    latency: int | None = NONE
    area: int | None = NONE
    energy_of: dict[str, int] = field(default_factory=dict)
    latency_of: dict[str, int] = field(default_factory=dict)
    area_of: dict[str, int] = field(default_factory=dict)
    head: bool = False
    chips: tuple[int, ...] = (0,)


FREE = "a property of the cells, not an effort"
DEAR_CELLS = dict.fromkeys(("neurram-2022", "isaac"), DOWN)  # a product in RRAM takes 3 to 6 times that in SRAM there
SAME_WAIT = dict.fromkeys(("ideal", "neurram-2022"), NONE)
"""The LoRA branch is what a token waits for there, at 16 bits, or beside reads of 2 ns, wherever the weights are.
Of NeuRRAM's layers without one, some are faster in RRAM than an SRAM macro's pass of 20 ns."""
SERIAL = dict.fromkeys(
    ("cmo-hfox", *(name for name in preset_names() if name.startswith(("halora", "ideal", "rram", "pcm")))), NONE
)
"""They drive all bits at once."""
AFTER = {"pipeline": {"branch": "after"}}
OUTSIDE = {"mapping": {"sram": ["*.mlp.*"]}}
LOGIC = {"mapping": {"digital": ["*.mlp.*"]}}
QUIET = {
    "noise": {"strength": 0.0},
    "read": {"white_us": 0.0, "thermal": False},
    "dac": {"lossless": True},
    "adc": {"lossless": True},
    "wires": {"resistance_ohm": 0.0},
    "attention": {"bits": 16},
}
"""Nothing but the roundings of SRAM and digital logic: those of a small branch are lost beside other errors."""
DRIFT = {"kind": "power-law", "nu_mean": 0.05, "nu_std": 0.02}
DRIFTING = {"retention": {"ageing": DRIFT, "refresh_interval_s": 1e5}, "noise": WAN}
STUCK = {"faults": {"stuck_low_rate": 0.02, "stuck_high_rate": 0.02}}
WARM = {"temperature": {"kelvin": 400.0}}
GAUSSIAN = {"noise": {"kind": "gaussian", "sigma": 0.02, "reference": "tensor_max"}}
TILES = {"noise": GAUSSIAN["noise"] | {"reference": "tile_max"}, "coding": {"scale": "tile_max"}}
MILO = {"noise": {"kind": "milo"}, "cells": {"g_min_us": 50.0, "g_max_us": 225.0}}
CMO = {"noise": {"kind": "cmo"}, "cells": {"g_min_us": 9.0, "g_max_us": 88.2}, "read": {"white_us": 0.0}}
PCM = {
    "noise": {"kind": "pcm"},
    "cells": {"g_min_us": 0.5, "g_max_us": 20.0},
    "read": {"white_us": 0.0},
}
DRIFTED = merge(PCM, {"retention": {"ageing": {"kind": "pcm-drift"}, "refresh_interval_s": 86400.0}})
RELAXED = merge(CMO, {"retention": {"ageing": {"kind": "cmo-relaxation"}, "refresh_interval_s": 86400.0}})
STATES = [{"conductance_us": g, "mean_us": g, "std_us": 1.0, "time_s": 1.0} for g in (0.0, 60.0)]
NOISIER = [state | {"std_us": 3.0} for state in STATES]
MEASURED = {"noise": {"kind": "measured", "states": STATES, "extrapolate": True}}
COARSE = {"layers": {"group": {"match": "*", "adc": {"bits": 5}}}}
PERMISSION = "a permission to compute beyond what was measured"
LABEL = "a name"

FIELDS: dict[str, Walk] = {
    "name": Walk("a", "b", NONE, NONE, LABEL),
    "mapping.lm_head": Walk(False, True, UP, UP, head=True, latency=UP, area=UP),
    "mapping.sram": Walk([], ["*.mlp.*"], UP, DOWN, energy_of=DEAR_CELLS, latency=DOWN, area=UP, latency_of=SAME_WAIT),
    "mapping.digital": Walk([], ["*.mlp.*"], UP, DOWN, latency=UP, area=UP),
    "mapping.sram_fraction": Walk(
        0.0, 0.5, UP, DOWN, energy_of=DEAR_CELLS, latency=DOWN, area=UP, latency_of={"neurram-2022": UP}
    ),
    "mapping.ranking": Walk(
        "depth",
        ["*.v_proj", "*.k_proj"],
        None,
        None,
        "which layers, not how many",
        {"mapping": {"sram_fraction": 0.3}},
        latency=None,
        area=None,
    ),
    "mapping.outliers.share": Walk(0.0, 0.002, UP, DOWN, area=UP),
    "mapping.outliers.by": Walk(
        "column",
        "weight",
        UP,
        DOWN,
        where={"mapping": {"outliers": {"share": 0.002}}},
        area=UP,
        latency_of={"neurram-2022": DOWN},
    ),
    "mapping.outliers.weight_bits": Walk(
        2,
        8,
        UP,
        None,
        "what rounding takes stays in RRAM, whose full scale bears it",
        {"mapping": {"outliers": {"share": 0.002}}},
        area=UP,
    ),
    "cells.g_min_us": Walk(9.0, 20.0, UP, UP),
    "cells.g_max_us": Walk(12.0, 24.0, UP, DOWN),
    "cells.levels": Walk(4, 64, None, DOWN, "rounding moves the mean conductance either way by a little"),
    "cells.read_voltage_v": Walk(0.03, 0.3, UP, DOWN),
    "cells.read_time_ns": Walk(0.001, 1.0, UP, DOWN, latency=UP),
    "cells.mean_fill": Walk(0.05, 0.9, UP, UP, where={"tile": {"rows": 256}, "wires": {"resistance_ohm": 5.0}}),
    "coding.scale": Walk("tensor_max", "channel_max", UP, DOWN),
    "coding.clip_std": Walk(
        6.0, 2.5, UP, None, "clipping errs and noise falls: least in between", {"coding": {"scale": "tensor_max"}}
    ),
    "coding.slices": Walk(1, 2, UP, DOWN, latency=UP, area=UP),
    "coding.slice_ratio": Walk(
        2.0, 8.0, None, DOWN, "finite levels fill later slices by what they leave over", {"coding": {"slices": 2}}
    ),
    "coding.replicas": Walk(1, 4, UP, DOWN, latency=UP, area=UP),
    "noise[gaussian].kind": Walk("gaussian", "gaussian", NONE, NONE, LABEL, GAUSSIAN),
    "noise[gaussian].sigma": Walk(0.005, 0.02, NONE, UP, FREE, GAUSSIAN),
    "noise[gaussian].reference": Walk("std", "tensor_max", NONE, UP, FREE, GAUSSIAN),
    "noise[wan-2022].kind": Walk("wan-2022", "wan-2022", NONE, NONE, LABEL),
    "noise[wan-2022].strength": Walk(0.05, 0.3, NONE, UP, FREE),
    "noise[wan-2022].g_max_us": Walk(20.0, 80.0, NONE, UP, FREE, {"noise": {"extrapolate": True}}),
    "noise[wan-2022].extrapolate": Walk(False, True, NONE, NONE, PERMISSION),
    "noise[milo].kind": Walk("milo", "milo", NONE, NONE, LABEL, MILO),
    "noise[milo].strength": Walk(0.5, 4.0, NONE, UP, FREE, MILO),
    "noise[milo].extrapolate": Walk(False, True, NONE, NONE, PERMISSION, MILO),
    "noise[cmo].kind": Walk("cmo", "cmo", NONE, NONE, LABEL, CMO),
    "noise[cmo].strength": Walk(1.0, 10.0, NONE, UP, FREE, CMO),
    "noise[cmo].acceptance_percent": Walk(2.0, 0.2, UP, DOWN, where=merge(CMO, {"noise": {"strength": 5.0}})),
    "noise[cmo].extrapolate": Walk(False, True, NONE, NONE, PERMISSION, CMO),
    "noise[pcm].kind": Walk("pcm", "pcm", NONE, NONE, LABEL, PCM),
    "noise[pcm].strength": Walk(0.5, 4.0, NONE, UP, FREE, PCM),
    "noise[pcm].fit": Walk("pcm-like", "hermes-2", NONE, UP, FREE, PCM),
    "noise[pcm].g_max_us": Walk(20.0, 80.0, NONE, UP, FREE, PCM),
    "noise[pcm].extrapolate": Walk(False, True, NONE, NONE, PERMISSION, PCM),
    "noise[measured].kind": Walk("measured", "measured", NONE, NONE, LABEL, MEASURED),
    "noise[measured].strength": Walk(0.5, 3.0, NONE, UP, FREE, MEASURED),
    "noise[measured].states": Walk(STATES, NOISIER, NONE, UP, FREE, MEASURED),
    "noise[measured].extrapolate": Walk(True, True, NONE, NONE, PERMISSION, MEASURED),
    "write_verify.pulses": Walk(1.0, 20.0, UP, DOWN),
    "write_verify.reference_pulses": Walk(1.0, 20.0, NONE, UP, "the pulses that the noise model's figures are for"),
    "write_verify.pulse_energy_pj": Walk(10.0, 500.0, UP, NONE, "the same pulses"),
    "faults.stuck_low_rate": Walk(0.0, 0.05, NONE, UP, FREE),
    "faults.stuck_high_rate": Walk(0.0, 0.05, NONE, UP, FREE),
    "faults.stuck_low_us": Walk(1.0, 30.0, NONE, UP, FREE, STUCK),
    "faults.stuck_high_us": Walk(20.0, 120.0, NONE, UP, FREE, STUCK),
    "faults.clustering": Walk(0.0, 4.0, NONE, None, "as many stuck cells on average, closer together", STUCK),
    "retention.refresh_interval_s": Walk(10.0, 1.7e5, DOWN, UP),
    "retention.compensation": Walk("none", "column", NONE, DOWN, "probe reads are not priced", DRIFTING),
    "retention.ageing": Walk(None, DRIFT, NONE, UP, FREE),
    "retention.ageing[power-law].kind": Walk("power-law", "power-law", NONE, NONE, LABEL, DRIFTING),
    "retention.ageing[power-law].strength": Walk(0.5, 2.0, NONE, UP, FREE, DRIFTING),
    "retention.ageing[power-law].nu_mean": Walk(0.01, 0.1, NONE, UP, FREE, DRIFTING),
    "retention.ageing[power-law].nu_std": Walk(0.0, 0.1, NONE, UP, FREE, DRIFTING),
    "retention.ageing[power-law].t0_s": Walk(1.0, 1e4, NONE, DOWN, FREE, DRIFTING),
    "retention.ageing[cmo-relaxation].kind": Walk("cmo-relaxation", "cmo-relaxation", NONE, NONE, LABEL, RELAXED),
    "retention.ageing[cmo-relaxation].strength": Walk(1.0, 10.0, NONE, UP, FREE, RELAXED),
    "retention.ageing[cmo-relaxation].extrapolate": Walk(False, True, NONE, NONE, PERMISSION, RELAXED),
    "retention.ageing[pcm-drift].kind": Walk("pcm-drift", "pcm-drift", NONE, NONE, LABEL, DRIFTED),
    "retention.ageing[pcm-drift].strength": Walk(0.5, 2.0, NONE, UP, FREE, DRIFTED),
    "retention.ageing[pcm-drift].fit": Walk("hermes-2", "pcm-like", NONE, UP, FREE, DRIFTED),
    "retention.ageing[pcm-drift].g_max_us": Walk(20.0, 80.0, NONE, UP, FREE, DRIFTED),
    "retention.ageing[pcm-drift].extrapolate": Walk(False, True, NONE, NONE, PERMISSION, DRIFTED),
    "read.averaged": Walk(1, 8, UP, DOWN, latency=UP),
    "read.white_us": Walk(0.0, 2.0, NONE, UP, FREE),
    "read.flicker": Walk(0.0, 0.1, NONE, UP, FREE),
    "read.slow": Walk("none", "cmo", NONE, UP, FREE, merge(QUIET, {"cells": {"g_min_us": 9.0}})),
    "read.thermal": Walk(False, True, NONE, UP, FREE, {"cells": {"read_time_ns": 0.001}}),
    "dac.input_bits": Walk(4, 8, UP, DOWN, latency=UP, latency_of=SERIAL),
    "dac.bits": Walk(8, 1, UP, DOWN, where={"adc": {"bits": 6}}, latency=UP),
    "dac.range": Walk("token", "calibrated", NONE, UP, "the digital scale of each token is not priced"),
    "dac.lossless": Walk(False, True, NONE, DOWN, "no chip: the reference of tests", {"dac": {"input_bits": 5}}),
    "adc.bits": Walk(5, 8, UP, DOWN, latency=UP, area=UP),
    "adc.lossless": Walk(False, True, NONE, DOWN, "no chip: the reference of tests", {"adc": {"bits": 6}}),
    "adc.noise_steps": Walk(0.0, 4.0, NONE, UP, "a property of the converter, not an effort"),
    "adc.calibration_reads": Walk(
        0, 64, UP, DOWN, where={"variation": {"adc_gain": 0.1, "adc_offset_steps": 8.0}}, latency=UP
    ),
    "adc.costs": Walk(
        "isaac", "survey", None, NONE, "another source of the same converter's price", latency=None, area=None
    ),
    "tile.rows": Walk(64, 512, DOWN, UP, latency=DOWN, area=DOWN, latency_of={"isaac": UP}),
    "tile.columns": Walk(
        64,
        512,
        DOWN,
        UP,
        where=TILES,
        latency=UP,
        area=DOWN,
        latency_of={"neurram-2022": NONE},
        area_of={"neurram-2022": UP},
    ),
    "tile.adc_share": Walk(
        1,
        64,
        None,
        NONE,
        "converters that are fewer leak less, and for longer; they convert alike",
        latency=UP,
        area=DOWN,
    ),
    "die.area_mm2": Walk(100.0, 2000.0, DOWN, NONE, "the same bits pass the links", latency=DOWN),
    "pipeline.branch": Walk("beside", "after", UP, NONE, "the same sum", latency=UP),
    "wires.resistance_ohm": Walk(0.0, 20.0, NONE, UP, "loss in the wires is part of the read energy V^2 G t"),
    "variation.strength": Walk(0.0, 1.0, NONE, UP, FREE, chips=(0, 1, 2, 3)),
    "variation.conductance": Walk(0.0, 0.3, NONE, UP, FREE, chips=(0, 1)),
    "variation.gradient": Walk(0.0, 0.2, NONE, UP, FREE),
    "variation.adc_gain": Walk(0.0, 0.2, NONE, UP, FREE),
    "variation.adc_offset_steps": Walk(0.0, 8.0, NONE, UP, FREE),
    "variation.adc_inl_steps": Walk(0.0, 8.0, NONE, UP, FREE),
    "temperature.kelvin": Walk(
        220.0,
        440.0,
        NONE,
        UP,
        FREE,
        {"cells": {"read_time_ns": 0.001}},
        energy_of={"rram-variation": DOWN},  # whose cells conduct less when warm
    ),
    "temperature.low_per_k": Walk(0.0, 0.02, UP, UP, where=WARM, energy_of={"pcm-like": NONE}),  # from 0 uS on
    "temperature.high_per_k": Walk(0.0, -0.003, DOWN, UP, where=WARM),
    "sram.weight_bits": Walk(4, 8, UP, DOWN, where=OUTSIDE, area=UP),
    "sram.input_bits": Walk(4, 8, UP, DOWN, where=OUTSIDE | AFTER, latency=UP),
    "digital.weight_bits": Walk(4, 8, UP, DOWN, where=LOGIC, area=UP),
    "digital.input_bits": Walk(4, 8, UP, DOWN, where=LOGIC),
    "lora.weight_bits": Walk(3, 8, UP, DOWN, where=QUIET, area=UP),
    "lora.input_bits": Walk(3, 8, UP, DOWN, where=QUIET | AFTER, latency=UP),
    "attention.bits": Walk(3, 8, UP, DOWN, latency=UP),
    "layers.match": Walk("*.k_proj", "*.mlp.*", DOWN, UP, where=COARSE, latency=DOWN, area=DOWN, latency_of=SAME_WAIT),
    "layers.depth": Walk([0.0, 0.2], [0.0, 0.9], DOWN, None, "one block has no depth", COARSE, latency=DOWN, area=DOWN),
    "boundary.attention": Walk(False, True, UP, NONE, "computed either way", latency=UP),
    "boundary.buffers": Walk(False, True, UP, NONE, "moved without error", latency=UP),
    "boundary.leakage": Walk(False, True, UP, NONE, "no part of a product"),
    "boundary.programming": Walk(False, True, UP, NONE, "programmed either way"),
    "boundary.tokens_per_s": Walk(
        10.0,
        1000.0,
        DOWN,
        NONE,
        "how many tokens share a refresh",
        latency_of={"rram-variation": DOWN},  # whose columns are calibrated at every refresh
    ),
    "boundary.adapter_swap_tokens": Walk(10.0, 1000.0, DOWN, NONE, "loaded without error"),
    "costs": Walk({}, {"shift_add_pj": 5.0}, UP, NONE, "prices"),
}


OF_LAYERS = [f"{section}.{field}" for section, (_, fields) in LAYER_FIELDS.items() for field in fields]
"""What a group of layers may have a value of its own of: it does there what it does to a chip."""


def _fields(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields, those of every kind of noise under its name."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        choices = [info.annotation, *get_args(info.annotation)]
        nested = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, pydantic.BaseModel)]
        if path in ("noise", "retention.ageing"):
            ages = path != "noise"
            if ages:
                yield path
            for kind in noise_kinds(ages):
                yield from (f"{path}[{kind}].{each}" for each in _model(kind).model_fields)
        elif nested:
            yield from _fields(nested[0], f"{path}.")
        else:
            yield path


def test_every_field_is_declared():
    assert sorted(_fields(Chip)) == sorted([*FIELDS, *(f"layers.{path}" for path in OF_LAYERS)])
    for path, walk in FIELDS.items():
        unsigned = [side for side in (walk.energy, walk.error) if side in (NONE, None)]
        unsaid = [side for side in (walk.latency, walk.area) if side is None]
        assert bool(unsigned + unsaid) == bool(walk.why), path


def _set(walk: Walk, path: str, value: Any, base: Any) -> Chip:
    """The base with what the field needs to act, and the field at a value."""
    names = path.split("[")[0] + (path.partition("]")[2] if "[" in path else "")
    names = names.replace("layers.", "layers.group.")
    change = _nested(names, value)
    chip = merge(merge(base, walk.where), change)
    if value is not None and isinstance(value, dict):  # replaces the whole
        *sections, last = names.split(".")
        place = chip
        for name in sections:
            place = place[name]
        place[last] = value
    return load_chip(chip)


def _nested(path: str, value: Any) -> Any:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    """SmolLM2, its fills estimated, so that no weights are looked at."""
    found = known_shape("smollm2-135m-instruct")
    assert found is not None
    return found


def _priced(chip: Chip, shape: ModelShape) -> EnergyBreakdown:
    return energy_per_token(shape, chip, rank=8, targets=LoraSettings().targets, context_tokens=128)


def _sign(before: float, after: float) -> int:
    return NONE if isclose(before, after, rel_tol=1e-12) else UP if after > before else DOWN


@pytest.mark.parametrize("preset", preset_names())
def test_every_field_moves_energy_time_and_area_as_declared(shape, preset):
    wrong = []
    for path, walk in FIELDS.items():
        models = path.startswith(("noise", "retention.ageing")) or "noise" in walk.where
        base = CHIP if models or path == "retention.refresh_interval_s" else {"preset": preset}
        name = preset if base is not CHIP else "halora-2026"
        base = base | {"die": {"area_mm2": 1e6}}  # more dies pass more links besides
        low, high = (_priced(_set(walk, path, value, base), shape) for value in (walk.low, walk.high))
        for what, before, after, sign, otherwise in (
            ("uJ", low.total_uj_per_token, high.total_uj_per_token, walk.energy, walk.energy_of),
            ("us", low.latency.path_us, high.latency.path_us, walk.latency, walk.latency_of),
            ("mm2", low.area_mm2, high.area_mm2, walk.area, walk.area_of),
        ):
            expected = otherwise.get(name, sign)
            if expected is not None and _sign(before, after) != expected:
                wrong.append(f"{path}: {before:.6g} -> {after:.6g} {what}, declared {_SIGNS[expected]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("preset", ["halora-2026", "isaac"])
def test_a_group_of_all_layers_costs_what_the_chip_does(shape, preset):
    for path in OF_LAYERS:
        walk = FIELDS[path]
        everywhere = merge({"preset": preset}, walk.where)
        alike = everywhere | {"layers": {"all": {"match": "*", **_nested(path, walk.high)}}}
        uniform, grouped = load_chip(merge(everywhere, _nested(path, walk.high))), load_chip(alike)
        on_chip = [layer for layer in grouped.on_layers(shape.sizes).values() if layer.place is not Placement.HOST]
        assert all(layer.chip == uniform for layer in on_chip), path
        assert _priced(grouped, shape) == _priced(uniform, shape), path


class Blocks:
    """The first decoder block of SmolLM2 with an adapter and real tokens, on one chip instance after the other."""

    def __init__(self) -> None:
        self.base: BaseModel = load_base("smollm2-135m-instruct", "fp32")
        del self.base.causal_lm.model.layers[1:]
        self.array: RramArray = install(self.base.causal_lm)
        rows = task_rows("arc-easy", "validation", 2)
        self.batch: Batch = lay_out([pack_answer(row, self.base.tokenizer) for row in rows])
        self.calibration = task_rows("arc-easy", "train", 4)
        self.pairs = lora_pairs(attach(self.base, LoraSettings(rank=8), 0))
        generator = torch.Generator().manual_seed(0)
        for a, b in self.pairs:
            a.requires_grad_(False)
            b.requires_grad_(False).copy_(0.05 * torch.randn(b.shape, generator=generator))
        self.stored = [(a.clone(), b.clone()) for a, b in self.pairs]
        self.clean = {head: self._outputs(head) for head in (False, True)}
        self.known: dict[tuple[str, bool, tuple[int, ...]], float] = {}

    @torch.no_grad()
    def _outputs(self, head: bool) -> torch.Tensor:
        with self.array.reading(self.batch.rows, self.batch.predicting):
            causal_lm = self.base.causal_lm
            return self.batch.logits(causal_lm) if head else self.batch.hidden(causal_lm)[0]

    @torch.no_grad()
    def error(self, chip: Chip, head: bool, chips: tuple[int, ...]) -> float:
        """Relative error of the outputs, every conversion carried out."""
        known = (chip.content_hash, head, chips)
        if known not in self.known:
            for pair, stored in zip(self.pairs, self.stored, strict=True):
                for dim, (weight, original) in zip((1, 0), zip(pair, stored, strict=True), strict=True):
                    weight.copy_(rounded(original, chip.lora.weight_bits, dim=dim))
            reads = calibrate(self.base, self.array, chip, self.calibration, 64, "exact")
            errors = []
            for seed in chips:
                key = NoiseKey(role=Role.SEARCH, chip_seed=seed)
                self.array.program(ChipInstance(chip, key, chip.noise.level), reads, digital=True)
                errors.append(self._outputs(head) - self.clean[head])
                self.array.clear()
            power = torch.stack(errors).square().sum() / len(chips)
            self.known[known] = (power.sqrt() / self.clean[head].norm()).item()
        return self.known[known]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """One for all fields: calibration rows and clean outputs are shared."""
    return Blocks()


SEEN = {UP: lambda low, high: high > 1.02 * low, DOWN: lambda low, high: high < 0.98 * low, NONE: lambda a, b: a == b}
"""Two in a hundred is what a sign has to show."""


@pytest.mark.parametrize("path", [path for path, walk in FIELDS.items() if walk.error is not None])
def test_every_field_moves_the_error_as_declared(blocks, path):
    walk = FIELDS[path]
    low, high = (blocks.error(_set(walk, path, value, CHIP), walk.head, walk.chips) for value in (walk.low, walk.high))
    print(f"{path}: error {low:.4f} -> {high:.4f}, declared {_SIGNS[walk.error]}")
    assert SEEN[walk.error](low, high)


EVERY_KNOB = {
    "adc": {"bits": 6},
    "coding": {"scale": "tile_max", "clip_std": 3.0, "slices": 2, "slice_ratio": 8.0, "replicas": 2},
    "dac": {"input_bits": 6, "bits": 3, "range": "calibrated"},
    "digital": {"weight_bits": 5, "input_bits": 5},
    "mapping": {"outliers": {"share": 0.002, "by": "tile", "weight_bits": 4}},
    "read": {"averaged": 2},
    "sram": {"weight_bits": 5, "input_bits": 6},
    "tile": {"rows": 128, "columns": 32, "adc_share": 8},
    "write_verify": {"pulses": 4.0},
}


def test_layers_compute_with_the_values_of_their_groups(blocks):
    """All of a chip's knobs by a group of all layers, or by the chip: the same output, bit for bit."""
    assert sorted(OF_LAYERS) == sorted(dotted(EVERY_KNOB))
    outside = {"mapping": {"sram": ["*.o_proj"], "digital": ["*.up_proj"]}}
    base = merge(CHIP, outside)
    uniform = blocks.error(load_chip(merge(base, EVERY_KNOB)), False, (0,))
    kinds = {"attention": {"match": "*.self_attn.*", **EVERY_KNOB}, "mlp": {"match": "*.mlp.*", **EVERY_KNOB}}
    assert blocks.error(load_chip(base | {"layers": kinds}), False, (0,)) == uniform
    only = blocks.error(load_chip(base | {"layers": {"attention": kinds["attention"]}}), False, (0,))
    assert only not in (uniform, blocks.error(load_chip(base), False, (0,)))


def test_a_group_that_says_what_the_chip_says_changes_nothing(blocks, shape):
    chip = load_chip(CHIP)
    same = {name: section for name, section in chip.model_dump().items() if name in LAYER_FIELDS}
    own = {path: dotted(same)[path] for path in OF_LAYERS if dotted(same)[path] is not None}
    group: dict[str, Any] = {"match": ["*.mlp.*"]}
    for path, value in own.items():
        group = merge(group, _nested(path, value))
    grouped = load_chip(CHIP | {"layers": {"mlp": group}})
    assert grouped.content_hash != chip.content_hash
    assert _priced(grouped, shape) == _priced(chip, shape)
    assert blocks.error(grouped, False, (0,)) == blocks.error(chip, False, (0,))


def test_what_counts_as_finer_lowers_the_error():
    for path, sign in FINER.items():
        walk = FIELDS[path]
        assert walk.error == (DOWN if (walk.high > walk.low) == (sign > 0) else UP), path
