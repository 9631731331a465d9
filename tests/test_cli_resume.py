"""Sweeps that are stopped, interrupted and killed. Oracle: the same sweep undisturbed, by MLflow's own database."""

import json
import os
import re
import signal

import fsspec
import psutil
import pytest
import yaml
from commands import background, content_of, halora, loss_history, runs, training_steps
from raylets import frozen
from records_audit import differences

STEPS = 120


# One sweep twice: once undisturbed, once stopped, interrupted and killed. Its second trial fails by its own fault.


@pytest.fixture(scope="module")
def repeat_file(tiny_models, tiny_task, tmp_path_factory):
    """A function that writes the same sweep under another name."""
    content = content_of("", tiny_models, tiny_task, steps=STEPS, report_every=3, schedule={"redraw_steps": 7})
    content["space"] = {
        "training.weight_decay": {"choices": [0.0, 1e30]},  # the second drives every weight out of range
        "training.learning_rate": {"low": 0.01, "high": 0.1, "log": True},
    }
    content["first"] = [{"training.weight_decay": decay} for decay in (0.0, 1e30, 0.0)]
    folder = tmp_path_factory.mktemp("sweeps")

    def write(name):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | {"name": name}))
        return path

    return write


@pytest.fixture(scope="module")
def undisturbed(store, repeat_file):
    return halora(store, "sweep", "launch", repeat_file("undisturbed"))


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(undisturbed, store):
    assert undisturbed.returncode == 1, undisturbed.stderr
    good, bad, later = runs(store, "undisturbed")
    assert [run.info.status for run in (good, bad, later)] == ["FINISHED", "FAILED", "FINISHED"]
    assert bad.data.tags["halora.cause"] == "loss nan at step 1"
    assert re.search(r"trial +1 failed +loss nan at step 1", undisturbed.stderr)
    assert "Traceback" not in undisturbed.stderr
    (parent,) = runs(store, "undisturbed", kind="sweep")
    assert (parent.info.status, parent.data.metrics["trials_done"]) == ("FINISHED", 2)
    every_third = list(range(3, STEPS + 1, 3))
    assert [step for step, _ in loss_history(store, good)] == every_third
    assert [step for step, _ in loss_history(store, later)] == every_third
    (row,) = json.loads(halora(store, "sweep", "status", "undisturbed", "--format", "json").stdout)
    assert (row["state"], row["finished"], row["failed"]) == ("ended", 2, 1)
    shown = halora(store, "trial", "show", "undisturbed/1", "--recompute")
    assert shown.returncode == 2
    assert "has no 'scores.json'" in shown.stderr


@pytest.fixture(scope="module")
def stopped(store, repeat_file):
    """The sweep again, asked to stop by another process while its first trial trains, however long the asking takes."""
    with background(store, "sweep", "launch", repeat_file("disturbed")) as driver:
        driver.wait_for("training")
        (worker,) = driver.workers()
        with frozen(worker.pid):
            twice = halora(store, "sweep", "resume", "disturbed")
            stop = halora(store, "sweep", "stop", "disturbed")
        driver.end()
        return driver, stop, twice


def test_a_stop_from_another_process_pauses_the_sweep(stopped, store):
    driver, stop, twice = stopped
    assert stop.returncode == 0, stop.stderr
    assert "halora sweep resume disturbed" in stop.stderr
    assert twice.returncode == 2
    assert "running in another process" in twice.stderr
    assert driver.process.returncode == 1, driver.said
    assert "halora sweep resume disturbed" in driver.said
    assert training_steps(driver.said, 0)
    assert "trial   1" not in driver.said
    assert {run.info.status for run in runs(store, "disturbed")} == {"KILLED"}
    (row,) = json.loads(halora(store, "sweep", "status", "disturbed", "--format", "json").stdout)
    assert (row["state"], row["unfinished"], row["waiting"]) == ("interrupted", 1, 2)


@pytest.fixture(scope="module")
def interrupted(stopped, store):
    """Resumed, and interrupted with Ctrl-C, which a terminal sends to every process of the session."""
    with background(store, "sweep", "resume", "disturbed") as driver:
        driver.wait_for("training")
        family = driver.family()
        os.killpg(driver.process.pid, signal.SIGINT)
        driver.end()
        return driver, family


