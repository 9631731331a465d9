"""Oracles: what the saved configuration says; errors that name the cause and the next step."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.hardware.shapes import known_shape
from halora.training.models import find_model, load_base, model_shape

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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_folder_is_loaded_whole_and_frozen(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32)
    assert type(base.causal_lm) is type(plain)
    state, expected = base.causal_lm.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not base.causal_lm.training
    assert not any(parameter.requires_grad for parameter in base.causal_lm.parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_shape_is_that_of_the_weights(tiny_models, architecture):
    shape = model_shape(tiny_models[architecture])
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32)
    assert len(plain.model.layers) == shape.layers
    for linear in shape.linears:
        (weight,) = [
            parameter
            for name, parameter in plain.model.layers[0].named_parameters()
            if name.endswith(f"{linear.name}.weight")
        ]
        assert weight.shape == (linear.out_features, linear.in_features)
    assert plain.lm_head.weight.shape == (shape.vocabulary, shape.hidden)


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
    folder = _damaged(tiny_models, tmp_path, model_type="phi3")  # all dimensions, but q, k and v in one layer
    with pytest.raises(UserError, match=r"': type 'phi3' is not one of llama, qwen2, qwen3"):
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


def test_missing_or_damaged_weights_are_told(tiny_models, tmp_path):
    folder = _damaged(tiny_models, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match="cannot be loaded: "):
        load_base(str(folder), "fp32")
    weights.unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: .*no file named"):
        load_base(str(folder), "fp32")
