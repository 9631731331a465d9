"""Oracles: plain `transformers` and `peft` with `F.cross_entropy`; the uninterrupted run; AdamW's first step."""

import gc
import json
import shutil
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_families import FEWER
from torch.nn import functional as F
from training_runs import run_losses, run_reports
from transformers import AutoModelForCausalLM, AutoTokenizer

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role, derive_seed
from halora.hardware.families import LINEAR_NAMES
from halora.hardware.noise import programmed_weight
from halora.settings.trial import TrialConfig
from halora.training.adapter import attach_saved, detach
from halora.training.batches import rows_at_step
from halora.training.tasks import load_rows
from halora.trial_folder import adapter_folder
from halora.trial_runner import TrialRunner


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    """One process's runner, used by trial after trial as in an actor."""
    return TrialRunner()


def _plain(config: TrialConfig) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()


@torch.no_grad()
def _plain_task_loss(model: torch.nn.Module, config: TrialConfig, step: int) -> float:
    """Mean cross-entropy of the right options' tokens, one unpadded row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows = load_rows(config.task, "train")
    losses = []
    for i in rows_at_step(len(rows), config.training.batch_size, config.seed, step):
        prompt = tokenizer(rows[i].prompt).input_ids
        option = tokenizer(rows[i].options[rows[i].answer]).input_ids
        logits = model(input_ids=torch.tensor([prompt + option])).logits[0]
        losses.append(F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(option), reduction="none"))
    return torch.cat(losses).mean().item()


def _perturb(model: torch.nn.Module, config: TrialConfig, draw: int, sigma: float) -> None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR_NAMES:
            seed = derive_seed(config.seed, draw)
            key = NoiseKey(role=Role.TRAIN, chip_seed=seed, module=name, purpose="programming")
            module.weight.data = programmed_weight(module.weight.data, config.chip, key, sigma)


@pytest.mark.parametrize("architecture", FEWER)
def test_losses_are_those_of_plain_transformers_and_peft(runner, tiny_trial, tmp_path, architecture):
    config = tiny_trial(architecture, method="lora", steps=4)
    first = run_losses(runner, config, tmp_path, stop_at=3)
    assert first[0] == pytest.approx(_plain_task_loss(_plain(config), config, 0), abs=1e-4)
    trained = PeftModel.from_pretrained(_plain(config), adapter_folder(tmp_path))
    expected = _plain_task_loss(trained, config, 3)
    assert abs(expected - _plain_task_loss(_plain(config), config, 3)) > 0.01  # the adapter takes part
    (last,) = run_losses(runner, config, tmp_path)
    assert last == pytest.approx(expected, abs=1e-4)


def test_noisy_losses_are_those_of_a_plain_model_with_perturbed_weights(runner, tiny_trial, tmp_path):
    schedule = {"shape": "linear", "strength_start": 0.02, "strength_end": 0.1, "redraw_steps": 2}
    config = tiny_trial(method="noise_lora", steps=5, schedule=schedule, seed=3)
    reports = run_reports(runner, config, tmp_path, stop_at=3)
    sigmas = [0.02, 0.04, 0.06, 0.08, 0.1]  # of steps 0 and 1 the same draw, of 2 and 3 another
    assert [report["train_strength"] for report in reports] == pytest.approx(sigmas[:3])
    model = _plain(config)
    _perturb(model, config, draw=0, sigma=sigmas[0])
    assert reports[0]["train_loss"] == pytest.approx(_plain_task_loss(model, config, 0), abs=1e-4)
    model = _plain(config)
    _perturb(model, config, draw=1, sigma=sigmas[3])
    expected = _plain_task_loss(PeftModel.from_pretrained(model, adapter_folder(tmp_path)), config, 3)
    whole = run_reports(runner, config, tmp_path / "whole")
    assert whole[3]["train_loss"] == pytest.approx(expected, abs=1e-4)
    assert [report["train_strength"] for report in whole] == pytest.approx(sigmas)


@pytest.mark.parametrize(("chip", "unit"), [("neurram-2022", 1.0), ("halora-2026", 0.1)])
@pytest.mark.parametrize("holding", ["materialise", "regenerate"])
def test_weights_have_the_strength_that_is_reported_wherever_a_run_was_interrupted(
    runner, tiny_trial, tmp_path, chip, unit, holding
):
    """Loss of a plain model whose weights were programmed at the reported strength; the uninterrupted run."""
    schedule = {"shape": "linear", "strength_start": 0.5 * unit, "strength_end": unit, "redraw_steps": 24}
    settings = {"method": "noise_lora", "steps": 24, "noisy_weights": holding, "learning_rate": 1e-3}
    config = tiny_trial(chip=chip, schedule=schedule, **settings)
    whole = run_reports(runner, config, tmp_path / "whole")
    sigmas = [report["train_strength"] for report in whole]
    assert len(set(sigmas)) == 12  # every second or third step moves by a twentieth
    assert (sigmas[0], sigmas[-1]) == (0.5 * unit, unit)
    parts = [each for stop in (5, 6, 17, None) for each in run_reports(runner, config, tmp_path / "parts", stop)]
    assert [report["train_strength"] for report in parts] == sigmas
    losses = [[report["train_loss"] for report in reports] for reports in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    run_reports(runner, config, tmp_path / "begun", stop_at=7)
    model = _plain(config)
    _perturb(model, config, draw=0, sigma=sigmas[7])
    expected = _plain_task_loss(PeftModel.from_pretrained(model, adapter_folder(tmp_path / "begun")), config, 7)
    assert whole[7]["train_loss"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_halora_adds_mu_times_the_norms_of_the_adapter(runner, tiny_trial, tmp_path, norm):
    config = tiny_trial(method="halora", mu=0.5, reg_norm=norm, steps=4, lora={"targets": ["q_proj", "down_proj"]})
    run_reports(runner, config, tmp_path, stop_at=3)
    weights = load_file(adapter_folder(tmp_path) / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # A and B of two targets in two blocks
    order = {"frobenius": 4, "spectral": torch.inf}[norm]  # norms of the singular values, squared
    expected = sum(torch.linalg.svdvals(w).norm(p=order).item() ** 2 for w in weights.values()) / 4
    (report,) = run_reports(runner, config, tmp_path)
    assert report["train_reg_loss"] == pytest.approx(expected, rel=1e-5)
    assert report["train_loss"] == pytest.approx(report["train_task_loss"] + 0.5 * expected, rel=1e-5)


def test_the_regulariser_shrinks_the_adapter(runner, tiny_trial, tmp_path):
    last = {}
    for mu in (0.0, 3.0):
        reports = run_reports(runner, tiny_trial(mu=mu, steps=12), tmp_path / str(mu))
        last[mu] = reports[-1]["train_reg_loss"]
    assert last[3.0] < 0.9 * last[0.0]


def test_training_under_noise_lowers_the_loss(runner, tiny_trial, tmp_path):
    losses = run_losses(runner, tiny_trial(steps=24, batch_size=8, learning_rate=2e-2), tmp_path)
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 1.0


def test_the_seed_decides_everything_and_a_used_runner_changes_nothing(runner, tiny_trial, tmp_path):
    config = tiny_trial(schedule={"redraw_steps": 2})
    first = run_losses(runner, config, tmp_path / "first")
    run_reports(runner, tiny_trial(seed=9, lora={"rank": 2, "targets": ["o_proj"]}, steps=3), tmp_path / "other")
    assert run_losses(runner, config, tmp_path / "again") == first
    assert run_losses(TrialRunner(), config, tmp_path / "fresh") == first
    assert run_losses(runner, tiny_trial(schedule={"redraw_steps": 2}, seed=1), tmp_path / "seed") != first
    weights = [load_file(adapter_folder(tmp_path / n) / "adapter_model.safetensors") for n in ("first", "fresh")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_first_step_has_the_size_of_the_warmed_up_learning_rate(runner, tiny_trial, tmp_path, warmup_steps):
    config = tiny_trial(method="lora", learning_rate=1e-3, warmup_steps=warmup_steps)
    run_reports(runner, config, tmp_path, stop_at=1)
    weights = load_file(adapter_folder(tmp_path) / "adapter_model.safetensors")
    b = torch.cat([weight.flatten() for name, weight in weights.items() if "lora_B" in name])
    assert b.abs().median().item() == pytest.approx(1e-3 / (warmup_steps + 1), rel=0.01)  # AdamW: lr * sign(gradient)


@pytest.fixture(scope="module")
def reference_losses() -> dict[str, list[float]]:
    """Uninterrupted losses by dtype, set by the first test that needs them."""
    return {}


ENGINES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 3)]


@pytest.mark.parametrize(("dtype", "zero_stage"), ENGINES)
def test_an_interrupted_run_goes_on_like_an_uninterrupted_one(
    runner, reference_losses, tiny_trial, tmp_path, dtype, zero_stage
):
    # Warm-up, noise redrawn off the checkpoints and weight decay all depend on the step.
    settings = {"warmup_steps": 3, "weight_decay": 0.1, "schedule": {"redraw_steps": 3}, "report_every": 2}
    config = tiny_trial(dtype=dtype, zero_stage=zero_stage, steps=8, **settings)
    whole = run_losses(runner, config, tmp_path / "whole")
    parts = [run_losses(runner, config, tmp_path / "parts", stop_at=step) for step in (2, 6, None)]
    assert [len(part) for part in parts] == [1, 2, 1]
    assert list(chain(*parts)) == pytest.approx(whole, abs=1e-5 if dtype == "fp32" else 2e-3)
    reference = reference_losses.setdefault(dtype, whole)  # every stage computes the same thing
    assert whole == pytest.approx(reference, abs=1e-4 if dtype == "fp32" else 3e-2)
    adapters = [load_file(adapter_folder(tmp_path / n) / "adapter_model.safetensors") for n in ("whole", "parts")]
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=0, atol=1e-5 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_an_adapter_without_steps_is_saved_and_restored(runner, tiny_trial, tmp_path, zero_stage):
    config = tiny_trial(zero_stage=zero_stage, steps=0)
    saved = []
    for _ in range(2):
        training = runner.train(config, tmp_path)
        assert training.done
        assert training.advance() == {"step": 0}
        training.close()
        saved.append(load_file(adapter_folder(tmp_path) / "adapter_model.safetensors"))
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert all((weight == 0).all() == ("lora_B" in name) for name, weight in saved[0].items())


def test_zero_3_gives_its_base_up_and_lower_stages_keep_it(runner, tiny_trial, tmp_path):
    for zero_stage, kept in ((0, True), (2, True), (3, False)):
        config = tiny_trial(zero_stage=zero_stage, steps=1)
        before = runner.base(config)[0]
        run_reports(runner, config, tmp_path / str(zero_stage))
        assert (runner.base(config)[0] is before) == kept


def test_the_frozen_weights_survive_training_under_noise(runner, tiny_trial, tmp_path):
    config = tiny_trial(schedule={"strength_start": 1.0, "redraw_steps": 2})
    base = runner.base(config)[0]
    names = set(base.causal_lm.state_dict())
    frozen = {name: tensor.clone() for name, tensor in base.causal_lm.state_dict().items()}
    tokens = torch.arange(100, 120)[None]
    with torch.no_grad():
        logits = base.causal_lm(input_ids=tokens).logits
    run_reports(runner, config, tmp_path)
    state = base.causal_lm.state_dict()
    assert set(state) == names
    assert all(torch.equal(state[name], frozen[name]) for name in names)
    assert not any(parameter.requires_grad for parameter in base.causal_lm.parameters())
    with torch.no_grad():
        assert torch.equal(base.causal_lm(input_ids=tokens).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "zero_stage", "noisy_weights"),
    [("fp32", 0, "materialise"), ("fp32", 3, "regenerate"), ("bf16", 0, "regenerate"), ("bf16", 3, "materialise")],
)
def test_a_thousand_noisy_steps_leave_every_bit_of_the_base(tiny_trial, tmp_path, dtype, zero_stage, noisy_weights):
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    config = tiny_trial(
        dtype=dtype,
        zero_stage=zero_stage,
        noisy_weights=noisy_weights,
        steps=1000,
        report_every=1000,
        batch_size=2,
        schedule={"strength_start": 0.5, "redraw_steps": 1},
    )
    runner = TrialRunner()
    base = runner.base(config)[0]
    parameters = dict(base.causal_lm.named_parameters())  # the very tensors, whatever is wrapped around them
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    training = runner.train(config, tmp_path)
    while not training.done:
        training.advance()
    with GatheredParameters(list(parameters.values()), enabled=zero_stage == 3):
        for name, parameter in parameters.items():
            assert torch.equal(parameter.detach(), before[name]), name
    training.close()


def test_both_ways_to_hold_noisy_weights_train_alike(tiny_trial, tmp_path):
    losses = {}
    for noisy_weights, zero_stage in (("materialise", 0), ("regenerate", 0), ("regenerate", 3)):
        config = tiny_trial(noisy_weights=noisy_weights, zero_stage=zero_stage, steps=6, schedule={"redraw_steps": 2})
        losses[noisy_weights, zero_stage] = run_losses(TrialRunner(), config, tmp_path / f"{noisy_weights}{zero_stage}")
    first, *others = losses.values()
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)


@pytest.fixture(scope="module")
def trained(tiny_models, tiny_task, tmp_path_factory) -> tuple[TrialConfig, Path]:
    """A short trial's folder, stopped two steps before its end."""
    training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "report_every": 2}
    content = {"model": tiny_models["llama"], "task": tiny_task, "chip": "halora-2026", "training": training}
    config = TrialConfig.model_validate(content)
    folder = tmp_path_factory.mktemp("trained")
    run_reports(TrialRunner(), config, folder, stop_at=4)
    return config, folder


