"""Oracles: an optimiser step written out in plain torch; a stored list of losses; one batch however it is shared."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training_runs import run_losses, run_reports
from transformers import AutoModelForCausalLM, AutoTokenizer

from halora.hardware.addressing import NoiseKey, Role, derive_seed
from halora.hardware.families import LINEAR_NAMES
from halora.hardware.noise import programmed_weight
from halora.settings.trial import TrialConfig
from halora.training.batches import rows_at_step
from halora.training.tasks import load_rows
from halora.trial_folder import adapter_folder, latest_checkpoint
from halora.trial_runner import TrialRunner

VOCABULARY = 49152
GENERATOR = torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    """One process's runner, used by trial after trial as in an actor."""
    return TrialRunner()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter_folder(folder) / "adapter_model.safetensors")


def _checkpoint_in_mid_training(runner: TrialRunner, config: TrialConfig, folder: Path, step: int) -> None:
    """A checkpoint whose weights and moments are drawn at random, so that every term of a step matters."""
    run_losses(runner, config, folder, stop_at=1)
    checkpoint = latest_checkpoint(folder)
    for file, scale in (("adapter/adapter_model.safetensors", 0.3), ("optimizer.safetensors", 0.02)):
        drawn = {
            name: scale * torch.randn(tensor.shape, generator=GENERATOR)
            for name, tensor in load_file(checkpoint / file).items()
        }
        for name, tensor in drawn.items():
            if name.endswith("exp_avg_sq"):
                tensor.abs_()
        save_file(drawn, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / "progress.json").write_text(json.dumps({"step": step}))
    checkpoint.rename(folder / f"step-{step:06d}")
    (folder / "reports.json").unlink()


