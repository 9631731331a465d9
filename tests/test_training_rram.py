"""Oracle: a plain `transformers` model whose weights were replaced one by one with the programmed ones."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_families import FEWER
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.converter_model import fit_converters
from halora.hardware.converters import ExactReads, tilewise_product
from halora.hardware.draws import coarse_normal
from halora.hardware.families import LINEAR_NAMES
from halora.hardware.instance import ChipInstance
from halora.hardware.manufactured import Columns, strength_factor
from halora.hardware.noise import Programming, noise_to_signal_db, programmed_weight
from halora.training.models import load_base
from halora.training.rram import RramLinear, install

CHIP = load_chip({"preset": "halora-2026", "noise": {"sigma": 0.05}, "tile": {"rows": 16}})
INSTANCE = ChipInstance(CHIP, NoiseKey(role=Role.SEARCH, chip_seed=1), CHIP.noise.level)
TOKENS = torch.arange(300, 340).reshape(2, 20)


def _plain(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in LINEAR_NAMES}


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("architecture", FEWER)
def test_a_programmed_model_computes_with_the_noisy_weights(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    array = install(base.causal_lm)
    assert [layer.name for layer in array.layers] == [*base.shape.all_layers]
    plain = _plain(tiny_models[architecture])
    frozen = {name: tensor.clone() for name, tensor in base.causal_lm.state_dict().items()}
    torch.testing.assert_close(_logits(base.causal_lm), _logits(plain), rtol=0, atol=1e-5)

    array.program(INSTANCE)
    noisy = _logits(base.causal_lm)
    db = array.noise_db()
    assert list(db) == [*base.shape.linear_layers]  # not the output projection, here off the chip
    for name, linear in _linears(plain).items():
        key = replace(INSTANCE.key, module=name, purpose="programming")
        programmed = programmed_weight(linear.weight.data, CHIP, key, 0.05)
        assert db[name] == pytest.approx(noise_to_signal_db(linear.weight.data, programmed), abs=1e-4)
        linear.weight.data = programmed
    assert (noisy - _logits(_plain(tiny_models[architecture]))).abs().max() > 0.1
    torch.testing.assert_close(noisy, _logits(plain), rtol=0, atol=1e-5)

    state = base.causal_lm.state_dict()
    assert all(torch.equal(state[name], frozen[name]) for name in frozen)
    array.clear()
    torch.testing.assert_close(_logits(base.causal_lm), _logits(_plain(tiny_models[architecture])), rtol=0, atol=1e-5)


def test_chips_differ_by_seed_role_and_draw_and_repeat_exactly(tiny_models):
    base = load_base(tiny_models["llama"], "fp32")
    array = install(base.causal_lm)
    outputs = []
    for change in ({}, {"chip_seed": 2}, {"role": Role.TRAIN}, {"draw": 1}, {}):
        array.program(replace(INSTANCE, key=replace(INSTANCE.key, **change)))
        outputs.append(_logits(base.causal_lm))
    assert torch.equal(outputs[0], outputs[-1])
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_made_again_in_every_pass_give_the_same_outputs_and_gradients(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    array = install(base.causal_lm)
    embeddings = base.causal_lm.get_input_embeddings()(TOKENS).detach()
    results = []
    for regenerate in (False, True):
        array.program(INSTANCE, regenerate=regenerate)
        inputs = embeddings.clone().requires_grad_()
        logits = base.causal_lm(inputs_embeds=inputs).logits
        logits.square().mean().backward()
        results.append((logits.detach(), inputs.grad))
        kept = sum(layer._kept is not None for layer in array.layers)
        mapped = array.mapped(CHIP)
        assert kept == (0 if regenerate else len(mapped))
        places = {layer.effective_weight().data_ptr() for layer in mapped}
        assert len(places) == (1 if regenerate else len(mapped))
    for kept, made_again in zip(*results, strict=True):
        torch.testing.assert_close(made_again, kept, rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["halora-2026", "neurram-2022"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_made_again_take_little_memory(dtype, preset):
    """The largest layer of Llama-3.2-1B beside a smaller one; peaks of torch's and numpy's allocators added."""
    model = nn.ModuleDict({"down_proj": nn.Linear(8192, 2048, bias=False), "v_proj": nn.Linear(2048, 512, bias=False)})
    model.to(dtype).requires_grad_(False)
    array = install(model)
    chip = load_chip(preset)
    array.program(ChipInstance(chip, INSTANCE.key, chip.noise.level), regenerate=True)
    x = torch.randn(1, 4, 8192, dtype=dtype, requires_grad=True)
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model["v_proj"](model["down_proj"](x)).sum().backward()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert x.grad is not None
    largest = model["down_proj"].effective_weight().nbytes
    assert held.max() >= largest  # it was made at all
    assert held.max() + numpy_peak <= 3 * largest


def test_layers_outside_rram_compute_with_their_clean_weights(tiny_models):
    base = load_base(tiny_models["llama"], "fp32")
    array = install(base.causal_lm)
    mapping = {"sram": ["*.v_proj"], "digital": ["model.layers.0.*"]}
    chip = load_chip({"preset": "halora-2026", "noise": {"sigma": 0.05}, "mapping": mapping})
    array.program(replace(INSTANCE, chip=chip))
    clean = {layer.name for layer in array.layers if layer.effective_weight() is layer.weight}
    outside = ("layers.0.", "v_proj", "lm_head")
    assert clean == {layer.name for layer in array.layers if any(part in layer.name for part in outside)}
    assert array.noise_db().keys() == {layer.name for layer in array.layers} - clean
    with pytest.raises(UserError, match=r"'\*\.w_proj' matches no layer"):
        array.program(replace(INSTANCE, chip=load_chip({"preset": "ideal", "mapping": {"sram": ["*.w_proj"]}})))


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(UserError, match="no linear layers named q_proj"):
        install(nn.Sequential(nn.Linear(4, 4)))


@pytest.fixture
def layer() -> tuple[nn.Module, RramLinear]:
    """A single layer with a bias, as a model of its own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(48, 40)})
    return model, install(model)


