"""Oracles: closed forms of both norms and of their gradients; PEFT's own layer; the variants' weights, written out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_families import FEWER
from training_runs import run_losses
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.families import LINEAR_NAMES
from halora.hardware.noise import programmed_weight
from halora.training.adapter import attach, attach_saved, detach, regulariser
from halora.training.adapter_config import read_lora_config
from halora.training.rram import ChipInstance
from halora.trial_folder import ADAPTER_WEIGHTS, adapter_folder
from halora.trial_runner import TrialRunner

GENERATOR = torch.Generator().manual_seed(4)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).requires_grad_()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_frobenius_value_and_gradient(scale):
    a, b = (scale * _random(4, 30)).detach().requires_grad_(), _random(20, 4)
    value = regulariser([(a, b)], "frobenius")
    singular_a, singular_b = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
    expected = (singular_a**4).sum().sqrt() + (singular_b**4).sum().sqrt()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    gram_a, gram_b = (a @ a.T).detach(), (b.T @ b).detach()
    torch.testing.assert_close(a.grad, 2 * gram_a @ a.detach() / gram_a.norm())
    torch.testing.assert_close(b.grad, 2 * b.detach() @ gram_b / gram_b.norm())


def test_spectral_value_and_gradient():
    a, b = _random(4, 30), _random(20, 4)
    value = regulariser([(a, b)], "spectral")
    value.backward()
    total = 0.0
    for matrix in (a, b):
        u, s, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
        total += s[0].item() ** 2
        torch.testing.assert_close(matrix.grad, 2 * s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-4, atol=1e-4)
    assert value.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("rank", [1, 4])
def test_value_and_gradient_are_finite_at_the_start_of_training(norm, rank):
    a, b = _random(rank, 30), torch.zeros(20, rank, requires_grad=True)
    value = regulariser([(a, b)], norm)
    value.backward()
    assert value.item() > 0
    assert torch.isfinite(a.grad).all()
    assert torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_it_is_a_mean_over_modules(norm):
    first, second = (_random(4, 30), _random(20, 4)), (_random(4, 12), _random(9, 4))
    alone = [regulariser([pair], norm).item() for pair in (first, second)]
    assert regulariser([first] * 5, norm).item() == pytest.approx(alone[0], rel=1e-6)
    assert regulariser([first, second], norm).item() == pytest.approx(sum(alone) / 2, rel=1e-6)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_sum_is_the_mean_times_the_modules_in_value_and_gradient(norm):
    pairs = [(_random(3, d_in), _random(d_out, 3)) for d_in, d_out in ((8, 20), (12, 9), (8, 20), (20, 8))]
    flat = [weight for pair in pairs for weight in pair]
    mean, total = regulariser(pairs, norm, "mean"), regulariser(pairs, norm, "sum")
    assert total.item() == pytest.approx(4 * mean.item(), rel=1e-6)
    for four, one in zip(torch.autograd.grad(total, flat), torch.autograd.grad(mean, flat), strict=True):
        torch.testing.assert_close(four, 4 * one)


def test_bf16_weights_are_measured_in_float32():
    pair = (_random(4, 300).detach().bfloat16(), _random(200, 4).detach().bfloat16())
    value = regulariser([pair], "frobenius")
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(regulariser([(pair[0].float(), pair[1].float())], "frobenius").item())


def test_modules_of_all_shapes_count_alike():
    pairs = [(_random(3, d_in), _random(d_out, 3)) for d_in, d_out in ((8, 20), (12, 9), (8, 20), (20, 8))]
    by_hand = sum((a @ a.T).norm() + (b.T @ b).norm() for a, b in pairs) / 4
    assert regulariser(pairs, "frobenius").item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    """One process's runner."""
    return TrialRunner()


