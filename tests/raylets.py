"""A Ray cluster of several nodes on this machine, of real processes, for tests.

Every worker node has a network namespace and an address of its own, joined to the head by a bridge, where the tests run
as root on Linux; elsewhere all nodes share one address. Ray's token authentication is on. Nothing is mocked: a node is
`ray start`, its death is SIGKILL of all its processes.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from namespaces import (
    can_make_namespaces,
    command_of,
    kill_all,
    left_over,
    living,
    make_namespace,
    new_folder,
    pids_in,
    remove,
)
from services import free_port

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("trainables", "search_spaces", "platform", "dashboards")
OBJECT_STORE_BYTES = 100 * 2**20
STARTING_S = 180.0
QUICK_HEALTH_CHECKS = {
    # A node is dead after three checks without an answer, here 3 to 10 s; Ray's own settings take 15 to 65 s.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def source_environment() -> dict[str, str]:
    """Environment of a process that runs this checkout's code, on one thread, without the hub."""
    path = os.pathsep.join(str(ROOT / source_root) for source_root in SOURCE_ROOTS)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Node:
    """One node of a cluster.

    Attributes:
        name: `head`, `node1`, `node2`, ...; Ray's name of the node, and a custom resource that only it has, once.
        address: Its IP address.
        folder: Its own `--temp-dir`, with session and logs.
        namespace: Its network namespace, empty where it has none.
        starter: The process `ray start --block`.
    """

    name: str
    address: str
    folder: Path
    namespace: str
    starter: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """Its living processes: all in its namespace, or else those that `ray start` began."""
        if self.namespace:
            return living(pids_in(self.namespace))
        with suppress(psutil.NoSuchProcess):
            starter = psutil.Process(self.starter.pid)
            return living([starter.pid, *(child.pid for child in starter.children(recursive=True))])
        return []

    def workers(self) -> list[psutil.Process]:
        """Its worker processes: actors and tasks, idle ones too."""
        return [process for process in self.processes() if command_of(process).startswith("ray::")]

    def kill(self) -> None:
        """End all its processes at once, as a power cut would."""
        kill_all(self.processes)
        self.starter.wait()

    def log(self, lines: int = 40) -> str:
        """The end of what `ray start` and the raylet said: for a failed assertion."""
        paths = [self.folder.with_suffix(".log"), *sorted(self.folder.glob("session_2*/logs/raylet.*"))]
        return "\n".join(f"== {p}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-lines:]) for p in paths)


class Cluster:
    """A head and its workers; made by `raylets`.

    Args:
        namespaces: Whether every worker has an address of its own.
        settings: Further environment of all nodes, and of processes that use the cluster.

    Attributes:
        folder: Holds the token, and a folder for every node.
        token_path: File of the token, mode 600.
        head_address: IP address of the head, which every node reaches: servers for the cluster may listen there.
        network: The nodes' addresses, as CIDR.
        nodes: All nodes by name, also those that were killed.
    """

    def __init__(self, namespaces: bool, settings: Mapping[str, str]) -> None:
        self._namespaces, self._settings = namespaces, dict(settings)
        self._ports = {name: free_port() for name in ("gcs", "dashboard", "client")}
        self.nodes: dict[str, Node] = {}
        self.head_address, self.network = "127.0.0.1", "127.0.0.0/8"
        self.folder, address = new_folder(bridge=namespaces)
        if address:
            self.head_address, self.network = address, f"{address.rpartition('.')[0]}.0/24"
        self.token_path = self.folder / "token"
        self.token_path.touch(mode=0o600)
        self.token_path.write_text(secrets.token_hex(32))

    @property
    def address(self) -> str:
        """For a driver on the head's machine: `HOST:PORT`."""
        return f"{self.head_address}:{self._ports['gcs']}"

    @property
    def jobs_address(self) -> str:
        """For job submission, and the dashboard: `http://HOST:PORT`."""
        return f"http://{self.head_address}:{self._ports['dashboard']}"

    @property
    def client_address(self) -> str:
        """For Ray's client: `ray://HOST:PORT`."""
        return f"ray://{self.head_address}:{self._ports['client']}"

    def environment(self) -> dict[str, str]:
        """Environment of a process that uses the cluster: this checkout's code, and the token."""
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # as the recipe's head has it
        }
        return source_environment() | own | QUICK_HEALTH_CHECKS | self._settings

    def start_head(self, cpus: int = 0) -> Node:
        """Start the head, by default one that runs no trial; `wait_for` says when it is there."""
        arguments = ["--head", f"--port={self._ports['gcs']}", f"--ray-client-server-port={self._ports['client']}"]
        arguments += [f"--dashboard-host={self.head_address}", f"--dashboard-port={self._ports['dashboard']}"]
        return self._start("head", self.head_address, "", arguments, cpus, {})

    def start_node(self, cpus: int = 1, resources: Mapping[str, float] | None = None) -> Node:
        """Start one more worker node; `wait_for` says when it is there."""
        count = sum(name != "head" for name in self.nodes) + 1
        address, namespace = self.head_address, ""
        if self._namespaces:
            address, namespace = f"{self.head_address.rpartition('.')[0]}.{10 + count}", f"{self.folder.name}n{count}"
            make_namespace(namespace, self.folder.name, address, self.head_address)
        return self._start(f"node{count}", address, namespace, [f"--address={self.address}"], cpus, resources or {})

    def _start(
        self, name: str, address: str, namespace: str, arguments: list[str], cpus: int, resources: Mapping[str, float]
    ) -> Node:
        folder = self.folder / name
        folder.mkdir()
        command = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
        command += [str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments, f"--node-name={name}"]
        command += [f"--node-ip-address={address}", f"--temp-dir={folder}", f"--num-cpus={cpus}", "--num-gpus=0"]
        command += [f"--resources={json.dumps({name: 1, **resources})}", "--disable-usage-stats"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        for port in ("dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port"):
            command.append(f"--{port}={free_port()}")
        environment = self.environment() | {"RAY_TMPDIR": str(folder), "RAY_worker_niceness": "0"}
        with folder.with_suffix(".log").open("wb") as log:
            starter = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        self.nodes[name] = Node(name, address, folder, namespace, starter)
        return self.nodes[name]

    def wait_for(self, *names: str, timeout_s: float = STARTING_S) -> None:
        """Wait until these nodes live, says the head; by default all whose `ray start` runs."""
        wanted = names or tuple(name for name, node in self.nodes.items() if node.starter.poll() is None)
        end = time.monotonic() + timeout_s
        while missing := [name for name in wanted if self.states().get(name) != "ALIVE"]:
            for name in missing:
                assert self.nodes[name].starter.poll() is None, f"{name} ended\n{self.nodes[name].log()}"
            assert time.monotonic() < end, f"no {missing}\n{self.nodes[missing[0]].log()}"
            time.sleep(0.3)

    def wait_dead(self, name: str, timeout_s: float = 60.0) -> None:
        """Wait until the head has noticed that a node is dead."""
        end = time.monotonic() + timeout_s
        while self.states().get(name) != "DEAD":
            assert time.monotonic() < end, f"{name} still lives, says the head"
            time.sleep(0.3)

    def states(self) -> dict[str, str]:
        """`ALIVE` or `DEAD` by node name, as the head sees it; nothing while the head does not answer."""
        return {row["node_name"]: row["state"] for row in self._ask("nodes")}

    def node_ids(self) -> dict[str, str]:
        """Ray's id of every node, by name."""
        return {row["node_name"]: row["node_id"] for row in self._ask("nodes")}

    def actors(self, name: str, class_part: str = "") -> dict[int, str]:
        """Class by process id of the actors that live on a node and whose class name holds a text."""
        own = self.node_ids().get(name)
        alive = [row for row in self._ask("actors") if row["node_id"] == own and row["state"] == "ALIVE"]
        return {row["pid"]: row["class_name"] for row in alive if class_part in row["class_name"]}

    def _ask(self, what: str) -> list[dict[str, Any]]:
        """Rows of the state API of Ray's dashboard; none while it does not answer."""
        request = urllib.request.Request(
            f"{self.jobs_address}/api/v0/{what}?detail=true&limit=10000",
            headers={"Authorization": f"Bearer {self.token_path.read_text()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                content = json.load(answer)
        except OSError:
            return []
        return list(content["data"]["result"]["result"])

    def close(self) -> None:
        """End every process of the cluster, drivers too; remove namespaces, bridge and folder."""
        for node in self.nodes.values():
            node.kill()
        remove(self.folder.name)


@contextmanager
def raylets(
    *cpus: int, head_cpus: int = 0, settings: Mapping[str, str] | None = None, namespaces: bool | None = None
) -> Iterator[Cluster]:
    """A running cluster with one worker node for each number of CPUs; nothing is left of it afterwards.

    Args:
        cpus: CPUs that each worker node offers to Ray.
        head_cpus: CPUs that the head offers.
        settings: Further environment of all nodes, and of processes that use the cluster.
        namespaces: Whether every worker has an address of its own; by default where possible.
    """
    for name in left_over():
        remove(name)
    cluster = Cluster(can_make_namespaces() if namespaces is None else namespaces, settings or {})
    try:
        cluster.start_head(head_cpus)
        cluster.wait_for("head")
        for count in cpus:
            cluster.start_node(count)
        cluster.wait_for()
        yield cluster
    finally:
        cluster.close()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that is stopped (SIGSTOP) while the block runs, and goes on afterwards if it is still there."""
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # the signal is delivered when it is next scheduled
        time.sleep(0.01)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