def _converters(linear: RramLinear, chip=CHIP):
    calibration = torch.randn(64, 48, generator=torch.Generator().manual_seed(5))
    return {"q_proj": fit_converters(calibration, linear.weight.detach(), chip)}


@torch.no_grad()
def test_reads_of_a_row_do_not_depend_on_its_batch(layer):
    model, array = layer
    linear = model["q_proj"]
    x = torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(6))
    array.program(INSTANCE, _converters(linear))
    rows = [("a", 11), ("b", 8), ("c", 5)]
    with array.reading(rows):
        together = linear(x)
    for (row, tokens), inputs, outputs in zip(rows, x.split([11, 8, 5], 1), together.split([11, 8, 5], 1), strict=True):
        with array.reading([(row, tokens)]):
            torch.testing.assert_close(linear(inputs), outputs, rtol=1e-5, atol=1e-5)
    with array.reading([("a", 3)]):  # a longer read continues a shorter one
        torch.testing.assert_close(linear(x[:, :3]), together[:, :3], rtol=1e-5, atol=1e-5)
    with array.reading([("b", 11), ("a", 8), ("c", 5)]):
        assert (linear(x)[0, :11] - together[0, :11]).abs().max() > 1e-3  # another row reads other noise


@torch.no_grad()
def test_reads_have_the_error_of_the_converter_model_and_a_digital_bias(layer):
    model, array = layer
    linear = model["q_proj"]
    chip = load_chip({"preset": "ideal", "adc": {"bits": 4, "lossless": False}, "tile": {"rows": 16}})
    converters = _converters(linear, chip)
    array.program(ChipInstance(chip, INSTANCE.key, 0.0), converters)
    x = torch.randn(1, 3000, 48, generator=torch.Generator().manual_seed(7))
    with array.reading([("a", 3000)]):
        read = linear(x)
    model = converters["q_proj"]
    driven = model.drive(x)
    explained = (driven.inputs @ linear.weight.T) * model.output_gain
    noise = (read - linear.bias - explained) / (driven.converter_power.sqrt() * model.error_factor)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.square().square().mean().item() == pytest.approx(3, abs=0.1)
    array.program(INSTANCE)
    torch.testing.assert_close(linear(torch.zeros(1, 48))[0], linear.bias)


