"""What a job of Slurm runs on each of its nodes: Ray, and on the first node the sweep's driver.

    python -m halora.sweep.cluster.slurm_node FOLDER SWEEP PATIENCE_S < the sweep's file

FOLDER is the job's own, on a file system that all its nodes see: `token` and `address` of its Ray, `joined-N` of every
node that is there, `node-N.log`, and what the batch script and the nodes tell each other, `pause`, `ended` and `code`.
It is by files, as Slurm delivers a signal to every process of a step, and one that is not expected ends Ray.

Ports are in a block that follows from the job's number, so that jobs share a node; what Ray starts per worker has ports
that the system chooses. Whatever a node began ends with it, by its descent from this process.
"""

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

from halora.errors import UnreachableError, UserError
from halora.files import write_whole
from halora.records.store import Store
from halora.sweep.cluster.interrupts import signals_as_interrupt
from halora.sweep.cluster.session import OBJECT_STORE_BYTES, own_folder
from halora.sweep.cluster.slurm import PAUSED, job_name

FIRST_PORT, PORTS_OF_A_BLOCK, BLOCKS = 20000, 16, 790
"""Blocks end below 32768, from where on Linux gives ports to whoever asks for any."""

_STARTING_S = 300.0  # that a node may take to start Ray, and the head to wait for all nodes
_ENDING_S = 15.0  # that a driver may take to close its records; Slurm kills 30 s after it asked a job to end
_STARTS = 3  # of Ray, which gives its own processes 30 s; too few where the node is overloaded
_RUNS = b"Ray runtime started"
_POLL_S = 1.0
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PROGRESS = ("reported", "scored")
_HEAD_PORTS = ("port", "ray-client-server-port")
_METRIC_PORTS = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")  # Ray has variables for them, and no options
_NODE_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


class JobFolder:
    """The folder of one start of a job, by which its nodes and its batch script know of each other.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.token, self.address = root / "token", root / "address"
        self.pause, self.ended, self.code = root / "pause", root / "ended", root / "code"

    def joined(self, node: str) -> Path:
        """There once a node is part of the job's Ray."""
        return self.root / f"joined-{node}"

    def left(self, node: str) -> Path:
        """There once a node is no part of it, and will not be."""
        return self.root / f"left-{node}"

    def log(self, node: str) -> Path:
        """What `ray start` says on a node."""
        return self.root / f"node-{node}.log"


