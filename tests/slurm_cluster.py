"""A Slurm cluster on this machine, of real processes, for tests: munged, slurmctld and a slurmd for every node.

Nothing is started by systemd, and everything is in a folder and on ports of its own. Where the tests run as root every
node has a network namespace and an address; elsewhere the nodes are several slurmds at the loopback address.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from namespaces import can_make_namespaces, kill_all, left_over, living, make_namespace, new_folder, pids_in, remove
from raylets import source_environment
from services import free_port, required

STARTING_S = 60.0
PATIENCE_S = 600.0

_CONFIGURATION = """
ClusterName={name}
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=20
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


class SlurmCluster:
    """A controller and its nodes; made by `slurm`.

    Args:
        cpus: CPUs of each node, as Slurm is to count them.

    Attributes:
        folder: Configuration, logs and state.
        nodes: Names of the nodes.
    """

    def __init__(self, *cpus: int) -> None:
        self.folder, address = new_folder(bridge=can_make_namespaces())
        self._namespaces, address = bool(address), address or "127.0.0.1"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}
        self.nodes = [f"{self.folder.name}n{count}" for count in range(1, len(cpus) + 1)]
        lines = _CONFIGURATION.format(
            name=self.folder.name,
            host=socket.gethostname(),
            address=address,
            port=free_port(),
            user=psutil.Process().username(),
            folder=self.folder,
        ).splitlines()
        for count, (name, number) in enumerate(zip(self.nodes, cpus, strict=True), start=1):
            own = f"{address.rpartition('.')[0]}.{10 + count}" if self._namespaces else address
            if self._namespaces:
                make_namespace(name, self.folder.name, own, address)
            where = f"NodeHostname={socket.gethostname()} NodeAddr={own} Port={free_port()}"
            lines.append(f"NodeName={name} {where} CPUs={number} RealMemory=4000 State=UNKNOWN")
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "state").mkdir()

    def environment(self) -> dict[str, str]:
        """Environment of Slurm's commands, and of what they submit."""
        return source_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start everything, and return once every node waits for jobs."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        own = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid"}
        own |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        self._run("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in own.items()))
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._run("slurmctld", "-D", "-i")
        for name in self.nodes:
            self.start_node(name)
        self._wait(lambda: set(self.states().values()) == {"idle"}, "slurmctld")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        within = ["nsenter", f"--net=/run/netns/{name}"] if self._namespaces else []
        self._slurmds[name] = self._run(*within, _program("slurmd"), "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End all processes of a node at once, as a power cut would."""
        kill_all(lambda: self.processes(name))
        self._slurmds[name].wait()

    def processes(self, name: str) -> list[psutil.Process]:
        """Living processes of a node, its slurmd among them."""
        if self._namespaces:
            return living(pids_in(name))
        with suppress(psutil.NoSuchProcess):
            slurmd = psutil.Process(self._slurmds[name].pid)
            return living([slurmd.pid, *(child.pid for child in slurmd.children(recursive=True))])
        return []

    def listening(self, name: str) -> set[int]:
        """TCP ports that a node listens on."""
        pid = next(iter(self.processes(name))).pid if self._namespaces else os.getpid()
        tables = [Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:] for kind in ("tcp", "tcp6")]
        rows = [line.split() for table in tables for line in table]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}

    def states(self) -> dict[str, str]:
        """State of every node by its name; nothing while the controller does not answer."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").stdout.split("\n")
        return {name: state for name, _, state in (line.partition(" ") for line in lines) if name}

    def ask(self, command: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(
            [_program(command), *map(str, arguments)],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )

    def job(self, job: str) -> Mapping[str, str]:
        """What the controller says of a job; nothing once it has forgotten it."""
        told = self.ask("scontrol", "show", "job", job, "--oneliner").stdout.splitlines()
        return dict(word.partition("=")[::2] for word in told[0].split()) if told else {}

    def wait_for(self, job: str, *states: str, patience_s: float = PATIENCE_S) -> Mapping[str, str]:
        """Wait until a job is in one of these states; what is then said of it."""
        end = time.monotonic() + patience_s
        while (told := self.job(job)).get("JobState") not in states:
            assert time.monotonic() < end, told
            time.sleep(0.5)
        return told

    def close(self) -> None:
        """End every process of the cluster and of its jobs; remove namespaces, bridge and folder."""
        for name in self.nodes:
            self.kill_node(name)
        for process in self._processes:
            process.kill()
            process.wait()
        remove(self.folder.name)

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as log:
            started = subprocess.Popen(
                [command[0] if command[0] == "nsenter" else _program(command[0]), *command[1:]],
                env=self.environment(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(started)
        return started

    def _wait(self, there: Any, what: str) -> None:
        end = time.monotonic() + STARTING_S
        while not there():
            assert all(process.poll() is None for process in self._processes), self.log()
            assert time.monotonic() < end, f"{what} does not answer\n{self.log()}"
            time.sleep(0.2)

    def log(self, lines: int = 30) -> str:
        """The end of what its daemons said: for a failed assertion."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {p}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-lines:]) for p in paths)


@contextmanager
def slurm(*cpus: int) -> Iterator[SlurmCluster]:
    """A running Slurm with one node for each number of CPUs; nothing is left of it afterwards."""
    for name in ("munged", "slurmctld", "slurmd"):
        required("Slurm", _program(name) if shutil.which(name, path=_PATH) else None)
    for name in left_over():
        remove(name)
    cluster = SlurmCluster(*cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def _program(name: str) -> str:
    found = Path(name) if os.sep in name else shutil.which(name, path=_PATH)
    assert found, name
    return str(found)
