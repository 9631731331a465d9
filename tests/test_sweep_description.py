"""A sweep as it was launched is all that is ever read of it: oracle is the same sweep that nothing was done to."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import yaml

from halora.errors import UserError
from halora.events import Scored
from halora.hardware.shapes import ModelShape, named_shapes
from halora.records.store import Store
from halora.spaces.sweep import SweepConfig, load_sweep
from halora.sweep.run.launched import as_launched, base_and_task, check_unchanged
from halora.sweep.run.state import check_not_launched, claim, load_core, load_sweep_of, open_core, write_sweep
from halora.training.models import model_shape

_STATES = "conductance_us,mean_us,std_us,time_s\n0,0.5,0.4,1\n20,19.5,1.0,1\n40,39,1.2,1\n"
_TABLE = {"kind": "measured", "path": "states.csv", "extrapolate": True}
_MEASURED = {"preset": "halora-2026", "cells": {"g_max_us": 40}, "noise": _TABLE}
_LAB = {"preset": "halora-2026", "name": "lab", "adc": {"bits": 7}, "noise": {"sigma": 1e-3}}


@pytest.fixture
def lab(tmp_path, monkeypatch, tiny_models, tiny_task):
    """A folder to are in, with a sweep that names chips in every way."""
    folder = tmp_path / "lab"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("lab.yaml").write_text(yaml.safe_dump(_LAB))
    Path("other.yaml").write_text(yaml.safe_dump(_LAB | {"name": "other", "adc": {"bits": 5}}))
    Path("states.csv").write_text(_STATES)
    content = {
        "name": "described",
        "family": "tests",
        "seed": 5,
        "trials": 8,
        "chips": {"measured": _MEASURED},
        "trial": {
            "model": tiny_models["llama"],
            "task": tiny_task,
            "chip": {"preset": "lab.yaml", "tile": {"rows": 32}},
            "training": {"steps": 4, "learning_rate": 1.2345678901234567e-05},
            "evaluation": {"rows": 8, "chip_instances": 2},
        },
        "space": {
            "chip": {"choices": ["lab.yaml", "other.yaml", "measured", "isaac"]},
            "chip.adc.bits": {"low": 4, "high": 8, "kind": "int"},
            "lora.rank": {"choices": [2, 4, 8]},
        },
        "constraints": ["energy_uj_per_token <= 4.2951234567891234"],
        "first": [{"chip": "other.yaml", "chip.adc.bits": 6, "lora.rank": 4}],
        "comparison": {"rows": 4, "chip_instances": 1, "chips": ["other.yaml", "measured", "neurram-2022"]},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 10.0},
    }
    Path("described.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def _launched(root: Path, name: str = "described") -> tuple[Store, SweepConfig]:
    store, sweep = Store(root), load_sweep("described.yaml", {"name": name})
    sweep = as_launched(sweep)
    root.mkdir()
    claim(store.sweep(name), lambda folder: write_sweep(folder, sweep))
    return store, sweep


def _run(store: Store, most: int) -> list:
    """The next jobs of the sweep as it is read from the store, and the chips they are for."""
    sweep = load_sweep_of(store.sweep("described"))
    core, done = open_core(sweep, store), []
    while len(done) < most and (job := core.suggest()):
        done.append((job, sweep.resolve(job.values).chip))
        metrics = {"accuracy": 0.5, "clean_accuracy": 0.9, "clean_accuracy_high": 0.9}
        by_chip = [0.5] * job.goal.chip_instances
        core.take(Scored(trial=job.number, step=job.goal.steps, metrics=metrics, accuracy_by_chip=by_chip))
    return done


def _edit(lab):
    Path("lab.yaml").write_text(yaml.safe_dump(_LAB | {"noise": {"sigma": 0.5}}))
    Path("other.yaml").write_text("noise: [")
    Path("states.csv").write_text(_STATES.replace("1.2", "9"))


def _move(lab):
    lab.rename(lab.with_name("moved"))


def _delete(lab):
    for name in ("lab.yaml", "other.yaml", "states.csv", "described.yaml"):
        Path(name).unlink()


@pytest.mark.parametrize("change", [_edit, _move, _delete])
def test_chips_that_change_in_mid_sweep_change_nothing(lab, tmp_path, change, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    undisturbed = _run(_launched(tmp_path / "undisturbed")[0], 99)
    assert len(undisturbed) == 8
    store, _ = _launched(tmp_path / "store")
    found = _run(store, 3)
    change(lab)
    monkeypatch.chdir(tmp_path / "elsewhere")  # what another directory has under these names is not looked at
    Path("other.yaml").write_text(yaml.safe_dump(_LAB | {"adc": {"bits": 3}}))
    found += _run(store, 99)
    assert [(job, chip.content_hash, chip.name) for job, chip in found] == [
        (job, chip.content_hash, chip.name) for job, chip in undisturbed
    ]
    assert {chip.name for _, chip in found} == {"lab", "other", "measured", "isaac"}


def test_a_description_is_read_back_bit_for_bit(lab, tmp_path, monkeypatch):
    store, sweep = _launched(tmp_path / "store")
    chips = [sweep.chip(name) for name in sweep.comparison.chips]
    _move(lab)
    monkeypatch.chdir(tmp_path)
    again = load_sweep_of(store.sweep("described"))
    assert again == sweep
    assert again.trial["training"]["learning_rate"] == 1.2345678901234567e-05
    assert again.constraints[0].bound == 4.2951234567891234
    assert [again.chip(name) for name in again.comparison.chips] == chips
    assert [chip.name for chip in chips] == ["other", "measured", "neurram-2022"]
    assert again.shape(sweep.trial["model"]) == model_shape(sweep.trial["model"])
    # it can be launched again as well, as another launch
    repeated = load_sweep(str(store.sweep("described").sweep_file), {"name": "again"})
    assert repeated.resolve({"chip": "lab.yaml"}) == sweep.resolve({"chip": "lab.yaml"})
    assert (repeated.launch, repeated.folders, repeated.shapes) == ("", {}, {})


@pytest.mark.parametrize("model", sorted(named_shapes()))
def test_the_dimensions_of_every_known_model_are_read_back(model):
    shape = named_shapes()[model]
    assert ModelShape.from_config(shape.dimensions) == shape
    assert ModelShape.from_config(shape.dimensions).fill_source == shape.fill_source


@pytest.mark.parametrize("given", [5, [1], {"lab.yaml": 5}, {"lab.yaml": "isaac", "other.yaml": None}])
def test_a_file_need_not_say_what_its_chips_are(lab, given):
    assert load_sweep("described.yaml", {"chips_read": given, "launch": given}) == load_sweep("described.yaml")


def test_a_model_or_a_task_that_changed_is_told(lab, tiny_task, tmp_path):
    task = tmp_path / "task"
    task.mkdir()
    for file in Path(tiny_task).iterdir():
        (task / file.name).write_bytes(file.read_bytes())
    sweep = load_sweep("described.yaml", {"trial.task": f"2*{task}+arc-easy"})
    sweep = as_launched(sweep)
    assert sorted(sweep.folders) == sorted([str(task), sweep.trial["model"]])
    check_unchanged(sweep)
    os.utime(task / "train.jsonl", (0, 0))  # what counts is the content
    (task / "notes.md").touch()
    check_unchanged(sweep)
    with (task / "validation.jsonl").open("a") as rows:
        rows.write("\n")
    with pytest.raises(UserError, match=rf"^'{task}' has changed since the sweep was launched \(bring back"):
        check_unchanged(sweep)
    task.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"^'{task}', which the sweep was launched with, is gone"):
        check_unchanged(sweep)


def test_folders_of_one_name_are_told_apart_by_what_is_in_them(tiny_models, tiny_task, tmp_path):
    """For the registry: a base of the same name is another base, and the same base elsewhere is the same."""
    sweep = load_sweep("quickstart")
    told = {}
    for place in ("one", "two", "copy"):
        model, task = tmp_path / place / "model", tmp_path / place / "task"
        shutil.copytree(tiny_models["qwen2" if place == "two" else "llama"], model)
        shutil.copytree(tiny_task, task)
        own = {"model": str(model), "task": f"2*{task}+arc-easy"}
        trial = as_launched(sweep.model_copy(update={"trial": sweep.trial | own}))
        told[place] = base_and_task(trial, trial.resolve({}))
    assert told["one"][0] != told["two"][0]
    assert told["one"] == told["copy"]
    assert told["one"][1] == told["two"][1]
    assert base_and_task(sweep, sweep.resolve({})) == ("smollm2-135m-instruct", "1.0*arc-easy")


def test_status_shows_the_others_beside_a_sweep_that_cannot_be_read(lab, tmp_path, halora, halora_json):
    store, sweep = _launched(tmp_path / "store")
    for name in ("damaged", "older", "torn"):
        claim(store.sweep(name), lambda folder, own=name: write_sweep(folder, sweep.model_copy(update={"name": own})))
    store.sweep("damaged").sweep_file.write_text("name: [")
    store.sweep("older").sweep_file.write_text("name: older\n")
    store.sweep("torn").study_file.write_text("{}\n{}\n")
    _run(store, 3)
    code, out, err = halora(f"sweep status --store {store.root}")
    assert code == 0
    assert sorted(line.split()[:2] for line in out.splitlines()[1:]) == [
        ["damaged", "unreadable"],
        ["described", "interrupted"],
        ["older", "unreadable"],
        ["torn", "unreadable"],
    ]
    for name, cause in (("damaged", "is not YAML"), ("older", "family: required"), ("torn", "cannot be read")):
        (told,) = [line for line in err.splitlines() if line.startswith(f"sweep '{name}' cannot be shown: ")]
        assert cause in told
    assert halora_json(f"sweep status described --store {store.root}")[0]["finished"] == 3
    code, _, err = halora(f"sweep status damaged --store {store.root}")
    assert (code, "is not YAML" in err) == (2, True)
    with pytest.raises(UserError, match="cannot be read"):
        load_core("torn", store)


def test_of_launches_at_once_one_has_the_name(tmp_path):
    folder = Store(tmp_path).sweep("same")
    barrier, told, won = threading.Barrier(8), [], []

    def launch(number):
        def write(new):
            barrier.wait()  # all have looked and found the name free
            new.sweep_file.write_text(str(number))
            (new.root / "more").touch()

        try:
            claim(folder, write)
            won.append(str(number))
        except UserError as error:
            told.append(str(error))

    threads = [threading.Thread(target=launch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder.sweep_file.read_text()] == won
    assert len(told) == 7
    (sentence,) = set(told)
    assert sentence.startswith("sweep 'same' was launched before (resume it with `halora sweep resume same`, or launch")
    assert [path.name for path in tmp_path.iterdir()] == ["sweeps"]


def test_a_launch_that_is_killed_before_its_sweep_can_run_leaves_the_name_free(tmp_path):
    store = Store(tmp_path)

    def die(new):
        new.sweep_file.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            claim(store.sweep("name"), die)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    check_not_launched(store.sweep("name"))
    assert store.sweeps() == []
    claim(store.sweep("name"), lambda new: new.sweep_file.touch())
    assert store.sweeps() == ["name"]
    (tmp_path / "sweeps" / "notes").mkdir()
    (tmp_path / "sweeps" / "notes" / "text").touch()
    with pytest.raises(UserError, match=r"sweeps/notes' is in the way: it has no sweep.yaml, so it is not a sweep"):
        claim(store.sweep("notes"), lambda new: new.sweep_file.touch())
