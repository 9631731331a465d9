"""Oracles: products of whole numbers for SRAM, digital logic and the LoRA branch; attention of each head and row alone
in float64; a plain `transformers` model whose output projection was replaced by its programmed copy.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halora.errors import UserError
from halora.evaluation.scoring import option_scores, plain_option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.hardware.mapping import LM_HEAD
from halora.hardware.noise import noise_to_signal_db, programmed_weight
from halora.hardware.rounding import rounded
from halora.training.adapter import attach, detach
from halora.training.attention import RowLayout, attend_on_cpu, attend_rounded
from halora.training.batches import lay_out, pack
from halora.training.calibration import calibrate
from halora.training.fused import Branch
from halora.training.models import load_base
from halora.training.rram import install
from halora.training.tasks import load_rows
from halora.trial_runner import TrialRunner

KEY = NoiseKey(role=Role.SEARCH, chip_seed=3)


def _codes(values: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and the step of each row, `(rows, n)` and `(rows, 1)`, in float64."""
    rows = values.double().numpy()
    step = np.abs(rows).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(rows / step), step


def _whole_number_product(x: Tensor, weight: Tensor, input_bits: int, weight_bits: int) -> np.ndarray:
    (inputs, input_steps), (weights, weight_steps) = _codes(x, input_bits), _codes(weight, weight_bits)
    return (inputs @ weights.T) * input_steps * weight_steps.T


@pytest.fixture
def layer() -> nn.Module:
    """A single layer with a bias, as a model of its own."""
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(48, 40)}).requires_grad_(False)


