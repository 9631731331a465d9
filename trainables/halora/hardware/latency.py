"""Time per token of a model on a chip: the path of one token, and what holds up the tokens behind it.

Every layer has its own tiles and macros, so all of them can work at once, each on another token. A layer in RRAM, with
n = N_i K reads of a product one after the other (symbols as in `halora.hardware.energy`), s columns that take turns at
an ADC, t_read of a pulse and t_adc of a conversion:

    cycle       max(t_read, s t_adc)            a column's sum is held while the next pulse is on, so the two overlap
    path        t_read + (n - 1) cycle + s t_adc + (1 + log2 of the arrays that are added up) t_clock
    interval    n cycle                         from one token to the next

Slices, replicas and the tiles of a layer work at once; their sums meet in a tree of adders. In SRAM macros all weights
take one bit of the inputs at a time, plain logic takes products one by one. The branch (LoRA, two macros in a row, and
the outliers) is beside the tiles or after them (`pipeline.branch`): beside, a token waits for the slower of the two,
and either way the slower one sets the interval. Within a block q, k and v work at once, and so do gate and up;
attention and softmax are between v and o. Inputs and outputs pass a tile's port where the boundary has the buffers. A
model whose area is more than a die's passes a link for every further die.

    decode      max(path, sequences x interval)                  from a token of a sequence to its next one
    prefill     (path + (sequences x context - 1) interval) / context
                                                                 time to the first token over those of the prompt

The interval is that of the slowest stage. Where columns are calibrated, all tiles at once, nothing else works for 2 n
cycles whenever cells are programmed; every token's path and interval have their share of it. Not modelled: norms,
activations, rotary embeddings and residual additions, the host, contention for the network, pipeline bubbles other than
the fill, reloading what does not fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, log2
from typing import Any

from halora.hardware.chip import Chip
from halora.hardware.costs import AdcCost
from halora.hardware.layers import OnLayer
from halora.hardware.mapping import Placement, outlier_count
from halora.hardware.shapes import LinearShape, ModelShape

_AT_ONCE = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)
"""Layers of a block by stage; attention follows the first."""


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
class Latency:
    """How long a token takes.

    Attributes:
        components_us: Microseconds of one token's path by component: what it waits for, one after the other.
        interval_us: Microseconds between two tokens at the slowest stage.
        bottleneck: That stage: a layer by its canonical name, `attention`, `softmax` or `links`.
        phase: What the tokens are.
        context_tokens: Tokens of a prompt, or those that a generated one attends to.
        sequences: Sequences that are worked on at once.
        dies: Dies that the model takes.
    """

    components_us: Mapping[str, float]
    interval_us: float
    bottleneck: str
    phase: Phase
    context_tokens: int
    sequences: int
    dies: int

    @property
    def path_us(self) -> float:
        """Microseconds of a token from the first layer to the last, nothing else on the chip."""
        return sum(self.components_us.values())

    @property
    def us_per_token(self) -> float:
        """Microseconds that a sequence takes over its tokens, see the module's formulas."""
        match self.phase:
            case Phase.PREFILL:
                behind = self.sequences * self.context_tokens - 1
                return (self.path_us + behind * self.interval_us) / self.context_tokens
            case Phase.DECODE:
                return max(self.path_us, self.sequences * self.interval_us)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences together, per second."""
        return self.sequences * 1e6 / self.us_per_token


@dataclass(frozen=True)
class _Stage:
    """Nanoseconds of a stage: of its path by component, and from one token to the next."""

    path_ns: Mapping[str, float]
    interval_ns: float

    @property
    def total_ns(self) -> float:
        return sum(self.path_ns.values())


def token_latency(
    shape: ModelShape,
    chip: Chip,
    *,
    met: Mapping[str, OnLayer],
    ranks: Mapping[str, int],
    adcs: Mapping[int, AdcCost],
    constants: Mapping[str, Any],
    area_mm2: float,
    context_tokens: int,
    phase: Phase,
    sequences: int,
) -> Latency:
    """Time of a token.

    Args:
        shape: Dimensions of the model.
        chip: The chip.
        met: Where each layer sits and the chip it meets there, by canonical name.
        ranks: LoRA rank of each adapted layer by canonical name.
        adcs: The converters, by their bits.
        constants: Values by the names of `constants.yaml`.
        area_mm2: Area of the whole model, in square millimetre.
        context_tokens: Tokens each token attends to.
        phase: What the tokens are.
        sequences: Sequences that are worked on at once.
    """
    known, stages = dict[Any, _Stage](), dict[str, _Stage]()
    for name, layer in shape.all_layers.items():
        place, own, groups = met[name]
        if place is not Placement.HOST:
            alike = (layer, place, ranks.get(name, 0), groups)
            if alike not in known:
                known[alike] = _layer(layer, place, ranks.get(name, 0), own, adcs[own.adc.bits], constants)
            stages[name] = known[alike]
    around = _attention(shape, chip, constants, context_tokens)
    path = dict.fromkeys(("tiles", "sram", "digital", "branch", *around, "moving"), 0.0)
    for waited_for in _slowest(shape, stages):
        for name, ns in waited_for.path_ns.items():
            path[name] += ns
    path |= {name: stage.total_ns for name, stage in around.items()}
    dies = max(ceil(area_mm2 / chip.die.area_mm2), 1)
    crossing_ns = link_bits(shape, met) * constants["link_ps_per_bit"] * 1e-3
    path["links"] = (dies - 1) * (constants["link_ns"] + crossing_ns)
    intervals = {name: stage.interval_ns for name, stage in (stages | around).items()}
    intervals |= {"links": crossing_ns} if dies > 1 else {}
    bottleneck = max(intervals, key=intervals.__getitem__)
    calibration_ns = 0.0
    if chip.adc.calibration_reads:
        calibration_ns = path["calibration"] = _calibration_ns(shape, met, adcs) / chip.tokens_between_refreshes
    return Latency(
        {name: ns * 1e-3 for name, ns in path.items()},
        (intervals[bottleneck] + calibration_ns) * 1e-3,
        bottleneck,
        phase,
        context_tokens,
        sequences,
        dies,
    )


def link_bits(shape: ModelShape, met: Mapping[str, OnLayer]) -> int:
    """Bits that pass from a die to the next for every token: what a layer hands on, at the finest of the inputs."""
    finest = max((layer.chip.dac.input_bits for layer in met.values() if layer.place is not Placement.HOST), default=0)
    return shape.hidden * finest


def reads_in_turn(chip: Chip) -> int:
    """Reads of the same cells that one product takes, one after the other."""
    return chip.dac.cycles * chip.read.averaged


def _slowest(shape: ModelShape, stages: Mapping[str, _Stage]) -> Iterable[_Stage]:
    """Of every group of layers that work at once, the one that the others wait for, over all blocks."""
    by_group: dict[tuple[str, int], list[_Stage]] = {}
    for name, stage in stages.items():
        block, _, kind = name.rpartition(".")
        group = next((i for i, kinds in enumerate(_AT_ONCE) if kind in kinds), len(_AT_ONCE))
        by_group.setdefault((block.rpartition(".")[0], group), []).append(stage)
    return [max(group, key=lambda stage: stage.total_ns) for group in by_group.values()]


def _layer(
    layer: LinearShape,
    place: Placement,
    rank: int,
    chip: Chip,
    adc: AdcCost,
    constants: Mapping[str, Any],
) -> _Stage:
    kind, main_ns, interval_ns = _product(layer, place, chip, adc, constants)
    branch_ns, branch_interval_ns = 0.0, 0.0
    if rank:
        pass_ns = chip.lora.input_bits * constants["sram_ns_per_bit"]
        branch_ns, branch_interval_ns = 2 * pass_ns, pass_ns  # A, and then B
    if place is Placement.RRAM:
        outliers_ns, outliers_interval_ns = _outliers(layer, chip, constants)
        branch_ns = max(branch_ns, outliers_ns)
        branch_interval_ns = max(branch_interval_ns, outliers_interval_ns)
    waits_ns = branch_ns if chip.pipeline.branch == "after" else max(branch_ns - main_ns, 0.0)
    in_ns, out_ns = _moving(layer, chip, constants)
    return _Stage(
        {kind: main_ns, "branch": waits_ns, "moving": in_ns + out_ns},
        max(interval_ns, branch_interval_ns, in_ns, out_ns),
    )


def _product(
    layer: LinearShape, place: Placement, chip: Chip, adc: AdcCost, constants: Mapping[str, Any]
) -> tuple[str, float, float]:
    """What a layer's frozen weights are in, and the nanoseconds of a product's path and to the next product."""
    if place is Placement.SRAM:
        pass_ns = chip.sram.input_bits * constants["sram_ns_per_bit"]
        return "sram", pass_ns, pass_ns
    if place is Placement.DIGITAL:
        all_ns = layer.weights * constants["digital_mac_ps"] * 1e-3
        return "digital", all_ns, all_ns
    read_ns, convert_ns = chip.cells.read_time_ns, _conversions_ns(layer, chip, adc)
    reads, cycle_ns = reads_in_turn(chip), max(read_ns, convert_ns)
    arrays = ceil(layer.in_features / chip.tile.rows) * chip.coding.copies
    merge_ns = (1 + ceil(log2(arrays))) * constants["clock_ns"]
    return "tiles", read_ns + (reads - 1) * cycle_ns + convert_ns + merge_ns, reads * cycle_ns


def _conversions_ns(layer: LinearShape, chip: Chip, adc: AdcCost) -> float:
    """Nanoseconds in which the columns that share an ADC are converted in turn."""
    columns = min(chip.tile.columns, layer.out_features)
    return min(chip.tile.adc_share or columns, columns) * adc.conversion_ns


def _calibration_ns(shape: ModelShape, met: Mapping[str, OnLayer], adcs: Mapping[int, AdcCost]) -> float:
    """Nanoseconds of a calibration: cycles of the layer with the slowest columns."""
    in_rram = [(layer, met[name].chip) for name, layer in shape.all_layers.items() if met[name].place is Placement.RRAM]
    return max(
        (
            2
            * chip.adc.calibration_reads
            * max(chip.cells.read_time_ns, _conversions_ns(layer, chip, adcs[chip.adc.bits]))
            for layer, chip in in_rram
        ),
        default=0.0,
    )


def _outliers(layer: LinearShape, chip: Chip, constants: Mapping[str, Any]) -> tuple[float, float]:
    """Nanoseconds of what SRAM holds of a layer in RRAM, and to the next token's."""
    outliers, tile = chip.mapping.outliers, (chip.tile.rows, chip.tile.columns)
    count = outlier_count(layer.in_features, layer.out_features, outliers.share, outliers.by, tile)
    if not count:
        return 0.0, 0.0
    pass_ns = chip.sram.input_bits * constants["sram_ns_per_bit"]
    match outliers.by:
        case "column":
            return pass_ns, pass_ns
        case "singular":
            return 2 * pass_ns, pass_ns
        case "weight" | "tile":
            all_ns = count * constants["digital_mac_ps"] * 1e-3
            return all_ns, all_ns


