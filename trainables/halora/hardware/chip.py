"""The chip: one frozen description used by training, evaluation, energy and export alike.

Modelled: Gaussian programming noise (static per chip instance), IR drop along the columns (first order, static),
tile-wise ADC quantisation (statistical, per read), energy of each of these.
Not modelled yet: drift and relaxation, read noise, stuck-at faults, finite conductance levels, DAC quantisation,
temperature, buffers and network, reprogramming.
"""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from halora.errors import UserError, nearest

PRESETS = files("halora.hardware") / "presets"


class Frozen(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class GaussianNoise(Frozen):
    """Independent Gaussian error of every programmed weight, drawn once per chip instance (HaLoRA: W* = W0 + N)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: float = Field(ge=0, le=100)
    """Standard deviation in units of `reference`."""
    reference: Literal["absolute", "tensor_max", "channel_max", "std"]
    """What sigma is relative to: weight units, max|W| of the tensor, max|W| of the output channel, or std of W."""


class Adc(Frozen):
    """The converter at the foot of every tile column."""

    bits: int = Field(ge=4, le=10)
    """Resolution; the range is the one the energy table covers."""
    lossless: bool = False
    """True: no quantisation error (energy is still that of `bits`)."""


class Tile(Frozen):
    """Size of one crossbar tile, in cells."""

    rows: int = Field(ge=8, le=1024)
    """Inputs summed in the analog domain before one conversion."""
    columns: int = Field(ge=8, le=1024)
    """Outputs that share one input driver."""


class Wires(Frozen):
    """Column wire and mean cell, which set the IR drop."""

    resistance_ohm: float = Field(ge=0, le=100)
    """Wire resistance per cell segment, in ohm; 0 switches IR drop off."""
    conductance_us: float = Field(gt=0, le=1000)
    """Mean cell conductance, in microsiemens."""


class Boundary(Frozen):
    """What the energy totals include besides the mapped linear layers and LoRA."""

    attention: bool
    """Attention products and softmax."""
    lm_head: bool
    """The output projection, mapped to RRAM."""


class Chip(Frozen):
    """A hybrid compute-in-memory chip: frozen weights in RRAM tiles, LoRA in SRAM."""

    name: str
    noise: GaussianNoise
    adc: Adc
    tile: Tile
    wires: Wires
    boundary: Boundary
    lora_weight_bits: int = Field(ge=2, le=16)
    """Precision of the LoRA weights in SRAM."""

    @property
    def content_hash(self) -> str:
        """Twelve hex digits that change with any value but the name."""
        content = json.dumps(self.model_dump(exclude={"name"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def preset_names() -> list[str]:
    """Names of the shipped chips."""
    return sorted(item.name.removesuffix(".yaml") for item in PRESETS.iterdir() if item.name.endswith(".yaml"))


def expand_chip(value: Any) -> Any:
    """Turn a preset's name, a YAML path, or `{preset: NAME, overrides...}` into the full mapping of a chip.

    Raises:
        UserError: There is no such preset or file.
    """
    if isinstance(value, str):
        return _read(value)
    if isinstance(value, dict) and "preset" in value:
        overrides = {key: item for key, item in value.items() if key != "preset"}
        return merge(_read(str(value["preset"])), overrides)
    return value


def _read(name: str) -> dict[str, Any]:
    if name in preset_names():
        return dict(yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return dict(yaml.safe_load(Path(name).read_text()))
    known = ", ".join(preset_names())
    raise UserError(f"no chip '{name}': neither a preset ({known}) nor a YAML file{nearest(name, preset_names())}")


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in overrides.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_mappings else value
    return merged


ChipSetting = Annotated[Chip, BeforeValidator(expand_chip)]
"""A chip in a configuration file: a preset's name, a path, a preset with overrides, or the whole description."""


def load_chip(setting: Any) -> Chip:
    """The chip that a configuration's `chip` entry names."""
    return Chip.model_validate(expand_chip(setting))
