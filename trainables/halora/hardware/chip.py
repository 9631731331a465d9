"""The chip: one frozen description used by training, evaluation, energy and export alike.

Every section says what it does to the accuracy path and what it costs. `docs/hardware.md` lists what is modelled, what
is not, and the source of each constant.
"""

import hashlib
import json
from collections.abc import Mapping as MappingOf
from math import ceil, inf
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from halora.errors import UserError, nearest
from halora.hardware.cell_models import CMO_US
from halora.hardware.chip_files import expand_chip
from halora.hardware.costs import AdcCosts, constant_names
from halora.hardware.layers import LayerGroup, OnLayer, group_of, on_layers
from halora.hardware.mapping import Mapping
from halora.hardware.noise_settings import AgeingSetting, NoiseSetting
from halora.hardware.pcm_models import PcmFit, pcm_range_us
from halora.hardware.variation import Temperature, Variation
from halora.strict_model import StrictModel


class Cells(StrictModel):
    """The RRAM cells and their read pulse. A weight is the difference of two cells (differential pair)."""

    g_min_us: float = Field(ge=0, le=1000)
    """Lowest conductance used, in microsiemens."""
    g_max_us: float = Field(gt=0, le=1000)
    """Conductance of the largest weight, in microsiemens."""
    levels: int | None = Field(default=None, ge=2, le=4096)
    """Number of conductances a cell can be programmed to; continuous when left out."""
    read_voltage_v: float = Field(gt=0, le=5)
    """Read voltage; the cells' current, and so the thermal noise of a read, follows from it."""
    read_time_ns: float = Field(gt=0, le=10_000)
    """Length of one read pulse; the read energy of a cell is V^2 G t."""
    mean_fill: float | None = Field(default=None, ge=0, le=1)
    """Mean of what a pair of cells holds over the largest it can hold, which sets the mean conductance, so the array's
    energy and the IR drop. Left out, it follows from the weights and their coding (`halora.hardware.fill`)."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "Cells":
        if self.g_min_us >= self.g_max_us:
            raise ValueError(f"g_min_us {self.g_min_us:g} must be below g_max_us {self.g_max_us:g}")
        return self

    def mean_us(self, fill: float) -> float:
        """Mean conductance over both cells of the pairs, in microsiemens, at a mean fill."""
        return self.g_min_us + (self.g_max_us - self.g_min_us) * fill / 2

    def read_energy_fj(self, fill: float) -> float:
        """Mean energy of one cell in one read pulse, V^2 G t, in femtojoule, at a mean fill."""
        return self.read_voltage_v**2 * self.mean_us(fill) * self.read_time_ns


class Coding(StrictModel):
    """How a weight matrix is laid out in cells."""

    scale: Literal["tensor_max", "channel_max", "tile_max"] = "tensor_max"
    """Weight that maps to the largest conductance, a digital scale each: of the whole matrix, of each output channel,
    or of each tile of `tile.rows` inputs and `tile.columns` outputs."""
    clip_std: float | None = Field(default=None, gt=0, le=20)
    """Weights are clipped at this many standard deviations (of the tensor, channel or tile) before they are mapped."""
    slices: int = Field(default=1, ge=1, le=16)
    """Cells pairs in a row for one weight; each holds what the read-back of those before it left over."""
    slice_ratio: float = Field(default=4.0, ge=2, le=256)
    """Significance of a slice over that of the next."""
    replicas: int = Field(default=1, ge=1, le=32)
    """Copies of the whole matrix, averaged digitally."""

    @property
    def copies(self) -> int:
        """Arrays that a weight matrix takes: every slice of every replica."""
        return self.slices * self.replicas


class WriteVerify(StrictModel):
    """Programming effort. Each pulse is taken as an independent try that is kept once it falls inside the window."""

    pulses: float = Field(default=1.0, ge=1, le=10_000)
    """Mean number of programming pulses per cell; fewer widen the accepted window."""
    reference_pulses: float = Field(default=1.0, ge=1, le=10_000)
    """Pulses at which the noise model's own figures hold."""
    pulse_energy_pj: float = Field(default=117.0, ge=0)
    """Energy of one pulse with its verify read, in picojoule."""


