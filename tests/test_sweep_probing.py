"""Oracles: the closed form of Gaussian noise against a weight's power, the bench that scores by hand, the order of what
a launch says, and MLflow's database read on its own. Launches are processes of their own with a real Ray."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from safetensors.torch import load_file, save_file

from halora.evaluation.damage import Damage, described
from halora.records.store import Store
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.probing import Probing, bases
from halora.trial_runner import TrialRunner, task_rows

OUTLIER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def outlier(tiny_models, tmp_path_factory):
    """The tiny model with one weight of one layer far beyond all others."""
    folder = tmp_path_factory.mktemp("outlier") / "model"
    shutil.copytree(tiny_models["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{OUTLIER}.weight"][3, 5] = 100.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _trial(model, task, **more):
    return {
        "model": model,
        "task": task,
        "chip": {"preset": "ideal", "noise": {"sigma": 0.05}},
        "training": {"steps": 2, "batch_size": 4, "report_every": 1},
        "evaluation": {"chip_instances": 2, "rows": 8, "calibration_tokens": 64, "context_tokens": 64},
        **more,
    }


def _sweep(model, task, **more):
    return {
        "name": "probed",
        "family": "probed",
        "trials": 1,
        "trial": _trial(model, task),
        "space": {"lora.rank": {"choices": [2, 4]}},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
        **more,
    }


def test_damage_is_what_the_scores_and_the_weights_say(outlier, tiny_task):
    config = TrialConfig.model_validate(_trial(outlier, tiny_task))
    runner, rows = TrialRunner(), task_rows(tiny_task, "validation", 8)
    scores = runner.evaluate(config, None)
    damage = Damage.of("it", scores, rows, "cloze")
    assert damage.chance == pytest.approx(fmean(1 / len(row.options) for row in rows))
    assert damage.clean_accuracy == pytest.approx(fmean(m > 0 for m in scores.clean))
    assert damage.accuracy == pytest.approx(fmean(m > 0 for on_chip in scores.noisy for m in on_chip))
    assert damage.margin == pytest.approx(scores.summary()["margin"])
    weight = load_file(Path(outlier) / "model.safetensors")[f"{OUTLIER}.weight"]
    expected_db = 20 * math.log10(0.05 * 100 / weight.square().mean().sqrt().item())
    name, ratio_db = damage.worst[0]
    assert name == OUTLIER
    assert ratio_db == pytest.approx(expected_db, abs=0.3)  # of 2,048 weights on two chips
    assert (damage.overwhelmed, damage.layers) == (1, 14)
    assert damage.worst[1][1] < -10
    assert f"in 1 of 14 layers, most in {OUTLIER}" in damage.warning
    assert Damage.from_json(json.loads(json.dumps(damage.to_json()))) == damage
    assert described([damage.to_json()]) == [damage.said, damage.warning]


def test_the_share_lost_is_of_the_score_above_chance():
    figures = {"base": "b", "rows": 8, "chip_instances": 1, "clean_margin": 0.0, "margin": 0.0, "noise_db": -9.0}
    figures |= {"worst": (), "layers": 3, "overwhelmed": 0, "chance": 0.25}
    assert Damage(**figures, clean_accuracy=0.75, accuracy=0.5).lost == pytest.approx(0.5)
    assert Damage(**figures, clean_accuracy=0.25, accuracy=0.5).lost is None
    assert Damage(**figures, clean_accuracy=0.75, accuracy=0.5).warning == ""


def test_every_pair_of_a_base_and_a_chip_is_probed_once(tiny_models, tiny_task):
    content = _sweep(
        tiny_models["llama"],
        tiny_task,
        chips={"wild": {"preset": "ideal", "noise": {"sigma": 0.2}}},
        space={
            "model": {"choices": [tiny_models[name] for name in ("llama", "qwen2", "qwen3")]},
            "chip.tile.rows": {"choices": [32, 64]},
        },
        first=[{"chip.tile.rows": 64}, {"model": tiny_models["qwen2"], "chip.tile.rows": 32}, {"chip.tile.rows": 32}],
        probe={"rows": 4, "most": 10},
    )
    said = []
    found = bases(SweepConfig.model_validate(content), said.append)
    assert [base.name for base in found] == [
        "llama on ideal",
        "qwen2 on ideal (tile.rows 32)",
        "llama on ideal (tile.rows 32)",
        "qwen2 on ideal",
        "qwen3 on ideal",
        "llama on wild",
    ]
    assert [base.config.chip.noise.level for base in found] == [0.05] * 5 + [0.2]
    assert {(base.config.evaluation.rows, base.config.evaluation.chip_instances) for base in found} == {(4, 2)}
    assert said == []
    fewer = SweepConfig.model_validate(content | {"probe": {"most": 2}})
    assert [base.config.evaluation.rows for base in bases(fewer, said.append)] == [8, 8]  # a trial has no more
    assert said == ["4 of 6 pairs of a base and a chip are not looked at before training, see probe.most"]
    assert bases(SweepConfig.model_validate(content | {"probe": None}), said.append) == []


def test_a_base_that_cannot_be_scored_is_told_and_the_others_go_on(outlier, tiny_task):
    sweep = SweepConfig.model_validate(_sweep(outlier, tiny_task, first=[{"chip.tile.rows": 32}]))
    said, outcomes = [], []
    probing = Probing(bases(sweep, said.append), said.append, outcomes.extend)
    assert probing.begin("a").name == "model on ideal"
    second = probing.begin("b")
    assert probing.begin("c") is None
    probing.failed("a", "its worker ended")
    assert (probing.over, outcomes) == (False, [])
    probing.scored("b", TrialRunner().evaluate(second.config, None))
    assert probing.over
    assert said[0] == "model on ideal: what its chips do to it is not known: its worker ended"
    assert said[2].startswith("warning: model on ideal (tile.rows 32): noise exceeds the signal in 1 of 14 layers")
    assert [outcome["base"] for outcome in outcomes] == ["model on ideal", "model on ideal (tile.rows 32)"]


def _halora(store, *args):
    own = {"HALORA_STORE": str(store), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [Path(sys.executable).parent / "halora", *map(str, args)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def test_a_launch_warns_before_anything_is_trained_and_a_resume_does_not_repeat_it(outlier, tiny_task, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(outlier, broken)
    (broken / "model.safetensors").unlink()
    space = {"lora.rank": {"choices": [2, 4]}, "model": {"choices": [outlier, str(broken)]}}
    content = _sweep(outlier, tiny_task, space=space, first=[{"model": outlier, "lora.rank": 2}])
    file, store = tmp_path / "probed.yaml", tmp_path / "store"
    file.write_text(yaml.safe_dump(content))
    launched = _halora(store, "sweep", "launch", file)
    assert launched.returncode == 0, launched.stderr
    said = launched.stderr
    warning = said.index(f"warning: model on ideal: noise exceeds the signal in 1 of 14 layers, most in {OUTLIER}")
    assert said.index("model on ideal, untrained, 8 rows, 2 chips: accuracy") < warning
    unknown = said.index("broken on ideal: what its chips do to it is not known: model '")
    assert max(warning, unknown) < said.index("trial   0 running")

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("probed")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`halora.kind` = 'sweep'")
    assert OUTLIER in parent.data.tags["halora.warning"]
    written = Path(client.download_artifacts(parent.info.run_id, "damage.json", str(tmp_path)))
    outcomes = {outcome["base"]: outcome for outcome in json.loads(written.read_text())}
    assert outcomes["model on ideal"]["overwhelmed"] == 1
    assert "cannot be loaded" in outcomes["broken on ideal"]["cause"]
    assert (
        "noise exceeds the signal in 1 of 14 layers"
        in Store.at(store).sweep("probed").published.joinpath("report.html").read_text()
    )

    resumed = _halora(store, "sweep", "resume", "probed")
    assert resumed.returncode == 0, resumed.stderr
    assert "untrained" not in resumed.stderr
    assert "warning" not in resumed.stderr


def test_a_dry_run_probes_and_launches_nothing(outlier, tiny_task, tmp_path):
    file, store = tmp_path / "probed.yaml", tmp_path / "store"
    file.write_text(yaml.safe_dump(_sweep(outlier, tiny_task)))
    probed = _halora(store, "sweep", "launch", file, "--dry-run", "--probe")
    assert probed.returncode == 0, probed.stderr
    assert f"noise exceeds the signal in 1 of 14 layers, most in {OUTLIER}" in probed.stderr
    assert not store.exists()
    without = _halora(store, "sweep", "launch", file, "--probe")
    assert (without.returncode, "--probe goes with --dry-run" in without.stderr) == (2, True)
    off = _halora(store, "sweep", "launch", file, "--dry-run", "--probe", "--set", "probe=null")
    assert (off.returncode, "switches the probe off" in off.stderr) == (2, True)


@pytest.mark.slow
def test_a_sweep_on_the_outlier_twin_is_warned_about(tmp_path):
    """The paper's strength relative to the tensor's largest weight, on a Qwen's tails."""
    content = _sweep("smollm2-135m-instruct-outliers", "arc-easy", probe={"rows": 4, "chip_instances": 1})
    content["trial"]["chip"] = {"preset": "halora-2026", "noise": {"sigma": 0.01, "reference": "tensor_max"}}
    content["trial"]["training"] |= {"steps": 1, "batch_size": 1, "dtype": "bf16"}
    content["trial"]["evaluation"] |= {"rows": 2, "chip_instances": 1}
    file = tmp_path / "twin.yaml"
    file.write_text(yaml.safe_dump(content))
    launched = _halora(tmp_path / "store", "sweep", "launch", file)
    assert launched.returncode == 0, launched.stderr
    warning = launched.stderr.index("warning: smollm2-135m-instruct-outliers on halora-2026: noise exceeds the signal")
    assert warning < launched.stderr.index("trial   0 running")
