"""Energy per token and area of a model on a chip, as sums of named components.

Per linear layer d_in x d_out in RRAM, with tiles of R rows and C columns, N_w weight slices, N_rep replicas, N_i input
cycles of b_d bits and K reads averaged:

    adc, shift_add   d_out ceil(d_in / R) N_w N_rep N_i K    conversions: every cycle of every tile column ends in one
    dac              d_in ceil(d_out / C) N_w N_rep N_i K    driven inputs of b_d bits: every tile has its own drivers
    array            2 d_in d_out N_w N_rep N_i K            reads of a cell, V^2 G t each (differential pairs), G by
                                                             the layer's fill (`halora.hardware.fill`)
    programming      2 d_in d_out N_w N_rep                  cells, over the tokens between two refreshes

and r (d_in + d_out) SRAM multiply-accumulates per adapted layer, and those of what `mapping.outliers` keeps in SRAM.
Digital products cost by their bits of weights and inputs, with which scoring computes them. The output projection
counts where the mapping puts it on the chip. Counts are exact; a token passes every linear layer once, in prefill and
in decode. The constants and their sources are in `constants.yaml`. Not modelled: leakage, clocks and control, partial
sums between tiles, norms and embeddings, host traffic, the probe reads of drift compensation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, log2
from typing import Any

from halora.errors import UserError, attempt, nearest
from halora.hardware.chip import Chip
from halora.hardware.costs import adc_cost, energy_constants
from halora.hardware.mapping import Placement, outlier_count
from halora.hardware.shapes import LinearShape, ModelShape

_CELLS_PER_WEIGHT = 2  # a differential pair


class Phase(StrEnum):
    """What the tokens are: those of a prompt, or those that are generated one by one."""

    PREFILL = "prefill"
    DECODE = "decode"

    def context(self, context_tokens: int) -> str:
        """What `context_tokens` counts in this phase."""
        match self:
            case Phase.PREFILL:
                return f"every token attends to all {context_tokens} of its prompt (non-causal, as the HaLoRA paper)"
            case Phase.DECODE:
                return f"every token attends to the {context_tokens} before it, kept in SRAM"


@dataclass(frozen=True)
class EnergyBreakdown:
    """Energy per token with everything needed to compare it.

    Attributes:
        components_uj: Microjoule per token by component.
        phase: What the tokens are.
        context_tokens: Number of tokens every token attends to; `phase.context` says which.
        boundary: What is included and what is not.
        area_mm2: Area of ADCs, cells and SRAM, in square millimetre; rough.
        fill: Where the fill of the cells comes from: the chip, the weights, or an estimate.
    """

    components_uj: Mapping[str, float]
    phase: Phase
    context_tokens: int
    boundary: str
    area_mm2: float
    fill: str

    @property
    def total_uj_per_token(self) -> float:
        """Sum of the components, in microjoule per token."""
        return sum(self.components_uj.values())

    @property
    def lora_share(self) -> float:
        """Share of the LoRA branch in the total."""
        return self.components_uj["lora_sram"] / self.total_uj_per_token


@dataclass(frozen=True)
class _Counts:
    """Events of one token in the layers that sit in RRAM, and what they occupy."""

    conversions: int
    driven_inputs: int
    cells: int
    tiles: int


def energy_per_token(
    shape: ModelShape,
    chip: Chip,
    *,
    rank: int | Mapping[str, int],
    targets: tuple[str, ...] = (),
    context_tokens: int = 512,
    phase: Phase = Phase.PREFILL,
) -> EnergyBreakdown:
    """Energy of one token on the chip.

    Args:
        shape: Dimensions of the model.
        chip: The chip; each of its sections acts where it has an energy side.
        rank: LoRA rank r of the layers that `targets` names, 0 for none; or of each adapted layer by its canonical
            name, e.g. of an adapter that was made elsewhere.
        targets: Names of the adapted linear layers, e.g. `q_proj`; see `ModelShape.adapted`.
        context_tokens: Tokens each token attends to.
        phase: What the tokens are; the chip takes the same for both, its baselines do not.

    Raises:
        UserError: With every mistake: ADC bits that the costs do not cover, patterns that match no layer, unknown
            targets or layers, a negative rank or context.
    """
    constants = {**energy_constants(), **chip.costs}
    layers = shape.all_layers
    targeted = shape.adapted(targets)
    adapted = [name for name, layer in layers.items() if layer.name in targeted]
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(adapted, rank)
    problems = _problems(shape, rank, targets, context_tokens)
    adc = attempt(problems, lambda: adc_cost(chip.adc.costs, chip.adc.bits, constants))
    places = attempt(problems, lambda: chip.mapping.places(shape.sizes))
    if problems:
        raise UserError(problems)
    assert adc is not None
    assert places is not None

    layers = {name: layer for name, layer in layers.items() if places[name] is not Placement.HOST}
    rram = {name: layer for name, layer in layers.items() if places[name] is Placement.RRAM}
    counts, outliers = _count(list(rram.values()), chip), _outliers(rram, chip, constants)
    sram_weights, digital_weights = (
        sum(layer.weights for name, layer in layers.items() if places[name] is place)
        for place in (Placement.SRAM, Placement.DIGITAL)
    )
    lora_weights = sum(
        each * (layers[name].in_features + layers[name].out_features) for name, each in ranks.items() if name in layers
    )
    components = {
        "adc": counts.conversions * adc.conversion_pj * 1e-6,
        "dac": counts.driven_inputs * min(chip.dac.bits, chip.dac.input_bits) * constants["dac_pj_per_bit"] * 1e-6,
        "shift_add": counts.conversions * constants["shift_add_pj"] * 1e-6,
        "array": _array_fj(rram, shape, chip) * 1e-9,
        "sram": sram_weights * constants["sram_mac_fj"] * chip.sram.cost * 1e-9,
        "digital": digital_weights * _digital_mac_fj(chip, constants) * 1e-9,
        "lora_sram": lora_weights * constants["sram_mac_fj"] * chip.lora.cost * 1e-9,
        "outliers": outliers.energy_fj * 1e-9,
        **_around(shape, chip, constants, list(layers.values()), counts.cells, lora_weights, context_tokens),
    }
    sram_bits = (
        chip.sram.weight_bits * sram_weights
        + chip.digital.weight_bits * digital_weights
        + chip.lora.weight_bits * lora_weights
        + outliers.bits
    )
    area_um2 = (
        counts.tiles * adc.area_um2 + counts.cells * constants["rram_cell_um2"] + sram_bits * constants["sram_bit_um2"]
    )
    fill = "chip" if chip.cells.mean_fill is not None else shape.fill_source
    return EnergyBreakdown(components, phase, context_tokens, _describe(chip), area_um2 * 1e-6, fill)


def _problems(
    shape: ModelShape, rank: int | Mapping[str, int], targets: tuple[str, ...], context_tokens: int
) -> list[str]:
    known = [linear.name for linear in shape.linears]
    strange = [target for target in targets if not shape.adapted([target])]
    problems = [f"targets: the model has no layer '{t}'{nearest(t, known)}" for t in strange]
    layers = shape.all_layers
    ranks = rank if isinstance(rank, Mapping) else {"": rank}
    problems += [f"adapter: the model has no layer '{n}'{nearest(n, layers)}" for n in ranks if n and n not in layers]
    problems += [f"{n or 'rank'}: must be 0 or more, got {each}" for n, each in ranks.items() if each < 0]
    if context_tokens < 1:
        problems.append(f"context: must be 1 token or more, got {context_tokens}")
    return problems


def _count(layers: list[LinearShape], chip: Chip) -> _Counts:
    copies = chip.coding.slices * chip.coding.replicas
    reads = _reads(chip)
    rows, columns = chip.tile.rows, chip.tile.columns
    cells = _CELLS_PER_WEIGHT * sum(layer.weights for layer in layers)
    return _Counts(
        conversions=reads * sum(layer.out_features * ceil(layer.in_features / rows) for layer in layers),
        driven_inputs=reads * sum(layer.in_features * ceil(layer.out_features / columns) for layer in layers),
        cells=copies * cells,
        tiles=copies * sum(ceil(layer.in_features / rows) * ceil(layer.out_features / columns) for layer in layers),
    )


def _reads(chip: Chip) -> int:
    """Reads of every pair of cells that one product takes, over all slices and replicas."""
    return chip.coding.slices * chip.coding.replicas * chip.dac.cycles * chip.read.averaged


def _array_fj(layers: Mapping[str, LinearShape], shape: ModelShape, chip: Chip) -> float:
    """Femtojoule per token of all cells' reads."""
    stated = chip.cells.mean_fill
    weight_fj = sum(
        layer.weights * chip.cells.read_energy_fj(shape.fill(name, chip) if stated is None else stated)
        for name, layer in layers.items()
    )
    return _CELLS_PER_WEIGHT * _reads(chip) * weight_fj