@torch.no_grad()
def test_the_adapter_loads_with_plain_peft_and_gives_our_logits(runner, trained):
    config, folder = trained
    tokens = torch.arange(100, 120)[None]
    plain = PeftModel.from_pretrained(_plain(config), adapter_folder(folder)).eval()
    expected = plain(input_ids=tokens).logits
    base = runner.base(config)[0]
    ours = attach_saved(base, adapter_folder(folder))
    logits = ours(input_ids=tokens).logits
    detach(ours)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (logits - base.causal_lm(input_ids=tokens).logits).abs().max() > 0.1


def test_a_checkpoint_is_one_folder_without_pickles(trained):
    _, folder = trained
    checkpoint = folder / "step-000004"
    assert [path for path in folder.iterdir() if path.is_dir()] == [checkpoint]
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "optimizer.safetensors",
        "progress.json",
    }
    weights = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert json.loads((checkpoint / "progress.json").read_text()) == {"step": 4}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _drop_a_tensor(path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter/adapter_model.safetensors", _truncate),
        ("adapter/adapter_model.safetensors", Path.unlink),
        ("adapter/adapter_model.safetensors", _drop_a_tensor),
        ("optimizer.safetensors", _truncate),
        ("optimizer.safetensors", Path.unlink),
        ("optimizer.safetensors", _drop_a_tensor),
        ("progress.json", lambda path: path.write_text("")),
        ("progress.json", lambda path: path.write_text("[4]")),
    ],
)
def test_a_damaged_checkpoint_is_told_and_spoils_nothing(runner, trained, tmp_path, file, damage):
    config, folder = trained
    shutil.copytree(folder, tmp_path / "trial")
    damage(tmp_path / "trial" / "step-000004" / file)
    with pytest.raises(UserError, match=r"checkpoint '.*step-000004' .*delete it; the trial starts over"):
        runner.train(config, tmp_path / "trial")
    base = runner.base(config)[0]
    assert not any("lora" in name for name, _ in base.causal_lm.named_modules())


