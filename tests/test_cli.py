"""Oracles: the command's exit codes; MLflow's database read on its own; one sweep run twice, once undisturbed.

Every launch is a process of its own with a real Ray; launched sweeps are shared by the tests that look at them.
"""

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import optuna
import psutil
import pytest
import yaml
from records_audit import differences

from halora.hardware.chip import load_chip

HALORA = Path(sys.executable).parent / "halora"
TRIALS = 5
STEPS = 120


def _environment(store):
    own = {"HALORA_STORE": str(store), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return os.environ | own


def halora(store, *args, cwd=None, timeout=1200):
    """Run the command, in the folder that holds the store."""
    return subprocess.run(
        [HALORA, *map(str, args)],
        env=_environment(store),
        cwd=cwd or store.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Background:
    """The command in a session of its own, as in a terminal; its stderr is read line by line."""

    def __init__(self, store, *args):
        self.lines = []
        self.process = subprocess.Popen(
            [HALORA, *map(str, args)],
            env=_environment(store),
            cwd=store.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self):
        """Its stderr so far."""
        return "".join(self.lines)

    def wait_for(self, text, timeout=1000, after=0):
        """Wait until a line of stderr holds the text, leaving out as many lines as came `after` which it is to come."""
        end = time.monotonic() + timeout
        while text not in "".join(self.lines[after:]):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, f"no '{text}' in: {self.said}"
            time.sleep(0.05)

    def end(self, timeout=1200):
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def family(self):
        """All processes it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self):
        """The processes among them that train."""
        found = []
        for process in self.family():
            with suppress(psutil.NoSuchProcess):  # it ends at this moment
                if "Trainable" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self):
        """End it and whatever it started, if anything is left."""
        left = [*self.family(), self.process] if self.process.poll() is None else []
        for process in left:
            process.kill()


@contextmanager
def background(store, *args):
    running = Background(store, *args)
    try:
        yield running
    finally:
        running.kill()


def training_steps(said, number):
    """Steps of a trial's reports in the order they were told."""
    return [int(step) for step in re.findall(rf"trial +{number} training +step (\d+)/", said)]


def _client(store):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store / 'mlflow.db'}")


def runs(store, name, kind="trial"):
    """MLflow's runs of a sweep, by trial number."""
    client = _client(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`halora.sweep` = '{name}' and tags.`halora.kind` = '{kind}'")
    return sorted(found, key=lambda run: int(run.data.tags.get("halora.trial", -1)))


def loss_history(store, run):
    """(step, train_loss) of a run as recorded, by step."""
    history = _client(store).get_metric_history(run.info.run_id, "train_loss")
    return sorted((metric.step, metric.value) for metric in history)


def _content(name, models, task, **training):
    """A sweep over the tiny models' fixed part."""
    return {
        "name": name,
        "family": "tiny",
        "description": "tiny models",
        "seed": 7,
        "trials": 3,
        "trial": {
            "model": models["llama"],
            "task": task,
            "chip": "halora-2026",
            "training": {"method": "halora", "mu": 0.01, "batch_size": 4, "learning_rate": 0.05, **training},
            "evaluation": {"chip_instances": 2, "rows": 8, "calibration_tokens": 64, "context_tokens": 64},
        },
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store that all launched sweeps share."""
    return tmp_path_factory.mktemp("cli") / "store"


@pytest.fixture(scope="module")
def zoo_file(tiny_models, tiny_task, tmp_path_factory):
    """A sweep over all architectures, two trials at a time, with a closing comparison."""
    content = _content("zoo", tiny_models, tiny_task, steps=6, report_every=2, schedule={"redraw_steps": 2})
    content |= {
        "trials": TRIALS,
        "concurrent": 2,
        "space": {
            "model": {"choices": list(tiny_models.values())},
            "lora.rank": {"choices": [2, 4]},
            "chip.adc.bits": {"low": 5, "high": 9, "kind": "int"},
        },
        "first": [{"model": folder, "lora.rank": 4} for folder in tiny_models.values()],
        "comparison": {"rows": 8, "chip_instances": 2},
    }
    path = tmp_path_factory.mktemp("sweeps") / "zoo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def zoo(store, zoo_file):
    """The process that launched that sweep."""
    return halora(store, "sweep", "launch", zoo_file)


# One sweep over all families, launched once.


def test_a_sweep_over_all_families_ends_in_a_front(zoo, store, tiny_models):
    assert zoo.returncode == 0, zoo.stderr
    assert re.search(rf"front of zoo: \d of {TRIALS} finished trials", zoo.stdout)
    assert "energy_uj_per_token" in zoo.stdout
    for number in range(TRIALS):
        assert f"trial {number:>3} finished" in zoo.stderr
    assert re.search(r"best adapter \(trial \d\) beside the untrained base, on the same 2 fresh chips", zoo.stderr)
    assert "Traceback" not in zoo.stderr
    assert "Warning" not in zoo.stderr
    assert [path.name for path in store.parent.iterdir()] == ["store"]  # nothing is written beside the store

    shown = halora(store, "front", "show", "zoo", "--all", "--format", "json")
    assert shown.returncode == 0
    rows = json.loads(shown.stdout)
    assert {row["params"]["model"] for row in rows} == set(tiny_models.values())
    assert sorted(row["trial"] for row in rows) == list(range(TRIALS))
    for row in rows:
        beaten = [
            other
            for other in rows
            if (other["accuracy"], -other["energy_uj_per_token"]) != (row["accuracy"], -row["energy_uj_per_token"])
            and other["accuracy"] >= row["accuracy"]
            and other["energy_uj_per_token"] <= row["energy_uj_per_token"]
        ]
        assert row["front"] == (not beaten)

    members = list(csv.DictReader(io.StringIO(halora(store, "front", "show", "zoo", "--format", "csv").stdout)))
    assert {int(row["trial"]) for row in members} == {row["trial"] for row in rows if row["front"]}


def test_mlflow_holds_the_whole_sweep(zoo, store, tiny_models):
    (parent,) = runs(store, "zoo", kind="sweep")
    trials = runs(store, "zoo")
    assert (parent.info.status, parent.data.metrics["trials_done"]) == ("FINISHED", TRIALS)
    assert [run.data.tags["halora.trial"] for run in trials] == [str(number) for number in range(TRIALS)]
    assert {run.data.params["model"] for run in trials} == set(tiny_models.values())
    client = _client(store)
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "sweep.yaml",
        "front.json",
        "front.csv",
        "front.png",
        "report.html",
        "comparison.json",
        "damage.json",
    }
    for run in trials:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert set(run.data.params) == {"model", "lora.rank", "chip.adc.bits"}
        assert [step for step, _ in loss_history(store, run)] == [2, 4, 6]
        metrics = run.data.metrics
        components = [value for name, value in metrics.items() if name.startswith("energy_uj_per_token.")]
        assert len(components) == 11
        assert sum(components) == pytest.approx(metrics["energy_uj_per_token"], rel=1e-9)
        assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
        (output,) = run.outputs.model_outputs
        adapter = Path(client.get_logged_model(output.model_id).artifact_location.removeprefix("file://"))
        assert {path.name for path in adapter.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    kept = [*(store / "artifacts").rglob("*"), *(store / "sweeps" / "zoo" / "trials").rglob("*")]
    assert {path.suffix for path in kept if path.is_file()} <= {
        ".json",
        ".jsonl",
        ".yaml",
        ".csv",
        ".png",
        ".html",
        ".safetensors",
    }


def test_the_closing_comparison_scores_every_contestant_on_every_chip(store, tiny_models, tiny_task, tmp_path):
    """Oracle: `halora evaluate` of the same adapters on the same fresh rows and chips."""
    content = _content("matrix", tiny_models, tiny_task, steps=4, report_every=2, schedule={"redraw_steps": 1})
    chips = {
        "noisy": {"preset": "halora-2026", "noise": {"sigma": 0.05}},
        "stuck": {"preset": "ideal", "faults": {"stuck_high_rate": 0.05}},
    }
    content |= {
        "trials": 2,
        "concurrent": 2,
        "chips": chips,
        "space": {"chip": {"choices": list(chips)}},
        "first": [{"chip": name} for name in chips],
        "comparison": {"rows": 8, "chip_instances": 3, "by": "chip", "against": "noisy", "chips": [*chips, "ideal"]},
    }
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump(content))
    launched = halora(store, "sweep", "launch", path)
    assert launched.returncode == 0, launched.stderr
    assert "comparison on 3 fresh instances of each chip and 8 fresh rows" in launched.stderr
    assert "the 95 % interval of the gain over 'noisy'" in launched.stderr
    for name in ("untrained", *chips):
        assert re.search(rf"^{name} +[-\d]+ +[01]\.\d{{3}}", launched.stdout, re.MULTILINE)
    (parent,) = runs(store, "matrix", kind="sweep")
    text = _client(store).download_artifacts(parent.info.run_id, "comparison.json", str(tmp_path))
    comparison = json.loads(Path(text).read_text())
    cells = {(cell["contestant"], cell["chip"]): cell for cell in comparison["cells"]}
    assert set(cells) == {(name, chip) for name in ("untrained", *chips) for chip in (*chips, "ideal")}
    for (name, chip), cell in cells.items():
        assert (cell["margin_gain"] is None) == (name == "noisy")
        if name != "noisy":
            gain = cell["summary"]["margin"] - cells["noisy", chip]["summary"]["margin"]
            assert cell["margin_gain"]["mean"] == pytest.approx(gain)
            assert cell["margin_gain"]["low"] <= gain <= cell["margin_gain"]["high"]
    chip_file = tmp_path / "stuck.yaml"
    chip_file.write_text(yaml.safe_dump(load_chip(chips["stuck"]).model_dump(mode="json")))
    folder = store / "sweeps" / "matrix" / "trials" / f"{cells['noisy', 'stuck']['number']:05d}"
    asked = [
        "--chip",
        chip_file,
        "--instances",
        3,
        "--rows",
        8,
        "--first-row",
        8,
        "--first-chip",
        2,
        "--format",
        "json",
    ]
    evaluated = halora(store, "evaluate", folder, *asked)
    assert evaluated.returncode == 0, evaluated.stderr
    (again,) = json.loads(evaluated.stdout)
    summary = cells["noisy", "stuck"]["summary"]
    assert {name: again[name] for name in summary} == pytest.approx(summary, abs=1e-4)


@pytest.mark.slow
def test_a_comparison_over_seeds_goes_on_after_a_kill(store, tiny_models, tiny_task, tmp_path):
    """Killed while it trains the comparison's adapters; oracle: the same trainings by `halora train`, undisturbed."""
    content = _content("seeds", tiny_models, tiny_task, steps=16, report_every=2, schedule={"redraw_steps": 4})
    by_method = {"by": "training.method", "against": "lora", "seeds": 2, "equivalence_margin": {"margin": 50.0}}
    content |= {
        "trials": 2,
        "space": {"training.method": {"choices": ["lora", "halora"]}},
        "first": [{"training.method": "lora"}, {"training.method": "halora"}],
        "comparison": {"rows": 8, "chip_instances": 2, **by_method},
    }
    path = tmp_path / "seeds.yaml"
    path.write_text(yaml.safe_dump(content))
    with background(store, "sweep", "launch", path) as driver:
        driver.wait_for("comparison, lora with seed 8: trained")
        driver.wait_for("comparison, halora with seed 8: step 4/16")
        workers = driver.workers()
        driver.process.kill()
        driver.end()
    psutil.wait_procs(workers, timeout=120)
    resumed = halora(store, "sweep", "resume", "seeds")
    assert resumed.returncode == 0, resumed.stderr
    assert "training 3 of 4 adapters for the comparison" in resumed.stderr
    told = re.findall(r"comparison, (\w+) with seed (\d): step (\d+)/16", resumed.stderr)
    assert ("lora", "8") not in {(name, seed) for name, seed, _ in told}
    assert min(int(step) for name, seed, step in told if (name, seed) == ("halora", "8")) > 4  # from its checkpoint
    (parent,) = runs(store, "seeds", kind="sweep")
    assert parent.info.status == "FINISHED"
    text = _client(store).download_artifacts(parent.info.run_id, "comparison.json", str(tmp_path))
    comparison = json.loads(Path(text).read_text())
    origins = [(each["contestant"], each["seed"]) for each in comparison["adapters"]]
    assert origins == [("lora", 8), ("halora", 8), ("lora", 9), ("halora", 9)]
    assert comparison["program"]["version"]
    cells = {cell["contestant"]: cell for cell in comparison["cells"]}
    assert {name: cell["seeds"] for name, cell in cells.items()} == {"untrained": 0, "lora": 2, "halora": 2}
    assert "these 2 adapters of 'halora' are" in resumed.stderr
    by_hand = tmp_path / "by hand"
    fresh = ["--rows", 8, "--first-row", 8, "--first-chip", 2, "--instances", 2, "--format", "json"]
    margins = []
    for seed in (8, 9):
        own = ["--set", "training.method=halora", "--set", f"seed={seed}"]
        trained = halora(store, "train", path, "--output", by_hand / str(seed), "--no-scores", *own)
        assert trained.returncode == 0, trained.stderr
        (scored,) = json.loads(halora(store, "evaluate", by_hand / str(seed), *fresh).stdout)
        margins.append(scored["margin"])
    summary = cells["halora"]["summary"]
    assert summary["margin"] == pytest.approx(sum(margins) / 2, abs=1e-3)
    assert summary["margin_std_seeds"] == pytest.approx(abs(margins[0] - margins[1]) / 2**0.5, abs=1e-3)
    gain = cells["halora"]["margin_gain"]
    assert gain["mean"] == pytest.approx(summary["margin"] - cells["lora"]["summary"]["margin"])
    assert gain["p_equivalent"] < 1
    again = halora(store, "sweep", "resume", "seeds")  # nothing is left to train or to score
    assert "adapters for the comparison" not in again.stderr
    assert "evaluations" not in again.stderr
    assert "these 2 adapters of 'halora' are" in again.stderr


@pytest.mark.slow
def test_trials_of_two_workers_give_the_losses_of_one(store, tiny_models, tiny_task, tmp_path):
    """Two trials after each other in one placement group of two, beside the same sweep on one worker."""
    losses = {}
    for workers in (1, 2):
        name = f"workers-{workers}"
        content = _content(name, tiny_models, tiny_task, steps=4, report_every=2, workers=workers)
        content |= {"trials": 2, "space": {"lora.rank": {"choices": [2, 4]}}}
        content |= {"first": [{"lora.rank": 2}, {"lora.rank": 4}]}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        launched = halora(store, "sweep", "launch", path)
        assert launched.returncode == 0, launched.stderr
        losses[workers] = [loss_history(store, run) for run in runs(store, name)]
    for one, two in zip(losses[1], losses[2], strict=True):
        assert [step for step, _ in one] == [2, 4]
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)


def test_status_and_trial_tell_what_is_recorded(zoo, store):
    (row,) = json.loads(halora(store, "sweep", "status", "zoo", "--format", "json").stdout)
    assert row == {
        "sweep": "zoo",
        "state": "ended",
        "trials": TRIALS,
        "finished": TRIALS,
        "failed": 0,
        "stopped": 0,
        "skipped": 0,
        "unfinished": 0,
        "waiting": 0,
    }
    told = json.loads(halora(store, "trial", "show", "zoo/0", "--format", "json").stdout)
    values = {row["name"]: row["value"] for row in told}
    run = runs(store, "zoo")[0]
    assert values["state"] == "finished"
    assert {name: str(values[name]) for name in run.data.params} == run.data.params
    assert values["train_loss"] == pytest.approx(run.data.metrics["train_loss"], abs=1e-6)


def test_recompute_agrees_and_notices_other_weights(zoo, store, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    again = halora(store, "trial", "show", "zoo/0", "--recompute")
    assert again.returncode == 0, again.stderr
    assert "energy: agrees" in again.stderr
    assert "accuracy: agrees" in again.stderr

    run = runs(store, "zoo")[0]
    model = _client(store).get_logged_model(run.outputs.model_outputs[0].model_id)
    weights = Path(model.artifact_location.removeprefix("file://")) / "adapter_model.safetensors"
    original = weights.read_bytes()
    try:
        generator = torch.Generator().manual_seed(0)
        changed = {
            name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator) if "lora_B" in name else tensor
            for name, tensor in load_file(weights).items()
        }
        save_file(changed, weights)
        wrong = halora(store, "trial", "show", "zoo/0", "--recompute")
    finally:
        weights.write_bytes(original)
    assert wrong.returncode == 1
    assert "accuracy: DISAGREES" in wrong.stderr
    assert "energy: agrees" in wrong.stderr


def test_the_dashboard_serves_the_store(zoo, store):
    with background(store, "dashboard", "--port", "0") as page:
        page.wait_for("http://127.0.0.1:", 120)
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", page.said)
        for trial in (f"sweeps/zoo/trials/{number}" for number in range(TRIALS)):
            assert urllib.request.urlopen(url + trial, timeout=60).status == 200
        shown = urllib.request.urlopen(f"{url}sweeps/zoo", timeout=60).read().decode()
        assert f"{TRIALS} of {TRIALS}</b>trials finished" in shown
        taken = halora(store, "dashboard", "--port", url.rpartition(":")[2].strip("/"))
        assert (taken.returncode, "--port 0 takes a free one" in taken.stderr) == (2, True)
        family = page.family()
        os.kill(page.process.pid, signal.SIGTERM)
        assert page.process.wait(60) == 0
        assert not psutil.wait_procs(family, timeout=60)[1]
    assert [path.name for path in store.parent.iterdir()] == ["store"]


# One sweep twice: once undisturbed, once stopped, interrupted and killed. Its second trial fails by its own fault.


@pytest.fixture(scope="module")
def repeat_file(tiny_models, tiny_task, tmp_path_factory):
    """A function that writes the same sweep under another name."""
    content = _content("", tiny_models, tiny_task, steps=STEPS, report_every=3, schedule={"redraw_steps": 7})
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
    """The sweep again, asked to stop by another process while its first trial begins."""
    with background(store, "sweep", "launch", repeat_file("disturbed")) as driver:
        driver.wait_for("trial   0 running")
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
def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(undisturbed, store, repeat_file):
    with background(store, "sweep", "launch", repeat_file("bereaved")) as driver:
        driver.wait_for("training")
        (worker,) = driver.workers()
        worker.kill()
        assert driver.end() == undisturbed.returncode
    assert "trial 0 goes on from its checkpoint: its worker ended; see `halora trial logs bereaved/0`" in driver.said
    again, whole = runs(store, "bereaved"), runs(store, "undisturbed")
    assert [run.info.status for run in again] == [run.info.status for run in whole]
    for one, other in zip(again, whole, strict=True):
        steps, losses = ([pair[i] for pair in loss_history(store, one)] for i in (0, 1))
        assert steps == [step for step, _ in loss_history(store, other)]
        assert losses == pytest.approx([loss for _, loss in loss_history(store, other)], abs=1e-4)
    logs = halora(store, "trial", "logs", "bereaved/0")
    assert logs.returncode == 0
    assert "error.txt" in logs.stdout


def _with_rungs(name, models, task):
    content = _content(name, models, task, steps=6, report_every=1, schedule={"redraw_steps": 2})
    return content | {
        "trials": 6,
        "concurrent": 2,
        "space": {
            "lora.rank": {"choices": [2, 4, 8]},
            "training.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
            "chip.adc.bits": {"low": 5, "high": 9, "kind": "int"},
        },
        "search": {"sampler": "random"},
        "early_stopping": {"rungs": [{"steps": 2, "rows": 4, "chip_instances": 1}], "keep": 0.5},
        "racing": {"extra": 4, "most": 4},
    }


def test_early_stopping_pauses_promotes_and_races(store, tiny_models, tiny_task, tmp_path):
    """Oracle: a promoted trial trained in one go in this process, and scored on the same chips."""
    from halora.trainable import Workbench
    from halora.trial import TrialConfig, adapter_folder

    path = tmp_path / "rungs.yaml"
    path.write_text(yaml.safe_dump(_with_rungs("rungs", tiny_models, tiny_task)))
    launched = halora(store, "sweep", "launch", path)
    assert launched.returncode == 0, launched.stderr
    assert "24 of 36 optimiser steps taken; early stopping saved 33%" in launched.stderr
    (row,) = json.loads(halora(store, "sweep", "status", "rungs", "--format", "json").stdout)
    assert (row["finished"], row["stopped"], row["failed"], row["unfinished"]) == (3, 3, 0, 0)
    trials = runs(store, "rungs")
    assert {run.info.status for run in trials} == {"FINISHED"}
    finished = [run for run in trials if run.data.tags["halora.state"] == "finished"]
    for run in trials:
        last = 6 if run in finished else 2
        assert [step for step, _ in loss_history(store, run)] == list(range(1, last + 1))
        assert ("accuracy" in run.data.metrics) == ("front_probability" in run.data.metrics) == (run in finished)
    promoted = finished[-1]
    folder = store / "sweeps" / "rungs" / "trials" / f"{int(promoted.data.tags['halora.trial']):05d}"
    config = TrialConfig.model_validate_json((folder / "trial.json").read_text())
    workbench = Workbench()
    training = workbench.train(config, tmp_path / "by hand")
    losses = []
    while not training.done:
        losses.append(training.advance()["train_loss"])
    training.close()
    assert [loss for _, loss in loss_history(store, promoted)] == pytest.approx(losses, abs=1e-4)
    result = json.loads((folder / "result.json").read_text())
    chips = {"evaluation": config.evaluation.model_copy(update={"chip_instances": len(result["chip_seeds"])})}
    scores = workbench.evaluate(config.model_copy(update=chips), adapter_folder(tmp_path / "by hand"))
    assert result["chip_seeds"] == list(scores.chip_seeds)
    for margins, again in zip(result["noisy"], scores.noisy, strict=True):
        assert margins == pytest.approx(again, abs=1e-3)


def _kill_and_resume(store, name, file, kills, chance):
    """Launch, kill at random moments what `kills` names, and resume after a driver's end; lines of all drivers.

    A trial that lost its worker reports before the next worker is killed, as three losses in a row would fail it.
    """
    arguments, left, said = ["launch", file], list(kills), []
    while left:
        with background(store, "sweep", *arguments) as driver:
            driver.wait_for("the sweep runs")
            while left:
                if chance.random() < 0.5:  # else perhaps while it starts
                    driver.wait_for("training", after=len(driver.lines))
                time.sleep(chance.uniform(0, 8))
                if left.pop(0) == "driver":
                    driver.process.kill()
                    driver.end()
                    break
                while not driver.workers() or _mourning("".join([*said, *driver.lines])):
                    assert driver.process.poll() is None, driver.said
                    time.sleep(0.1)
                heard = len(driver.lines)
                chance.choice(driver.workers()).kill()
                driver.wait_for("goes on from its checkpoint", after=heard)
            said += driver.lines
        arguments = ["resume", name]
    last = halora(store, "sweep", "resume", name)
    assert last.returncode == 0, last.stderr
    return said


def _mourning(said):
    """Whether the trial that lost the last worker has not reported since."""
    lost = re.findall(r"trial (\d+) goes on from its checkpoint", said)
    since = said.rpartition("goes on from its checkpoint")[2]
    return bool(lost) and not re.search(rf"trial +{lost[-1]} (training|finished)", since)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps", "every"), [("llama", 200, 10), ("smollm2-135m-instruct", 40, 4)])
def test_twenty_kills_of_drivers_and_workers_lose_and_repeat_nothing(
    store, model, steps, every, tiny_models, tiny_task, tmp_path
):
    """Oracle: the same sweep without kills; MLflow's tables beside the journal; Optuna's own storage."""
    names, chance = [f"{model}-{kind}" for kind in ("never-killed", "killed")], random.Random(20)
    for name in names:
        content = _with_rungs(name, {"llama": tiny_models.get(model, model)}, tiny_task)
        del content["early_stopping"], content["racing"]
        content["trials"] = 12
        content["trial"]["training"] |= {"steps": steps, "report_every": every}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    quiet = halora(store, "sweep", "launch", tmp_path / f"{names[0]}.yaml")
    assert quiet.returncode == 0, quiet.stderr
    kills = ["driver", "worker"] * 10
    chance.shuffle(kills)
    said = _kill_and_resume(store, names[1], tmp_path / f"{names[1]}.yaml", kills, chance)
    assert sum("goes on from its checkpoint: its worker ended" in line for line in said) == 10

    whole, killed = (runs(store, name) for name in names)
    assert [run.data.tags["halora.trial"] for run in killed] == [str(number) for number in range(12)]
    assert [run.data.params for run in killed] == [run.data.params for run in whole]
    assert {run.info.status for run in [*killed, *runs(store, names[1], kind="sweep")]} == {"FINISHED"}
    for one, other in zip(killed, whole, strict=True):
        told, losses = ([pair[i] for pair in loss_history(store, one)] for i in (0, 1))
        assert told == list(range(every, steps + 1, every))
        assert losses == pytest.approx([loss for _, loss in loss_history(store, other)], abs=1e-4)
        assert one.data.metrics["margin"] == pytest.approx(other.data.metrics["margin"], abs=1e-3)
    folder = store / "sweeps" / names[1]
    assert differences(f"sqlite:///{store / 'mlflow.db'}", names[1], folder / "records.jsonl") == []
    journal = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    study = optuna.load_study(study_name=names[1], storage=optuna.storages.JournalStorage(journal))
    assert [(trial.number, trial.state.name) for trial in study.trials] == [(i, "COMPLETE") for i in range(12)]


def test_a_sweep_with_a_storage_goes_on_where_no_file_of_it_is(
    store, s3, tiny_models, tiny_task, tmp_path, monkeypatch
):
    """Oracle: every step recorded once, of trials whose driver and workers were killed, and whose scratch is gone."""
    content = _content("afar", tiny_models, tiny_task, steps=24, report_every=4, schedule={"redraw_steps": 7})
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
    with background(store, "sweep", "launch", path, "--storage", "s3://bucket/sweeps/") as driver:
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
    assert differences(f"sqlite:///{store / 'mlflow.db'}", "afar", store / "sweeps" / "afar" / "records.jsonl") == []
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
    assert {re.fullmatch(r"bucket/sweeps/afar-[0-9a-f]{8}/(\d{5})/.*", name)[1] for name in objects} == {
        f"{number:05d}" for number in members
    }
    assert not [name for name in objects if "optimizer" in name]


# What a user can get wrong, and what needs no sweep.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "trial.training.lerning_rate=0.1"], "unknown key; did you mean 'learning_rate'"),
        (["--set", "trial.lora.rank=0"], "trial.lora.rank: input should be greater than or equal to 1, got 0"),
        (["--set", "trial.model=smollm2", "--set", "space={}", "--set", "first=[]"], "no model 'smollm2'"),
        (["--set", "trial.task=arc-medium"], "no task 'arc-medium'"),
        (["--set", "trial.training.steps=many"], "trial.training.steps: input should be a valid integer"),
        (["--set", "trial.training.steps"], "write PATH=VALUE"),
        (["--set", "trial={"], "is not YAML"),
        (["--seed", "-1"], "seed: input should be greater than or equal to 0, got -1"),
        (["--set", "comparison.rows=100"], "comparison.rows: 100, but"),
    ],
)
def test_bad_input_is_refused_with_a_message_and_nothing_is_written(args, message, zoo_file, tmp_path):
    place = tmp_path / "store"
    refused = halora(place, "sweep", "launch", zoo_file, *args)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("error: ") == 1
    assert "Traceback" not in refused.stderr
    assert not refused.stdout
    assert not list(place.rglob("*"))


