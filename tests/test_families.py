"""Oracles: the configuration classes, models and norms of `transformers`; PEFT on the plain model, row by row; counts
by hand. What all families share is tested where it is computed, over all of them: attention, noise, scores, training.
"""

from dataclasses import fields, replace
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from tiny_families import FAMILIES as TINY
from tiny_families import tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from halora.errors import UserError
from halora.hardware.chip import load_chip
from halora.hardware.costs import adc_cost, energy_constants
from halora.hardware.energy import energy_per_token
from halora.hardware.families import FAMILIES, Family, adapted
from halora.hardware.fill import estimated_fill
from halora.hardware.shapes import ModelShape
from halora.selection import bundle_reading
from halora.settings.training import LoraSettings
from halora.training.adapter import attach, detach, lora_pairs
from halora.training.batches import lay_out, pack_answer
from halora.training.fused import FrozenNorm
from halora.training.models import load_base
from halora.training.prompts import prepared_rows
from halora.training.tasks import Row, load_rows

DIMENSIONS = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "vocab_size": 50,
}


def _read(family: str, **settings: object) -> ModelShape:
    return ModelShape.from_config({"model_type": family, **DIMENSIONS, **settings})


def test_every_family_has_a_tiny_model():
    assert [*TINY] == [*FAMILIES]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_setting_of_transformers_is_declared(family: Family):
    common = {each.name for each in fields(PreTrainedConfig)}
    own = {each.name for each in fields(CONFIG_MAPPING[family.name])}
    assert own - common <= family.settings


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_a_configuration_leaves_out_is_as_transformers_has_it(family: Family):
    """Whatever of a bare configuration a shape is made of, its windows included."""
    whole = CONFIG_MAPPING[family.name](**DIMENSIONS).to_dict()
    assert _read(family.name) == ModelShape.from_config(whole)


