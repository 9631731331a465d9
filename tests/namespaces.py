"""Network namespaces joined by a bridge, the processes in them, and what clusters of this machine leave, for tests.

A cluster is named after the process that made it, so that what a killed one left is found and removed.
"""

import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

# Of clusters: `hr`, our process id, `x`, a count; of nodes with `n`, a count.
_NAMES = re.compile(r"hr(\d+)x\d+(n\d+)?")
_TEMPORARY = Path(tempfile.gettempdir())


def can_make_namespaces() -> bool:
    """Whether nodes can have network namespaces here: root, and a kernel that makes bridges."""
    if not _has_ip() or shutil.which("nsenter") is None:
        return False
    probe = f"hr{os.getpid()}x"
    made = subprocess.run(["ip", "link", "add", probe, "type", "bridge"], capture_output=True, check=False)
    if made.returncode == 0:
        ip("link", "del", probe)
    return made.returncode == 0


def traces(name: str) -> list[str]:
    """What there still is of a cluster: processes that use its folder, namespaces, interfaces, the folder."""
    found = [f"process {process.pid}: {command_of(process)}" for process in using(_TEMPORARY / name)]
    found += [f"{kind} {one}" for kind, ones in _network_names().items() for one in ones if _cluster_of(one) == name]
    return found + ([f"folder {_TEMPORARY / name}"] if (_TEMPORARY / name).exists() else [])


def left_over() -> set[str]:
    """Names of clusters whose test process has gone without tidying up."""
    found = {path.name for path in _TEMPORARY.glob("hr*x*")}
    found |= {_cluster_of(one) for ones in _network_names().values() for one in ones}
    return {name for name in found if (ours := _NAMES.fullmatch(name)) and not psutil.pid_exists(int(ours[1]))}


def remove(name: str) -> None:
    """Remove all there still is of a cluster."""
    namespaces = [one for one in _network_names()["namespace"] if _cluster_of(one) == name]
    for namespace in namespaces:
        kill_all(lambda namespace=namespace: living(pids_in(namespace)))  # type: ignore[misc]
        ip("netns", "del", namespace)  # its interfaces go with it
    kill_all(lambda: using(_TEMPORARY / name))
    if name in _network_names()["interface"]:
        ip("link", "del", name)
    shutil.rmtree(_TEMPORARY / name, ignore_errors=True)


def kill_all(processes: Callable[[], Iterable[psutil.Process]]) -> None:
    """Kill what is found until nothing is: a process that is ending may have started another."""
    while found := list(processes()):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=10)


def living(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes that are not zombies."""
    living = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def using(folder: Path) -> list[psutil.Process]:
    """Processes with an open file or their working directory below a folder, or with its path in their command.

    Neither this process nor one that it descends from is among them.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    below = f"{folder}/"
    found = []
    for process in living(set(psutil.pids()) - spared):
        with suppress(psutil.Error, OSError):
            links = [*Path(f"/proc/{process.pid}/fd").iterdir(), Path(f"/proc/{process.pid}/cwd")]
            if below in f"{command_of(process)}/" or any(_target(link).startswith(below) for link in links):
                found.append(process)
    return found


def _target(link: Path) -> str:
    try:
        return os.readlink(link) + "/"
    except OSError:
        return ""


def command_of(process: psutil.Process) -> str:
    """Its command line; empty once it has gone."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def new_folder(*, bridge: bool) -> tuple[Path, str]:
    """A folder for a cluster, and the address on a bridge of the same name where one is wanted."""
    with (_TEMPORARY / "hr.lock").open("w") as lock:  # one process at a time chooses names and addresses
        fcntl.flock(lock, fcntl.LOCK_EX)
        count = 1
        while True:
            with suppress(FileExistsError):
                folder = _TEMPORARY / f"hr{os.getpid()}x{count}"
                folder.mkdir(mode=0o755)
                break
            count += 1
        if not bridge:
            return folder, ""
        address = f"{_free_prefix()}.1"
        ip("link", "add", folder.name, "type", "bridge")
        ip("addr", "add", f"{address}/24", "dev", folder.name)
        ip("link", "set", folder.name, "up")
        return folder, address


def _free_prefix() -> str:
    """The first three bytes of a private network that no interface and no route of this machine has."""
    used = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True)
    while True:
        prefix = f"10.{random.randrange(128, 256)}.{random.randrange(256)}"
        if f" {prefix}." not in used.stdout and f"10.{prefix.split('.')[1]}.0.0/16" not in used.stdout:
            return prefix


def make_namespace(name: str, bridge: str, address: str, gateway: str) -> None:
    """A namespace with loopback and one interface, joined to a bridge."""
    ip("netns", "add", name)
    ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", name, "master", bridge, "up")
    ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")
    ip("-n", name, "route", "add", "default", "via", gateway)


def _has_ip() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None


def ip(*arguments: str) -> str:
    """Run `ip`, which must succeed."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def pids_in(namespace: str) -> list[int]:
    """Processes in a network namespace."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def _network_names() -> dict[str, list[str]]:
    """Names of namespaces and interfaces that look as if they were made here."""
    if not _has_ip():
        return {"namespace": [], "interface": []}
    namespaces = [row["name"] for row in json.loads(ip("-j", "netns", "list") or "[]")]
    interfaces = [row["ifname"] for row in json.loads(ip("-j", "link", "show"))]
    return {
        "namespace": [name for name in namespaces if _NAMES.fullmatch(name)],
        "interface": [name for name in interfaces if _NAMES.fullmatch(name)],
    }


def _cluster_of(name: str) -> str:
    return name.partition("n")[0]