def test_checkpoints_that_were_never_finished_are_passed_over(runner, trained, tmp_path):
    config, folder = trained
    whole = run_losses(runner, config, tmp_path / "whole")
    shutil.copytree(folder, tmp_path / "killed")
    partial = tmp_path / "killed" / ".step-000006.partial"
    shutil.copytree(folder / "step-000004", partial)  # killed while writing the last checkpoint
    (tmp_path / "killed" / "step-000005").mkdir()
    assert run_losses(runner, config, tmp_path / "killed") == pytest.approx(whole[2:], abs=1e-5)
    shutil.copytree(folder, tmp_path / "emptied")
    (tmp_path / "emptied" / "step-000004" / "progress.json").unlink()
    assert run_losses(runner, config, tmp_path / "emptied") == whole


def test_a_checkpoint_of_another_adapter_is_refused(runner, trained, tmp_path):
    config, folder = trained
    shutil.copytree(folder, tmp_path / "trial")
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 2})})
    with pytest.raises(UserError, match="belongs to another adapter"):
        runner.train(other, tmp_path / "trial")


def test_training_under_converters_is_the_plain_training_where_they_are_perfect(runner, tiny_trial, tmp_path):
    chips = {"perfect": "ideal", "coarse": {"preset": "ideal", "adc": {"bits": 4, "lossless": False}}}
    losses = {}
    for name, chip in chips.items():
        for converters in ("none", "statistical"):
            config = tiny_trial(chip=chip, converters=converters, schedule={"strength_start": 0.02, "redraw_steps": 2})
            losses[name, converters] = run_losses(runner, config, tmp_path / f"{name} {converters}")
    assert losses["perfect", "statistical"] == losses["perfect", "none"] == losses["coarse", "none"]
    gaps = [a - b for a, b in zip(losses["coarse", "statistical"], losses["coarse", "none"], strict=True)]
    assert all(abs(gap) > 1e-3 for gap in gaps)


