"""The file for `sbatch` and what its nodes do, as far as it takes no Ray; `test_slurm.py` runs the whole.

Oracles: a real Slurm, for jobs; sbatch(1), for limits; the kernel, for ports and processes.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from raylets import source_environment
from slurm_cluster import SlurmCluster, slurm

from halora.records.store import Store
from halora.spaces.sweep import load_sweep
from halora.sweep.cluster.slurm import seconds_of
from halora.sweep.cluster.slurm_node import BLOCKS, FIRST_PORT, PORTS_OF_A_BLOCK, reserved_ports
from halora.sweep.run.state import write_sweep

_SWEEP = """
name: short
family: tests
description: |
  END_OF_SWEEP
  $(touch {folder}/executed) `touch {folder}/executed`
trials: 2
trial: {{model: smollm2-135m-instruct, task: arc-easy, chip: ideal, training: {{steps: 2}}, evaluation: {{rows: 8}}}}
space: {{lora.rank: {{choices: [2, 4]}}}}
reference_point: {{accuracy: 0.0, energy_uj_per_token: 6.0}}
"""

_NODE = [sys.executable, "-m", "halora.sweep.cluster.slurm_node"]


@pytest.fixture
def sweep_file(tmp_path) -> Path:
    file = tmp_path / "short.yaml"
    file.write_text(_SWEEP.format(folder=tmp_path))
    return file


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of four CPUs, as Slurm counts them."""
    with slurm(4, 4) as cluster:
        yield cluster


_STAND_IN = """#!/bin/bash
# Takes the place of Python on the nodes: notes what it is given, and ends as it is told by FOLDER/NUMBER-of-the-start.
[[ $SLURM_NODEID == 0 ]] || exit 0
echo "$*" >>{folder}/arguments
echo --- >>{folder}/sweeps
cat >>{folder}/sweeps
start=$(grep -c . {folder}/arguments)
if [[ -e {folder}/waits-$start ]]; then until [[ -e $3/pause ]]; do sleep 0.2; done; fi
if [[ -e {folder}/code-$start ]]; then cp {folder}/code-$start "$3/code"; else exit 3; fi
"""


class Run:
    """A job whose nodes run a stand-in for Python, which ends with these codes, a start each.

    Args:
        cluster: Where it is submitted.
        script: The file that was printed.
        folder: Of its own.
        codes: What the nodes write at each start; nothing for none.
        waits: Number of the start that waits for a pause.
    """

    def __init__(self, cluster: SlurmCluster, script: str, folder: Path, *codes: str, waits: int = 0) -> None:
        folder.mkdir()
        self._folder = folder
        for start, code in enumerate(codes, start=1):
            if code:
                (folder / f"code-{start}").write_text(code)
        (folder / f"waits-{waits}").touch()
        (folder / "python").write_text(_STAND_IN.format(folder=folder))
        (folder / "python").chmod(0o755)
        assert sys.executable in script
        (folder / "sbatch").write_text(script.replace(sys.executable, str(folder / "python")))
        submitted = cluster.ask("sbatch", "--parsable", folder / "sbatch")
        assert submitted.returncode == 0, submitted.stderr
        self.job = submitted.stdout.strip()

    @property
    def starts(self) -> list[list[str]]:
        """Arguments of the nodes' program at each start."""
        file = self._folder / "arguments"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def sweeps(self) -> list[dict[str, Any]]:
        """What it read then."""
        return list(yaml.safe_load_all((self._folder / "sweeps").read_text()))


