"""A sweep on a real cluster with PostgreSQL and MLflow as servers of their own, and everything that may go away.

Oracles: the event log, MLflow's tables in PostgreSQL beside it, Optuna's study; the kernel, for what is left.
"""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import pytest
from cluster_runs import (
    PATIENCE_S,
    assert_whole,
    driver_log,
    launched,
    node_of,
    settings,
    trains,
    wait_for,
    worker_of,
    write_sweep,
)
from raylets import Cluster, raylets
from services import MlflowServer, PostgresServer, mlflow_server, postgres_server

from halora.records.store import SweepFolder
from halora.sweep.run.state import load_sweep_of

pytestmark = pytest.mark.slow
STEPS, EVERY = 120, 4
AWAY_S = 60.0
SMALL_KIB = 3000


@dataclass(frozen=True)
class Site:
    """A cluster with its servers.

    Attributes:
        cluster: A head and three nodes of one CPU.
        studies: PostgreSQL, for Optuna's studies.
        mlflow: MLflow's server.
        store: The store, which all nodes see.
        disk: A small disk for checkpoints, which all nodes see.
        records: SQLAlchemy's address of MLflow's database.
    """

    cluster: Cluster
    studies: PostgresServer
    mlflow: MlflowServer
    store: Path
    disk: Path
    records: str


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with (
        postgres_server() as studies,
        postgres_server() as records,  # of its own, so that studies can go away alone
        mlflow_server(records.uri, folder) as mlflow,
        small_disk(folder / "disk") as disk,
    ):
        servers = {
            "HALORA_STUDY_URL": studies.uri,
            "HALORA_TRACKING_URI": mlflow.uri,
            "HALORA_CHECKPOINT_URL": str(disk),
        }
        with raylets(1, 1, 1, settings=settings(folder) | servers) as cluster:
            yield Site(cluster, studies, mlflow, folder / "store", disk, records.uri)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own in memory, of a few megabytes."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_KIB}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def launch(site, tiny_models, tiny_task, tmp_path):
    """A function that launches a sweep of tiny trials on the cluster; its driver."""

    def start(name: str, trials: int = 4) -> subprocess.Popen[bytes]:
        sweep = {"trials": trials, "concurrent": 3}
        path = tmp_path / f"{name}.yaml"
        write_sweep(path, tiny_models["llama"], tiny_task, sweep=sweep, steps=STEPS, report_every=EVERY)
        return launched(site.cluster, "launch", path)

    return start


def check(site: Site, sweep: str, trials: int = 4) -> None:
    """Everything is there once, and nothing runs any more."""
    assert_whole(site.store, sweep, trials, STEPS, EVERY, database=site.records)
    launch = load_sweep_of(SweepFolder(site.store / "sweeps" / sweep)).launch
    study = optuna.load_study(study_name=f"{sweep}-{launch}", storage=site.studies.uri)
    assert [(trial.number, trial.state.name) for trial in study.trials] == [(i, "COMPLETE") for i in range(trials)]
    end = time.monotonic() + 60
    while busy := [process for node in site.cluster.nodes.values() for process in node.workers() if has_trial(process)]:
        assert time.monotonic() < end, busy
        time.sleep(0.5)


def has_trial(process: psutil.Process) -> bool:
    """Whether a process has a trial."""
    with suppress(psutil.NoSuchProcess):
        return "Trainable" in " ".join(process.cmdline())
    return False


def test_a_database_of_studies_that_is_away_for_a_minute_is_waited_for(site, launch):
    driver = launch("study-away")
    wait_for(site.store, "study-away", trains)
    site.studies.stop()
    time.sleep(AWAY_S)
    assert driver.poll() is None
    site.studies.start()
    assert driver.wait(PATIENCE_S) == 0
    said = [line["message"] for line in driver_log(site.store, "study-away")]
    assert "the study's database has gone; the sweep waits for it" in said
    assert "the study's database is back" in said
    check(site, "study-away")


def test_an_mlflow_that_is_away_for_a_minute_holds_nothing_up(site, launch):
    driver = launch("mlflow-away")
    wait_for(site.store, "mlflow-away", trains)
    site.mlflow.kill()
    before = len(driver_log(site.store, "mlflow-away"))
    wait_for(site.store, "mlflow-away", trains, after=before)  # meanwhile
    time.sleep(AWAY_S)
    site.mlflow.start()
    assert driver.wait(PATIENCE_S) == 0
    check(site, "mlflow-away")