def test_training_under_converters_goes_on_as_if_never_interrupted(runner, tiny_trial, tmp_path):
    chip = {"preset": "halora-2026", "adc": {"bits": 6}, "read": {"white_us": 0.4}}
    config = tiny_trial(chip=chip, converters="statistical", schedule={"strength_start": 0.02, "redraw_steps": 2})
    whole = run_losses(runner, config, tmp_path / "whole")
    first = run_losses(runner, config, tmp_path / "cut", stop_at=3)
    assert first + run_losses(TrialRunner(), config, tmp_path / "cut") == pytest.approx(whole, abs=1e-6)


def test_converters_and_sharded_weights_are_refused(tiny_trial):
    with pytest.raises(ValidationError, match="calibrated on whole weights"):
        tiny_trial(converters="statistical", zero_stage=3)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_trial_and_keeps_the_last_checkpoint(tiny_trial, tmp_path, zero_stage):
    runner = TrialRunner()
    config = tiny_trial(zero_stage=zero_stage)
    training = runner.train(config, tmp_path)
    training.advance()
    before = load_file(adapter_folder(tmp_path) / "adapter_model.safetensors")
    norm = runner.base(config)[0].causal_lm.model.norm.weight
    kept = norm.detach().clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="loss nan at step 1"):
        training.advance()
    training.close()
    after = load_file(adapter_folder(tmp_path) / "adapter_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    norm.data.copy_(kept)
    assert len(run_reports(runner, config, tmp_path)) == 5


def test_a_segment_reports_means_over_its_steps(runner, tiny_trial, tmp_path):
    config = tiny_trial(steps=5)
    single = run_reports(runner, config, tmp_path / "single")
    means = run_reports(runner, tiny_trial(steps=5, report_every=3), tmp_path / "means")
    assert [report["step"] for report in means] == [3, 5]
    losses = [report["train_loss"] for report in single]
    assert [report["train_loss"] for report in means] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 2])


@pytest.mark.slow
def test_fifty_trials_do_not_grow_their_process(tiny_trial, tmp_path):
    """The process's own memory after fifty trials, of all methods and several ranks and stages, beside ten."""
    runner, used = TrialRunner(), []
    for number in range(50):
        config = tiny_trial(
            method=("lora", "noise_lora", "halora")[number % 3],
            zero_stage=number % 3,
            lora={"rank": 2 + number % 4},
            steps=2,
            seed=number,
        )
        folder = tmp_path / str(number)
        run_reports(runner, config, folder)
        runner.evaluate(config, adapter_folder(folder))
        gc.collect()
        used.append(psutil.Process().memory_full_info().uss / 2**20)
    assert max(used[-5:]) < max(used[9:14]) + 20, [round(mib) for mib in used]