@pytest.mark.parametrize(
    ("family", "settings", "blocks"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 6}, [6, 7]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, [*range(8)]),
        ("mistral", {"sliding_window": 7}, [*range(8)]),
        ("phi3", {"sliding_window": 7, "pad_token_id": 0}, [*range(8)]),
        ("olmo3", {"sliding_window": 7}, [0, 1, 2, 4, 5, 6]),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 2}, [0, 2, 4, 6]),
        ("gemma3_text", {"sliding_window": 7, "layer_types": 8 * ["full_attention"]}, []),
    ],
)
def test_windows_are_those_that_the_modules_of_transformers_have(family, settings, blocks):
    given = {**DIMENSIONS, "num_key_value_heads": 2, **settings}
    config = CONFIG_MAPPING[family](**given)
    with torch.device("meta"):
        attentions = [block.self_attn for block in AutoModelForCausalLM.from_config(config).model.layers]
    theirs = tuple(getattr(each, "sliding_window", config.sliding_window) for each in attentions)
    assert theirs == tuple(7 if block in blocks else None for block in range(8))
    for each in (given, config.to_dict()):
        assert _read(family, **each).windows == (theirs if blocks else ())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"model_type": "gpt_neox"},
            r"'gpt_neox' is not one of llama, .*; not modelled: its layers and settings are",
        ),
        ({"model_type": "gemma2"}, "not modelled: softcapped attention scores"),
        ({"model_type": "gemma3"}, "its text model alone, saved as Gemma3ForCausalLM, is of type gemma3_text"),
        ({"model_type": "qwen3_5_text"}, "gated delta-net"),
        ({"model_type": ["llama"]}, "is not one of llama"),
        ({"model_type": "granite", "num_local_experts": 8}, "a mixture of experts is not modelled"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; .* only None"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "only None or False is supported"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop is 0.1"),
        ({"model_type": "smollm3", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": "mistral", "sliding_window": -3}, "sliding_window is -3, not a positive whole number"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 8}, "layer_types is"),
        ({"model_type": "olmo3", "layer_types": ["chunked_attention"] * 8}, "a list of full_attention and sliding_att"),
        ({"model_type": "olmo3", "layer_types": "full_attention"}, "a list of full_attention and sliding_attention"),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 8 layers"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ],
)
def test_what_is_not_modelled_is_refused(config, told):
    with pytest.raises(UserError, match=told):
        ModelShape.from_config(DIMENSIONS | config)


@pytest.mark.parametrize(
    ("targets", "separate", "fused"),
    [
        (LoraSettings().targets, ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), "qkv gate_up down"),
        (("k_proj",), ("k_proj",), "qkv"),
        (("qkv_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), "qkv o"),
        (("gate_up_proj",), ("gate_proj", "up_proj"), "gate_up"),
        (("w_pack",), (), ""),
    ],
)
def test_targets_mean_the_same_weights_in_every_family(targets, separate, fused):
    assert _read("llama").adapted(targets) == separate
    assert _read("phi3").adapted(targets) == tuple(f"{name}_proj" for name in fused.split())
    assert adapted(["w_pack", "q_proj"], ["w_pack"]) == ("w_pack",)  # somebody else's layer


def test_a_bundle_s_adapter_sits_where_its_trial_asks_for_it():
    asked = LoraSettings().targets
    for stored in (asked, ("qkv_proj", "gate_up_proj", "down_proj")):
        assert bundle_reading._as_asked([*stored], asked) == sorted(asked)
    for stored in (asked[:-1], (*asked, "o_proj"), ("qkv_proj", "down_proj")):
        assert bundle_reading._as_asked([*stored], asked) == sorted(stored)
    assert bundle_reading._as_asked("all-linear", asked) == "all-linear"


def test_targets_of_no_family_are_refused():
    with pytest.raises(ValidationError, match=r"targets must be some of q_proj, .*, gate_up_proj; got w_pack"):
        LoraSettings(targets=("q_proj", "w_pack"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_are_those_that_are_declared(tiny_models, family):
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    theirs = {name for name, module in plain.named_modules() if type(module).__name__.endswith("RMSNorm")}
    found = load_base(tiny_models[family], "fp32").causal_lm
    ours = {name for name, module in found.named_modules() if isinstance(module, FrozenNorm)}
    assert ours == theirs
    assert {name.rpartition(".")[2] for name in theirs} == set(FAMILIES[family].norms)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_step_has_the_loss_and_the_gradients_of_plain_peft(tiny_models, tiny_task, family):
    """Rows packed end to end, beside each row as a sequence of its own."""
    base = load_base(tiny_models[family], "fp32")
    rows = [pack_answer(row, base.tokenizer) for row in load_rows(tiny_task, "train")[:3]]
    settings = LoraSettings(targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))  # all linear layers
    ours = attach(base, settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in lora_pairs(ours):
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    names = [linear.name for linear in base.shape.linears]
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.float32).eval()
    theirs = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    assert len(lora_pairs(ours)) == len(lora_pairs(theirs)) == 2 * len(names)
    with torch.no_grad():
        for own, other in zip(lora_pairs(ours), lora_pairs(theirs), strict=True):
            for one, another in zip(own, other, strict=True):
                another.copy_(one)
    found = lay_out(rows).log_likelihoods(ours.get_base_model())
    expected = torch.cat([_log_likelihoods(theirs, row) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = []
    for total, model in ((found.sum(), ours), (expected.sum(), theirs)):
        weights = [weight for pair in lora_pairs(model) for weight in pair]
        gradients.append(torch.autograd.grad(total, weights))
    for one, another in zip(*gradients, strict=True):
        assert another.abs().max() > 0
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-3 * float(another.abs().max()))
    detach(ours)


def _log_likelihoods(model: torch.nn.Module, row) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([row.tokens])).logits[0, row.sources].log_softmax(dim=-1)
    return logits[range(len(row.sources)), row.tokens[row.prompt_length :]]


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
def test_energy_by_hand(family):
    """Phi-3's fused layers with a window in every block; Gemma 3's heads, wider than its stream, with one in every
    second: layers (inputs, outputs), blocks with a window, and heads times their width, written down by hand."""
    layers, windowed, queries = {
        "phi3": ([(32, 32 + 16 + 16), (32, 32), (32, 2 * 64), (64, 32)], 2, 4 * 8),
        "gemma3_text": ([(32, 64), (32, 32), (32, 32), (64, 32), (32, 64), (32, 64), (64, 32)], 1, 4 * 16),
    }[family]
    config = tiny_config(family, vocabulary=100).to_dict() | ({"head_dim": 16} if family == "gemma3_text" else {})
    chip = load_chip(
        {
            "preset": "halora-2026",
            "tile": {"rows": 24, "columns": 20},
            "cells": {"mean_fill": 0.1},
            "boundary": {"attention": True},
        }
    )
    constants = {**energy_constants(), **chip.costs}
    reads = chip.coding.slices * chip.coding.replicas * chip.dac.cycles * chip.read.averaged
    conversions = 2 * reads * sum(d_out * ceil(d_in / 24) for d_in, d_out in layers)
    driven = 2 * reads * sum(d_in * ceil(d_out / 20) for d_in, d_out in layers)
    cells = 2 * 2 * sum(d_in * d_out for d_in, d_out in layers)
    attended = windowed * 6 + (2 - windowed) * 50
    shape = ModelShape.from_config(config)
    energy = energy_per_token(shape, chip, rank=3, targets=("q_proj",), context_tokens=50)
    found = energy.components_uj
    adc = adc_cost(chip.adc.costs, chip.adc.bits, constants)
    bits = min(chip.dac.bits, chip.dac.input_bits)
    assert found["adc"] == pytest.approx(conversions * adc.conversion_pj * 1e-6)
    assert found["dac"] == pytest.approx(driven * bits * constants["dac_pj_per_bit"] * 1e-6)
    assert found["array"] == pytest.approx(cells * reads * chip.cells.read_energy_fj(0.1) * 1e-9)
    lora = 2 * 3 * sum(layers[0])
    assert found["lora_sram"] == pytest.approx(lora * constants["sram_mac_fj"] * chip.lora.cost * 1e-9)
    macs = 2 * queries * attended * constants["attention_mac_fj"] * (chip.attention.bits / 8) ** 2
    assert found["attention"] == pytest.approx(macs * 1e-9)
    assert found["softmax"] == pytest.approx(4 * attended * constants["softmax_element_pj"] * 1e-6)
    kept = {"phi3": 16, "gemma3_text": 32}[family]
    assert shape.cache_values(50) == 2 * kept * attended


def test_a_fused_layer_is_as_full_as_its_parts_are_on_average():
    chip, fill = load_chip("halora-2026"), estimated_fill("smollm2")
    parts = [fill(f"model.layers.0.self_attn.{name}_proj", chip) for name in "qkv"]
    assert fill("model.layers.0.self_attn.qkv_proj", chip) == pytest.approx(sum(parts) / 3)
    assert len(set(parts)) == 3


def test_rows_that_would_rotate_the_others_of_their_batch_are_refused(tiny_models):
    """`longrope` rotates a whole batch otherwise once one of its rows is longer than the first training's."""
    base = load_base(tiny_models["phi3"], "fp32")
    rows = [Row("short", "one", (" two",), 0), Row("long", "one " * 30, (" two",), 0)]
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 20}
    for rotations in (longrope, {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}):
        config = SimpleNamespace(max_position_embeddings=512, rope_parameters=rotations)
        limited = replace(base, causal_lm=SimpleNamespace(config=config))
        with pytest.raises(UserError, match=r"row 'long' of task '' has .* tokens; model .* takes 20"):
            prepared_rows(rows, limited, "plain")
    assert len(prepared_rows(rows, base, "plain")) == 2