def main() -> None:
    """Run this node's part of the job, and leave nothing of it behind."""
    folder, sweep, patience_s = JobFolder(Path(sys.argv[1])), sys.argv[2], float(sys.argv[3])
    node, job = os.environ["SLURM_NODEID"], int(os.environ["SLURM_JOB_ID"])
    signals_as_interrupt()
    try:
        with own_folder(f"halora-{job}-") as scratch, reserved_ports(job) as ports, descendants_kept():
            ray_here = _Ray(folder, node, Path(scratch), ports)
            try:
                _head(folder, ray_here, sweep, patience_s) if node == "0" else _worker(folder, ray_here)
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's, a second time
                ray_here.keep_logs()
    except UserError as error:  # of this node; the job ends by it if it is the first one
        _say(f"error: {error}")
        sys.exit(3 if isinstance(error, UnreachableError) else 2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    finally:
        (folder.ended if node == "0" else folder.left(node)).touch()


def _head(folder: JobFolder, ray_here: "_Ray", sweep: str, patience_s: float) -> None:
    """The first node: Ray's head, which runs trials as well, and the driver; writes the job's exit code."""
    try:
        folder.token.touch(mode=0o600)
        folder.token.write_text(secrets.token_hex(32), encoding="utf-8")
        address = f"{ray_here.address}:{ray_here.ports[0]}"
        ray_here.start("--head", *ray_here.ports_of(_HEAD_PORTS), "--include-dashboard=false")
        write_whole(folder.address, address)
        nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        others = list(map(str, range(1, nodes)))
        _wait_until(lambda: all(folder.joined(node).exists() or folder.left(node).exists() for node in others))
        there = 1 + sum(folder.joined(node).exists() and not folder.left(node).exists() for node in others)
        _say(f"job {job_name()}: {there} of {nodes} nodes are there")
        code = _drive(folder, address, ray_here.environment, sweep, patience_s)
        write_whole(folder.code, str(code))
    finally:
        folder.token.unlink(missing_ok=True)
        folder.address.unlink(missing_ok=True)


def _worker(folder: JobFolder, ray_here: "_Ray") -> None:
    """Another node: joins the head, and leaves with it."""
    while not folder.address.exists():
        if folder.ended.exists():
            _say("the first node does not start Ray")
            return
        time.sleep(_POLL_S)
    ray_here.start(f"--address={folder.address.read_text(encoding='utf-8')}")
    folder.joined(ray_here.node).touch()
    while not folder.ended.exists():
        if ray_here.over():
            raise UnreachableError(f"Ray has ended on node {ray_here.node} of the job", "the job runs on without it")
        time.sleep(_POLL_S)


def _drive(folder: JobFolder, address: str, environment: dict[str, str], sweep: str, patience_s: float) -> int:
    """Launch the sweep, or resume it, until it ends or is to pause; the job's exit code."""
    command = [sys.executable, "-m", "halora.cli.main", "sweep"]
    log = Store.at().sweep(sweep).event_log_file
    before = _reports(log)
    launch = [*command, "launch", "-", "--or-resume", "--follow", f"--address={address}"]
    driver = subprocess.Popen(launch, env=environment)  # which reads the sweep where this process would
    try:
        while driver.poll() is None and not folder.pause.exists():
            time.sleep(_POLL_S)
        if driver.poll() is not None:
            return driver.returncode
        _say("the limit is near: trials pause at their next reports")
        asked = subprocess.Popen([*command, "stop", sweep], env=environment)
        try:
            driver.wait(patience_s)
        except subprocess.TimeoutExpired:
            driver.terminate()  # as Ctrl-C: trials go back to their last reports
            driver.wait()
        asked.kill()
        asked.wait()
    except BaseException:  # Slurm ends the job, cancelled, preempted or at its limit, and has told the driver too
        with suppress(subprocess.TimeoutExpired):
            driver.wait(_ENDING_S)
        raise
    if driver.returncode == 0:
        return 0
    if _reports(log) == before:
        _say("no trial came to a report within this job, so the next would not either: it takes more --time")
        return 1
    return PAUSED


def _reports(log: Path) -> int:
    """Reports and scores of all trials so far."""
    if not log.exists():
        return 0
    with log.open(encoding="utf-8") as lines:
        kinds = [json.loads(line).get("kind") for line in lines if line.endswith("\n")]
    return sum(kind in _PROGRESS for kind in kinds)


class _Ray:
    """Ray on this node, whose processes stay below this one.

    Attributes:
        node: Slurm's number of the node within the job.
        address: By which other nodes reach it.
        ports: What it may listen on.
        environment: Of whatever uses it.
    """

    def __init__(self, folder: JobFolder, node: str, scratch: Path, ports: Sequence[int]) -> None:
        self.node, self.ports, self.address = node, ports, ray.util.get_node_ip_address()
        self._folder, self._scratch = folder, scratch
        self._process: subprocess.Popen[bytes] | None = None
        foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "HALORA_ADDRESS")
        self.environment = {name: value for name, value in os.environ.items() if name not in foreign} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder.token),
            "RAY_TMPDIR": str(scratch),
            "TMPDIR": str(scratch),
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **{name: str(port) for name, port in zip(_METRIC_PORTS, reversed(ports), strict=False)},
        }

    def ports_of(self, names: Sequence[str]) -> list[str]:
        """Options that give Ray these ports."""
        every = (*_HEAD_PORTS, *_NODE_PORTS)
        return [f"--{name}={self.ports[every.index(name)]}" for name in names]

    def start(self, *arguments: str) -> None:
        """Start it, and return once it says that it runs.

        Raises:
            UnreachableError: It does not.
        """
        own = [f"--node-ip-address={self.address}", f"--temp-dir={self._scratch}", *self.ports_of(_NODE_PORTS)]
        own += ["--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={os.environ['SLURM_CPUS_ON_NODE']}"]
        own += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *own]
        log = self._folder.log(self.node)
        for _ in range(_STARTS):
            end_descendants()  # of a start that failed
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            _wait_until(lambda: self.over() or _RUNS in log.read_bytes())
            if not self.over() and _RUNS in log.read_bytes():
                return
        said = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
        raise UnreachableError(f"Ray does not start on node {self.node} of the job: {said}", f"see '{log}'")

    def over(self) -> bool:
        """Whether it has ended, or was never started."""
        return self._process is None or self._process.poll() is not None

    def keep_logs(self) -> None:
        """Copy its logs into the job's folder, as its own folder goes with it."""
        for logs in self._scratch.glob("session_2*/logs"):
            with suppress(OSError, shutil.Error):
                shutil.copytree(logs, self._folder.root / f"ray-{self.node}", dirs_exist_ok=True)


@contextmanager
def reserved_ports(job: int) -> Iterator[range]:
    """Ports of this machine that are the job's while the block runs: a block that follows from its number, or the next.

    The first port of a block is held by a socket, so that a job of the same block takes another one.

    Raises:
        UnreachableError: None is free.
    """
    for block in ((job + further) % BLOCKS for further in range(BLOCKS)):
        first = FIRST_PORT + block * PORTS_OF_A_BLOCK
        with socket.socket() as held:
            try:
                held.bind(("", first))
                for port in range(first + 1, first + PORTS_OF_A_BLOCK):
                    _check_free(port)
            except OSError:
                continue
            yield range(first + 1, first + PORTS_OF_A_BLOCK)
            return
    last = FIRST_PORT + BLOCKS * PORTS_OF_A_BLOCK - 1
    raise UnreachableError(f"no block of ports is free between {FIRST_PORT} and {last} on {socket.gethostname()}")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as a server would: ports still closing count as free
        probe.bind(("", port))


@contextmanager
def descendants_kept() -> Iterator[None]:
    """What this process begins stays below it, also what loses its parent, and is ended after the block."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        end_descendants()


def end_descendants() -> None:
    """End all processes below this one at once."""
    while found := [each for each in psutil.Process().children(recursive=True) if _lives(each)]:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=5)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait_until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + _STARTING_S
    while not there() and time.monotonic() < end:
        time.sleep(_POLL_S / 4)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
