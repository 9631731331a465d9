"""Folders of models and tasks are where they were when the sweep was read, wherever its trials are carried out."""

import os
from pathlib import Path

import pytest
import yaml

from halora.settings.names import as_sum
from halora.spaces.sweep import load_sweep, load_trial
from halora.training.models import model_shape
from halora.training.tasks import load_rows


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A function that leaves for another folder."""

    def leave():
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")

    return leave


def test_folders_of_a_sweep_are_absolute_wherever_it_names_them(
    tiny_models, tiny_task, tmp_path, monkeypatch, elsewhere
):
    monkeypatch.chdir(Path(tiny_task).parent)
    model, other = (os.path.relpath(tiny_models[name]) for name in ("llama", "qwen2"))
    task = Path(tiny_task).name + "/"  # a trailing slash is not a part of a name
    mixture = f"2*{task}+arc-easy"
    content = {
        "name": "near",
        "family": "f",
        "trials": 2,
        "trial": {"model": model, "task": task, "chip": "halora-2026", "training": {"method": "lora", "steps": 2}},
        "space": {
            "model": {"choices": [model, other]},
            "task": {"choices": [task, mixture]},
            "lora.rank": {"choices": [2, 4], "when": {"model": [other]}},
        },
        "first": [{"model": other, "task": mixture, "lora.rank": 4}],
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 5.0},
    }
    (tmp_path / "near.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    sweep = load_sweep(str(tmp_path / "near.yaml"))
    trial = load_trial(str(tmp_path / "near.yaml"))
    elsewhere()
    assert (trial.model, trial.task) == (tiny_models["llama"], tiny_task)
    assert sweep.trial["model"] == tiny_models["llama"]
    assert sweep.space["model"].choices == (tiny_models["llama"], tiny_models["qwen2"])
    assert sweep.space["lora.rank"].when == {"model": (tiny_models["qwen2"],)}
    (first,) = sweep.first
    assert first == {"model": tiny_models["qwen2"], "task": f"2*{tiny_task}+arc-easy", "lora.rank": 4}
    config = sweep.resolve(first)
    assert model_shape(config.model).layers == 2
    assert len(load_rows(config.task, "train", 10)) == 10


def test_a_folder_of_the_same_name_does_not_hide_what_was_launched(tmp_path, monkeypatch):
    """A resume may be typed in a directory where somebody keeps a copy of a task or a model."""
    sweep = load_sweep("quickstart")
    monkeypatch.chdir(tmp_path)
    for name in ("arc-easy", "commonsense", "smollm2-135m-instruct"):
        (tmp_path / name).mkdir()
    assert sweep.resolve({}).task == load_sweep("quickstart").resolve({}).task == "arc-easy"
    assert sweep.resolve({"task": "2*commonsense+piqa"}).task == "2*commonsense+piqa"
    assert sweep.resolve({}).model == "smollm2-135m-instruct"
    assert as_sum("./arc-easy") == str(tmp_path / "arc-easy")


def test_a_mixture_s_weights_stay_beside_its_folders(tiny_task, monkeypatch):
    monkeypatch.chdir(Path(tiny_task).parent)
    name = Path(tiny_task).name
    assert as_sum({name: 2, "arc-easy": 0.5}) == f"2*{tiny_task}+0.5*arc-easy"
    assert as_sum("arc-easy+openbookqa") == "arc-easy+openbookqa"
    assert as_sum("allenai/ai2_arc/ARC-Easy") == "allenai/ai2_arc/ARC-Easy"