@pytest.mark.parametrize("architecture", FEWER)
def test_a_branch_computed_with_its_layer_is_peft_s(runner, tiny_trial, architecture):
    """Outputs and all gradients of every adapted layer, on noisy weights made again in the backward."""
    config = tiny_trial(architecture, lora={"variant": "rslora"})
    base, array = runner.base(config)
    array.program(ChipInstance(config.chip, NoiseKey(role=Role.TRAIN, chip_seed=5), 0.05), regenerate=True)
    peft_model = attach(base, config.lora, config.seed)
    layers = [module for module in peft_model.modules() if isinstance(module, Linear)]
    assert len(layers) == 2 * len(base.shape.adapted(config.lora.targets))
    for layer in layers:
        x, b = _random(1, 7, layer.in_features), layer.lora_B["default"].weight
        with torch.no_grad():
            b.copy_(_random(*b.shape))
        upstream = torch.randn(1, 7, layer.out_features, generator=GENERATOR)
        inputs = (x, layer.lora_A["default"].weight, b)
        ours, theirs = layer(x), Linear.forward(layer, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(output, inputs, upstream) for output in (ours, theirs))
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    array.clear()
    detach(peft_model)


def test_rslora_scales_by_the_root_of_the_rank(runner, tiny_trial, tmp_path):
    rslora = tiny_trial(lora={"rank": 4, "alpha_over_rank": 1.0, "variant": "rslora"})
    plain = tiny_trial(lora={"rank": 4, "alpha_over_rank": 2.0})
    losses = run_losses(runner, rslora, tmp_path / "rslora")
    assert losses == run_losses(runner, plain, tmp_path / "plain")
    config = json.loads((adapter_folder(tmp_path / "rslora") / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (True, False)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_dora_trains_its_magnitude_and_goes_on_from_a_checkpoint(runner, tiny_trial, tmp_path, zero_stage):
    config = tiny_trial(lora={"variant": "dora"}, zero_stage=zero_stage, schedule={"redraw_steps": 2})
    whole = run_losses(runner, config, tmp_path / "whole")
    parts = [loss for stop in (3, None) for loss in run_losses(runner, config, tmp_path / "parts", stop)]
    assert parts == pytest.approx(whole, abs=1e-5)
    run_losses(runner, config, tmp_path / "begun", stop_at=1)
    begun, done = (load_file(adapter_folder(tmp_path / n) / "adapter_model.safetensors") for n in ("begun", "whole"))
    magnitudes = [name for name in begun if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == 5 * 2
    assert all((begun[name] - done[name]).abs().max() > 1e-3 for name in magnitudes)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_dora_scales_the_noisy_product_by_a_norm_of_clean_weights(runner, tiny_trial, tmp_path, architecture):
    """Within 1e-4 of a plain model that holds m / ||W0 + s B A|| x (W* + s B A), its bias unscaled."""
    config = tiny_trial(architecture, lora={"variant": "dora"}, steps=1)
    with torch.enable_grad():
        run_losses(runner, config, tmp_path)
    folder = adapter_folder(tmp_path)
    drawn = {  # far from where training starts
        name: weight + 0.3 * torch.randn(weight.shape, generator=GENERATOR)
        for name, weight in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(drawn, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    key = NoiseKey(role=Role.SEARCH, chip_seed=5)
    plain = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    for name, module in plain.named_modules():
        if name.rpartition(".")[2] in LINEAR_NAMES:
            at = key.at(module=name, purpose="programming")
            noisy = programmed_weight(module.weight.data, config.chip, at, 0.05)
            if name.rpartition(".")[2] in config.lora.targets:
                a, b = (drawn[f"base_model.model.{name}.lora_{ab}.weight"] for ab in "AB")
                branch = config.lora.alpha_over_rank * b @ a
                magnitude = drawn[f"base_model.model.{name}.lora_magnitude_vector"]
                scale = magnitude / (module.weight.data + branch).norm(dim=1)
                noisy = scale[:, None] * (noisy + branch)
            module.weight.data = noisy
    tokens = torch.arange(100, 120)[None]
    base, array = runner.base(config)
    ours = attach_saved(base, folder)
    array.program(ChipInstance(config.chip, key, 0.05))
    with torch.no_grad():
        logits = ours(input_ids=tokens).logits
    array.clear()
    detach(ours)
    torch.testing.assert_close(logits, plain(input_ids=tokens).logits, rtol=0, atol=1e-4)


def test_dora_at_zero_3_is_refused(tiny_trial):
    with pytest.raises(ValidationError, match=r"'dora' reads frozen weights whole.*use zero_stage 0 to 2"):
        tiny_trial(lora={"variant": "dora"}, zero_stage=3)


def test_targets_that_the_model_has_not_are_told_before_anything_changes(runner, tiny_trial):
    config = tiny_trial()
    base, _ = runner.base(config)
    lora = config.lora.model_copy(update={"targets": ("q_proj", "w_pack", "c_attn")})
    with pytest.raises(UserError, match=r"has no layers named w_pack, c_attn \(fix lora.targets\)"):
        attach(base, lora, seed=0)
    assert not any("lora" in name for name, _ in base.causal_lm.named_modules())


@pytest.fixture(scope="module")
def saved(tiny_models, tmp_path_factory):
    """Folder of a fresh adapter of the tiny LLaMA, as PEFT stores it."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


def _renamed(tensors):
    return {name.replace("base_model.model.", "model."): tensor for name, tensor in tensors.items()}


def _of_another_depth(tensors):
    return {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_renamed, "tensor 'model.model.layers.0.self_attn.q_proj.lora_A.weight' does not belong to the base model"),
        (lambda tensors: {}, "layers.1.self_attn.v_proj.lora_B.weight' is missing"),
        (lambda tensors: {n: t for n, t in tensors.items() if "lora_B" not in n}, "q_proj.lora_B.weight' is missing"),
        (_of_another_depth, "layers.7.self_attn.q_proj.lora_A.weight' does not belong to the base model"),
        (
            lambda tensors: {n: t[:, :-1].contiguous() for n, t in tensors.items()},
            r"q_proj.lora_A.weight' has the shape \[2, 31\], its layer wants \[2, 32\]",
        ),
    ],
    ids=["another prefix", "empty", "half of them", "another depth", "another width"],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_base_left_as_it_was(
    runner, tiny_trial, saved, tmp_path, change, told
):
    folder = Path(shutil.copytree(saved, tmp_path / "changed"))
    save_file(change(load_file(folder / ADAPTER_WEIGHTS)), folder / ADAPTER_WEIGHTS)
    base, _ = runner.base(tiny_trial())
    with pytest.raises(UserError, match=told):
        attach_saved(base, folder)
    assert not any("lora" in name for name, _ in base.causal_lm.named_modules())
    detach(attach_saved(base, saved))


def test_an_adapter_that_is_not_lora_is_refused(runner, tiny_trial, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "changed"))
    described = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    base, _ = runner.base(tiny_trial())
    with pytest.raises(UserError, match="is of PEFT's type IA3, not LORA"):
        attach_saved(base, folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"exclude_modules": "(a+)+$"}, r"exclude_modules: plain names of modules are wanted, and no patterns"),
        ({"target_modules": "(.*)*q_proj"}, r"target_modules: plain names"),
        ({"layers_to_transform": [0], "layers_pattern": "(x+x+)+y"}, r"layers_pattern: plain names"),
        ({"rank_pattern": {"^(.+)+q_proj$": 2}}, r"rank_pattern: numbers by plain names"),
        ({"alpha_pattern": {"(q|q)*": 2}}, r"alpha_pattern: numbers by plain names"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: only a LoRA branch on named layers is supported"),
        ({"loftq_config": {}, "layer_replication": [[0, 2], [0, 2]]}, "layer_replication: only a LoRA branch"),
        ({"bias": "all"}, "bias: only a LoRA branch"),
        ({"r": 10**9}, "r: a whole number from 1 to 1024 is wanted, got 1000000000"),
        ({"r": "2", "lora_alpha": None}, "lora_alpha: a positive number is wanted, got null"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_adapter_s_configuration_holds_no_pattern_and_nothing_beside_its_shape(saved, tmp_path, change, told):
    folder = Path(shutil.copytree(saved, tmp_path / "changed"))
    read_lora_config(folder)
    written = folder / "adapter_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(UserError, match=told):
        read_lora_config(folder)
