"""The dimensions of a model that its energy depends on: known by name, or read from a `config.json`. No download."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from halora.errors import UserError
from halora.hardware.families import FAMILIES, LINEARS, adapted, family_of, parts_of
from halora.hardware.fill import LayerFill, estimated_fill
from halora.hardware.mapping import LM_HEAD
from halora.reading import is_file, read_object

_TUNING = re.compile(r"-(instruct|base|it|pt)$")  # endings of hub ids, of models of the same dimensions


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
    windows: tuple[int | None, ...] = ()
    """How many tokens a token of each block attends to at most, itself included; empty where no block has a limit."""
    dimensions: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The `config.json` that `from_config` reads it back from, with an estimate of the fill."""
    fill: LayerFill = field(default=estimated_fill("smollm2"), compare=False, repr=False)
    """Fill of a layer's cells where the chip states none; an estimate where no weights were at hand."""
    fill_source: str = field(default="estimate (smollm2)", compare=False, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read the dimensions from the `config.json` of a model of a declared family, see `halora.hardware.families`.

        Raises:
            KeyError: The configuration lacks a dimension.
            UserError: It is of another family, a mixture of experts, has a setting that is not modelled, or a dimension
                that is not a positive whole number.
        """
        family = family_of(config)
        given = family.dimensions(config)
        hidden, heads, layers = given["hidden_size"], given["num_attention_heads"], given["num_hidden_layers"]
        head_dim = given.get("head_dim") or hidden // heads
        widths = {
            "hidden": hidden,
            "queries": heads * head_dim,
            "keys": given.get("num_key_value_heads", heads) * head_dim,
            "inner": given["intermediate_size"],
        }
        windows = family.sliding.windows(config, layers) if family.sliding else ()
        return cls(
            layers,
            hidden,
            heads,
            head_dim,
            given["vocab_size"],
            tuple(
                LinearShape(linear.name, widths[linear.inputs], sum(widths[each] for each in linear.outputs))
                for linear in family.linears
            ),
            windows if any(windows) else (),
            given,
            estimated_fill(family.statistics),
            f"estimate ({family.statistics})",
        )

    def adapted(self, targets: Iterable[str]) -> tuple[str, ...]:
        """Names of its linear layers that an adapter's targets mean, see `halora.hardware.families.adapted`."""
        return adapted([linear.name for linear in self.linears], targets)

    @property
    def foreign_tokens(self) -> tuple[str, ...]:
        """Tokens that its tokenizer may know and its embedding has no row for, see `Family.foreign_tokens`."""
        return FAMILIES[self.dimensions["model_type"]].foreign_tokens if self.dimensions else ()

    @property
    def linear_layers(self) -> dict[str, LinearShape]:
        """Every linear layer of the decoder blocks by canonical name, in the order of the forward pass."""
        return {
            f"model.layers.{i}.{LINEARS[linear.name].block}.{linear.name}": linear
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

    def attended(self, context_tokens: int) -> int:
        """Tokens that one token attends to, summed over the blocks: all of so many, or those in the block's window."""
        return sum(min(context_tokens, window or context_tokens) for window in self.windows or (None,) * self.layers)

    def attention_macs(self, context_tokens: int) -> int:
        """Multiply-accumulates of scores and weighted values, per token that attends to so many."""
        return 2 * self.heads * self.head_dim * self.attended(context_tokens)

    def cache_values(self, context_tokens: int) -> int:
        """Keys and values that are kept of so many tokens, over all blocks."""
        queries = self.heads * self.head_dim
        kept = sum(
            linear.out_features - ("q_proj" in parts_of(linear.name)) * queries
            for linear in self.linears
            if {"k_proj", "v_proj"} & set(parts_of(linear.name))
        )
        return kept * self.attended(context_tokens)


@cache
def named_shapes() -> dict[str, ModelShape]:
    """Dimensions of the models known by name."""
    return {name: ModelShape.from_config(entry) for name, entry in _known_models().items()}


def known_shape(model: str) -> ModelShape | None:
    """Dimensions of a model that needs neither download nor conversion: a known name or hub id, or a `config.json`.

    Raises:
        UserError: The file is not a configuration of a model of a declared family.
    """
    if model in named_shapes():
        return named_shapes()[model]
    for name, entry in _known_models().items():
        if _TUNING.sub("", entry["hub"].lower()) == _TUNING.sub("", model.lower()):
            return named_shapes()[name]
    return _read_shape(Path(model)) if is_file(model) else None


def _read_shape(path: Path) -> ModelShape:
    config = read_object(path, f"model '{path}'")
    try:
        return ModelShape.from_config(config)
    except UserError as error:
        raise UserError([f"model '{path}': {problem}" for problem in error.problems]) from None
    except KeyError as error:
        raise UserError(f"model '{path}' has no {error}; the config.json of such a model has") from None


@cache
def _known_models() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((files("halora.hardware") / "models.yaml").read_text(encoding="utf-8")))
