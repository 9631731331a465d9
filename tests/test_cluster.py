"""Sweeps on a Ray cluster of several nodes, by the real command, with what happens to clusters.

Oracles: the store's own event log, MLflow's tables beside it, Optuna's study; exit codes; the kernel, for what is left.
"""

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import (
    PATIENCE_S,
    TRIALS,
    assert_whole,
    assert_without_gap,
    driver_log,
    halora,
    launched,
    node_of,
    settings,
    trains,
    wait_for,
    worker_of,
    write_sweep,
)
from raylets import ROOT, SOURCE_ROOTS, Cluster, raylets
from services import free_port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head without trials and two nodes of one CPU; its store is on a folder that all see."""
    with raylets(1, 1, settings=settings(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def store(cluster) -> Path:
    return Path(cluster.environment()["HALORA_STORE"])


@pytest.fixture
def sweep_file(tiny_models, tiny_task, tmp_path):
    """A function that writes a sweep of tiny trials, see `write_sweep`."""
    return lambda name, **more: write_sweep(tmp_path / f"{name}.yaml", tiny_models["llama"], tiny_task, **more)


def test_a_sweep_is_launched_looked_at_stopped_and_resumed_from_elsewhere(cluster, store, sweep_file):
    jobs, client, every = cluster.jobs_address, cluster.client_address, 40
    launched = halora(
        cluster,
        "sweep",
        "launch",
        sweep_file("afar", steps=1_000_000, report_every=every),  # it runs until it is stopped
        "--address",
        jobs,
        HALORA_STORE="/nowhere",
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "the sweep runs" in launched.stdout
    assert "halora sweep stop afar --address http://" in launched.stderr
    wait_for(store, "afar", trains)

    status = halora(cluster, "sweep", "status", "afar", "--format", "json", "--address", jobs, HALORA_STORE="/nowhere")
    (row,) = json.loads(status.stdout)
    assert (row["sweep"], row["state"], row["trials"]) == ("afar", "running", TRIALS)
    second = halora(cluster, "sweep", "resume", "afar", "--address", cluster.address, "--follow")
    assert second.returncode == 2
    assert "is running in another process" in second.stderr

    stop_and_wait(cluster, "afar", client)
    stopped = len(driver_log(store, "afar"))
    resumed = halora(cluster, "sweep", "resume", "afar", "--address", jobs, HALORA_STORE="/nowhere")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    wait_for(store, "afar", trains, after=stopped)
    stop_and_wait(cluster, "afar", jobs)
    assert_without_gap(store, "afar", every)

    logs = halora(cluster, "sweep", "logs", "afar", "--trial", "0", "--format", "json", "--address", jobs)
    nodes = {line["node"] for line in driver_log(store, "afar") if "node" in line}
    assert nodes <= {node.address for node in cluster.nodes.values() if node.name != "head"}
    assert {json.loads(line)["trial"] for line in logs.stdout.splitlines()} == {0}


def test_a_sweep_launched_from_elsewhere_is_brought_to_its_end(cluster, store, sweep_file):
    launched = halora(cluster, "sweep", "launch", sweep_file("whole"), "--follow", "--address", cluster.jobs_address)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert_whole(store, "whole")


def stop_and_wait(cluster: Cluster, sweep: str, address: str) -> None:
    """Stop a sweep by the command, from that address, and wait until its driver has ended."""
    told = halora(cluster, "sweep", "stop", sweep, "--address", address)
    assert told.returncode == 0, told.stderr
    end = time.monotonic() + PATIENCE_S
    while json.loads(halora(cluster, "sweep", "status", sweep, "--format", "json").stdout)[0]["state"] == "running":
        assert time.monotonic() < end


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_trials_of_a_node_that_dies_go_on_elsewhere(cluster, store, sweep_file):
    driver = launched(cluster, "launch", sweep_file("nodes"))
    line = wait_for(store, "nodes", trains)
    node_of(cluster, line).kill()
    cluster.start_node(1)
    said = wait_for(store, "nodes", lambda line: "resumes from its checkpoint" in line["message"])
    assert "its node is gone" in said["message"] or "its worker ended" in said["message"]
    assert driver.wait(PATIENCE_S) == 0
    assert_whole(store, "nodes")


@pytest.mark.slow
def test_a_frozen_worker_is_found_and_its_trial_goes_on(cluster, store, sweep_file):
    port = free_port()
    driver = launched(cluster, "launch", sweep_file("frozen"), "--metrics-port", port)
    line = wait_for(store, "frozen", trains)
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'halora_trials{state="running",sweep="frozen"}' in metrics
    worker = worker_of(node_of(cluster, line))
    worker.suspend()
    said = wait_for(store, "frozen", lambda line: "resumes from its checkpoint" in line["message"])
    assert "its worker hung: it said nothing for 12 s" in said["message"]
    assert driver.wait(PATIENCE_S) == 0
    assert_whole(store, "frozen")
    assert not worker.is_running()


@pytest.mark.slow
def test_a_trial_of_two_workers_spans_two_nodes_and_survives_the_loss_of_one(cluster, store, sweep_file):
    alone = launched(cluster, "launch", sweep_file("alone", sweep={"trials": 1, "concurrent": 1}))
    assert alone.wait(PATIENCE_S) == 0
    together = {"trials": 1, "concurrent": 1}
    driver = launched(cluster, "launch", sweep_file("pair", sweep=together, workers=2, worker_timeout_s=60))
    line = wait_for(store, "pair", trains)
    other = next(
        node
        for node in cluster.nodes.values()
        if node.name != "head" and node.address != line["node"] and node.starter.poll() is None
    )
    assert any("Peer" in " ".join(process.cmdline()) for process in other.workers())
    other.kill()
    cluster.start_node(1)
    said = wait_for(store, "pair", lambda line: "resumes from its checkpoint" in line["message"])
    assert "worker 1 of 2 ended" in said["message"] or "its worker ended" in said["message"]
    assert driver.wait(PATIENCE_S) == 0
    assert_whole(store, "pair", trials=1)
    losses = [
        [line["message"] for line in driver_log(store, name) if trains(line) and line["message"].startswith("step 60/")]
        for name in ("alone", "pair")
    ]
    assert losses[0] == losses[1]