@torch.no_grad()
def test_exact_reads_are_the_tilewise_product_plus_read_noise(layer):
    model, array = layer
    linear = model["q_proj"]
    calibration, x = torch.randn(64, 48), torch.randn(1, 6000, 48)
    for white_us in (0.0, 0.5):
        chip = load_chip(
            {"preset": "halora-2026", "tile": {"rows": 16}, "read": {"white_us": white_us, "thermal": False}}
        )
        reads = ExactReads.calibrated(calibration, linear.weight, chip)
        array.program(replace(INSTANCE, chip=chip), {"q_proj": reads})
        with array.reading([("a", 3000), ("b", 3000)]):
            read = linear(x)
        product = tilewise_product(x.flatten(0, 1), linear.effective_weight(), chip, reads.converters)[None]
        noise = read - linear.bias - product
        if white_us == 0:
            torch.testing.assert_close(read, product + linear.bias)
        else:
            codes = (x / x.abs().amax(dim=-1, keepdim=True) * 127).round() * x.abs().amax(dim=-1, keepdim=True) / 127
            variance = reads.noise.fresh.of_product(codes.square())
            assert (noise.square().mean() / variance.mean()).item() == pytest.approx(1, abs=0.02)
            relative = noise / variance.sqrt()
            assert relative.square().square().mean().item() == pytest.approx(3, abs=0.1)  # normal, not uniform: 1.8
            assert relative.abs().max() > 4


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("processor_has_bf16", [False, True])
def test_converters_of_a_bf16_model_are_as_fine_as_those_of_a_float32_one(monkeypatch, bits, processor_has_bf16):
    """Error of 64 rows of 2,048 inputs, against products in float64 of the same bf16 weights and inputs.

    Converted in the dtype of the products these were -37.3, -41.8 and -42.3 dB in bf16.
    """
    monkeypatch.setattr("halora.training.fused._cpu_has_bf16", lambda: processor_has_bf16)
    generator = torch.Generator().manual_seed(11)
    weight = (torch.randn(256, 2048, generator=generator) * 0.02).bfloat16()
    calibration, x = (torch.randn(1, 64, 2048, generator=generator).bfloat16() for _ in range(2))
    adc = {"bits": bits, "lossless": False, "costs": "survey"}
    chip = load_chip({"preset": "ideal", "adc": adc, "dac": {"lossless": False, "input_bits": 16, "bits": 15}})
    clean = x[0].double() @ weight.double().T
    errors_db, reads = {}, ExactReads.calibrated(calibration[0], weight, chip)
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(2048, 256, bias=False, dtype=dtype)
        linear.weight.data.copy_(weight)
        model = nn.ModuleDict({"q_proj": linear})
        array = install(model)
        array.program(ChipInstance(chip, INSTANCE.key, 0.0), {"q_proj": reads})
        product = model["q_proj"].product(x.to(dtype))
        assert product.dtype == torch.float32
        errors_db[dtype] = 10 * torch.log10((product[0] - clean).square().sum() / clean.square().sum()).item()
        assert model["q_proj"](x.to(dtype)).dtype == dtype
    assert errors_db[torch.bfloat16] == pytest.approx(errors_db[torch.float32], abs=0.1)
    print(bits, errors_db)
    assert errors_db[torch.float32] == pytest.approx({8: -39.2, 10: -51.0, 12: -60.2}[bits], abs=3)


