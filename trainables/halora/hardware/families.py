"""Families of models, declared: what a decoder block is made of, and which settings change what it computes.

`transformers` computes every model. An entry here says what of it a chip holds and what of its `config.json` counts. A
new family is a new entry, and a model in `tests/tiny_families.py`, which all tests of families then take. Every setting
that the configuration class of `transformers` has is of one of these kinds, which `tests/test_families.py` checks:

    dimensions   what shapes, energy and memory follow from
    honoured     computed as `transformers` does
    fixed        refused at any other than the stated values
    idle         no effect on a frozen model: initial weights, caches, special tokens, dropout

What sits where is the same in all families. The linear layers of the blocks sit in RRAM, but for those that the chip's
mapping puts into SRAM or digital logic; so does `lm_head`, where the mapping has it on the chip. Low-rank branches are
SRAM's, scores and weighted values digital macros'. Norms, rotations, activations, biases, multipliers and residual sums
are digital, computed as the model has them. Rows that share a batch meet in attention alone, which keeps them apart,
and in rotations that depend on the longest row of a batch (`rope_type: longrope`): rows that long are refused.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from halora.errors import UserError
from halora.hardware.mapping import LM_HEAD

Width = Literal["hidden", "queries", "keys", "inner"]
"""A width by what it counts: the residual stream, all query heads, all heads of keys (or values), the MLP's."""

NormKind = Literal["rounded", "wide", "offset"]
"""w x / rms(x), the quotient in float32: `rounded` to the model's dtype before the product with w, or `wide`, rounded
after it; `offset` is wide with 1 + w."""


@dataclass(frozen=True)
class Linear:
    """A linear layer that every decoder block has.

    Attributes:
        name: Its name in the block, by which adapters are attached to it.
        block: The part of the block it is in.
        inputs: Width of its inputs.
        outputs: Widths of its outputs, end to end.
        parts: Names of the plain layers that it stands for, one for each of `outputs`.
    """

    name: str
    block: Literal["self_attn", "mlp"]
    inputs: Width
    outputs: tuple[Width, ...]
    parts: tuple[str, ...]


def _plain(name: str, block: Literal["self_attn", "mlp"], inputs: Width, outputs: Width) -> Linear:
    return Linear(name, block, inputs, (outputs,), (name,))


_OUTPUT = _plain("o_proj", "self_attn", "queries", "hidden")
_DOWN = _plain("down_proj", "mlp", "inner", "hidden")
_SEPARATE = (
    _plain("q_proj", "self_attn", "hidden", "queries"),
    _plain("k_proj", "self_attn", "hidden", "keys"),
    _plain("v_proj", "self_attn", "hidden", "keys"),
    _OUTPUT,
    _plain("gate_proj", "mlp", "hidden", "inner"),
    _plain("up_proj", "mlp", "hidden", "inner"),
    _DOWN,
)
_FUSED = (
    Linear("qkv_proj", "self_attn", "hidden", ("queries", "keys", "keys"), ("q_proj", "k_proj", "v_proj")),
    _OUTPUT,
    Linear("gate_up_proj", "mlp", "hidden", ("inner", "inner"), ("gate_proj", "up_proj")),
    _DOWN,
)
LINEARS: Mapping[str, Linear] = {linear.name: linear for linear in (*_SEPARATE, *_FUSED)}
"""The linear layers of all families by name."""
LINEAR_NAMES = tuple(LINEARS)
_PLAIN_NAMES = tuple(linear.name for linear in _SEPARATE)  # in the order of the forward pass