class Retention(StrictModel):
    """What happens to programmed cells until they are programmed again."""

    ageing: AgeingSetting | None = None
    """Drift or relaxation model; none: cells hold their value for ever."""
    refresh_interval_s: float = Field(default=1.0, gt=0, le=1e9)
    """Time between two programmings, in seconds; accuracy is that of the oldest moment."""
    compensation: Literal["none", "global", "column"] = "none"
    """Digital gain that undoes the mean ageing, from one probe read per refresh: per layer or per output."""


class Faults(StrictModel):
    """Cells stuck at a conductance, drawn once per chip instance."""

    stuck_low_rate: float = Field(default=0.0, ge=0, le=0.5)
    stuck_high_rate: float = Field(default=0.0, ge=0, le=0.5)
    stuck_low_us: float = Field(default=0.0, ge=0, le=2000)
    stuck_high_us: float = Field(default=40.0, ge=0, le=2000)
    """Where stuck cells stand; it may lie outside the range in use."""
    clustering: float = Field(default=0.0, ge=0, le=10)
    """Variance of the rates from tile to tile over their squares, 1 / alpha: how many cells of a tile are stuck is then
    negative binomial, as in the yield model of Stapper (1983)."""

    @property
    def occur(self) -> bool:
        """Whether any cell can be stuck."""
        return self.stuck_low_rate + self.stuck_high_rate > 0


class Read(StrictModel):
    """Noise of single reads, fresh for every token."""

    averaged: int = Field(default=1, ge=1, le=64)
    """Reads averaged per product, K: white noise falls with sqrt(K), 1/f noise does not."""
    white_us: float = Field(default=0.0, ge=0, le=100)
    """White noise of one cell and read, standard deviation in microsiemens."""
    flicker: float = Field(default=0.0, ge=0, le=1)
    """1/f noise of one cell as a fraction of its conductance; the floor under averaging."""
    slow: Literal["none", "cmo"] | PcmFit = "none"
    """Published 1/f noise besides, by conductance and age: of CMO/HfOx cells (arXiv 2502.04524), or of PCM cells."""
    thermal: bool = True
    """Thermal noise of the read pulse: sigma_G / G = sqrt(2 k T / read energy of the cell). Without it the read pulse
    (`cells.read_voltage_v`, `cells.read_time_ns`) costs energy and buys nothing."""

    @property
    def noisy(self) -> bool:
        """Whether a cell reads differently from read to read."""
        return bool(self.white_us or self.thermal or self.lasting)

    @property
    def lasting(self) -> bool:
        """Whether reads have noise that is the same in all cycles of a product."""
        return bool(self.flicker or self.slow != "none")


class Dac(StrictModel):
    """The converters that drive the rows."""

    input_bits: int = Field(default=8, ge=1, le=16)
    """Resolution of the inputs, sign included."""
    bits: int = Field(default=8, ge=1, le=16)
    """Most magnitude bits driven at once, the sign by polarity; the read cycles of a product are added with shifts."""
    range: Literal["token", "calibrated"] = "token"
    """Input full scale: the largest input of each token (digital scale), or a fixed one per layer from calibration."""
    lossless: bool = False
    """True: no quantisation error (energy is still that of `input_bits`)."""

    @property
    def cycles(self) -> int:
        """Read cycles per product, N_i."""
        return max(ceil((self.input_bits - 1) / self.bits), 1)