def test_a_full_disk_of_checkpoints_is_waited_for_and_told(site, launch):
    driver = launch("full-disk")
    wait_for(site.store, "full-disk", trains)
    ballast = site.disk / "ballast"
    fill(ballast)
    before = len(driver_log(site.store, "full-disk"))
    said = wait_for(site.store, "full-disk", lambda line: "resumes from its checkpoint" in line["message"], before)
    assert "No space left on device" in said["message"]
    ballast.unlink()
    assert driver.wait(PATIENCE_S) == 0
    check(site, "full-disk")


def test_a_clock_that_jumps_changes_nothing(site, launch, tmp_path, tiny_models, tiny_task):
    """The driver's clock goes back by a day and forward by two, as libfaketime has it."""
    library = max(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), default=None)
    if library is None:
        pytest.skip("libfaketime is not installed; `make services` installs it")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    path = tmp_path / "clock-jumps.yaml"
    write_sweep(path, tiny_models["llama"], tiny_task, sweep={"concurrent": 3}, steps=STEPS, report_every=EVERY)
    fake = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    driver = launched(site.cluster, "launch", path, **fake)
    for jump in ("-1d", "+1d"):
        before = len(driver_log(site.store, "clock-jumps"))
        wait_for(site.store, "clock-jumps", trains, after=before)
        clock.write_text(jump)
    while sum(line.get("state") == "finished" for line in driver_log(site.store, "clock-jumps")) < 4:
        assert driver.poll() is None
        time.sleep(0.5)
    driver.kill()  # under libfaketime Ray's own gRPC waits for the next day as it ends
    driver.wait()
    assert launched(site.cluster, "resume", "clock-jumps").wait(PATIENCE_S) == 0
    check(site, "clock-jumps")


def test_twenty_faults_in_a_row_lose_and_repeat_nothing(site, launch):
    """Each comes at a random moment of a running sweep; the next one once a trial has reported since."""
    name, trials, chance = "twenty", 40, random.Random(20)
    driver = launch(name, trials)
    faults = [kind for kind in FAULTS for _ in range(3)] + ["driver", "worker"]
    chance.shuffle(faults)
    assert len(faults) == 20
    for kind in faults:
        before = len(driver_log(site.store, name))
        assert driver.poll() is None, f"the sweep ended before fault '{kind}'"
        line = wait_for(site.store, name, trains, after=before)
        time.sleep(chance.uniform(0, 3))
        if kind == "driver":
            driver.kill()
            driver.wait()
            driver = launched(site.cluster, "resume", name)
        else:
            FAULTS[kind](site, line)
    code = driver.wait(2 * PATIENCE_S)
    assert code == 0, driver_log(site.store, name)[-10:]
    check(site, name, trials)


def fill(path: Path) -> None:
    """Write a file until there is no room for more."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0" * 256)


def kill_node(site, line):
    """A node dies, and another joins."""
    node_of(site.cluster, line).kill()
    site.cluster.start_node(1)


def kill_worker(site, line):
    """A worker dies."""
    with suppress(ValueError, psutil.NoSuchProcess):  # between two jobs it may be another
        worker_of(node_of(site.cluster, line)).kill()


def freeze_worker(site, line):
    """A worker stands still for ever."""
    with suppress(ValueError, psutil.NoSuchProcess):
        worker_of(node_of(site.cluster, line)).suspend()


def lose_studies(site, line):
    """PostgreSQL is away for a while."""
    site.studies.stop()
    time.sleep(10)
    site.studies.start()


def lose_mlflow(site, line):
    """MLflow is away for a while."""
    site.mlflow.kill()
    time.sleep(10)
    site.mlflow.start()


def fill_disk(site, line):
    """The disk of the checkpoints is full for a while."""
    ballast = site.disk / "ballast"
    fill(ballast)
    time.sleep(10)
    ballast.unlink()


FAULTS = {
    "node": kill_node,
    "worker": kill_worker,
    "frozen": freeze_worker,
    "studies": lose_studies,
    "mlflow": lose_mlflow,
    "disk": fill_disk,
}