_DIMENSIONS = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size")
_OPTIONAL_DIMENSIONS = ("head_dim", "num_key_value_heads")
_HONOURED = ("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
_IDLE = (
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("attention_dropout", "embd_pdrop", "pretraining_tp"),
)
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_MOST_LAYERS, _LARGEST = 10_000, 2**24  # beyond any model; a shape lists its layers
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Sliding:
    """Attention within a window: a token sees none that is `sliding_window` positions or more before it.

    Attributes:
        window: `sliding_window` of a configuration without one, as `transformers` has it.
        switch: The setting that has to be true, or no block has a window.
        blocks: Whether a block has the window, by configuration and number, where `layer_types` does not say.
        by_type: Whether `layer_types` says; else all blocks are alike.
        settings: What `blocks` reads, and its value in a configuration without it.
    """

    window: int | None
    switch: str | None = None
    blocks: Callable[[Mapping[str, Any], int], bool] = lambda _settings, _block: True
    by_type: bool = True
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Names of all settings that are read."""
        given = {"sliding_window", *self.settings}
        return given | ({self.switch} if self.switch else set()) | ({"layer_types"} if self.by_type else set())

    def problems(self, config: Mapping[str, Any], layers: int) -> list[str]:
        """What is wrong with the settings of a model of so many blocks."""
        numbers = {name: config.get(name) for name in ("sliding_window", *self.settings)}
        problems = [
            f"{name} is {value!r}, not a positive whole number"
            for name, value in numbers.items()
            if value is not None and not _whole(value) and (name, value) != ("max_window_layers", 0)
        ]
        types = config.get("layer_types") if self.by_type else None
        if types is not None and not (isinstance(types, list) and set(map(str, types)) <= {_FULL, _SLIDING}):
            problems.append(f"layer_types: a list of {_FULL} and {_SLIDING} is supported, not {str(types)[:80]}")
        elif types is not None and len(types) != layers:
            problems.append(f"layer_types has {len(types)} entries for {layers} layers")
        return problems

    def windows(self, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """The window of every block; none where a token sees all before it."""
        window = config.get("sliding_window", self.window)
        if window is None or (self.switch and not config.get(self.switch)):
            return (None,) * layers
        settings = {n: default if config.get(n) is None else config[n] for n, default in self.settings.items()}
        types = (config.get("layer_types") if self.by_type else None) or [
            _SLIDING if self.blocks(settings, block) else _FULL for block in range(layers)
        ]
        return tuple(window if kind == _SLIDING else None for kind in types)


@dataclass(frozen=True)
class Family:
    """A family of dense decoder-only models: its blocks, and what of its configuration counts.

    Attributes:
        name: The `model_type` of its configurations.
        linears: Linear layers of every block in the order of the forward pass; an adapter may sit on each.
        norms: Names of its root-mean-square norms, those of queries and keys among them.
        norm_kind: How they compute.
        honoured: Settings of its own that `transformers` computes with.
        fixed: Settings that are refused, but for these values.
        sliding: Its windows; none where every token sees all before it.
        statistics: Whose measured weights estimate the fill of its cells, see `weight_statistics.yaml`.
        defaults: Dimensions of a configuration that does not state them, as `transformers` has them.
        foreign_tokens: Tokens of its tokenizers that its embedding has no rows for: those of images.
    """

    name: str
    linears: tuple[Linear, ...] = _SEPARATE
    norms: tuple[str, ...] = _LLAMA_NORMS
    norm_kind: NormKind = "rounded"
    honoured: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    sliding: Sliding | None = None
    statistics: str = "smollm2"
    defaults: Mapping[str, int] = field(default_factory=dict)
    foreign_tokens: tuple[str, ...] = ()

    @property
    def settings(self) -> set[str]:
        """Every setting that is read, refused or known to be idle."""
        own = {*self.honoured, *self.fixed} | (self.sliding.names if self.sliding else set())
        return own | {*_DIMENSIONS, *_OPTIONAL_DIMENSIONS, *_HONOURED, *_IDLE}

    def dimensions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of a configuration a shape is made of, its type included; checked.

        Raises:
            KeyError: A dimension is missing.
            UserError: With every setting that is refused and every dimension that is none.
        """
        known = {**self.defaults, **config}
        given = {name: known[name] for name in _DIMENSIONS}
        given |= {name: known[name] for name in _OPTIONAL_DIMENSIONS if known.get(name) is not None}
        most = dict.fromkeys(given, _LARGEST) | {"num_hidden_layers": _MOST_LAYERS}
        wrong = [f"{name} is {value!r}, no positive whole number" for name, value in given.items() if not _whole(value)]
        wrong += [f"{n} is {value}, {most[n]} at most" for n, value in given.items() if _whole(value) > most[n]]
        if wrong:
            raise UserError(wrong)
        if "head_dim" not in given and given["num_attention_heads"] > given["hidden_size"]:
            raise UserError("num_attention_heads is larger than hidden_size, which leaves a head nothing")
        problems = [
            f"{name} is {config[name]!r}; of type '{self.name}' only {' or '.join(map(repr, values))} is supported"
            for name, values in self.fixed.items()
            if name in config and not any(_same(config[name], value) for value in values)
        ]
        if self.sliding:
            problems += self.sliding.problems(config, given["num_hidden_layers"])
        if problems:
            raise UserError(problems)
        windows = {name: config[name] for name in sorted(self.sliding.names if self.sliding else ()) if name in config}
        return {"model_type": self.name, **given, **windows}


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)  # 0 is not False


def _whole(number: Any) -> int:
    """The number, where it is a positive whole one; else 0."""
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else 0


