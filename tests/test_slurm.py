"""Sweeps as jobs of a real Slurm.

Oracles: Slurm's own word for its jobs; the store's event log, with MLflow's tables beside it; the kernel, for what is
left.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_runs import HALORA, assert_whole, driver_log, trains, wait_for, write_sweep
from slurm_cluster import SlurmCluster, slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of four CPUs, as Slurm counts them."""
    with slurm(4, 4) as cluster:
        yield cluster


def submitted(cluster: SlurmCluster, file: Path, store: Path, *options: str) -> str:
    """The number of a job that `halora cluster slurm --submit` submits on both nodes."""
    command = [HALORA, "cluster", "slurm", file, "--nodes", "2", "--cpus", "1", "--submit", "--store", store, *options]
    done = subprocess.run(
        list(map(str, command)), env=cluster.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def output(store: Path, job: str) -> str:
    """What a job said."""
    path = store / "jobs" / f"{job}.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_a_sweep_is_paused_before_the_limit_requeued_and_brought_to_its_end(cluster, tiny_models, tiny_task, tmp_path):
    file = write_sweep(tmp_path / "limited.yaml", tiny_models["llama"], tiny_task, steps=300)
    store = tmp_path / "store"
    job = submitted(cluster, file, store, "--time", "1:00:00", "--notice", "60")
    wait_for(store, "limited", trains)
    status = subprocess.run(
        [HALORA, "sweep", "status", "limited", "--format", "json", "--store", store], capture_output=True, check=True
    )
    (row,) = json.loads(status.stdout)
    assert (row["state"], row["job"]) == ("running", job)
    minutes = 2 + int(cluster.job(job)["RunTime"].split(":")[1])
    assert cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}").returncode == 0
    cluster.wait_for(job, "PENDING")
    assert cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60").returncode == 0
    told = cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), output(store, job)
    assert_whole(store, "limited", steps=300)
    assert {line["node"] for line in driver_log(store, "limited") if "node" in line} != set()