class Adc(StrictModel):
    """The converter at the foot of every tile column."""

    bits: int = Field(ge=2, le=14)
    """Resolution; `costs` must cover it."""
    lossless: bool = False
    """True: no quantisation error (energy is still that of `bits`)."""
    noise_steps: float = Field(default=0.0, ge=0, le=16)
    """Output noise before each conversion, standard deviation in ADC steps."""
    calibration_reads: int = Field(default=0, ge=0, le=4096)
    """Conversions of nothing, and as many of a full input, by which every column's offset and gain are trimmed whenever
    cells are programmed; 0: never."""
    costs: AdcCosts = "isaac"
    """Where the energy per conversion comes from."""


class Tile(StrictModel):
    """Size of one crossbar tile, in cells."""

    rows: int = Field(ge=8, le=1024)
    """Inputs summed in the analog domain before one conversion."""
    columns: int = Field(ge=8, le=1024)
    """Outputs that share one input driver."""
    adc_share: int | None = Field(default=None, ge=1, le=1024)
    """Columns that take turns at one ADC; fewer are faster and take more area. All of a tile when left out."""


class Die(StrictModel):
    """One piece of silicon; what takes more area is spread over several, in the order of the forward pass."""

    area_mm2: float = Field(default=858.0, gt=0, le=1e6)
    """Largest area of a die; by default what a reticle exposes, 26 mm x 33 mm."""


class Pipeline(StrictModel):
    """What waits for what."""

    branch: Literal["beside", "after"] = "beside"
    """The LoRA branch and the outliers multiply beside a layer's tiles, or once those are done."""


class Wires(StrictModel):
    """Column wire, which sets the IR drop together with the mean conductance."""

    resistance_ohm: float = Field(ge=0, le=100)
    """Wire resistance per cell segment, in ohm; 0 switches IR drop off."""


class Boundary(StrictModel):
    """What energy and time include besides the mapped linear layers and LoRA."""

    attention: bool = True
    """Attention products and softmax."""
    buffers: bool = False
    """Moving inputs and outputs through buffers and network."""
    leakage: bool = True
    """Leakage of the chip's area for as long as it works on a token."""
    programming: bool = True
    """Programming the cells, spread over the tokens between two refreshes. Without it write-verify and refreshes are
    free."""
    tokens_per_s: float = Field(default=100.0, gt=0, le=1e9)
    """Throughput over which a refresh is spread."""
    adapter_swap_tokens: float | None = Field(default=None, gt=0)
    """Tokens between two adapter loads from DRAM; never when left out."""


class Products(StrictModel):
    """Precision of exact, digital products: their energy is that of so many bits, and scoring computes with them."""

    weight_bits: int = Field(default=8, ge=2, le=16)
    """Of the weights, symmetric; 16 leaves them as they are."""
    input_bits: int = Field(default=8, ge=2, le=16)
    """Of what is multiplied with them, symmetric with a scale per token; 16 leaves it as it is."""

    @property
    def cost(self) -> float:
        """Bits of a product over those of 8 x 8."""
        return self.weight_bits * self.input_bits / 64


class Attention(StrictModel):
    """The digital macros that multiply what changes with every token."""

    bits: int = Field(default=8, ge=2, le=16)
    """Of queries, keys, values and softmax weights; 16 leaves them as they are."""


LAYER_FIELDS: MappingOf[str, tuple[type[StrictModel], tuple[str, ...]]] = {
    "adc": (Adc, ("bits",)),
    "coding": (Coding, tuple(Coding.model_fields)),
    "dac": (Dac, ("input_bits", "bits", "range")),
    "digital": (Products, tuple(Products.model_fields)),
    "mapping": (Mapping, ("outliers.share", "outliers.by", "outliers.weight_bits")),
    "read": (Read, ("averaged",)),
    "sram": (Products, tuple(Products.model_fields)),
    "tile": (Tile, tuple(Tile.model_fields)),
    "write_verify": (WriteVerify, ("pulses",)),
}
"""What may differ from layer to layer, by section: how a chip is built and operated, not what its cells are."""

if TYPE_CHECKING:
    _LayerGroup = LayerGroup
else:
    _LayerGroup = group_of(LAYER_FIELDS)


