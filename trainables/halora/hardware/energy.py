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
Digital products cost by their bits of weights and inputs, with which scoring computes them. The output projection
counts where the mapping puts it on the chip. Counts are exact; a token passes every linear layer once, in prefill and
in decode. Time is that of `halora.hardware.latency`; the chip's area leaks for as long as a token takes, shared by the
sequences that are worked on at once, and what passes from die to die is paid per bit. The constants and their sources
are in `constants.yaml`. Not modelled: clocks and control, partial sums between tiles, norms and embeddings, host
traffic, the probe reads of drift compensation, the area of attention and of the keys and values that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from halora.errors import UserError, attempt, nearest
from halora.hardware.chip import Chip
from halora.hardware.costs import adc_cost, energy_constants
from halora.hardware.latency import Latency, Phase, link_bits, reads_in_turn, token_latency
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
    """

    components_uj: Mapping[str, float]
    latency: Latency
    boundary: str
    area_mm2: float
    fill: str

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


@dataclass(frozen=True)
class _Counts:
    """Events of one token in the layers that sit in RRAM, and what they occupy."""

    columns: int
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
    if chip.adc.calibration_reads:
        conversion_pj = adc.conversion_pj + constants["shift_add_pj"]
        reads = 2 * chip.adc.calibration_reads * counts.columns
        components["calibration"] = reads * conversion_pj * 1e-6 / chip.tokens_between_refreshes
    sram_bits = (
        chip.sram.weight_bits * sram_weights
        + chip.digital.weight_bits * digital_weights
        + chip.lora.weight_bits * lora_weights
        + outliers.bits
    )
    adcs = counts.tiles * ceil(chip.tile.columns / (chip.tile.adc_share or chip.tile.columns))
    area_um2 = adcs * adc.area_um2 + counts.cells * constants["rram_cell_um2"] + sram_bits * constants["sram_bit_um2"]
    latency = token_latency(
        shape,
        chip,
        places=places,
        ranks=ranks,
        adc=adc,
        constants=constants,
        area_mm2=area_um2 * 1e-6,
        context_tokens=context_tokens,
        phase=phase,
        sequences=sequences,
    )
    if not latency.us_per_token:
        raise UserError("chip.costs: a token takes no time with these; leave out some of the times that are 0")
    components["links"] = (latency.dies - 1) * link_bits(shape, chip) * constants["link_pj_per_bit"] * 1e-6
    if chip.boundary.leakage:
        leakage_w = area_um2 * 1e-9 * constants["leakage_mw_per_mm2"]
        components["leakage"] = leakage_w * latency.us_per_token / sequences
    fill = "chip" if chip.cells.mean_fill is not None else shape.fill_source
    return EnergyBreakdown(components, latency, _describe(chip), area_um2 * 1e-6, fill)


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


def _count(layers: list[LinearShape], chip: Chip) -> _Counts:
    copies = chip.coding.slices * chip.coding.replicas
    reads = _reads(chip)
    rows, columns = chip.tile.rows, chip.tile.columns
    cells = _CELLS_PER_WEIGHT * sum(layer.weights for layer in layers)
    tile_columns = sum(layer.out_features * ceil(layer.in_features / rows) for layer in layers)
    return _Counts(
        columns=copies * tile_columns,
        conversions=reads * tile_columns,
        driven_inputs=reads * sum(layer.in_features * ceil(layer.out_features / columns) for layer in layers),
        cells=copies * cells,
        tiles=copies * sum(ceil(layer.in_features / rows) * ceil(layer.out_features / columns) for layer in layers),
    )


def _reads(chip: Chip) -> int:
    """Reads of every pair of cells that one product takes, over all slices and replicas."""
    return chip.coding.copies * reads_in_turn(chip)


def _array_fj(layers: Mapping[str, LinearShape], shape: ModelShape, chip: Chip) -> float:
    """Femtojoule per token of all cells' reads."""
    stated = chip.cells.mean_fill
    weight_fj = sum(
        layer.weights * chip.warm_cells.read_energy_fj(shape.fill(name, chip) if stated is None else stated)
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
        components["programming"] = pulses * chip.write_verify.pulse_energy_pj * 1e-6 / chip.tokens_between_refreshes
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
        "leakage": boundary.leakage,
        "adapter swap": boundary.adapter_swap_tokens is not None,
    }
    inside = ["linear layers", "LoRA", *(part for part, included in parts.items() if included)]
    outside = [part for part, included in parts.items() if not included]
    return ", ".join(inside) + (f"; outside: {', '.join(outside)}" if outside else "")
