"""Oracles: our own scores of the same adapter on the same chip instance; the model as it was, bit for bit."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from halora.errors import UserError
from halora.evaluation.scoring import margin, plain_option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.training.batches import pack_answer
from halora.training.on_chip import on_chip
from halora.training.tasks import load_rows
from halora.trial_runner import TrialRunner

TOKENS = torch.arange(300, 348).reshape(2, 24)
EXACT = {
    "preset": "halora-2026",
    "noise": {"sigma": 0.05},
    "read": {"thermal": False},
    "adc": {"lossless": True},
    "dac": {"lossless": True},
    "attention": {"bits": 16},
    "lora": {"weight_bits": 4, "input_bits": 16},
    "mapping": {"lm_head": True, "outliers": {"share": 0.01, "weight_bits": 16}},
    "sram": {"input_bits": 16},
}
"""Rounds no input, and reads without noise."""
QUIET = {"preset": "halora-2026", "read": {"thermal": False}}


def _instance(chip, number=0):
    described = load_chip(chip)
    return ChipInstance(described, NoiseKey(role=Role.SEARCH, chip_seed=number), described.noise.level)


def _plain(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _adapted(folder, place, **lora):
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    model = get_peft_model(_plain(folder), config)
    model.save_pretrained(place)
    return model.eval()


def _state(model):
    """Everything that may be changed: modules, hooks, parameters by identity and bytes, the configuration."""
    modules = [(name, id(module), dict(vars(module)).keys()) for name, module in model.named_modules()]
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    tensors = [
        (n, id(t), t.requires_grad, t.detach().view(torch.uint8).numpy().tobytes()) for n, t in model.named_parameters()
    ]
    attention = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    return modules, hooks, tensors, attention


@torch.no_grad()
def _logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


@pytest.mark.parametrize(
    ("architecture", "lora", "chip", "tolerance"),
    [
        ("llama", None, EXACT, 1e-4),
        ("qwen2", {"use_rslora": True}, EXACT, 1e-4),
        ("qwen3", {"use_dora": True}, EXACT, 1e-4),
        ("llama", {}, EXACT, 1e-4),
        ("llama", {}, QUIET, 0.5),  # sums in another order change what is rounded (docs/decisions/003)
    ],
)
def test_scores_are_those_of_our_own_evaluation(architecture, lora, chip, tolerance, tiny_trial, tmp_path):
    evaluation = {"chip_instances": 2, "rows": 4, "calibration_tokens": 8}
    config = tiny_trial(architecture, chip, evaluation=evaluation)
    model = _plain(config.model)
    if lora is not None:
        model = _adapted(config.model, tmp_path, target_modules=["q_proj", "v_proj", "down_proj"], **lora)
    ours = TrialRunner().evaluate(config, None if lora is None else tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    (first,), rows = load_rows(config.task, "train", 1), load_rows(config.task, "validation", 4)
    calibration = torch.tensor([pack_answer(first, tokenizer).tokens[:8]])
    for number in (0, 1):
        with on_chip(model, _instance(config.chip.model_dump(), number), calibration) as array:
            found = [margin(plain_option_scores(model, tokenizer, row), row.answer) for row in rows]
            assert sum(array.noise_db().values()) / 15 == pytest.approx(sum(ours.layer_noise_db[number]) / 15, abs=1e-4)
        assert found == pytest.approx(ours.noisy[number], abs=tolerance)
    assert ours.noisy[0] != pytest.approx(ours.noisy[1], abs=0.01)


@pytest.mark.parametrize(
    ("kind", "chip"), [("plain", "halora-2026"), ("adapted", "neurram-2022"), ("bf16", QUIET), ("adapted", "ideal")]
)
def test_the_model_is_given_back_as_it_was(kind, chip, tiny_models, tmp_path):
    folder = tiny_models["llama"]
    model = (
        _adapted(folder, tmp_path)
        if kind == "adapted"
        else _plain(folder, torch.bfloat16 if kind == "bf16" else torch.float32)
    )
    before, clean = _state(model), _logits(model)
    with on_chip(model, _instance(chip)):
        noisy = _logits(model)
    assert _state(model) == before
    assert torch.equal(_logits(model), clean)
    assert torch.allclose(noisy, clean, atol=1e-2) == (chip == "ideal")
    with pytest.raises(RuntimeError, match="stop"), on_chip(model, _instance(chip)):
        raise RuntimeError("stop")
    with (
        pytest.raises(UserError, match=r"matches no layer"),
        on_chip(model, _instance({"preset": "ideal", "mapping": {"sram": ["*.x_proj"]}})),
    ):
        pass
    assert _state(model) == before
    assert torch.equal(_logits(model), clean)


@pytest.mark.parametrize("chip", ["halora-2026", QUIET])
def test_the_same_passes_give_the_same_results_and_reads_are_drawn_anew(chip, tiny_models):
    model = _plain(tiny_models["llama"])
    runs = []
    for _ in range(2):
        with on_chip(model, _instance(chip)):
            runs.append([_logits(model), _logits(model)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert torch.equal(*runs[0]) == (chip == QUIET)


def test_generation_with_a_cache_and_padding_goes_on_as_the_whole_would(tiny_models):
    """Attention at 8 bits alone: a cached state is that of the whole sequence."""
    model = _plain(tiny_models["llama"])
    chip = {"preset": "halora-2026", "adc": {"lossless": True}, "dac": {"lossless": True}, "read": {"thermal": False}}
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    with on_chip(model, _instance(chip)):
        whole = model.generate(TOKENS, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=2)
        alone = model.generate(TOKENS[1:, 5:], max_new_tokens=8, do_sample=False, pad_token_id=2, use_cache=False)
    assert whole[1, -8:].tolist() == alone[0, -8:].tolist()


def test_what_cannot_be_put_on_a_chip_is_refused(tiny_models):
    model, instance = _plain(tiny_models["llama"]), _instance("halora-2026")
    with (
        on_chip(model, instance),
        pytest.raises(UserError, match="lies under the model already"),
        on_chip(model, instance),
    ):
        pass
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    prefix = get_peft_model(
        _plain(tiny_models["llama"]), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert isinstance(prefix, PeftModel)
    with torch.device("meta"):
        absent = AutoModelForCausalLM.from_config(model.config)
    for unknown, told in (
        (other, "type 'gpt2' is not one of"),
        (torch.nn.Linear(2, 2), "a Linear is no causal language model"),
        (prefix, "PREFIX_TUNING"),
        (absent, "not in memory"),
    ):
        with pytest.raises(UserError, match=told), on_chip(unknown, instance):
            pass
