"""Oracles: PEFT's own folders of every kind; the multiply-accumulates of a branch, r (d_in + d_out), written out."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.hardware.costs import energy_constants
from halora.hardware.energy import energy_per_token
from halora.pricing import trial_energy
from halora.training.adapter_config import ADAPTER_CONFIG
from halora.training.models import model_shape
from halora.training.saved_lora import read_saved_lora
from halora.trial_folder import ADAPTER_WEIGHTS

Q, V, UP = (f"model.layers.{{}}.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))


@pytest.fixture(scope="module")
def saved(tiny_models, tmp_path_factory):
    """A function that makes the folder of a fresh adapter of the tiny LLaMA, as PEFT stores it."""

    def make(config: peft.PeftConfig) -> Path:
        folder = tmp_path_factory.mktemp("adapters") / "adapter"
        base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
        peft.get_peft_model(base, config).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"r": 3, "target_modules": ["q_proj"]}, {Q.format(0): 3, Q.format(1): 3}),
        (
            {"r": 3, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
            {Q.format(1): 3, UP.format(1): 3},
        ),
        (
            {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.v_proj": 8}},
            {Q.format(0): 2, Q.format(1): 2, V.format(0): 2, V.format(1): 8},
        ),
        (
            {"r": 2, "target_modules": ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]},
            {Q.format(0): 2, V.format(0): 2},
        ),
        ({"r": 2, "target_modules": ["v_proj"], "use_dora": True}, {V.format(0): 2, V.format(1): 2}),
    ],
)
def test_an_adapter_is_priced_as_what_it_is(saved, tiny_trial, settings, ranks):
    found = read_saved_lora(saved(peft.LoraConfig(task_type="CAUSAL_LM", **settings)))
    assert found.ranks == ranks
    config = tiny_trial(lora={"rank": 64})
    sizes = model_shape(config.model).all_layers
    macs = sum(rank * (sizes[name].in_features + sizes[name].out_features) for name, rank in ranks.items())
    priced = trial_energy(config, ranks=found.ranks)
    assert priced.components_uj["lora_sram"] == pytest.approx(macs * energy_constants()["sram_mac_fj"] * 1e-9)
    bare = energy_per_token(
        model_shape(config.model), config.chip, rank=0, context_tokens=priced.latency.context_tokens
    )
    moved = {name for name, energy in priced.components_uj.items() if energy != bare.components_uj[name]}
    assert moved <= {"lora_sram", "leakage"}  # a branch's macros leak as well


def test_what_peft_says_of_an_adapter_is_read(saved, tiny_models):
    found = read_saved_lora(
        saved(peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"]))
    )
    assert (found.base, found.rank, found.alpha, found.variant) == (tiny_models["llama"], 4, 6.0, "rslora")
    assert set(found.targets) == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
        peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_of_other_kinds_are_refused(saved, halora, config):
    folder = saved(config)
    code, _, err = halora(f"evaluate {folder} --chip halora-2026 --task arc-easy")
    assert code == 2
    assert f"it is of PEFT's type {config.peft_type.value}, not LORA" in " ".join(err.split())


def test_what_is_beside_a_lora_branch_is_refused(saved):
    folder = saved(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match="modules_to_save: only a LoRA branch on named layers is supported"):
        read_saved_lora(folder)
    content = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content | {"modules_to_save": None}))
    with pytest.raises(UserError, match=r"tensor '.*lm_head.*' is not part of a LoRA branch beside a linear layer"):
        read_saved_lora(folder)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 0}, "r: a whole number from 1 to 1024 is wanted, got 0"),
        ({"r": "4"}, 'r: a whole number from 1 to 1024 is wanted, got "4"'),
        ({"r": True, "lora_alpha": None}, "got true.*lora_alpha: a positive number is wanted, got null"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: a text is wanted, got 3"),
        ({"peft_type": ["LORA"]}, r"it is of PEFT's type \['LORA'\], not LORA"),
    ],
)
def test_settings_that_are_none_are_told(saved, tmp_path, settings, told):
    folder = Path(shutil.copytree(saved(peft.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter"))
    content = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content | settings))
    with pytest.raises(UserError, match=f"(?s){told}"):
        read_saved_lora(folder)


def test_tensors_that_are_no_branch_are_told(saved, tmp_path):
    folder = Path(shutil.copytree(saved(peft.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter"))
    weights = load_file(folder / ADAPTER_WEIGHTS)
    a, b = (f"base_model.model.{Q.format(0)}.lora_{matrix}.weight" for matrix in "AB")
    for changed, told in (
        ({}, "adapter_model.safetensors is empty; was it saved under ZeRO-3"),
        ({a: weights[a]}, f"layer '{Q.format(0)}' has A or B alone"),
        ({a: weights[a][:1].clone(), b: weights[b]}, r"has A \[1, 32\] and B \[32, 2\], which do not fit"),
        ({a: torch.zeros(0, 32), b: torch.zeros(32, 0)}, "has no elements"),
    ):
        save_file(changed, folder / ADAPTER_WEIGHTS)
        with pytest.raises(UserError, match=told):
            read_saved_lora(folder)
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(UserError, match=f"no adapter in '.*': it has no {ADAPTER_CONFIG}"):
        read_saved_lora(folder)