def _step_by_hand(
    config: TrialConfig, folder: Path, step: int
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, adapter and gradient norms of a step from the checkpoint, all of it written out.

    That is noise, LoRA, both losses, each with its gradient by autograd, clipping and AdamW.
    """
    training, lora = config.training, config.lora
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval().requires_grad_(False)
    adapter = {name: w.clone().requires_grad_() for name, w in _weights(folder).items()}
    draw = step // training.schedule.redraw_steps
    norms = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in LINEAR_NAMES:
            continue
        chip_seed = derive_seed(config.seed, draw)
        key = NoiseKey(role=Role.TRAIN, chip_seed=chip_seed, module=name, purpose="programming")
        weight = programmed_weight(module.weight.data, config.chip, key, training.schedule.strength_start)
        if name.rpartition(".")[2] in lora.targets:
            a, b = (adapter[f"base_model.model.{name}.lora_{ab}.weight"] for ab in "AB")
            weight = weight + lora.alpha_over_rank * b @ a
            norms += [(a @ a.T).square().sum().sqrt(), (b.T @ b).square().sum().sqrt()]
        module.forward = lambda x, weight=weight, bias=module.bias: F.linear(x, weight, bias)
    tokenizer, rows = AutoTokenizer.from_pretrained(config.model), load_rows(config.task, "train")
    nats = []
    for i in rows_at_step(len(rows), training.batch_size, config.seed, step):
        prompt, option = tokenizer(rows[i].prompt).input_ids, tokenizer(rows[i].options[rows[i].answer]).input_ids
        logits = model(input_ids=torch.tensor([prompt + option])).logits[0]
        nats.append(F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(option), reduction="none"))
    modules = len(norms) / 2 if training.reg_reduction == "mean" else 1
    terms = {"task": torch.cat(nats).mean(), "reg": training.mu * sum(norms) / modules}
    loss = sum(terms.values())
    of_term = {
        term: dict(zip(adapter, torch.autograd.grad(value, list(adapter.values())), strict=True))
        for term, value in terms.items()
    }
    gradients = {name: of_term["task"][name] + of_term["reg"][name] for name in adapter}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    clip = min(1.0, training.gradient_clip / norm.item())
    assert clip < 0.9  # it takes part
    rate = training.learning_rate * min(1.0, (step + 1) / (training.warmup_steps + 1))
    moments = load_file(latest_checkpoint(folder) / "optimizer.safetensors")
    after = {}
    for name, weight in adapter.items():
        inner = name.replace(".weight", ".default.weight")
        gradient = clip * gradients[name]
        first = 0.9 * moments[f"{inner}.exp_avg"] + 0.1 * gradient
        second = 0.999 * moments[f"{inner}.exp_avg_sq"] + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        decayed = weight.detach() * (1 - rate * training.weight_decay)
        after[name] = decayed - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    length = {
        (term, part): torch.cat([g.flatten() for name, g in found.items() if part in name]).norm().item()
        for term, found in of_term.items()
        for part in ("lora_", "lora_A", "lora_B")
    }
    told = {f"train_{term}_grad_norm": length[term, "lora_"] for term in of_term}
    told |= {
        f"train_reg_share{suffix}": length["reg", part] / length["task", part]
        for suffix, part in (("", "lora_"), ("_a", "lora_A"), ("_b", "lora_B"))
    }
    return loss.item(), after, told


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"gradient_accumulation": 3, "zero_stage": 2},
        {"activation_checkpointing": True, "noisy_weights": "regenerate"},
        {"activation_checkpointing": True, "gradient_accumulation": 2, "zero_stage": 3},
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_one_written_out_in_plain_torch(tiny_trial, tmp_path, engine, reduction):
    """Within 2e-6 of weights of 0.3 that move by 5e-3; gradient norms within 1e-3 of themselves."""
    settings = {"method": "halora", "mu": 0.3, "reg_reduction": reduction, "weight_decay": 0.1}
    settings |= {"steps": 8, "warmup_steps": 6}
    settings |= {"gradient_clip": 0.5, "schedule": {"strength_start": 0.05, "redraw_steps": 2}, "batch_size": 5}
    _checkpoint_in_mid_training(TrialRunner(), tiny_trial(**settings), tmp_path, step=3)
    config = tiny_trial(**settings, **engine)
    expected_loss, expected, gradients = _step_by_hand(config, tmp_path, step=3)
    (report,) = run_reports(TrialRunner(), config, tmp_path, stop_at=4)
    assert report["train_loss"] == pytest.approx(expected_loss, abs=1e-4)
    assert {name: report[name] for name in gradients} == pytest.approx(gradients, rel=1e-3)
    for name, weight in _weights(tmp_path).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_gradients_in_bf16_are_those_written_out(tiny_trial, tmp_path, zero_stage):
    """Within 8 %: the model, the gradients and their sums are rounded to 8 bits, and shares divide two of them."""
    settings = {"mu": 3.0, "reg_reduction": "sum", "steps": 8, "schedule": {"strength_start": 0.01, "redraw_steps": 2}}
    settings |= {"gradient_clip": 0.5}
    _checkpoint_in_mid_training(TrialRunner(), tiny_trial(**settings), tmp_path, step=3)
    _, _, gradients = _step_by_hand(tiny_trial(**settings), tmp_path, step=3)
    config = tiny_trial(**settings, dtype="bf16", zero_stage=zero_stage, gradient_accumulation=2)
    (report,) = run_reports(TrialRunner(), config, tmp_path, stop_at=4)
    assert {name: report[name] for name in gradients} == pytest.approx(gradients, rel=0.08)


def test_gradients_are_told_of_the_last_step_of_a_report_alone(runner, tiny_trial, tmp_path):
    """Each figure only where it says something: at B = 0 the task has no gradient by A, and plain LoRA has no L_reg."""
    told = {"train_task_grad_norm", "train_reg_grad_norm", "train_reg_share", "train_reg_share_a", "train_reg_share_b"}
    single = run_reports(runner, tiny_trial(mu=0.3), tmp_path / "single")
    assert [told - report.keys() for report in single] == [{"train_reg_share_a"}] + [set()] * 5
    assert single[0]["train_reg_share_b"] == 0
    means = run_reports(runner, tiny_trial(mu=0.3, report_every=3), tmp_path / "means")
    for report, last in zip(means, (single[2], single[5]), strict=True):
        assert {name: report[name] for name in told} == pytest.approx({name: last[name] for name in told}, rel=1e-4)
    plain = run_reports(runner, tiny_trial(method="lora"), tmp_path / "plain")
    assert all(told & report.keys() == {"train_task_grad_norm"} for report in plain)


GOLDEN = [
    11.2999, 11.5695, 10.8590, 10.9148, 11.1517, 11.3961, 11.0074, 10.8385, 10.5973, 10.6130,
    10.4209, 10.3529, 10.1048, 9.9757, 10.0528, 10.3076, 10.0627, 10.0725, 9.5651, 9.4441,
]  # fmt: skip


def test_twenty_losses_are_those_of_the_day_this_was_written(runner, tiny_trial, tmp_path):
    """Within 2e-3: another processor adds up in another order; another formula or draw differs by more."""
    config = tiny_trial(steps=20, mu=0.3, schedule={"strength_start": 0.05, "redraw_steps": 5}, seed=2)
    losses = run_losses(runner, config, tmp_path)
    assert losses == pytest.approx(GOLDEN, abs=2e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_accumulation_and_recomputation_change_nothing(runner, tiny_trial, tmp_path, dtype):
    """The loss of every step within 1e-4 (bf16: 3e-2); a batch of 7 rows is shared unevenly."""
    settings = {"dtype": dtype, "steps": 6, "batch_size": 7, "schedule": {"strength_start": 0.05, "redraw_steps": 2}}
    losses = {}
    for name, own in {
        "whole": {},
        "accumulated": {"gradient_accumulation": 3},
        "one by one": {"gradient_accumulation": 7, "zero_stage": 1},
        "recomputed": {"activation_checkpointing": True},
        "both": {"activation_checkpointing": True, "gradient_accumulation": 2, "noisy_weights": "regenerate"},
    }.items():
        losses[name] = run_losses(runner, tiny_trial(**settings, **own), tmp_path / name)
    for name, found in losses.items():
        assert found == pytest.approx(losses["whole"], abs=1e-4 if dtype == "fp32" else 3e-2), name


def test_recomputation_keeps_less_and_gives_the_base_back(runner, tiny_trial, tmp_path):
    """Oracle: the tensors torch saves for the backward, but for those over the whole vocabulary, which stay."""
    kept = {}
    for recompute in (False, True):
        config = tiny_trial(activation_checkpointing=recompute, steps=1)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            run_losses(runner, config, tmp_path / str(recompute))
        kept[recompute] = sum(t.nbytes for t in saved if VOCABULARY not in t.shape)
        assert not runner.base(config)[0].causal_lm.training
    assert kept[True] < 0.2 * kept[False]


def test_an_accumulated_run_goes_on_like_an_uninterrupted_one(runner, tiny_trial, tmp_path):
    config = tiny_trial(gradient_accumulation=2, steps=6, schedule={"redraw_steps": 2})
    whole = run_losses(runner, config, tmp_path / "whole")
    parts = [loss for stop in (3, None) for loss in run_losses(runner, config, tmp_path / "parts", stop_at=stop)]
    assert parts == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(("before", "after"), list(pairwise([0, 2, 3, 1, 0])))
def test_a_checkpoint_is_read_at_another_zero_stage(tiny_trial, tmp_path, before, after):
    settings = {"steps": 5, "schedule": {"redraw_steps": 2}}
    whole = run_losses(TrialRunner(), tiny_trial(zero_stage=before, **settings), tmp_path / "whole")
    parts = run_losses(TrialRunner(), tiny_trial(zero_stage=before, **settings), tmp_path / "parts", stop_at=2)
    parts += run_losses(TrialRunner(), tiny_trial(zero_stage=after, **settings), tmp_path / "parts")
    assert parts == pytest.approx(whole, abs=1e-4)