def _moving(layer: LinearShape, chip: Chip, constants: Mapping[str, Any]) -> tuple[float, float]:
    """Nanoseconds for the inputs of a tile to enter by its port, and for its outputs to leave."""
    if not chip.boundary.buffers:
        return 0.0, 0.0
    value_ns = chip.dac.input_bits * constants["port_ps_per_bit"] * 1e-3
    return (
        min(chip.tile.rows, layer.in_features) * value_ns,
        min(chip.tile.columns, layer.out_features) * value_ns,
    )


def _attention(shape: ModelShape, chip: Chip, constants: Mapping[str, Any], context_tokens: int) -> dict[str, _Stage]:
    """Attention products and softmax: the path through all blocks, the interval that of the block that sees most."""
    if not chip.boundary.attention:
        return {}
    attended = shape.attended(context_tokens)
    widest = max(min(context_tokens, window or context_tokens) for window in shape.windows or (None,))
    element_ns = {
        "attention": 2 * shape.head_dim * constants["attention_mac_ps"] * chip.attention.bits / 8 * 1e-3,
        "softmax": constants["softmax_element_ps"] * 1e-3,
    }
    return {
        name: _Stage({name: shape.heads * attended * ns}, shape.heads * widest * ns) for name, ns in element_ns.items()
    }