def test_a_store_that_cannot_be_written_is_refused(zoo_file, tmp_path):
    (tmp_path / "file").touch()
    refused = halora(tmp_path / "file" / "store", "sweep", "launch", zoo_file, cwd=tmp_path)
    assert refused.returncode == 2
    assert "cannot be written: Not a directory" in refused.stderr
    assert "next: name another with --store" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_database_that_cannot_be_opened_is_told_apart(zoo_file, tmp_path):
    place = tmp_path / "store"
    place.mkdir()
    (place / "mlflow.db").write_text("no database")
    refused = halora(place, "sweep", "launch", zoo_file)
    assert refused.returncode == 3
    assert "cannot be opened" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in place.iterdir()] == ["mlflow.db"]


def test_a_name_that_is_taken_is_refused_with_the_ways_to_go_on(zoo, zoo_file, store):
    before = len(runs(store, "zoo"))
    refused = halora(store, "sweep", "launch", zoo_file)
    assert refused.returncode == 2
    assert "sweep 'zoo' was launched before" in refused.stderr
    assert "halora sweep resume zoo" in refused.stderr
    assert "--name" in refused.stderr
    assert len(runs(store, "zoo")) == before


@pytest.mark.parametrize("args", [["sweep", "resume"], ["sweep", "stop"], ["sweep", "status"], ["front", "show"]])
def test_a_sweep_that_is_not_there_is_named(args, zoo, store):
    refused = halora(store, *args, "zo")
    assert refused.returncode == 2
    assert "no sweep 'zo'" in refused.stderr
    assert "did you mean 'zoo'" in refused.stderr


