"""Sweeps on a Ray cluster of several nodes, by the real command, with what happens to clusters.

Oracles: the store's own journal, MLflow's tables beside it, Optuna's study; exit codes; the kernel, for what is left.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from raylets import ROOT, SOURCE_ROOTS, Cluster, raylets
from records_audit import differences
from services import free_port

HALORA = Path(sys.executable).parent / "halora"
TRIALS = 4
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head without trials and two nodes of one CPU; its store is on a folder that all see."""
    settings = {
        "HALORA_STORE": str(tmp_path_factory.mktemp("cluster") / "store"),
        "PATH": f"{HALORA.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with raylets(1, 1, settings=settings) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def store(cluster) -> Path:
    return Path(cluster.environment()["HALORA_STORE"])


@pytest.fixture
def sweep_file(tiny_models, tiny_task, tmp_path) -> Callable[..., Path]:
    """A function that writes a sweep of tiny trials; its keyword arguments are settings of the training."""

    def write(name: str, sweep: dict[str, Any] | None = None, **training: Any) -> Path:
        settings = {"method": "halora", "mu": 0.01, "batch_size": 4, "steps": 60, "report_every": 3, **training}
        content = {
            "name": name,
            "family": "cluster",
            "seed": 3,
            "trials": TRIALS,
            "concurrent": 2,
            "resources": {"heartbeat_s": 12},
            "trial": {
                "model": tiny_models["llama"],
                "task": tiny_task,
                "chip": "halora-2026",
                "training": settings,
                "evaluation": {"chip_instances": 2, "rows": 8, "calibration_tokens": 64, "context_tokens": 64},
            },
            "space": {"training.learning_rate": {"low": 0.01, "high": 0.1, "log": True}},
            "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
            **(sweep or {}),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def halora(cluster: Cluster, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the head's machine."""
    return subprocess.run(
        [HALORA, *map(str, arguments)],
        env=cluster.environment() | environment,
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def log(store: Path, sweep: str) -> list[dict[str, Any]]:
    """Lines of the sweep's log so far."""
    path = store / "sweeps" / sweep / "driver.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(store: Path, sweep: str, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> dict[str, Any]:
    """The first line of the log, after some, that is wanted."""
    end = time.monotonic() + PATIENCE_S
    while True:
        lines = log(store, sweep)
        for line in lines[after:]:
            if wanted(line):
                return line
        assert time.monotonic() < end, lines[-5:]
        time.sleep(0.2)


def training(line: dict[str, Any]) -> bool:
    return bool(line.get("state") == "training")


def assert_whole(store: Path, sweep: str, trials: int = TRIALS, steps: int = 60, every: int = 3) -> None:
    """Every trial is finished exactly once, its reports without gap, and MLflow has all the journal has."""
    folder = store / "sweeps" / sweep
    entries = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[1:]]
    for number in range(trials):
        own = [entry for entry in entries if entry["trial"] == number]
        assert [e["step"] for e in own if e["kind"] == "report"] == list(range(every, steps + 1, every)), number
        assert sum(entry["kind"] == "scores" for entry in own) == 1
        assert [entry["state"] for entry in own if entry["kind"] == "state"][-1] == "finished"
    assert {entry["trial"] for entry in entries} == {*range(trials), None}
    assert differences(f"sqlite:///{store / 'mlflow.db'}", sweep, folder / "records.jsonl") == []


def test_a_sweep_is_launched_looked_at_stopped_and_resumed_from_elsewhere(cluster, store, sweep_file):
    jobs, client = cluster.jobs_address, cluster.client_address
    launched = halora(
        cluster,
        "sweep",
        "launch",
        sweep_file("afar", steps=400, report_every=20),
        "--address",
        jobs,
        HALORA_STORE="/nowhere",
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "the sweep runs" in launched.stdout
    assert "halora sweep stop afar --address http://" in launched.stderr
    wait_for(store, "afar", training)

    status = halora(cluster, "sweep", "status", "afar", "--format", "json", "--address", jobs, HALORA_STORE="/nowhere")
    (row,) = json.loads(status.stdout)
    assert (row["sweep"], row["state"], row["trials"]) == ("afar", "running", TRIALS)
    second = halora(cluster, "sweep", "resume", "afar", "--address", cluster.address, "--follow")
    assert second.returncode == 2
    assert "is running in another process" in second.stderr

    assert halora(cluster, "sweep", "stop", "afar", "--address", client).returncode == 0
    end = time.monotonic() + PATIENCE_S
    while json.loads(halora(cluster, "sweep", "status", "afar", "--format", "json").stdout)[0]["state"] == "running":
        assert time.monotonic() < end
    resumed = halora(cluster, "sweep", "resume", "afar", "--follow", "--address", jobs, HALORA_STORE="/nowhere")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_whole(store, "afar", steps=400, every=20)

    logs = halora(cluster, "sweep", "logs", "afar", "--trial", "0", "--format", "json", "--address", jobs)
    nodes = {line["node"] for line in log(store, "afar") if "node" in line}
    assert nodes <= {node.address for node in cluster.nodes.values() if node.name != "head"}
    assert {json.loads(line)["trial"] for line in logs.stdout.splitlines()} == {0}


def test_what_would_fail_is_told_before_any_trial(cluster, store, sweep_file):
    file, wrong = sweep_file("refused"), {"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_TOKEN_PATH": ""}
    nobody = f"127.0.0.1:{free_port()}"
    for address, environment, message in (
        (nobody, {}, f"no Ray cluster answers at {nobody}"),
        (f"http://{nobody}", {}, "no Ray cluster answers"),
        (f"ray://{nobody}", {}, "no Ray cluster answers"),
        (cluster.jobs_address, wrong, "refuses the token"),
        (cluster.address, wrong, "RAY_AUTH_TOKEN"),
    ):
        told = halora(cluster, "sweep", "launch", file, "--follow", "--address", address, **environment)
        assert told.returncode == 3, told.stderr
        assert message in told.stderr
        assert "next: " in told.stderr
    assert not (store / "sweeps" / "refused").exists()


def test_a_node_of_another_version_is_told_before_any_trial(cluster, store, sweep_file, tmp_path):
    for root in SOURCE_ROOTS:
        shutil.copytree(ROOT / root / "halora", tmp_path / root / "halora")
    (tmp_path / "trainables" / "halora" / "errors.py").open("a").write("\n# another version\n")
    path = os.pathsep.join(str(tmp_path / root) for root in SOURCE_ROOTS)
    cluster._settings["PYTHONPATH"] = path
    try:
        node = cluster.start_node(1)
    finally:
        del cluster._settings["PYTHONPATH"]
    try:
        cluster.wait_for(node.name)
        told = halora(cluster, "sweep", "launch", sweep_file("older"), "--follow", "--address", cluster.address)
        assert told.returncode == 3
        (line,) = [line for line in told.stderr.splitlines() if "error: " in line]
        assert f"node {node.address}: halora " in line
        assert not (store / "sweeps" / "older").exists()
    finally:
        node.kill()
        cluster.wait_dead(node.name)


def test_trials_of_a_node_that_dies_go_on_elsewhere(cluster, store, sweep_file):
    driver = _launched(cluster, sweep_file("nodes"))
    line = wait_for(store, "nodes", training)
    victim = next(node for node in cluster.nodes.values() if node.address == line["node"])
    victim.kill()
    cluster.start_node(1)
    said = wait_for(store, "nodes", lambda line: "goes on from its checkpoint" in line["message"])
    assert "its node is gone" in said["message"] or "its worker ended" in said["message"]
    assert driver.wait(PATIENCE_S) == 0
    assert_whole(store, "nodes")


def test_a_frozen_worker_is_found_and_its_trial_goes_on(cluster, store, sweep_file):
    port = free_port()
    driver = _launched(cluster, sweep_file("frozen"), "--metrics-port", port)
    line = wait_for(store, "frozen", training)
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'halora_trials{state="running",sweep="frozen"}' in metrics
    (node,) = [node for node in cluster.nodes.values() if node.address == line["node"]]
    (worker,) = [process for process in node.workers() if "HaloraTrainable" in " ".join(process.cmdline())]
    worker.suspend()
    said = wait_for(store, "frozen", lambda line: "goes on from its checkpoint" in line["message"])
    assert "its worker was frozen: it said nothing for 12 s" in said["message"]
    assert driver.wait(PATIENCE_S) == 0
    assert_whole(store, "frozen")
    assert not worker.is_running()


def _launched(cluster: Cluster, file: Path, *arguments: Any) -> subprocess.Popen[bytes]:
    """A driver on the head's machine, its output in the cluster's folder."""
    command = [HALORA, "sweep", "launch", file, "--follow", "--address", cluster.address, *arguments]
    with (cluster.folder / f"{file.stem}.log").open("wb") as out:
        return subprocess.Popen(
            list(map(str, command)), env=cluster.environment(), cwd=cluster.folder, stdout=out, stderr=out
        )
