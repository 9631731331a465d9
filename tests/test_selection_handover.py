"""Oracles: how `transformers` reads llama.cpp's layout, and what PEFT itself computes."""

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

import halora as surface
from halora.errors import UserError
from halora.selection.handover import MERGED, hand_over

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(300, 324)[None]


@pytest.fixture
def adapted(tiny_models, tmp_path):
    """A function that stores a random adapter of a model: its folder, and the model with it."""

    def make(architecture, **lora):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32)
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False, **lora
        )
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return make


@torch.no_grad()
def _logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("architecture", "lora"), [("llama", {}), ("llama", {"use_rslora": True}), ("qwen2", {}), ("qwen3", {})]
)
def test_a_gguf_lora_adds_what_peft_adds(adapted, tiny_models, tmp_path, architecture, lora):
    """In llama.cpp's layout q and k of LLaMA have another order of outputs; `transformers` brings them back."""
    folder, model = adapted(architecture, **lora)
    hand_over(folder, tmp_path / "adapter.gguf", "gguf", tiny_models[architecture])
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.get_field("general.architecture").contents() == architecture
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    kinds = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
    heads = {"q_proj": 4, "k_proj": 2}
    seen = 0
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in kinds or not hasattr(module, "lora_A"):
            continue
        depth = name.split(".layers.")[1].split(".")[0]
        a, b = (tensors[f"blk.{depth}.{kinds[kind]}.weight.lora_{part}"] for part in "ab")
        delta = alpha / a.shape[0] * b @ a
        if architecture == "llama" and kind in heads:
            assert not np.allclose(delta, module.get_delta_weight("default").detach().numpy(), atol=1e-3)
            processor = LlamaTensorProcessor.__new__(LlamaTensorProcessor)
            delta = processor._reverse_permute_weights(delta, 4, heads[kind])
        np.testing.assert_allclose(delta, module.get_delta_weight("default").detach().numpy(), atol=1e-5)
        seen += 1
    assert (seen, len(tensors)) == (2 * len(TARGETS), 4 * len(TARGETS))


def test_merged_and_peft_compute_as_the_adapter(adapted, tiny_models, tmp_path):
    folder, model = adapted("llama")
    exported = surface.Adapter(folder)
    told = exported.export(tmp_path / "merged", format="merged", base=tiny_models["llama"])
    assert told == MERGED
    assert exported.export(tmp_path / "peft", format="peft", base=tiny_models["llama"]) == ""
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    torch.testing.assert_close(_logits(merged), _logits(model), rtol=0, atol=1e-4)
    assert torch.equal(_logits(loaded), _logits(model))


def test_what_a_format_has_no_place_for_is_refused(adapted, tiny_models, tmp_path, halora):
    folder, _ = adapted("llama", use_dora=True)
    with pytest.raises(UserError, match="no place for DoRA"):
        hand_over(folder, tmp_path / "adapter.gguf", "gguf", tiny_models["llama"])
    assert not (tmp_path / "adapter.gguf").exists()
    described = folder / "adapter_config.json"
    described.write_text(described.read_text().replace(tiny_models["llama"], ""))
    with pytest.raises(UserError, match="does not say which base model"):
        surface.Adapter(folder).export(tmp_path / "peft", format="peft")
    with pytest.raises(UserError, match="exists"):
        hand_over(folder, folder, "peft", tiny_models["llama"])
    code, _, err = halora(
        f"adapter export {folder} {tmp_path / 'merged'} --format merged --base {tiny_models['llama']}"
    )
    assert code == 0, err
    assert "warning: merged: there is no branch in SRAM" in err