class Chip(StrictModel):
    """A hybrid compute-in-memory chip: frozen weights in RRAM tiles, LoRA in SRAM."""

    name: str
    mapping: Mapping = Mapping()
    cells: Cells
    coding: Coding = Coding()
    noise: NoiseSetting
    """Error of programming."""
    write_verify: WriteVerify = WriteVerify()
    faults: Faults = Faults()
    retention: Retention = Retention()
    read: Read = Read()
    dac: Dac = Dac()
    adc: Adc
    tile: Tile
    wires: Wires
    variation: Variation = Variation()
    temperature: Temperature = Temperature()
    die: Die = Die()
    pipeline: Pipeline = Pipeline()
    sram: Products = Products()
    """Frozen layers that `mapping` keeps in SRAM macros: a weight scale per output."""
    digital: Products = Products()
    """Frozen layers that `mapping` keeps in plain logic: a weight scale per output."""
    lora: Products = Products()
    """The LoRA branch, in SRAM macros: a weight scale per rank; what lies between A and B is an input as well."""
    attention: Attention = Attention()
    layers: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], _LayerGroup] = Field(
        default_factory=dict, max_length=100
    )
    """Groups of layers with values of their own, by names of your own; no two may give a layer the same value."""
    boundary: Boundary = Boundary()
    costs: dict[str, float] = Field(default_factory=dict)
    """Constants of `constants.yaml` that this chip replaces, by name."""

    @field_validator("costs")
    @classmethod
    def _known_costs(cls, costs: dict[str, float]) -> dict[str, float]:
        for name, value in costs.items():
            if name not in constant_names():
                raise ValueError(f"no constant '{name}'{nearest(name, constant_names())}")
            if value < 0:
                raise ValueError(f"{name} is an energy, area or time and cannot be {value:g}")
        return costs

    @model_validator(mode="after")
    def _noise_is_known_for_the_cells(self) -> "Chip":
        models = [model for model in (self.noise, self.retention.ageing) if model is not None]
        known_for = (self.cells.g_min_us, self.cells.g_max_us, self.retention.refresh_interval_s)
        problems = [problem for model in models for problem in model.problems(*known_for)]
        slow = self.read.slow
        low_us, high_us = (0.0, inf) if slow == "none" else CMO_US if slow == "cmo" else pcm_range_us(slow)
        if not low_us <= self.cells.g_min_us < self.cells.g_max_us <= high_us:
            problems.append(f"read.slow: {slow} was measured from {low_us:g} to {high_us:g} uS; change the cells")
        problems += self.temperature.problems(self.cells.g_min_us, self.cells.g_max_us)
        if problems:
            raise UserError(problems)
        return self

    def on_layers(self, sizes: MappingOf[str, int]) -> dict[str, OnLayer]:
        """Where every layer of a model sits, and the chip it meets there; see `halora.hardware.layers`."""
        return on_layers(self, sizes)

    @property
    def warm_cells(self) -> Cells:
        """The cells at the chip's temperature."""
        low_us, high_us = self.temperature.of_range(self.cells.g_min_us, self.cells.g_max_us)
        return self.cells.model_copy(update={"g_min_us": low_us, "g_max_us": high_us})

    @property
    def tokens_between_refreshes(self) -> float:
        """Tokens that share the effort of one."""
        return self.boundary.tokens_per_s * self.retention.refresh_interval_s

    @property
    def ages(self) -> bool:
        """Whether cells change after they are programmed, as they are described."""
        return self.retention.ageing is not None or self.noise.first_s is not None

    @property
    def content_hash(self) -> str:
        """Twelve hex digits that change with any value but the name."""
        content = json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


ChipSetting = Annotated[Chip, BeforeValidator(expand_chip)]
"""A chip in a configuration file: a preset's name, a path, a preset with overrides, or the whole description."""


def load_chip(setting: Any) -> Chip:
    """The chip that a configuration's `chip` entry names."""
    return Chip.model_validate(expand_chip(setting))