def _digital_mac_fj(chip: Chip, constants: Mapping[str, Any]) -> float:
    """Femtojoule of a multiply-accumulate in plain logic with its weight's read."""
    bits = chip.digital
    return float(constants["digital_mac_fj"] * bits.cost + constants["digital_read_fj_per_bit"] * bits.weight_bits)


@dataclass(frozen=True)
class _Outliers:
    """What the layers in RRAM keep in SRAM: femtojoule per token, and bits with their addresses."""

    energy_fj: float = 0.0
    bits: int = 0


def _outliers(layers: Mapping[str, LinearShape], chip: Chip, constants: Mapping[str, Any]) -> _Outliers:
    """Single weights are multiplied by plain logic, which reads value, address and input from SRAM.

    An address is that of a row and a column within the tile. Columns and the singular part are dense, and multiplied in
    SRAM macros like the LoRA branch.
    """
    setting, inputs = chip.mapping.outliers, chip.sram.input_bits
    products = setting.weight_bits * inputs / 64
    address = ceil(log2(chip.tile.rows)) + ceil(log2(chip.tile.columns))
    energy_fj, bits = 0.0, 0
    for name, layer in layers.items():
        d_in, d_out, share = layer.in_features, layer.out_features, setting.of(name).share
        count = outlier_count(d_in, d_out, share, setting.by, (chip.tile.rows, chip.tile.columns))
        if setting.by in ("weight", "tile"):
            read_bits = setting.weight_bits + address + inputs
            energy_fj += count * (
                constants["digital_mac_fj"] * products + constants["digital_read_fj_per_bit"] * read_bits
            )
            bits += count * (setting.weight_bits + address)
        else:
            values = count * (d_out if setting.by == "column" else d_in + d_out)
            energy_fj += values * constants["sram_mac_fj"] * products
            bits += values * setting.weight_bits
    return _Outliers(energy_fj, bits)


