"""Energy per token of a model on a chip, as a sum of named components.

Counts are exact for one token that passes every mapped layer once (prefill and decode alike, except attention, whose
share depends on the context). Constants and their sources: `constants.yaml`. Not modelled: buffers and network,
programming, adapter swap, leakage, host traffic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil
from typing import Any

import yaml

from halora.hardware.chip import Chip


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of every decoder block."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder-only transformer that its energy depends on."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    vocabulary: int
    linears: tuple[LinearShape, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read the dimensions of a LLaMA or Qwen `config.json` (grouped-query attention, gated MLP)."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        queries, keys = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
        inner = int(config["intermediate_size"])
        linears = (
            LinearShape("q_proj", hidden, queries),
            LinearShape("k_proj", hidden, keys),
            LinearShape("v_proj", hidden, keys),
            LinearShape("o_proj", queries, hidden),
            LinearShape("gate_proj", hidden, inner),
            LinearShape("up_proj", hidden, inner),
            LinearShape("down_proj", inner, hidden),
        )
        return cls(int(config["num_hidden_layers"]), hidden, heads, head_dim, int(config["vocab_size"]), linears)


@dataclass(frozen=True)
class EnergyBreakdown:
    """Energy per token with everything needed to compare it.

    Attributes:
        components_uj: Microjoule per token by component.
        context_tokens: Number of tokens every token attends to (non-causal, as the paper counts).
        boundary: What is included.
    """

    components_uj: Mapping[str, float]
    context_tokens: int
    boundary: str

    @property
    def total_uj_per_token(self) -> float:
        """Sum of the components, in microjoule per token."""
        return sum(self.components_uj.values())


@cache
def energy_constants() -> dict[str, Any]:
    """Value by name of every constant in `constants.yaml`."""
    entries = yaml.safe_load((files("halora.hardware") / "constants.yaml").read_text())
    return {name: entry["value"] for name, entry in entries.items()}


def energy_per_token(
    shape: ModelShape, chip: Chip, *, rank: int, targets: tuple[str, ...], context_tokens: int = 512
) -> EnergyBreakdown:
    """Energy of one token on the chip.

    Args:
        shape: Dimensions of the model.
        chip: Tile, ADC, LoRA precision and boundary.
        rank: LoRA rank r; each adapted layer costs r (d_in + d_out) SRAM multiply-accumulates.
        targets: Names of the adapted linear layers, e.g. `q_proj`.
        context_tokens: Tokens each token attends to.
    """
    c = energy_constants()
    rram = [(linear.in_features, linear.out_features, shape.layers) for linear in shape.linears]
    if chip.boundary.lm_head:
        rram.append((shape.hidden, shape.vocabulary, 1))
    conversions = sum(n * d_out * ceil(d_in / chip.tile.rows) for d_in, d_out, n in rram)
    driven_inputs = sum(n * d_in * ceil(d_out / chip.tile.columns) for d_in, d_out, n in rram)
    cells = sum(n * d_in * d_out * 2 for d_in, d_out, n in rram)  # differential pairs
    adapted = sum(linear.in_features + linear.out_features for linear in shape.linears if linear.name in targets)
    components = {
        "adc": conversions * c["adc_conversion_pj"][chip.adc.bits] * 1e-6,
        "dac": driven_inputs * c["dac_conversion_pj"] * 1e-6,
        "shift_add": conversions * c["shift_add_pj"] * 1e-6,
        "array": cells * c["cell_read_fj"] * 1e-9,
        "lora_sram": shape.layers * rank * adapted * c["sram_mac_fj"] * chip.lora_weight_bits / 8 * 1e-9,
    }
    if chip.boundary.attention:
        scores = shape.layers * shape.heads * context_tokens
        components["attention"] = 2 * scores * shape.head_dim * c["attention_mac_fj"] * 1e-9
        components["softmax"] = scores * c["softmax_element_pj"] * 1e-6
    boundary = "linear layers and LoRA" + (", attention" if chip.boundary.attention else "")
    boundary += ", lm_head" if chip.boundary.lm_head else "; lm_head, buffers and programming outside"
    return EnergyBreakdown(components, context_tokens, boundary)