def test_looking_into_an_empty_store_makes_nothing(tmp_path):
    place = tmp_path / "store"
    refused = halora(place, "trial", "show", "zoo/0")
    assert refused.returncode == 2
    assert "no sweep 'zoo'" in refused.stderr
    assert "quickstart" in halora(place, "sweep", "status").stderr
    assert not place.exists()


@pytest.mark.parametrize("args", [[], ["sweep"], ["front"], ["trial"], ["doctor"], ["dashboard"], ["sweep", "launch"]])
def test_help_is_there_for_every_command(args, tmp_path):
    shown = halora(tmp_path / "store", *args, "--help")
    assert shown.returncode == 0
    assert shown.stdout.lstrip().startswith("Usage: halora")


def test_help_and_validation_load_nothing_heavy(zoo_file):
    code = (
        "import sys, halora.cli.main\n"
        "from halora.spaces.sweep import load_sweep\n"
        "import halora.sweep.state\n"
        f"load_sweep({str(zoo_file)!r})\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'peft', 'deepspeed', 'datasets', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_doctor_names_every_check(zoo, store):
    told = halora(store, "doctor", "--format", "json")
    findings = json.loads(told.stdout)
    assert [row["check"] for row in findings] == [
        "Python",
        "packages",
        "C++ compiler",
        "DeepSpeed op",
        "demo data",
        "Ray",
        "MLflow store",
        "free memory",
        "disk",
        "/dev/shm",
    ]
    by_name = {row["check"]: row for row in findings}
    for needed in ("Python", "packages", "demo data", "Ray", "MLflow store"):
        assert by_name[needed]["ok"] == "yes", by_name[needed]
    assert told.returncode == (0 if all(row["ok"] == "yes" for row in findings) else 1)
    assert all(row["do"] for row in findings if row["ok"] == "NO")
