"""Oracles: the command's exit codes; MLflow's database read on its own.

Every launch is a process of its own with a real Ray; launched sweeps are shared by the tests that look at them.
"""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from commands import background, client_of, content_of, halora, loss_history, runs

TRIALS = 5
ZOO = ("llama", "phi3", "gemma3_text")  # one linear layer each for queries, keys and values; one for all; windows


@pytest.fixture(scope="module")
def zoo_file(tiny_models, tiny_task, tmp_path_factory):
    """A sweep over models of three families, two trials at a time, with a closing comparison."""
    content = content_of("zoo", tiny_models, tiny_task, steps=6, report_every=2, schedule={"redraw_steps": 2})
    content |= {
        "trials": TRIALS,
        "concurrent": 2,
        "space": {
            "model": {"choices": [tiny_models[name] for name in ZOO]},
            "lora.rank": {"choices": [2, 4]},
            "chip.adc.bits": {"low": 5, "high": 9, "kind": "int"},
        },
        "first": [{"model": folder, "lora.rank": 4} for folder in (tiny_models[name] for name in ZOO)],
        "comparison": {"rows": 8, "chip_instances": 2},
    }
    path = tmp_path_factory.mktemp("sweeps") / "zoo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def zoo(store, zoo_file):
    """The process that launched that sweep."""
    return halora(store, "sweep", "launch", zoo_file)


# One sweep over three families, launched once.


def test_a_sweep_over_families_ends_in_a_front(zoo, store, tiny_models):
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
    assert {row["params"]["model"] for row in rows} == {tiny_models[name] for name in ZOO}
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
    assert {run.data.params["model"] for run in trials} == {tiny_models[name] for name in ZOO}
    client = client_of(store)
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "sweep.yaml",
        "front.json",
        "front.csv",
        "front.png",
        "summary.md",
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
        assert len(components) == 13
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
        ".md",
        ".safetensors",
    }


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
        "discarded": 0,
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
    model = client_of(store).get_logged_model(run.outputs.model_outputs[0].model_id)
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
        "import halora.sweep.run.state\n"
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