def _around(
    shape: ModelShape,
    chip: Chip,
    constants: Mapping[str, Any],
    layers: list[LinearShape],
    cells: int,
    lora_weights: int,
    context_tokens: int,
) -> dict[str, float]:
    """Microjoule per token of what the chip's boundary adds to its linear layers."""
    boundary, components = chip.boundary, dict[str, float]()
    if boundary.attention:
        macs, scores = shape.attention_macs(context_tokens), shape.heads * shape.attended(context_tokens)
        components["attention"] = macs * constants["attention_mac_fj"] * (chip.attention.bits / 8) ** 2 * 1e-9
        components["softmax"] = scores * constants["softmax_element_pj"] * 1e-6
    if boundary.buffers:
        bits = chip.dac.input_bits * sum(layer.in_features + layer.out_features for layer in layers)
        components["buffers"] = bits * constants["buffer_pj_per_bit"] * 1e-6
    if boundary.programming:
        pulses = cells * chip.write_verify.pulses * chip.noise.effort
        tokens = boundary.tokens_per_s * chip.retention.refresh_interval_s
        components["programming"] = pulses * chip.write_verify.pulse_energy_pj * 1e-6 / tokens
    if boundary.adapter_swap_tokens is not None:
        bits = lora_weights * chip.lora.weight_bits
        components["adapter_swap"] = bits * constants["dram_pj_per_bit"] * 1e-6 / boundary.adapter_swap_tokens
    return components


def _describe(chip: Chip) -> str:
    boundary = chip.boundary
    parts = {
        "attention": boundary.attention,
        "lm_head": chip.mapping.lm_head,
        "buffers": boundary.buffers,
        "programming": boundary.programming,
        "adapter swap": boundary.adapter_swap_tokens is not None,
    }
    inside = ["linear layers", "LoRA", *(part for part, included in parts.items() if included)]
    outside = [part for part, included in parts.items() if not included]
    return ", ".join(inside) + (f"; outside: {', '.join(outside)}" if outside else "")
