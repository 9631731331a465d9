"""Energy per token of a model on a chip as a sum of named components, its area, and with its time the power.

Per linear layer d_in x d_out in RRAM, with tiles of R rows and C columns, N_w weight slices, N_rep replicas, N_i input
cycles of b_d bits and K reads averaged:

    adc, shift_add   d_out ceil(d_in / R) N_w N_rep N_i K    conversions: every cycle of every tile column ends in one
    dac              d_in ceil(d_out / C) N_w N_rep N_i K    driven inputs of b_d bits: every tile has its own drivers
    array            2 d_in d_out N_w N_rep N_i K            reads of a cell, V^2 G t each (differential pairs), G by
                                                             the layer's fill (`halora.hardware.fill`)
    programming      2 d_in d_out N_w N_rep                  cells, over the tokens between two refreshes
    calibration      2 n d_out ceil(d_in / R) N_w N_rep      conversions with their shift-adds, n calibration reads of
                                                             nothing and n of a full input, over the same tokens

and r (d_in + d_out) SRAM multiply-accumulates per adapted layer, and those of what `mapping.outliers` keeps in SRAM.
Every layer counts with the values that it meets (`halora.hardware.layers`).
Digital products cost by their bits of weights and inputs, with which scoring computes them. The output projection
counts where the mapping puts it on the chip. Counts are exact; a token passes every linear layer once, in prefill and
in decode. Time is that of `halora.hardware.latency`; the chip's area leaks for as long as a token takes, shared by the
sequences that are worked on at once, and what passes from die to die is paid per bit. The constants and their sources
are in `constants.yaml`. Not modelled: clocks and control, partial sums between tiles, norms and embeddings, host
traffic, the probe reads of drift compensation, the area of attention and of the keys and values that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, fsum, log2
from typing import Any

from halora.errors import UserError, attempt, nearest
from halora.hardware.chip import Chip
from halora.hardware.costs import AdcCost, adc_cost, energy_constants
from halora.hardware.latency import Latency, Phase, link_bits, reads_in_turn, token_latency
from halora.hardware.layers import OnLayer, dotted
from halora.hardware.mapping import Placement, outlier_count
from halora.hardware.shapes import LinearShape, ModelShape

_CELLS_PER_WEIGHT = 2  # a differential pair

ENERGY = "energy_uj_per_token"
COSTS = (ENERGY, "latency_us_per_token", "tokens_per_s", "power_w", "area_mm2")
"""Names of what follows from a configuration alone, see `EnergyBreakdown.metrics`."""


@dataclass(frozen=True)
class EnergyBreakdown:
    """Energy per token with everything needed to compare it.

    Attributes:
        components_uj: Microjoule per token by component.
        latency: Its time; the phase and the context that it states are those of the energy.
        boundary: What is included and what is not.
        area_mm2: Area of ADCs, cells and SRAM, in square millimetre; rough.
        fill: Where the fill of the cells comes from: the chip, the weights, or an estimate.
        layers_uj: Microjoule per token of each linear layer on the chip by canonical name, its LoRA branch left out.
    """

    components_uj: Mapping[str, float]
    latency: Latency
    boundary: str
    area_mm2: float
    fill: str
    layers_uj: Mapping[str, float]

    @property
    def total_uj_per_token(self) -> float:
        """Sum of the components, in microjoule per token."""
        return sum(self.components_uj.values())

    @property
    def metrics(self) -> dict[str, float]:
        """What a trial is known to take before it is trained, by the names of `COSTS`."""
        latency, total_uj = self.latency, self.total_uj_per_token
        power_w = total_uj * 1e-6 * latency.tokens_per_s
        values = (total_uj, latency.us_per_token, latency.tokens_per_s, power_w, self.area_mm2)
        return dict(zip(COSTS, values, strict=True))

    @property
    def lora_share(self) -> float:
        """Share of the LoRA branch in the total."""
        return self.components_uj["lora_sram"] / self.total_uj_per_token


def energy_per_token(
    shape: ModelShape,
    chip: Chip,
    *,
    rank: int | Mapping[str, int],
    targets: tuple[str, ...] = (),
    context_tokens: int = 512,
    phase: Phase = Phase.PREFILL,
    sequences: int = 1,
) -> EnergyBreakdown:
    """Energy of one token on the chip.

    Args:
        shape: Dimensions of the model.
        chip: The chip; each of its sections acts where it has an energy side.
        rank: LoRA rank r of the layers that `targets` names, 0 for none; or of each adapted layer by its canonical
            name, e.g. of an adapter that was made elsewhere.
        targets: Names of the adapted linear layers, e.g. `q_proj`; see `ModelShape.adapted`.
        context_tokens: Tokens each token attends to.
        phase: What the tokens are; the chip's own events are the same for both, its leakage and its baselines are not.
        sequences: Sequences that are worked on at once.

    Raises:
        UserError: With every mistake: ADC bits that the costs do not cover, patterns that match no layer, unknown
            targets or layers, a negative rank, no context or sequence.
    """
    constants = {**energy_constants(), **chip.costs}
    layers = shape.all_layers
    targeted = shape.adapted(targets)
    adapted = [name for name, layer in layers.items() if layer.name in targeted]
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(adapted, rank)
    problems = _problems(shape, rank, targets, context_tokens, sequences)
    adcs = attempt(problems, lambda: _converters(chip, constants))
    met = attempt(problems, lambda: chip.on_layers(shape.sizes))
    if problems:
        raise UserError(problems)
    assert adcs is not None
    assert met is not None

    layers = {name: layer for name, layer in layers.items() if met[name].place is not Placement.HOST}
    costs = {
        name: _layer_costs(layer, met[name], _fill_of(name, shape, met[name].chip), adcs, constants)
        for name, layer in layers.items()
    }
    lora_weights = sum(
        each * (layers[name].in_features + layers[name].out_features) for name, each in ranks.items() if name in layers
    )
    around = _around(shape, chip, constants, lora_weights, context_tokens)
    components = {
        name: around[name]
        if name in around
        else fsum(layer.energy_fj.get(name, 0.0) for layer in costs.values()) * 1e-9
        for name in _components(chip)
    }
    lora_um2 = chip.lora.weight_bits * lora_weights * constants["sram_bit_um2"]
    area_um2 = fsum(layer.area_um2 for layer in costs.values()) + lora_um2
    latency = token_latency(
        shape,
        chip,
        met=met,
        ranks=ranks,
        adcs=adcs,
        constants=constants,
        area_mm2=area_um2 * 1e-6,
        context_tokens=context_tokens,
        phase=phase,
        sequences=sequences,
    )
    if not latency.us_per_token:
        raise UserError("chip.costs: a token takes no time with these; leave out some of the times that are 0")
    components["links"] = (latency.dies - 1) * link_bits(shape, met) * constants["link_pj_per_bit"] * 1e-6
    if chip.boundary.leakage:
        leakage_w = area_um2 * 1e-9 * constants["leakage_mw_per_mm2"]
        components["leakage"] = leakage_w * latency.us_per_token / sequences
    fill = "chip" if chip.cells.mean_fill is not None else shape.fill_source
    layers_uj = {
        name: fsum(fj for component, fj in layer.energy_fj.items() if component in components) * 1e-9
        for name, layer in costs.items()
    }
    return EnergyBreakdown(components, latency, _describe(chip), area_um2 * 1e-6, fill, layers_uj)


def _problems(
    shape: ModelShape, rank: int | Mapping[str, int], targets: tuple[str, ...], context_tokens: int, sequences: int
) -> list[str]:
    known = [linear.name for linear in shape.linears]
    unknown = [target for target in targets if not shape.adapted([target])]
    problems = [f"targets: the model has no layer '{t}'{nearest(t, known)}" for t in unknown]
    layers = shape.all_layers
    ranks = rank if isinstance(rank, Mapping) else {"": rank}
    problems += [f"adapter: the model has no layer '{n}'{nearest(n, layers)}" for n in ranks if n and n not in layers]
    problems += [f"{n or 'rank'}: must be 0 or more, got {each}" for n, each in ranks.items() if each < 0]
    if context_tokens < 1:
        problems.append(f"context: must be 1 token or more, got {context_tokens}")
    if sequences < 1:
        problems.append(f"sequences: must be 1 or more, got {sequences}")
    return problems


def _converters(chip: Chip, constants: Mapping[str, Any]) -> dict[int, AdcCost]:
    """What the chip's converters cost, by their bits.

    Raises:
        UserError: With every field whose bits the costs do not cover.
    """
    bits = {
        f"chip.layers.{name}.adc.bits": dotted(group.changes).get("adc.bits") for name, group in chip.layers.items()
    }
    problems: list[str] = []
    found = {
        each: attempt(problems, lambda: adc_cost(chip.adc.costs, each, constants, where))  # noqa: B023 (called at once)
        for where, each in {"chip.adc.bits": chip.adc.bits, **bits}.items()
        if each is not None
    }
    if problems:
        raise UserError(problems)
    return {each: cost for each, cost in found.items() if cost is not None}


def _fill_of(layer: str, shape: ModelShape, chip: Chip) -> float:
    return shape.fill(layer, chip) if chip.cells.mean_fill is None else chip.cells.mean_fill


@dataclass(frozen=True)
class _LayerCosts:
    """What a layer takes: femtojoule per token by component, and area in square micrometre."""

    energy_fj: Mapping[str, float]
    area_um2: float


def _layer_costs(
    layer: LinearShape, met: OnLayer, fill: float, adcs: Mapping[int, AdcCost], constants: Mapping[str, Any]
) -> _LayerCosts:
    """Of a layer that is on the chip, at the mean fill of its cells."""
    chip = met.chip
    match met.place:
        case Placement.RRAM:
            found = _in_rram(layer, chip, fill, adcs[chip.adc.bits], constants)
        case Placement.SRAM:
            energy_fj = {"sram": layer.weights * constants["sram_mac_fj"] * chip.sram.cost}
            found = _LayerCosts(energy_fj, layer.weights * chip.sram.weight_bits * constants["sram_bit_um2"])
        case Placement.DIGITAL:
            bits = chip.digital
            mac_fj = constants["digital_mac_fj"] * bits.cost + constants["digital_read_fj_per_bit"] * bits.weight_bits
            energy_fj = {"digital": layer.weights * mac_fj}
            found = _LayerCosts(energy_fj, layer.weights * bits.weight_bits * constants["sram_bit_um2"])
        case Placement.HOST:
            return _LayerCosts({}, 0.0)
    moved_bits = chip.dac.input_bits * (layer.in_features + layer.out_features)
    return replace(found, energy_fj={**found.energy_fj, "buffers": moved_bits * constants["buffer_pj_per_bit"] * 1e3})


def _in_rram(layer: LinearShape, chip: Chip, fill: float, adc: AdcCost, constants: Mapping[str, Any]) -> _LayerCosts:
    """Of a layer in RRAM, with what it keeps in SRAM."""
    tile, copies = chip.tile, chip.coding.copies
    reads = copies * reads_in_turn(chip)  # of every pair of cells that one product takes
    row_tiles, column_tiles = ceil(layer.in_features / tile.rows), ceil(layer.out_features / tile.columns)
    cells = _CELLS_PER_WEIGHT * copies * layer.weights
    conversions, driven_inputs = reads * layer.out_features * row_tiles, reads * layer.in_features * column_tiles
    pulses = cells * chip.write_verify.pulses * chip.noise.effort
    tokens = chip.tokens_between_refreshes
    columns = copies * layer.out_features * row_tiles
    calibration_pj = 2 * chip.adc.calibration_reads * columns * (adc.conversion_pj + constants["shift_add_pj"])
    outliers = _outliers(layer, chip, constants)
    adcs = copies * row_tiles * column_tiles * ceil(tile.columns / (tile.adc_share or tile.columns))
    sram_um2 = outliers.bits * constants["sram_bit_um2"]
    return _LayerCosts(
        {
            "adc": conversions * adc.conversion_pj * 1e3,
            "dac": driven_inputs * min(chip.dac.bits, chip.dac.input_bits) * constants["dac_pj_per_bit"] * 1e3,
            "shift_add": conversions * constants["shift_add_pj"] * 1e3,
            "array": _CELLS_PER_WEIGHT * reads * layer.weights * chip.warm_cells.read_energy_fj(fill),
            "outliers": outliers.energy_fj,
            "programming": pulses * chip.write_verify.pulse_energy_pj * 1e3 / tokens,
            "calibration": calibration_pj * 1e3 / tokens,
        },
        adcs * adc.area_um2 + cells * constants["rram_cell_um2"] + sram_um2,
    )


@dataclass(frozen=True)
class _Outliers:
    """What a layer in RRAM keeps in SRAM: femtojoule per token, and bits with their addresses."""

    energy_fj: float
    bits: int


def _outliers(layer: LinearShape, chip: Chip, constants: Mapping[str, Any]) -> _Outliers:
    """Single weights are multiplied by plain logic, which reads value, address and input from SRAM.

    An address is that of a row and a column within the tile. Columns and the singular part are dense, and multiplied in
    SRAM macros like the LoRA branch.
    """
    setting, inputs = chip.mapping.outliers, chip.sram.input_bits
    products = setting.weight_bits * inputs / 64
    address = ceil(log2(chip.tile.rows)) + ceil(log2(chip.tile.columns))
    d_in, d_out = layer.in_features, layer.out_features
    count = outlier_count(d_in, d_out, setting.share, setting.by, (chip.tile.rows, chip.tile.columns))
    if setting.by in ("weight", "tile"):
        read_bits = setting.weight_bits + address + inputs
        each_fj = constants["digital_mac_fj"] * products + constants["digital_read_fj_per_bit"] * read_bits
        return _Outliers(count * each_fj, count * (setting.weight_bits + address))
    values = count * (d_out if setting.by == "column" else d_in + d_out)
    return _Outliers(values * constants["sram_mac_fj"] * products, values * setting.weight_bits)


def _around(
    shape: ModelShape, chip: Chip, constants: Mapping[str, Any], lora_weights: int, context_tokens: int
) -> dict[str, float]:
    """Microjoule per token of what the chip does besides its linear layers."""
    macs, scores = shape.attention_macs(context_tokens), shape.heads * shape.attended(context_tokens)
    swapped_bits, swap_tokens = lora_weights * chip.lora.weight_bits, chip.boundary.adapter_swap_tokens
    return {
        "lora_sram": lora_weights * constants["sram_mac_fj"] * chip.lora.cost * 1e-9,
        "attention": macs * constants["attention_mac_fj"] * (chip.attention.bits / 8) ** 2 * 1e-9,
        "softmax": scores * constants["softmax_element_pj"] * 1e-6,
        "adapter_swap": swapped_bits * constants["dram_pj_per_bit"] * 1e-6 / swap_tokens if swap_tokens else 0.0,
    }


def _components(chip: Chip) -> list[str]:
    """What the chip's boundary has inside, but for links and leakage, which follow from the time."""
    boundary = chip.boundary
    asked = {
        "attention": boundary.attention,
        "softmax": boundary.attention,
        "buffers": boundary.buffers,
        "programming": boundary.programming,
        "adapter_swap": boundary.adapter_swap_tokens is not None,
        "calibration": chip.adc.calibration_reads > 0,
    }
    always = ["adc", "dac", "shift_add", "array", "sram", "digital", "lora_sram", "outliers"]
    return always + [name for name, included in asked.items() if included]


def _describe(chip: Chip) -> str:
    boundary = chip.boundary
    parts = {
        "attention": boundary.attention,
        "lm_head": chip.mapping.lm_head,
        "buffers": boundary.buffers,
        "programming": boundary.programming,
        "leakage": boundary.leakage,
        "adapter swap": boundary.adapter_swap_tokens is not None,
    }
    inside = ["linear layers", "LoRA", *(part for part, included in parts.items() if included)]
    outside = [part for part, included in parts.items() if not included]
    return ", ".join(inside) + (f"; outside: {', '.join(outside)}" if outside else "")
