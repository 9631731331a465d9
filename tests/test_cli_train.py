"""Oracles: the same configuration run by the runner; an uninterrupted run; the logged summary."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from halora.settings.trial import TrialConfig
from halora.spaces.sweep import load_sweep, load_trial
from halora.trial_folder import adapter_folder
from halora.trial_runner import TrialRunner


@pytest.fixture(scope="module")
def content(tiny_models, tiny_task):
    return {
        "model": tiny_models["llama"],
        "task": tiny_task,
        "chip": "halora-2026",
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "report_every": 2},
        "evaluation": {"chip_instances": 2, "rows": 12},
        "seed": 3,
    }


@pytest.fixture
def file(content, tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _weights(run):
    return load_file(adapter_folder(run) / "adapter_model.safetensors")


def test_train_is_what_the_runner_does(halora_json, content, file, tmp_path):
    (said,) = halora_json(f"train {file} --output {tmp_path / 'run'}")
    config, runner = TrialConfig.model_validate(content), TrialRunner()
    training = runner.train(config, tmp_path / "by hand")
    while not training.done:
        training.advance()
    training.close()
    ours, by_hand = (
        load_file(adapter_folder(tmp_path / name) / "adapter_model.safetensors") for name in ("run", "by hand")
    )
    assert ours.keys() == by_hand.keys()
    assert all((ours[name] == by_hand[name]).all() for name in ours)
    summary = runner.evaluate(config, adapter_folder(tmp_path / "by hand")).summary()
    assert {name: said[name] for name in summary} == pytest.approx(summary)
    assert said["energy_uj_per_token"] > 0


def test_train_goes_on_from_its_checkpoint_and_refuses_another_trial(halora, file, tmp_path):
    run, cut = tmp_path / "run", tmp_path / "cut"
    assert halora(f"train {file} --output {run} --no-scores")[0] == 0
    assert halora(f"train {file} --output {cut} --no-scores --set training.steps=2")[0] == 0
    code, _, err = halora(f"train {file} --output {cut} --no-scores")
    assert code == 2
    assert "holds another trial" in err
    shutil.copy(run / "trial.json", cut / "trial.json")  # as if six steps had been asked for and two were taken
    code, _, err = halora(f"train {file} --output {cut} --no-scores")
    assert code == 0
    assert "step 4/6" in err
    assert "step 2/6" not in err
    finished, resumed = _weights(run), _weights(cut)
    assert all((finished[name] == resumed[name]).all() for name in finished)


def test_several_seeds_are_several_trainings_and_an_interval_over_them(halora, halora_json, content, file, tmp_path):
    """Oracle: each seed trained on its own, and the spread of their means."""
    short = "--set training.steps=2 --set evaluation.rows=6"
    (said,) = halora_json(f"train {file} --output {tmp_path / 'many'} --seeds 2 {short}")
    alone = [
        halora_json(f"train {file} --output {tmp_path / str(seed)} {short} --set seed={seed}")[0] for seed in (3, 4)
    ]
    for seed, one in zip((3, 4), alone, strict=True):
        ours, own = _weights(tmp_path / "many" / f"seed-{seed:05d}"), _weights(tmp_path / str(seed))
        assert all((ours[name] == own[name]).all() for name in own)
        assert said["margin_low"] < one["margin"] < said["margin_high"]
    first, second = (one["margin"] for one in alone)
    assert said["margin"] == pytest.approx((first + second) / 2)
    assert said["margin_std_seeds"] == pytest.approx(abs(first - second) / 2**0.5)
    code, _, err = halora(f"train {file} --output {tmp_path / 'many'} --seeds 2 {short}")
    assert code == 0
    assert "step 2/2" not in err  # both are done: nothing is trained again
    assert "over training seeds, chips and rows; this speaks of these 2 adapters, not of the method" in err
    code, _, err = halora(f"train {file} --output {tmp_path / '3'} --seeds 2 {short}")
    assert code == 2
    assert "holds a trial of one seed" in err


def test_a_sweep_s_fixed_values_are_a_trial():
    sweep = load_sweep("quickstart")
    assert load_trial("quickstart") == sweep.resolve({})
    assert load_trial("quickstart", {"training.method": "lora"}).training.method == "lora"
    assert load_trial("robustness", {"chip": "relaxed"}).chip == load_sweep("robustness").chip("relaxed")


def test_evaluate_repeats_what_train_scored_and_takes_another_chip(halora_json, file, tmp_path):
    run = tmp_path / "run"
    (trained,) = halora_json(f"train {file} --output {run}")
    (again,) = halora_json(f"evaluate {run}")
    assert {name: again[name] for name in trained} == pytest.approx(trained)
    assert (again["chip"], again["rows"], again["chip_instances"]) == ("halora-2026", 12, 2)
    (ideal,) = halora_json(f"evaluate {run} --chip ideal --instances 3 --rows 8 --set evaluation.batch_size=3")
    assert ideal["margin"] == pytest.approx(ideal["clean_margin"])  # nothing moves the weights or the reads
    assert (ideal["chip"], ideal["rows"], ideal["chip_instances"]) == ("ideal", 8, 3)
    (fresh,) = halora_json(f"evaluate {run} --first-chip 2")
    assert fresh["clean_margin"] == pytest.approx(again["clean_margin"])
    assert fresh["margin"] != pytest.approx(again["margin"], abs=1e-3)
    (base,) = halora_json(f"evaluate {run} --base")
    assert base["clean_margin"] != pytest.approx(again["clean_margin"], abs=1e-3)


def test_the_base_alone_is_scored_without_any_training(halora, halora_json, content, file, tmp_path):
    config = TrialConfig.model_validate(content)
    summary = TrialRunner().evaluate(config, None).summary()
    (of_file,) = halora_json(f"evaluate {file} --base")
    assert {name: of_file[name] for name in summary} == pytest.approx(summary)
    assert of_file["adapter"] is None
    above = summary["clean_accuracy"] - of_file["chance"]
    lost = (summary["clean_accuracy"] - summary["accuracy"]) / above if above > 0 else None
    assert of_file["lost"] == pytest.approx(lost)
    assert of_file["layers_overwhelmed"] == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "trial.json").write_text(config.model_dump_json())  # as a run that was stopped before its first checkpoint
    assert halora_json(f"evaluate {run} --base") == [of_file]
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"seed": 3, "trial": {**content, "chip": "ideal"}}))
    (ideal,) = halora_json(f"evaluate {sweep} --base --rows 8 --instances 1")
    assert (ideal["chip"], ideal["rows"], ideal["lost"] or 0.0) == ("ideal", 8, 0.0)
    code, _, err = halora(f"evaluate {file} --base --set 'chip.noise.sigma=100'")
    assert code == 0
    assert "warning: " in err
    assert "noise exceeds the signal in 14 of 14 layers" in err
    code, _, err = halora(f"evaluate {tmp_path / 'nothing.yaml'} --base")
    assert (code, "no trial '" in err) == (2, True)


def test_a_plain_peft_folder_needs_to_be_told_chip_and_task(halora, halora_json, file, tmp_path, tiny_task):
    run = tmp_path / "run"
    (trained,) = halora_json(f"train {file} --output {run}")
    peft = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(adapter_folder(run), peft)
    code, _, err = halora(f"evaluate {peft}")
    assert code == 2
    assert "task: required, but missing" in err
    assert "chip: required, but missing" in err
    (said,) = halora_json(f"evaluate {peft} --chip halora-2026 --task {tiny_task} --instances 2 --rows 12")
    assert said["margin"] == pytest.approx(trained["margin"])
    assert said["energy_uj_per_token"] == pytest.approx(trained["energy_uj_per_token"])


def test_every_mistake_of_a_trial_file_is_told_at_once(halora, content, tmp_path):
    bad = {
        **content,
        "task": "arc-eazy",
        "lora": {"rank": 0},
        "training": {"steps": -1, "schedule": {"shape": "cosine"}},
    }
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**bad, "chipp": "ideal"}))
    code, _, err = halora(f"train {path} --output {tmp_path / 'run'}")
    assert code == 2
    for told in (
        "chipp: unknown key; did you mean 'chip'",
        "lora.rank",
        "training.steps",
        "strength_end is required",
        "arc-easy",
    ):
        assert told in err, told
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train {tmp}/none.yaml --output {tmp}/run", "no trial '"),
        ("train {file} --output {tmp}", "is not empty and holds no trial"),
        ("train {file} --output {file}", "is a file"),
        ("evaluate {tmp}", "no adapter in '"),
    ],
)
def test_a_wrong_path_is_told(halora, file, tmp_path, arguments, told):
    code, _, err = halora(arguments.format(tmp=tmp_path, file=file))
    assert code == 2
    assert told in err


def test_a_loss_that_is_not_finite_fails_and_says_what_to_do(halora, content, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(content["model"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump({**content, "model": str(broken)}))
    code, _, err = halora(f"train {path} --output {tmp_path / 'run'}")
    assert code == 1
    assert "failed: loss nan at step 0; lower training.learning_rate" in err
    assert "Traceback" not in err


def test_train_writes_its_configuration_beside_its_results(halora_json, content, file, tmp_path):
    halora_json(f"train {file} --output {tmp_path / 'run'}")
    written = json.loads((tmp_path / "run" / "trial.json").read_text())
    assert TrialConfig.model_validate(written) == TrialConfig.model_validate(content)
    assert {"trial.json", "reports.json", "result.json", "step-000006"} == {
        p.name for p in (tmp_path / "run").iterdir()
    }


def test_one_worker_trains_and_scores_where_ray_is_not_installed(file, tmp_path):
    run = tmp_path / "run"
    code = "import sys; sys.modules['ray'] = None; from halora.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", file, "--output", run, "--set", "training.steps=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["row_ids"]


def test_two_workers_train_as_one(content, file, tmp_path):
    """In a process of its own, as Ray is started for the second worker."""
    reports = {}
    for workers in (1, 2):
        run = tmp_path / str(workers)
        settings = ["--no-scores", "--set", f"training.workers={workers}"]
        done = subprocess.run(
            [Path(sys.executable).parent / "halora", "train", file, "--output", run, *settings],
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        reports[workers] = [report["train_loss"] for report in json.loads((run / "reports.json").read_text())]
    assert len(reports[1]) == 3
    assert reports[2] == pytest.approx(reports[1], abs=1e-4)