@torch.no_grad()
def test_slices_and_replicas_of_a_programmed_layer_are_converted_one_by_one(layer):
    model, array = layer
    linear = model["q_proj"]
    calibration, x = torch.randn(64, 48), torch.randn(1, 30, 48)
    coding = {"slices": 2, "replicas": 2}
    chip = load_chip({"preset": "neurram-2022", "read": {"white_us": 0.0, "thermal": False}, "coding": coding})
    reads = ExactReads.calibrated(calibration, linear.weight, chip)
    outputs = []
    for seed in (1, 2, 1):
        key = replace(INSTANCE.key, chip_seed=seed)
        array.program(ChipInstance(chip, key, 1.0), {"q_proj": reads})
        outputs.append(linear(x)[0] - linear.bias)
        at = key.at(module="q_proj", purpose="programming")
        copies = Programming.of(linear.weight, chip, 1.0).copies(linear.weight, at)
        torch.testing.assert_close(outputs[-1], tilewise_product(x[0], copies, chip, reads.converters))
        torch.testing.assert_close(linear.effective_weight(), programmed_weight(linear.weight, chip, at, 1.0))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


VARIED = {
    "preset": "rram-variation",
    "tile": {"rows": 16},
    "read": {"thermal": False},
    "variation": {"strength": 0.5, "adc_gain": 0.1, "adc_offset_steps": 3.0},
    "adc": {"calibration_reads": 0},
}


@torch.no_grad()
@pytest.mark.parametrize("way", ["exact", "statistical"])
@pytest.mark.parametrize("regenerate", [False, True])
def test_a_layer_is_read_by_the_columns_of_the_chip_instance_under_it(layer, way, regenerate):
    """The strength of the noise, the weights' gains and the columns are those of one address, whoever asks."""
    model, array = layer
    linear, chip = model["q_proj"], load_chip(VARIED)
    calibration, x = torch.randn(64, 48), torch.randn(1, 30, 48)
    fitted = ExactReads.calibrated if way == "exact" else fit_converters
    reads, outputs = fitted(calibration, linear.weight, chip), []
    for seed in (1, 2, 1):
        instance = ChipInstance(chip, replace(INSTANCE.key, chip_seed=seed), chip.noise.level)
        array.program(instance, {"q_proj": reads}, regenerate=regenerate)
        with array.reading([("a", 30)]):
            outputs.append(linear(x)[0] - linear.bias)
        at = instance.key.at(module="q_proj", purpose="programming")
        level = chip.noise.level * strength_factor(chip, at)
        assert instance.level_at("q_proj") == level != chip.noise.level
        held, columns = programmed_weight(linear.weight, chip, at, level), Columns.of(chip, at, linear.weight)
        torch.testing.assert_close(linear.effective_weight(), held)
        if way == "exact":
            expected = tilewise_product(x[0], held, chip, reads.converters, columns)
        else:
            driven = reads.drive(x[0], columns)
            draws = coarse_normal(instance.key.at(module="q_proj", purpose="read", example="a"), (30, len(held)))
            expected = reads.read(driven.inputs @ held.T, driven, torch.from_numpy(draws))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


@torch.no_grad()
def test_watching_sees_every_layer_once_and_stops(tiny_models):
    base = load_base(tiny_models["llama"], "fp32")
    array = install(base.causal_lm)
    seen = {}
    with array.watching_inputs(lambda layer, x: seen.setdefault(layer.name, []).append(tuple(x.shape))):
        base.causal_lm(input_ids=TOKENS)
    base.causal_lm(input_ids=TOKENS)
    assert seen.pop("lm_head") == [(2, 20, 32)]
    assert len(seen) == 14
    assert all(shapes == [(2, 20, 64 if name.endswith("down_proj") else 32)] for name, shapes in seen.items())
