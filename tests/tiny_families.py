"""A tiny random model of every family: two blocks, one of each kind where a family has two.

Windows are shorter than the rows of the tests, so that a lost window shows.
"""

from typing import Any

import pytest
import torch

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "qwen2": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
        "tie_word_embeddings": False,  # tied, and its embeddings so large, a random model repeats its last token
    },
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "sliding_window": 6,
        "pad_token_id": 0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
}
"""Settings of each family's own, by its name."""

FEWER = tuple(
    pytest.param(name, marks=pytest.mark.slow) if name in ("mistral", "smollm3", "granite", "olmo2", "olmo3") else name
    for name in FAMILIES
)
"""All of them, most that are no other kind of model slow: for tests that take their time."""


def tiny_config(family: str, vocabulary: int) -> Any:
    """The `transformers` configuration of a family's tiny model."""
    from transformers import AutoConfig

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(family, **(settings | FAMILIES[family]))


def tiny_model(family: str, vocabulary: int) -> Any:
    """A family's tiny model, its weights random, none of them at a value that hides a lost one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocabulary))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default
                parameter.normal_(std=0.2)
            elif "norm" in name and family not in ("llama", "qwen2", "qwen3"):  # one, or zero, by default
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    return model