def test_ctrl_c_ends_a_sweep_and_keeps_its_reports(interrupted, stopped, store):
    driver, family = interrupted
    assert driver.process.returncode == 1, driver.said
    assert "halora sweep resume disturbed" in driver.said
    assert "Traceback" not in driver.said
    assert training_steps(driver.said, 0)[0] > training_steps(stopped[0].said, 0)[-1]  # from its checkpoint
    everything = [*runs(store, "disturbed"), *runs(store, "disturbed", kind="sweep")]
    assert {run.info.status for run in everything} <= {"KILLED", "FINISHED", "FAILED"}
    assert "KILLED" in {run.info.status for run in everything}
    assert not psutil.wait_procs(family, timeout=120)[1]


@pytest.fixture(scope="module")
def killed(interrupted, store):
    """Resumed again, and killed without a chance to record anything."""
    with background(store, "sweep", "resume", "disturbed") as driver:
        driver.wait_for("training")
        workers = driver.workers()
        driver.process.kill()
        driver.end()
        return driver, workers


@pytest.fixture(scope="module")
def resumed(killed, store):
    """Resumed a last time, to its end."""
    return halora(store, "sweep", "resume", "disturbed")


def test_workers_of_a_killed_driver_end_too(killed):
    driver, workers = killed
    assert driver.process.returncode == -signal.SIGKILL
    assert len(workers) == 1
    left = psutil.wait_procs(workers, timeout=120)[1]
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_a_disturbed_sweep_ends_as_the_undisturbed_one(resumed, undisturbed, store):
    assert resumed.returncode == undisturbed.returncode == 1, resumed.stderr  # for the trial that fails
    again, whole = runs(store, "disturbed"), runs(store, "undisturbed")
    assert [run.data.tags["halora.trial"] for run in again] == ["0", "1", "2"]  # none twice
    assert [run.info.status for run in again] == [run.info.status for run in whole]
    assert [run.data.params for run in again] == [run.data.params for run in whole]
    assert len(runs(store, "disturbed", kind="sweep")) == 1
    for one, other in zip(again, whole, strict=True):
        assert one.data.tags.get("halora.cause") == other.data.tags.get("halora.cause")
        steps, losses = zip(*loss_history(store, one), strict=True) if one.info.status == "FINISHED" else ((), ())
        assert steps == tuple(step for step, _ in loss_history(store, other))  # each once
        assert losses == pytest.approx([loss for _, loss in loss_history(store, other)], abs=1e-4)
        for name in ("margin", "clean_margin"):
            assert one.data.metrics.get(name) == pytest.approx(other.data.metrics.get(name), abs=1e-3)
    (row,) = json.loads(halora(store, "sweep", "status", "disturbed", "--format", "json").stdout)
    assert (row["state"], row["finished"], row["failed"], row["unfinished"]) == ("ended", 2, 1, 0)


def test_the_picture_of_a_resumed_sweep_shows_all_its_trials(resumed, undisturbed, store):
    import matplotlib.image
    import numpy as np

    pictures = []
    for name in ("disturbed", "undisturbed"):
        (parent,) = runs(store, name, kind="sweep")
        (path,) = (store / "artifacts").rglob(f"{parent.info.run_id}/artifacts/front.png")
        pictures.append(matplotlib.image.imread(path)[40:])  # without the title
    assert np.abs(pictures[0] - pictures[1]).mean() < 1e-3
    assert np.abs(pictures[0] - 1).mean() > 1e-3


@pytest.mark.slow
def test_sigterm_ends_a_sweep_as_ctrl_c_does(store, repeat_file):
    """It reaches the driver alone, for which Ray has a handler of its own."""
    with background(store, "sweep", "launch", repeat_file("terminated")) as driver:
        driver.wait_for("training")
        family = driver.family()
        driver.process.terminate()
        driver.end()
    assert driver.process.returncode == 1, driver.said
    assert "halora sweep resume terminated" in driver.said
    assert not re.search("Traceback|SIGTERM|Fatal|Abort", driver.said)
    everything = [*runs(store, "terminated"), *runs(store, "terminated", kind="sweep")]
    assert {run.info.status for run in everything} == {"KILLED"}
    assert not psutil.wait_procs(family, timeout=120)[1]