@pytest.mark.parametrize("regenerate", [False, True])
@pytest.mark.parametrize("place", ["sram", "digital"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)], ids=str)
def test_layers_outside_rram_are_products_of_whole_numbers(layer, place, bits, regenerate):
    weight_bits, input_bits = bits
    array = install(layer)
    products = {"weight_bits": weight_bits, "input_bits": input_bits}
    chip = load_chip({"preset": "halora-2026", "mapping": {place: ["q_proj"]}, place: products})
    x = torch.randn(1, 30, 48) * torch.logspace(-2, 2, 30)[:, None]
    linear = layer["q_proj"]
    array.program(ChipInstance(chip, KEY, chip.noise.level), digital=True, regenerate=regenerate)
    expected = _whole_number_product(x[0], linear.weight, input_bits, weight_bits)
    found = (linear(x)[0] - linear.bias).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())
    array.program(ChipInstance(chip, KEY, chip.noise.level))  # as training has it
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    array.clear()
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_rounding_errs_by_a_twelfth_of_its_squared_step():
    """Inputs with outliers, 20 times larger, which set the step of all others."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(256, 512, generator=generator), torch.randn(400, 512, generator=generator)
    x[:, ::100] *= 20
    clean = x @ weight.T
    error = rounded(x, 8, dim=-1) @ rounded(weight, 8, dim=1).T - clean
    expected = sum(
        (values.abs().amax(dim=1) / 127).square().mean() / 12 * others.square().sum(dim=1).mean()
        for values, others in ((x, weight), (weight, x))
    )
    assert (error.square().mean() / expected).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("place", ["rram", "sram"])
def test_a_branch_rounds_its_inputs_and_what_lies_between(layer, place):
    array = install(layer)
    mapping = {"sram": ["q_proj"]} if place == "sram" else {}
    chip = load_chip({"preset": "ideal", "mapping": mapping, "lora": {"input_bits": 5}})
    array.program(ChipInstance(chip, KEY, 0.0), digital=True)
    a, b, x = torch.randn(4, 48), torch.randn(40, 4), torch.randn(1, 20, 48)
    inputs, steps = _codes(x[0], 5)
    between = (inputs * steps) @ a.double().numpy().T
    codes, between_steps = _codes(torch.from_numpy(between), 5)
    expected = (codes * between_steps) @ b.double().numpy().T * 0.5
    linear = layer["q_proj"]
    found = (linear(x, Branch(a, b, 0.5)) - linear(x))[0].double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_dora_rounds_the_inputs_of_its_branch_and_nothing_else(tiny_trial):
    runner = TrialRunner()
    config = tiny_trial(lora={"variant": "dora"}, chip={"preset": "ideal", "lora": {"input_bits": 4}})
    base, array = runner.base(config)
    peft_model = attach(base, config.lora, 0)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.copy_(torch.randn(b.shape))
    x = torch.randn(1, 6, layer.in_features)
    weight, scaling = layer.base_layer.weight, layer.scaling["default"]
    scale = layer.lora_magnitude_vector["default"].weight / (weight + scaling * b @ a).norm(dim=1)
    between = rounded(rounded(x, 4, dim=-1) @ a.T, 4, dim=-1)
    array.program(ChipInstance(config.chip, KEY, 0.0), digital=True)
    torch.testing.assert_close(layer(x), scale * (x @ weight.T + scaling * between @ b.T), rtol=1e-4, atol=1e-4)
    array.clear()
    torch.testing.assert_close(layer(x), scale * (x @ weight.T + scaling * x @ a.T @ b.T), rtol=1e-4, atol=1e-4)
    detach(peft_model)


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_rounds_what_it_multiplies_row_by_row(bits):
    lengths, heads, groups, dim, scaling = [7, 11, 4], 6, 2, 8, 0.3
    taken = torch.arange(11) < torch.tensor(lengths)[:, None]
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    visible = (seen & taken[:, None, None]) | torch.eye(11, dtype=torch.bool)
    positions = torch.cat([torch.arange(length) for length in lengths])
    layout = RowLayout(taken.flatten().nonzero()[:, 0], visible, positions)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, count, 22, dim, generator=generator) for count in (heads, groups, groups))
    found = attend_rounded(q, k, v, layout, scaling, bits)
    start, steps = 0, 2**bits - 1
    for length in lengths:
        for head in range(heads):
            at = slice(start, start + length)
            states = [(q, head), (k, head // (heads // groups)), (v, head // (heads // groups))]
            query, key, value = (np.multiply(*_codes(each[0, which, at], bits)) for each, which in states)
            for token in range(length):
                scores = scaling * key[: token + 1] @ query[token]
                weights = np.rint(np.exp(scores - scores.max()) * steps)
                expected = weights @ value[: token + 1] / weights.sum()
                error = np.abs(found[0, start + token, head].numpy() - expected).max()
                assert error < (2 / steps if bits < 8 else 0.02)  # a weight may lie on the edge between two steps
        start += length
    exact = attend_on_cpu(q, k, v, layout, scaling)
    close = attend_rounded(q, k, v, layout, scaling, 15)
    torch.testing.assert_close(close, exact, rtol=1e-3, atol=1e-3)


def test_scoring_computes_at_the_precision_that_is_priced(tiny_trial, tmp_path):
    """Every field that prices a product outside RRAM moves the scores on a chip without any other imperfection."""
    runner = TrialRunner()
    training = runner.train(tiny_trial(steps=2, report_every=2), tmp_path)
    training.advance()
    training.close()
    adapter = next(tmp_path.glob("step-*/adapter"))
    exact = {"chip_instances": 1, "batch_size": 8}
    moved = {}
    for change in (
        {},
        {"lora": {"input_bits": 3}},
        {"attention": {"bits": 3}},
        {"sram": {"input_bits": 3}, "mapping": {"sram": ["*.o_proj"]}},
        {"sram": {"weight_bits": 3}, "mapping": {"sram": ["*.o_proj"]}},
        {"digital": {"input_bits": 3}, "mapping": {"digital": ["lm_head"], "lm_head": True}},
        {"digital": {"weight_bits": 3}, "mapping": {"digital": ["lm_head"], "lm_head": True}},
    ):
        scores = runner.evaluate(tiny_trial(chip={"preset": "ideal", **change}, evaluation=exact), adapter)
        moved[str(change)] = np.abs(np.array(scores.noisy[0]) - np.array(scores.clean)).mean()
    assert moved.pop("{}") == 0
    assert all(change > 1e-4 for change in moved.values()), moved


HEAD = {"preset": "halora-2026", "noise": {"sigma": 0.05}, "mapping": {"lm_head": True}}


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_head_on_the_chip_is_a_programmed_copy(tiny_models, tiny_task, architecture):
    """Tied to the embedding, whose look-up stays clean; its noise is on record by its name."""
    base = load_base(tiny_models[architecture], "fp32")
    array = install(base.causal_lm)
    embedding = base.causal_lm.get_input_embeddings().weight
    assert base.causal_lm.get_output_embeddings().weight is embedding
    before = embedding.clone()
    chip = load_chip(HEAD | {"mapping": {"lm_head": True, "digital": ["model.*"]}, "read": {"thermal": False}})
    array.program(ChipInstance(chip, KEY, 0.05))
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32).eval()
    held = programmed_weight(embedding, chip, KEY.at(module=LM_HEAD, purpose="programming"), 0.05)
    plain.set_output_embeddings(nn.Linear(32, len(held), bias=False))
    plain.lm_head.weight = nn.Parameter(held)
    packed = [pack(row, base.tokenizer) for row in load_rows(tiny_task, "validation")[:4]]
    scores = option_scores(base.causal_lm, array, packed, 3)
    for row, found in zip(load_rows(tiny_task, "validation"), scores, strict=False):
        assert found == pytest.approx(plain_option_scores(plain, base.tokenizer, row), abs=1e-3)
    assert torch.equal(embedding, before)
    assert array.noise_db() == {LM_HEAD: pytest.approx(noise_to_signal_db(before, held), abs=1e-4)}
    outside = load_chip(HEAD | {"mapping": {"lm_head": False}})
    array.program(ChipInstance(outside, KEY, 0.05))
    assert LM_HEAD not in array.noise_db()


@torch.no_grad()
@pytest.mark.parametrize("converters", ["exact", "statistical"])
def test_reads_of_the_head_belong_to_row_and_position(tiny_models, tiny_task, converters):
    base = load_base(tiny_models["llama"], "fp32")
    array = install(base.causal_lm)
    mapping = {"lm_head": True, "digital": ["model.*"]}
    chip = load_chip(HEAD | {"mapping": mapping, "read": {"white_us": 2.0}, "adc": {"bits": 6}})
    rows = load_rows(tiny_task, "validation")[:6]
    reads = calibrate(base, array, chip, load_rows(tiny_task, "train"), 64, converters)
    assert list(reads) == [LM_HEAD]
    packed = [pack(row, base.tokenizer) for row in rows]
    clean = np.concatenate(option_scores(base.causal_lm, array, packed, 6))
    array.program(ChipInstance(chip, KEY, 0.05), reads)
    alone = np.concatenate(option_scores(base.causal_lm, array, packed, 1))
    assert np.abs(alone - clean).max() > 0.05
    for order, size in ((1, 4), (-1, 3)):
        together = option_scores(base.causal_lm, array, packed[::order], size)[::order]
        np.testing.assert_allclose(np.concatenate(together), alone, atol=1e-4)
    batch = lay_out(packed[:1])
    with array.reading(batch.rows, batch.predicting):
        logits = batch.logits(base.causal_lm)
    first = [i for i, source in enumerate(packed[0].sources) if source == packed[0].prompt_length - 1]
    assert len(first) == len(rows[0].options)
    assert all(torch.equal(logits[i], logits[first[0]]) for i in first)  # one read of one token
    others = [i for i in range(len(logits)) if i not in first]
    assert not any(torch.equal(logits[i], logits[first[0]]) for i in others)


def test_a_pattern_for_the_head_asks_for_it_on_the_chip(tiny_models):
    array = install(load_base(tiny_models["llama"], "fp32").causal_lm)
    chip = load_chip({"preset": "ideal", "mapping": {"sram": ["lm_head"]}})
    with pytest.raises(UserError, match=r"'lm_head' matches no layer of the chip: chip\.mapping\.lm_head puts"):
        array.on_layers(chip)
    inside = array.on_layers(load_chip({"preset": "ideal", "mapping": {"sram": ["lm_head"], "lm_head": True}}))
    assert inside[LM_HEAD].place == "sram"
    by_share = array.on_layers(load_chip({"preset": "ideal", "mapping": {"lm_head": True, "sram_fraction": 0.02}}))
    assert by_share[LM_HEAD].place == "rram"
