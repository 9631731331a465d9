"""Sweeps as jobs of a real Slurm.

Oracles: Slurm's own word for its jobs; the store's event log, with MLflow's tables beside it; the kernel, for what is
left.
"""

import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_runs import HALORA, PATIENCE_S, assert_whole, assert_without_gap, driver_log, trains, wait_for, write_sweep
from slurm_cluster import SlurmCluster, slurm

from halora.sweep.cluster.slurm_node import BLOCKS, FIRST_PORT, PORTS_OF_A_BLOCK
from halora.training.models import extensions_dir

STEPS, EVERY = 450, 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of four CPUs, as Slurm counts them."""
    with slurm(4, 4) as cluster:
        yield cluster


class User:
    """Somebody who submits jobs, with a folder, a sweep file and a store.

    Args:
        cluster: The cluster.
        account: Of whom, where this process can act for others.
        model: Folder of a tiny model.
        task: Folder of a tiny task.
        settings: Of the sweep, see `write_sweep`.
    """

    def __init__(self, cluster: SlurmCluster, account: str, model: str, task: str, **settings: Any) -> None:
        folder = cluster.folder / account
        self.store = folder / "store"
        for source, copy in ((model, "model"), (task, "task"), (extensions_dir(), "extensions")):
            if Path(source).exists():
                shutil.copytree(source, folder / copy)  # an account sees none of another's
        self.file = write_sweep(folder / "shared.yaml", str(folder / "model"), str(folder / "task"), **settings)
        own = {"HOME": str(folder), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
        self._environment = cluster.environment() | own
        self._as: dict[str, Any] = {}
        if can_act_for(account):
            self._as = {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}
            for path in (folder, *folder.rglob("*")):
                shutil.chown(path, account)

    def halora(self, *arguments: Any) -> str:
        """Run the command, which must succeed; what it says on stdout."""
        done = subprocess.run(
            [HALORA, *map(str, arguments), "--store", self.store],
            env=self._environment,
            cwd=self.store.parent,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **self._as,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *options: str) -> str:
        """The number of a job that runs the sweep on a core of both nodes."""
        return self.halora("cluster", "slurm", self.file, "--nodes", "2", "--cpus", "1", "--submit", *options)

    def said(self, job: str) -> str:
        """What a job said."""
        path = self.store / "jobs" / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def secrets(self) -> list[Path]:
        """Tokens and addresses of jobs."""
        return [path for path in (self.store / "jobs").glob("*/*") if path.name in ("token", "address")]


def can_act_for(account: str) -> bool:
    """Whether this process can run the command for an account, which needs root and an interpreter open to all."""
    if os.geteuid() != 0:
        return False
    try:
        return subprocess.run([HALORA, "--version"], user=account, cwd="/", capture_output=True).returncode == 0
    except PermissionError:
        return False


@pytest.mark.slow
def test_a_sweep_is_paused_at_the_limit_requeued_preempted_and_comes_to_its_end(cluster, tiny_models, tiny_task):
    user = User(cluster, "root", tiny_models["llama"], tiny_task, steps=STEPS, report_every=EVERY)
    job = user.submit("--time", "1:00:00")
    wait_for(user.store, "shared", trains)
    (row,) = json.loads(user.halora("sweep", "status", "shared", "--format", "json"))
    assert (row["state"], row["job"]) == ("running", job)
    token, _ = sorted(user.secrets(), reverse=True)
    assert (token.name, token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == ("token", 0o600, 0o700)

    fixed = {6379, 8265, 10001, 44217, 44227, 52365}  # Ray's own choice, which another Ray of the node may have
    assert not [port for name in cluster.nodes for port in cluster.listening(name) if port in fixed]

    minutes = 4 + int(cluster.job(job)["RunTime"].split(":")[1])  # of which 5 are notice: Slurm gives it now
    assert cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}").returncode == 0
    cluster.wait_for(job, "PENDING")
    (row,) = json.loads(user.halora("sweep", "status", "shared", "--format", "json"))
    assert (row["state"], "job" in row) == ("interrupted", False)
    assert "trials pause at their next reports" in user.said(job)
    assert cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60").returncode == 0

    wait_for(user.store, "shared", trains, after=len(driver_log(user.store, "shared")))
    wanted = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.ask("sbatch", *wanted).returncode == 0
    cluster.wait_for(job, "PENDING")
    told = cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "2"), user.said(job)
    assert_whole(user.store, "shared", steps=STEPS, every=EVERY)
    assert left_of(job) == user.secrets() == []


@pytest.mark.slow
def test_jobs_of_two_users_share_nodes_one_is_cancelled_and_the_other_outlives_a_node(cluster, tiny_models, tiny_task):
    endless = {"steps": 1_000_000, "report_every": EVERY}
    one = User(cluster, "daemon", tiny_models["llama"], tiny_task, **endless)
    other = User(cluster, "nobody", tiny_models["llama"], tiny_task, sweep={"concurrent": 1}, **endless)
    kept, cancelled = one.submit("--time", "1:00:00"), other.submit("--time", "1:00:00")
    for user in (one, other):
        wait_for(user.store, "shared", trains)
    assert cluster.job(kept)["NodeList"] == cluster.job(cancelled)["NodeList"]
    before = processes_of(kept)
    assert len(ports_of(cluster, cancelled)) > 2
    assert cluster.ask("scancel", cancelled).returncode == 0
    cluster.wait_for(cancelled, "CANCELLED")
    end = time.monotonic() + PATIENCE_S
    while left_of(cancelled):  # Slurm says so before the last process has gone
        assert time.monotonic() < end, left_of(cancelled)
        time.sleep(0.5)
    assert ports_of(cluster, cancelled) == other.secrets() == []
    gone = [name for (*process, name) in before if tuple(process) not in {(p, b) for p, b, _ in processes_of(kept)}]
    assert not [name for name in gone if not name.startswith("ray::IDLE")]  # which Ray ends when it likes
    (row,) = json.loads(other.halora("sweep", "status", "shared", "--format", "json"))
    assert row["state"] == "interrupted"

    (dies,) = set(cluster.nodes) - {cluster.job(kept)["BatchHost"]}
    cluster.kill_node(dies)
    wait_for(one.store, "shared", lambda line: "resumes from its checkpoint" in line["message"])
    wait_for(one.store, "shared", trains, after=len(driver_log(one.store, "shared")))
    one.halora("sweep", "stop", "shared")
    told = cluster.wait_for(kept, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
    assert (told["ExitCode"], told["Restarts"]) == ("1:0", "0"), one.said(kept)
    assert_without_gap(one.store, "shared", EVERY)
    (folder,) = left_of(kept)  # of the node that died
    shutil.rmtree(folder)


def processes_of(job: str) -> set[tuple[int, float, str]]:
    """Living processes that Slurm started for a job, or that those did: number, birth and name."""
    found = set()
    for process in psutil.process_iter():
        try:
            of_job = process.environ().get("SLURM_JOB_ID") == job and "slurmstepd" not in process.name()
            if of_job and process.status() != psutil.STATUS_ZOMBIE:
                found.add((process.pid, process.create_time(), process.name()))
        except psutil.Error:
            continue
    return found


def left_of(job: str) -> list[Any]:
    """Processes and temporary folders of a job."""
    parents = {Path(tempfile.gettempdir()), Path("/var/tmp")}
    return [*processes_of(job), *(folder for parent in parents for folder in parent.glob(f"halora-{job}-*"))]


def ports_of(cluster: SlurmCluster, job: str) -> list[int]:
    """Ports of a job's own block that somebody listens on, on any of the nodes."""
    first = FIRST_PORT + int(job) % BLOCKS * PORTS_OF_A_BLOCK
    found = [port for name in cluster.nodes for port in cluster.listening(name)]
    return [port for port in found if first <= port < first + PORTS_OF_A_BLOCK]