def test_the_script_holds_the_sweep_and_what_was_asked_for(halora, sweep_file, tmp_path):
    store = tmp_path / "a store"
    code, script, _ = halora(
        f"cluster slurm {sweep_file} --nodes 4 --time 1-0 --cpus 8 --partition long --account team --gres gpu:2"
        f" --sbatch constraint=a100 --notice 600 --name another --set trial.training.steps=3 --store '{store}'"
    )
    assert code == 0
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for line in (
        "job-name=halora-another",
        "nodes=4",
        "ntasks-per-node=1",
        "cpus-per-task=8",
        "time=1-0",
        "partition=long",
        "account=team",
        "gres=gpu:2",
        "constraint=a100",
        "signal=B:USR1@600",
        "requeue",
        "no-kill",
        f"output='{store}/jobs/%j.log'",
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "exclusive" not in script
    assert (store / "jobs").stat().st_mode & 0o777 == 0o700  # where Slurm is to write


@pytest.mark.slow
def test_nothing_but_the_script_is_on_stdout_where_a_model_is_converted_for_it(sweep_file, tmp_path):
    own = {"HALORA_CACHE": str(tmp_path / "cache"), "HALORA_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-m", "halora.cli.main", "cluster", "slurm", sweep_file, "--nodes", "1", "--time", "60"]
    ran = subprocess.run(command, env=source_environment() | own, capture_output=True, text=True, check=True)
    assert list((tmp_path / "cache").iterdir())
    assert ran.stdout.startswith("#!/bin/bash\n")


def test_jobs_go_on_where_something_is_left_to_do(cluster, halora, sweep_file, tmp_path):
    store, options = tmp_path / "store", "--nodes 2 --cpus 1 --time 60 --notice 90"
    one, chain = (
        halora(f"cluster slurm {sweep_file} {options} --store {store} {more}")[1] for more in ("", "--jobs 3")
    )
    paused = Run(cluster, one, tmp_path / "paused", "75", "0", waits=1)
    chained = Run(cluster, chain, tmp_path / "chained", "75", "2", "0")
    failed = Run(cluster, one, tmp_path / "failed", "")
    cluster.wait_for(paused.job, "RUNNING")
    while not paused.starts:
        time.sleep(0.1)
    assert cluster.ask("scancel", "--batch", "--signal=USR1", paused.job).returncode == 0

    told = cluster.wait_for(failed.job, "FAILED", "COMPLETED")
    assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("FAILED", "1:0", "0")
    assert cluster.wait_for(f"{chained.job}_1", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    told = cluster.wait_for(f"{chained.job}_2", "COMPLETED", "FAILED")
    assert (told["JobState"], told["ExitCode"], len(chained.starts)) == ("FAILED", "2:0", 2)
    assert cluster.wait_for(f"{chained.job}_3", "CANCELLED", "RUNNING")["JobState"] == "CANCELLED"
    told = cluster.wait_for(paused.job, "COMPLETED", "FAILED")
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1")

    first, second = paused.starts
    assert first[:2] == ["-m", "halora.sweep.cluster.slurm_node"]
    assert (first[3:], second[3:]) == (["short", "60"], ["short", "60"])
    folders = [Path(arguments[2]) for arguments in (first, second)]
    assert len(set(folders)) == 2  # what an earlier start left says nothing
    assert all(folder.name.startswith(f"{paused.job}-") for folder in folders)
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert paused.sweeps[0] == paused.sweeps[1]
    assert "END_OF_SWEEP" in paused.sweeps[0]["description"]
    assert not (tmp_path / "executed").exists()
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(paused.sweeps[0]))
    assert halora(f"sweep validate {again}")[0] == 0


def test_all_that_is_wrong_is_told_together(halora, sweep_file):
    code, out, err = halora(
        f"cluster slurm {sweep_file} --nodes 0 --time 8h --gres 'gpu 2' --sbatch time=3 --sbatch array=1-2"
        " --sbatch '--qos x' --notice 3 --container /nowhere.sif --set trial.x=3"
    )
    assert (code, out) == (2, "")
    for told in (
        "--nodes: 0",
        "--time 8h: write MINUTES",
        "--gres 'gpu 2'",
        "--sbatch time=3: write --time",
        "--sbatch array=1-2: the script sets it itself",
        "--sbatch '--qos x'",
        "--notice: 3; write at least 60",
        "--container '/nowhere.sif': no such image",
        "trial.x: unknown key",
    ):
        assert told in err
    code, _, err = halora(f"cluster slurm {sweep_file} --nodes 2 --time 5")
    assert (code, "--time 5: no longer than the 300 s of --notice" in err) == (2, True)


def test_a_sweep_that_was_launched_otherwise_is_refused_before_it_waits_in_a_queue(halora, sweep_file, tmp_path):
    folder = Store.at(tmp_path / "store").sweep("short")
    folder.root.mkdir(parents=True)
    write_sweep(folder, load_sweep(str(sweep_file)))
    command = f"cluster slurm {sweep_file} --nodes 2 --time 60 --store {tmp_path / 'store'}"
    assert halora(command)[0] == 0
    code, out, err = halora(f"{command} --set trials=3")
    assert (code, out) == (2, "")
    assert "sweep 'short' was launched before with another trials" in err


def test_without_slurm_the_way_out_is_told(halora, sweep_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = halora(f"cluster slurm {sweep_file} --nodes 2 --time 60 --submit --store {tmp_path / 'store'}")
    assert code == 3
    assert "there is no `sbatch` on this machine" in err
    assert "without --submit the file is printed" in err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("8:00:00", 28800),
        ("2-1", 176400),
        ("2-1:30", 178200),
        ("2-1:30:15", 178215),
        *((wrong, None) for wrong in ("", "8h", "1:2:3:4", "-5", "1-", "UNLIMITED")),
    ],
)
def test_limits_are_read_as_slurm_reads_them(time, seconds):
    assert seconds_of(time) == seconds


def test_jobs_of_one_node_have_ports_of_their_own():
    with reserved_ports(7) as first, reserved_ports(7 + BLOCKS) as same, reserved_ports(8) as next_:
        blocks = [(ports[0] - FIRST_PORT) // PORTS_OF_A_BLOCK for ports in (first, same, next_)]
        assert len(set(blocks)) == 3
        for port in first:  # Ray may have all of them
            with socket.socket() as server:
                server.bind(("127.0.0.1", port))
    taken = FIRST_PORT + blocks[0] * PORTS_OF_A_BLOCK + 5
    with socket.socket() as other:  # of anybody
        other.bind(("127.0.0.1", taken))
        other.listen()
        with reserved_ports(7) as ports:
            assert taken not in ports
    assert FIRST_PORT + BLOCKS * PORTS_OF_A_BLOCK <= 32768


def test_a_node_whose_job_has_ended_leaves_and_leaves_nothing(tmp_path):
    job, scratch = tmp_path / "7.0", Path("/tmp") / f"hs{os.getpid()}"
    job.mkdir()
    scratch.mkdir()
    (job / "ended").touch()
    own = {"SLURM_NODEID": "1", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1", "TMPDIR": str(scratch)}
    try:
        ran = subprocess.run(
            [*_NODE, job, "short", "1"], env=source_environment() | own, capture_output=True, text=True, timeout=120
        )
        assert (ran.returncode, ran.stderr) == (0, "the first node does not start Ray\n")
        assert not list(scratch.iterdir())
    finally:
        scratch.rmdir()


_ORPHAN = """
import subprocess, sys
from halora.sweep.cluster.slurm_node import descendants_kept

with descendants_kept():
    made = subprocess.run(["bash", "-c", "setsid sleep 1000 >&- 2>&- & echo $!"], capture_output=True, text=True)
print(made.stdout.strip())
"""


def test_what_left_its_session_and_lost_its_parent_ends_as_well():
    ran = subprocess.run([sys.executable, "-c", _ORPHAN], env=source_environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pid, end = int(ran.stdout), time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.1)
