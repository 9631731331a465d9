"""Two stores with a sweep of the same name on one MLflow server and one database of studies.

Oracle: MLflow's own tables beside each store's event log; whatever the one launch does, all of the other is as it was.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psycopg
import pytest
import yaml
from mlflow import MlflowClient
from records_audit import differences, logged_events
from services import mlflow_server, postgres_server

HALORA = Path(sys.executable).parent / "halora"
STORES = ("one", "two")
TRIALS = 2


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """(MLflow's database, MLflow's address, database of studies)."""
    with postgres_server() as server:
        with psycopg.connect(server.uri, autocommit=True) as connection:
            connection.execute("create database studies")
        with mlflow_server(server.uri, tmp_path_factory.mktemp("mlflow")) as mlflow:
            yield server.uri, mlflow.uri, server.uri.removesuffix("/t") + "/studies"


@pytest.fixture(scope="module")
def start(services, tmp_path_factory):
    """Begin a command on a store."""
    root = tmp_path_factory.mktemp("stores")
    (root / "elsewhere").mkdir()
    own = {"HALORA_TRACKING_URI": services[1], "HALORA_STUDY_URL": services[2], "RAY_AUTH_MODE": "disabled"}

    def run(store, *arguments):
        return subprocess.Popen(
            [HALORA, *map(str, arguments)],
            env=os.environ | own | {"HALORA_STORE": str(root / store), "COLUMNS": "200"},
            cwd=root / "elsewhere",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    run.root = root
    return run


@pytest.fixture(scope="module")
def halora(start):
    """A command on a store, to its end: (exit code, stdout, stderr)."""

    def run(store, *arguments):
        process = start(store, *arguments)
        out, err = process.communicate(timeout=1500)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory, tiny_models, tiny_task):
    folder = tmp_path_factory.mktemp("files")
    (folder / "chip.yaml").write_text("preset: halora-2026\nname: lab\nnoise: {sigma: 0.005}\n")
    content = {
        "name": "same",
        "family": "shared",
        "trials": TRIALS,
        "trial": {
            "model": tiny_models["llama"],
            "task": tiny_task,
            "chip": str(folder / "chip.yaml"),
            "training": {"method": "lora", "steps": 40, "batch_size": 4, "report_every": 2, "learning_rate": 0.01},
            "evaluation": {"chip_instances": 2, "rows": 8, "calibration_tokens": 16},
        },
        "space": {"lora.rank": {"choices": [2, 4]}},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 5.0},
        "gates": {"min_accuracy": 0.01, "min_yield": 0.5, "confidence": 0.9, "test_rows": 12, "robustness_chips": 0},
    }
    (folder / "same.yaml").write_text(yaml.safe_dump(content))
    return folder / "same.yaml"


def _launch_of(root, store):
    return yaml.safe_load((root / store / "sweeps/same/sweep.yaml").read_text())["launch"]


def _everything(client, launch):
    """All that MLflow has of a launch, deleted runs too."""
    (experiment,) = client.search_experiments(filter_string="name = 'shared'")
    runs = client.search_runs([experiment.experiment_id], f"tags.`halora.launch` = '{launch}'", run_view_type=3)
    found = {run.info.run_id: _plain(run.to_dictionary()) for run in runs}
    for version in client.search_model_versions(f"tags.`halora.launch` = '{launch}'"):
        found[f"{version.name}/{version.version}"] = (version.run_id, version.source)
    return found


def _plain(content):
    """The same for the same content, in whatever order a database gives it."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return (
        sorted(json.dumps(_plain(each), sort_keys=True) for each in content) if isinstance(content, list) else content
    )


@pytest.mark.slow
def test_two_stores_that_share_their_servers_never_meet(services, start, halora, sweep_file):
    """Launched, killed, resumed, reconciled and certified in turn; the chip's file is gone after the launches."""
    database, address, studies = services
    client, root = MlflowClient(address), start.root
    logs = {store: root / store / "sweeps/same/events.jsonl" for store in STORES}

    driver = start("one", "sweep", "launch", sweep_file)
    while driver.poll() is None:
        if logs["one"].exists() and any(e["kind"] == "reported" for e in logged_events(logs["one"])):
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
        time.sleep(0.05)
    assert driver.returncode == -signal.SIGKILL, driver.communicate()
    code, _, err = halora("two", "sweep", "launch", sweep_file, "--seed", 7)
    assert code == 0, err
    launches = {store: _launch_of(root, store) for store in STORES}
    assert all(re.fullmatch("[0-9a-f]{32}", launch) for launch in launches.values())
    assert len(set(launches.values())) == 2
    code, out, err = halora("one", "sweep", "launch", sweep_file)
    assert (code, "resume it with `halora sweep resume same`, or launch under another name" in err) == (2, True)

    sweep_file.with_name("chip.yaml").unlink()
    known = _everything(client, launches["two"])
    code, _, err = halora("one", "sweep", "resume", "same")
    assert code == 0, err
    assert _everything(client, launches["two"]) == known
    names = optuna.get_all_study_names(studies)
    assert sorted(names) == sorted(f"same-{launch}" for launch in launches.values())
    for store in STORES:
        code, out, _ = halora(store, "sweep", "status", "--format", "json")
        (row,) = json.loads(out)
        assert (code, row["sweep"], row["state"], row["finished"]) == (0, "same", "ended", TRIALS)
        assert differences(database, "same", logs[store]) == []

    # runs of the one are doubled, deleted and changed in MLflow
    runs = {
        int(run.data.tags["halora.trial"]): run
        for run in client.search_runs(
            [client.get_experiment_by_name("shared").experiment_id],
            f"tags.`halora.launch` = '{launches['one']}' and tags.`halora.kind` = 'trial'",
        )
    }
    double = client.create_run(runs[0].info.experiment_id, tags=runs[0].data.tags)
    client.delete_run(runs[1].info.run_id)
    code, _, err = halora("two", "doctor", "--reconcile")
    assert (code, "the records say of every trial what its study says" in err) == (0, True), err
    assert client.get_run(double.info.run_id).info.lifecycle_stage == "active"  # it is not of this launch
    known = _everything(client, launches["two"])  # its own doctor has closed its own records again
    code, out, err = halora("one", "doctor", "--reconcile", "--format", "json")
    assert code == 0, err
    assert {row["trial"]: row["fixed"] for row in json.loads(out)} == {
        0: "a second run is deleted",
        1: "delivered again",
    }
    assert _everything(client, launches["two"]) == known
    for store in STORES:
        assert differences(database, "same", logs[store]) == []

    for store in STORES:
        code, out, err = halora(store, "adapter", "select", "same", "--format", "json")
        assert code == 0, err
        (certified,) = json.loads(out)
        assert certified["certificate"]["launch"] == launches[store]
        assert certified["certificate"]["chip"] == "lab"
    versions = {version.version: version for version in client.search_model_versions()}
    assert {version.tags["halora.launch"] for version in versions.values()} == set(launches.values())
    assert len({version.name for version in versions.values()}) == 1  # the same base, task and chip
    for version in versions.values():
        run = client.get_run(version.run_id)
        assert run.data.tags["halora.launch"] == version.tags["halora.launch"]
