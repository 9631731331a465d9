"""Oracles: what the saved configuration says; errors that name the cause and the next step."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, FEWER
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.hardware.shapes import known_shape
from halora.training.models import estimated_shape, find_model, load_base, model_shape
from halora.training.rram import install

_ASK_HUB = """
import time
import transformers
from transformers import AutoConfig
from halora.errors import UserError
from halora.training.models import model_shape
start = time.monotonic()
try:
    model_shape("nobody/nothing-here")
except UserError as error:
    print(time.monotonic() - start, error)
"""


@pytest.mark.parametrize("architecture", FEWER)
def test_a_folder_is_loaded_whole_and_frozen(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32)
    assert type(base.causal_lm) is type(plain)
    state, expected = base.causal_lm.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not base.causal_lm.training
    assert not any(parameter.requires_grad for parameter in base.causal_lm.parameters())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_shape_is_that_of_the_weights(tiny_models, architecture):
    """All linear layers there are, in the order in which a forward calls them."""
    shape = model_shape(tiny_models[architecture])
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32)
    called: dict[str, tuple[int, int]] = {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            size = module.in_features, module.out_features
            module.register_forward_hook(lambda *_, name=name, size=size: called.update({name: size}))
    plain(torch.tensor([[5, 6]]))
    expected = {name: (linear.in_features, linear.out_features) for name, linear in shape.all_layers.items()}
    assert list(called.items()) == list(expected.items())
    assert [layer.name for layer in install(load_base(tiny_models[architecture], "fp32").causal_lm).layers] == [*called]


def test_bf16_is_loaded_as_bf16(tiny_models):
    base = load_base(tiny_models["llama"], "bf16")
    assert {parameter.dtype for parameter in base.causal_lm.parameters()} == {torch.bfloat16}


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match=r"no model 'smollm2-135m'.*did you mean 'smollm2-135m-instruct'\?"):
        find_model("smollm2-135m")
    with pytest.raises(UserError, match="no model '/no/such/folder'"):
        find_model("/no/such/folder")


def test_a_hub_id_without_network_gives_the_next_step_quickly(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when the hub client is imported, hence the process of its own
    told = subprocess.run([sys.executable, "-c", _ASK_HUB], capture_output=True, text=True, check=True).stdout
    seconds, message = told.split(maxsplit=1)
    assert "model 'nobody/nothing-here' cannot be loaded" in message
    assert "check the id and the network" in message
    assert float(seconds) < 5


def _damaged(tiny_models, tmp_path, **changes: object) -> Path:
    """A copy of the tiny LLaMA model with entries of its configuration replaced; None deletes one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_without_a_configuration(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json.*save_pretrained"):
        model_shape(str(folder))


def test_a_configuration_of_another_family(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path, model_type="phi")
    told = (
        r"': type 'phi' is not one of llama, .*, gemma3_text; not modelled: blocks that run attention and MLP side by"
    )
    with pytest.raises(UserError, match=told):
        model_shape(str(folder))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": -16}, "num_hidden_layers is -16, no positive whole number"),
        ({"num_hidden_layers": 0, "vocab_size": 1.5}, "num_hidden_layers is 0, no .*vocab_size is 1.5, no positive"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True, no positive whole number"),
    ],
)
def test_dimensions_that_are_none(tiny_models, tmp_path, change, told):
    folder = _damaged(tiny_models, tmp_path, **change)
    with pytest.raises(UserError, match=f"(?s){told}"):
        model_shape(str(folder))
    with pytest.raises(UserError, match=f"(?s){told}"):
        known_shape(str(folder / "config.json"))


def test_a_configuration_without_a_dimension(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path, hidden_size=None)
    with pytest.raises(UserError, match=r"' has no 'hidden_size' in its config\.json"):
        model_shape(str(folder))


def test_quantised_weights_are_refused_before_anything_is_loaded(tiny_models, tmp_path):
    """The entries as AutoGPTQ, AutoAWQ and bitsandbytes write them."""
    for i, (entry, method) in enumerate(
        (
            ({"bits": 4, "group_size": 128, "quant_method": "gptq"}, "gptq"),
            ({"bits": 4, "quant_method": "awq", "version": "gemm", "zero_point": True}, "awq"),
            ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
            ("int4", "unknown"),
        )
    ):
        folder = _damaged(tiny_models, tmp_path / str(i), quantization_config=entry)
        with pytest.raises(UserError, match=rf"is quantised \({method}\).*name the original model; or .*dequantize"):
            estimated_shape(str(folder))
        assert known_shape(str(folder / "config.json"))  # its dimensions are all that a table of energies takes


def test_weights_that_are_not_those_of_the_configuration_are_told(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for i, (changed, told) in enumerate(
        (
            (
                {name: torch.zeros(0, 32)},
                rf"tensor '{name}' has no elements, its shape is \[0, 32\]",
            ),
            ({name: torch.zeros(60, 32)}, rf"tensor '{name}' has the shape \[60, 32\], config.json says \[64, 32\]"),
            ({name: None}, f"it has no tensor '{name}'"),
            ({"model.embed_tokens.weight": torch.zeros(7, 32)}, r"embed_tokens.weight' has the shape \[7, 32\]"),
            (dict.fromkeys(n for n in weights if "proj" in n), "and 9 weights more"),
        )
    ):
        each = Path(shutil.copytree(folder, tmp_path / f"model-{i}"))
        kept = {n: tensor for n, tensor in (weights | changed).items() if tensor is not None}
        save_file(kept, each / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=told):
            model_shape(str(each))


def test_tokens_beyond_the_embedding_are_told(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": 49152, "content": "<new>", "special": False, "lstrip": False, "rstrip": False}
    described["added_tokens"].append(added | {"normalized": False, "single_word": False})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    told = r"token '<new>' is number 49152, but the embedding has 49152 rows; resize it \(`resize_token_embeddings`\)"
    with pytest.raises(UserError, match=told):
        model_shape(str(folder))


def test_missing_or_damaged_weights_are_told(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"model '.*': model.safetensors is not safetensors: \w+"):
        model_shape(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: .*no file named"):
        load_base(str(folder), "fp32")
