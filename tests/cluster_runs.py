"""Sweeps on a cluster, for tests: their files, their drivers, and what they leave in the store."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from raylets import Cluster, Node
from records_audit import STATES, differences

HALORA = Path(sys.executable).parent / "halora"
TRIALS = 4
PATIENCE_S = 400.0


def settings(folder: Path) -> dict[str, str]:
    """Further environment of a cluster's nodes: the store, and the command on the path of the head's jobs."""
    return {"HALORA_STORE": str(folder / "store"), "PATH": f"{HALORA.parent}{os.pathsep}{os.environ['PATH']}"}


def write_sweep(path: Path, model: str, task: str, sweep: dict[str, Any] | None = None, **training: Any) -> Path:
    """Write a sweep of tiny trials, named as its file.

    Args:
        path: Of the file.
        model: Folder of a tiny model.
        task: Folder of a tiny task.
        sweep: Further keys of the sweep.
        training: Settings of the training.
    """
    content = {
        "name": path.stem,
        "family": "cluster",
        "seed": 3,
        "trials": TRIALS,
        "concurrent": 2,
        "resources": {"heartbeat_s": 12},
        "trial": {
            "model": model,
            "task": task,
            "chip": "halora-2026",
            "training": {"method": "halora", "mu": 0.01, "batch_size": 4, "steps": 60, "report_every": 3, **training},
            "evaluation": {"chip_instances": 2, "rows": 8, "calibration_tokens": 64, "context_tokens": 64},
        },
        "space": {"training.learning_rate": {"low": 0.01, "high": 0.1, "log": True}},
        "search": {"sampler": "random"},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
        **(sweep or {}),
    }
    path.write_text(yaml.safe_dump(content))
    return path


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


def launched(cluster: Cluster, *arguments: Any, **environment: str) -> subprocess.Popen[bytes]:
    """A driver on the head's machine that launches or resumes a sweep; its output is in the cluster's folder."""
    command = [HALORA, "sweep", *arguments, "--follow", "--address", cluster.address]
    with (cluster.folder / "drivers.log").open("ab") as out:
        return subprocess.Popen(
            list(map(str, command)),
            env=cluster.environment() | environment,
            cwd=cluster.folder,
            stdout=out,
            stderr=out,
        )


def driver_log(store: Path, sweep: str) -> list[dict[str, Any]]:
    """Lines of the sweep's log so far."""
    path = store / "sweeps" / sweep / "driver.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(store: Path, sweep: str, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> dict[str, Any]:
    """The first line of the log, after some, that is wanted."""
    end = time.monotonic() + PATIENCE_S
    while True:
        lines = driver_log(store, sweep)
        for line in lines[after:]:
            if wanted(line):
                return line
        assert time.monotonic() < end, lines[-5:]
        time.sleep(0.2)


def trains(line: dict[str, Any]) -> bool:
    """Whether a line of the log is about a report of a training."""
    return bool(line.get("state") == "training")


def node_of(cluster: Cluster, line: dict[str, Any]) -> Node:
    """The living node that a line of the log names."""
    if not any(node.namespace for node in cluster.nodes.values()):
        pytest.skip("nodes have one address here, and cannot be told apart; network namespaces need root")
    (node,) = [one for one in cluster.nodes.values() if one.address == line["node"] and one.starter.poll() is None]
    return node


def worker_of(node: Node) -> psutil.Process:
    """The process of the one trial on a node."""
    (worker,) = [process for process in node.workers() if "Trainable" in " ".join(process.cmdline())]
    return worker


def assert_whole(
    store: Path, sweep: str, trials: int = TRIALS, steps: int = 60, every: int = 3, database: str = ""
) -> None:
    """Every trial is finished exactly once, its reports without gap, and MLflow has all the event log has.

    Args:
        store: The store.
        sweep: The sweep.
        trials: How many it has.
        steps: Of each.
        every: Steps between two reports.
        database: SQLAlchemy's address of MLflow's database; by default the store's own file.
    """
    entries = _event_log_equal_to_mlflow(store, sweep, database)
    for number in range(trials):
        own = [entry for entry in entries if entry["trial"] == number]
        assert [e["step"] for e in own if e["kind"] == "reported"] == list(range(every, steps + 1, every)), number
        assert sum(entry["kind"] == "scored" for entry in own) == 1
        assert [entry["kind"] for entry in own if entry["kind"] in STATES][-1] == "finished"
    assert {entry["trial"] for entry in entries} == {*range(trials), None}


def assert_without_gap(store: Path, sweep: str, every: int) -> None:
    """Some trials of a stopped sweep have reports, from the first on without gap, and MLflow has all the event log has.

    Args:
        store: The store.
        sweep: The sweep.
        every: Steps between two reports.
    """
    reported: dict[int, list[int]] = {}
    for entry in _event_log_equal_to_mlflow(store, sweep):
        if entry["kind"] == "reported":
            reported.setdefault(entry["trial"], []).append(entry["step"])
    assert reported
    for number, steps in reported.items():
        assert steps == list(range(every, steps[-1] + 1, every)), number


def _event_log_equal_to_mlflow(store: Path, sweep: str, database: str = "") -> list[dict[str, Any]]:
    """Entries of the sweep's event log, after a look that MLflow has them all."""
    log = store / "sweeps" / sweep / "events.jsonl"
    assert differences(database or f"sqlite:///{store / 'mlflow.db'}", sweep, log) == []
    return [json.loads(line) for line in log.read_text().splitlines()[1:]]