@pytest.mark.slow
def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(undisturbed, store, repeat_file):
    with background(store, "sweep", "launch", repeat_file("bereaved")) as driver:
        driver.wait_for("training")
        (worker,) = driver.workers()
        worker.kill()
        assert driver.end() == undisturbed.returncode
    assert "trial 0 resumes from its checkpoint: its worker ended; see `halora trial logs bereaved/0`" in driver.said
    again, whole = runs(store, "bereaved"), runs(store, "undisturbed")
    assert [run.info.status for run in again] == [run.info.status for run in whole]
    for one, other in zip(again, whole, strict=True):
        steps, losses = ([pair[i] for pair in loss_history(store, one)] for i in (0, 1))
        assert steps == [step for step, _ in loss_history(store, other)]
        assert losses == pytest.approx([loss for _, loss in loss_history(store, other)], abs=1e-4)
    logs = halora(store, "trial", "logs", "bereaved/0")
    assert logs.returncode == 0
    assert "error.txt" in logs.stdout


def test_a_sweep_with_a_storage_goes_on_where_no_file_of_it_is(
    store, s3, tiny_models, tiny_task, tmp_path, monkeypatch
):
    """Oracle: every step recorded once, of trials whose driver and workers were killed, and whose scratch is gone."""
    content = content_of("afar", tiny_models, tiny_task, steps=24, report_every=4, schedule={"redraw_steps": 7})
    content |= {
        "trials": 3,
        "concurrent": 2,
        "space": {"lora.rank": {"choices": [2, 4, 8]}},
        "first": [{"lora.rank": rank} for rank in (8, 2, 4)],
        "comparison": {"rows": 8, "chip_instances": 2},
    }
    path, scratch = tmp_path / "afar.yaml", [tmp_path / "one", tmp_path / "two"]
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets want a short path
    for folder in scratch:
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch[0]))
    with background(store, "sweep", "launch", path, "--checkpoint-url", "s3://bucket/sweeps/") as driver:
        driver.wait_for("step 8/24")
        family = driver.family()
        driver.process.kill()
        driver.end()
        assert not psutil.wait_procs(family, timeout=120)[1]
    trials = store / "sweeps" / "afar" / "trials"
    assert not list(trials.glob("*/step-*"))
    assert list(scratch[0].glob("halora-trial-*/trial/step-*"))

    monkeypatch.setenv("TMPDIR", str(scratch[1]))
    resumed = halora(store, "sweep", "resume", "afar")
    assert resumed.returncode == 0, resumed.stderr
    number = int(re.search(r"trial +(\d+) training +step 8/24", driver.said)[1])
    assert training_steps(resumed.stderr, number)[0] > 8  # from its checkpoint
    for run in runs(store, "afar"):
        assert [step for step, _ in loss_history(store, run)] == list(range(4, 25, 4))
    assert differences(f"sqlite:///{store / 'mlflow.db'}", "afar", store / "sweeps" / "afar" / "events.jsonl") == []
    assert "best adapter (trial" in resumed.stderr
    kept = {str(file.relative_to(trials)) for file in trials.rglob("*") if file.is_file()}
    assert {name.partition("/")[0] for name in kept if name.endswith("adapter_model.safetensors")} == {
        f"{number:05d}" for number in range(3)
    }
    assert {f"{number:05d}/result.json" for number in range(3)} < kept
    assert not [name for name in kept if "optimizer" in name or "partial" in name]
    assert not list(scratch[1].glob("halora-trial-*"))

    objects = fsspec.filesystem("s3").find("bucket/sweeps")
    members = {row["trial"] for row in json.loads(halora(store, "front", "show", "afar", "--format", "json").stdout)}
    assert {re.fullmatch(r"bucket/sweeps/afar-[0-9a-f]{32}/(\d{5})/.*", name)[1] for name in objects} == {
        f"{number:05d}" for number in members
    }
    assert not [name for name in objects if "optimizer" in name]