_OLMO_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", "norm", "q_norm", "k_norm")
_QWEN_WINDOWS = Sliding(
    window=4096,
    switch="use_sliding_window",
    blocks=lambda settings, block: block >= settings["max_window_layers"],
    settings={"max_window_layers": 28},
)

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama", honoured=("attention_bias", "mlp_bias")),
        Family("qwen2", sliding=_QWEN_WINDOWS, statistics="qwen2.5", defaults={"num_key_value_heads": 32}),
        Family(
            "qwen3",
            norms=(*_LLAMA_NORMS, "q_norm", "k_norm"),
            honoured=("attention_bias",),
            sliding=_QWEN_WINDOWS,
            statistics="qwen2.5",
            defaults={"head_dim": 128, "num_key_value_heads": 32},
        ),
        Family(
            "mistral",
            fixed={"layer_types": (None,)},
            sliding=Sliding(window=4096, by_type=False),
            defaults={"num_key_value_heads": 8},
        ),
        Family(
            "smollm3",
            honoured=(
                *("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
                *("layer_types", "sliding_window"),  # of no effect without a window
            ),
            fixed={"use_sliding_window": (False, None)},
            defaults={"num_key_value_heads": 4},
        ),
        Family(
            "granite",
            honoured=(
                *("attention_bias", "mlp_bias"),
                *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
            ),
        ),
        Family("olmo2", norms=_OLMO_NORMS, norm_kind="wide", honoured=("attention_bias",)),
        Family(
            "olmo3",
            norms=_OLMO_NORMS,
            norm_kind="wide",
            honoured=("attention_bias",),
            sliding=Sliding(window=4096, blocks=lambda _settings, block: (block + 1) % 4 != 0),
        ),
        Family(
            "phi3",
            linears=_FUSED,
            honoured=("original_max_position_embeddings", "partial_rotary_factor"),
            fixed={"resid_pdrop": (0.0, 0, None)},
            sliding=Sliding(window=None, by_type=False),
        ),
        Family(
            "gemma3_text",
            norms=(*_LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"),
            norm_kind="offset",
            honoured=(
                *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
                *("rope_theta", "rope_local_base_freq"),
            ),
            fixed={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
            sliding=Sliding(
                window=4096,
                blocks=lambda settings, block: (block + 1) % settings["sliding_window_pattern"] != 0,
                settings={"sliding_window_pattern": 6},
            ),
            defaults={"head_dim": 256, "num_key_value_heads": 4},
            foreign_tokens=("<image_soft_token>",),
        ),
    )
}
"""Families of dense models whose layers are modelled, by the `model_type` of `config.json`."""

_MISSING = {
    "gemma": "norms of its own",
    "gemma2": "softcapped attention scores",
    "gemma3": "images beside text; its text model alone, saved as Gemma3ForCausalLM, is of type gemma3_text",
    "mistral3": "images beside text; its text model alone is of type mistral",
    "olmo": "norms without weights, clipped queries, keys and values",
    "phi": "blocks that run attention and MLP side by side",
    "qwen3_next": "linear attention (gated delta-net)",
    "qwen3_5": "linear attention (gated delta-net)",
    "qwen3_5_text": "linear attention (gated delta-net)",
    "granitemoehybrid": "state-space layers",
    "ministral": "a declaration of its own beside mistral",
}
"""What types that are asked for have and no family here models."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by its configuration.

    Raises:
        UserError: It is a mixture of experts, where a token does not pass every layer, or no family that is declared.
    """
    known = ", ".join(FAMILIES)
    if any(config.get(name) for name in _EXPERTS):
        raise UserError(f"a mixture of experts is not modelled; dense models are, of type {known}")
    kind = config.get("model_type", "unknown")
    if (family := FAMILIES.get(kind) if isinstance(kind, str) else None) is None:
        missing = _MISSING.get(str(kind), "its layers and settings are not declared")
        raise UserError(f"type '{kind}' is not one of {known}; not modelled: {missing}")
    return family


def adapted(names: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """Which of a model's linear layers an adapter's targets mean: all that hold weights of a layer named there.

    So `q_proj` means `qkv_proj` where queries, keys and values are one layer, and `qkv_proj` all three where they are
    not. A target that is no layer of any family means the model's layer of that name.

    Args:
        names: Names of the model's layers, e.g. `q_proj`.
        targets: Names from any family.
    """
    wanted = {part for target in targets for part in parts_of(target)}
    return tuple(name for name in names if wanted & set(parts_of(name)))


def parts_of(name: str) -> tuple[str, ...]:
    """The plain layers that a layer stands for; itself where it is not fused."""
    return LINEARS[name].parts if name in LINEARS else (name,)


def forward_order(layer: str) -> tuple[float, int]:
    """Where a layer is in the forward pass, by its canonical name; to sort by."""
    kind = layer.rpartition(".")[2]
    if kind == LM_HEAD:
        return float("inf"), 0
    depth = next((int(part) for part in layer.split(".") if part.isdecimal()), 0)
    return depth, _PLAIN_NAMES.index(LINEARS[kind].parts[0])
