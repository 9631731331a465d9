"""The dimensions of a model that its energy depends on: known by name, or read from a `config.json`. No download."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from halora.errors import UserError
from halora.hardware.fill import LayerFill, estimated_fill
from halora.hardware.mapping import LM_HEAD
from halora.reading import is_file, read_object

FAMILIES = ("llama", "qwen2", "qwen3")
"""Model types, as `config.json` has them, whose layers are those modelled."""
_MOST_LAYERS, _LARGEST = 10_000, 2**24  # beyond any model; a shape lists its layers
_DIMENSIONS = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size")
_BLOCK_OF = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of every decoder block."""

    name: str
    in_features: int
    out_features: int

    @property
    def weights(self) -> int:
        """Number of weights, which is that of multiply-accumulates per token."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelShape:
    """What the energy of a decoder-only transformer depends on: its dimensions, and how its weights fill the cells."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    vocabulary: int
    linears: tuple[LinearShape, ...]
    fill: LayerFill = field(default=estimated_fill("smollm2"), compare=False, repr=False)
    """Fill of a layer's cells where the chip states none; an estimate where no weights were at hand."""
    fill_source: str = field(default="estimate (smollm2)", compare=False, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read the dimensions of a LLaMA or Qwen `config.json` (grouped-query attention, gated MLP).

        Raises:
            KeyError: The configuration lacks a dimension: another family.
            UserError: It is of another family, a mixture of experts, where a token does not pass every layer, or has a
                dimension that is not a positive whole number.
        """
        if config.get("num_experts") or config.get("num_local_experts"):
            raise UserError("a mixture of experts is not modelled; dense LLaMA and Qwen models are")
        if (kind := config.get("model_type", "unknown")) not in FAMILIES:
            raise UserError(f"type '{kind}' is not one of {', '.join(FAMILIES)}")
        given = {name: config[name] for name in _DIMENSIONS}
        given |= {name: config[name] for name in ("head_dim", "num_key_value_heads") if config.get(name) is not None}
        if wrong := [
            f"{name} is {each!r}, no positive whole number" for name, each in given.items() if not _whole(each)
        ]:
            raise UserError(wrong)
        most = dict.fromkeys(given, _LARGEST) | {"num_hidden_layers": _MOST_LAYERS}
        if large := [f"{name} is {each}, {most[name]} at most" for name, each in given.items() if each > most[name]]:
            raise UserError(large)
        if "head_dim" not in given and given["num_attention_heads"] > given["hidden_size"]:
            raise UserError("num_attention_heads is larger than hidden_size, which leaves a head nothing")
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
        weights = "qwen2.5" if str(config.get("model_type", "")).startswith("qwen") else "smollm2"
        return cls(
            int(config["num_hidden_layers"]),
            hidden,
            heads,
            head_dim,
            int(config["vocab_size"]),
            linears,
            estimated_fill(weights),
            f"estimate ({weights})",
        )

    @property
    def dimensions(self) -> dict[str, Any]:
        """The `config.json` that `from_config` reads it back from, with an estimate of the fill."""
        rows = {linear.name: linear.out_features for linear in self.linears}
        return {
            "model_type": "qwen2" if "qwen" in self.fill_source else "llama",
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": rows["k_proj"] // self.head_dim,
            "head_dim": self.head_dim,
            "intermediate_size": rows["gate_proj"],
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
        }

    @property
    def linear_layers(self) -> dict[str, LinearShape]:
        """Every linear layer of the decoder blocks by canonical name, in the order of the forward pass."""
        return {
            f"model.layers.{i}.{_BLOCK_OF[linear.name]}.{linear.name}": linear
            for i in range(self.layers)
            for linear in self.linears
        }

    @property
    def lm_head(self) -> LinearShape:
        """The output projection."""
        return LinearShape(LM_HEAD, self.hidden, self.vocabulary)

    @property
    def all_layers(self) -> dict[str, LinearShape]:
        """Every linear layer by canonical name, the output projection last: what `Mapping.places` places."""
        return {**self.linear_layers, LM_HEAD: self.lm_head}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of every linear layer by canonical name, the output projection last."""
        return {name: layer.weights for name, layer in self.all_layers.items()}

    @property
    def attention_macs_per_context_token(self) -> int:
        """Multiply-accumulates of scores and weighted values, per token and token it attends to."""
        return 2 * self.layers * self.heads * self.head_dim

    @property
    def cache_values_per_context_token(self) -> int:
        """Keys and values kept per token, over all layers."""
        return self.layers * sum(linear.out_features for linear in self.linears if linear.name in ("k_proj", "v_proj"))


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


@cache
def named_shapes() -> dict[str, ModelShape]:
    """Dimensions of the models known by name."""
    return {name: ModelShape.from_config(entry) for name, entry in _known_models().items()}


def known_shape(model: str) -> ModelShape | None:
    """Dimensions of a model that needs neither download nor conversion: a known name or hub id, or a `config.json`.

    Raises:
        UserError: The file is not a configuration of a dense LLaMA or Qwen model.
    """
    if model in named_shapes():
        return named_shapes()[model]
    hub_id = model.lower().removesuffix("-instruct")
    for name, entry in _known_models().items():
        if entry["hub"].lower().removesuffix("-instruct") == hub_id:
            return named_shapes()[name]
    return _read_shape(Path(model)) if is_file(model) else None


def _read_shape(path: Path) -> ModelShape:
    config = read_object(path, f"model '{path}'")
    try:
        return ModelShape.from_config(config)
    except UserError as error:
        raise UserError([f"model '{path}': {problem}" for problem in error.problems]) from None
    except KeyError as error:
        raise UserError(f"model '{path}' has no {error}; the config.json of a LLaMA or Qwen model has") from None


@cache
def _known_models() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((files("halora.hardware") / "models.yaml").read_text(encoding="utf-8")))
