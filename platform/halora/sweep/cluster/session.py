"""Ray while a sweep needs it: started on this machine, or a cluster's that runs already."""

import os
import shutil
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir, mkdtemp
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray

from halora.errors import UnreachableError, UserError
from halora.retries import retried
from halora.spaces.sweep import SweepConfig
from halora.sweep.cluster.cluster import LOCAL, Cluster
from halora.sweep.cluster.interrupts import children_ignore_hangups, signals_as_interrupt
from halora.sweep.cluster.loopback import only_this_machine

NAMESPACE = "halora"
"""Ray's namespace of all that a sweep starts."""

_STARTS = 3
_LISTENING_S = 10.0
_LONGEST_FOLDER = 107 - 69
"""Bytes of the path of Ray's folder. A socket's path has 107 bytes (AF_UNIX), of which the names of Ray's session
(`session_2026-11-30_02-50-19_123456_1234567`) and of the socket take up to 69."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that runs nothing but sweeps: what it holds are adapters."""

# Read by Ray when it starts.
_RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_worker_niceness": "0",  # workers at Ray's default of 15 starve beside any other job
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def ray_session(processes: int, *, cpus: int | None = None, cluster: Cluster = LOCAL) -> Iterator[None]:
    """Ray while the block runs: the cluster's, or one of this machine with room for as many worker processes.

    Args:
        processes: Workers at once, over all trials.
        cpus: Cores and threads of each; a share of this machine's for none, on a cluster one.
        cluster: Where they run.

    Raises:
        UnreachableError: The cluster does not answer, or not to us; or Ray does not start on this machine.
        UserError: There is no folder for its sockets.
    """
    os.environ.update(_RAY_SETTINGS)
    cores = os.cpu_count() or 1
    share = max(cores // processes, 1)
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if not cluster.address:
        with only_this_machine(), own_folder("halora-") as folder:
            _start(
                folder,
                num_cpus=cores if cpus else processes,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cpus or share), **environment}},
            )
            try:
                signals_as_interrupt()
                yield
            finally:
                ray.shutdown()
        return
    with joined(cluster, {"OMP_NUM_THREADS": str(cpus or 1), **environment}):
        yield


def _start(folder: str, **options: Any) -> None:
    """Start Ray on this machine, its sockets and logs in the folder.

    Ray gives its own processes 30 s, which on an overloaded machine are too few: it is then started once more.
    """

    def start() -> None:
        try:
            with children_ignore_hangups():
                ray.init(
                    address="local",  # none would join $RAY_ADDRESS, or a Ray that runs here already
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    namespace=NAMESPACE,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                    **options,
                )
        except Exception:
            ray.shutdown()
            _end_processes(folder)
            raise

    try:
        retried(start, lambda error: "timed out" in str(error), (0.0,) * (_STARTS - 1))
    except Exception as error:  # OSError, RuntimeError, ConnectionError, TimeoutError ... by cause
        said = " ".join(str(error).split())[-300:] or type(error).__name__
        raise UnreachableError(f"Ray does not start on this machine: {said}", "see `halora doctor`") from None


def _end_processes(folder: str) -> None:
    """End what a start that failed left running: our children whose command names the folder."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(folder in argument for argument in child.cmdline()):
                child.kill()


@contextmanager
def own_folder(prefix: str) -> Iterator[str]:
    """A new folder for the sockets, logs and spilled objects of a Ray of our own, removed after the block.

    It is in `RAY_TMPDIR`, `TMPDIR` or `/tmp`, the first whose path leaves room for a socket's.

    Args:
        prefix: What its name begins with.

    Raises:
        UserError: There is none.
    """
    parents = dict.fromkeys(filter(None, (os.environ.get("RAY_TMPDIR"), gettempdir(), "/tmp", "/var/tmp")))
    longest = _LONGEST_FOLDER - len(f"/{prefix}12345678")
    for parent in parents:
        if len(os.fsencode(os.path.abspath(parent))) > longest:
            continue
        try:
            folder = mkdtemp(prefix=prefix, dir=os.path.abspath(parent))
        except OSError:
            continue
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    raise UserError(
        f"Ray's sockets need a folder that can be written, with a path of {longest} bytes at most; "
        f"tried {', '.join(parents)}",
        "set RAY_TMPDIR to one",
    )


@contextmanager
def joined(cluster: Cluster, environment: dict[str, str]) -> Iterator[None]:
    """This process as a driver of a running cluster while the block runs.

    Raises:
        UnreachableError: The cluster does not answer, or not to us.
    """
    check_listening(cluster)
    with TemporaryDirectory() as folder:
        runtime_env: dict[str, Any] = {"env_vars": environment, **shipped(cluster.wheel, Path(folder))}
        try:
            with redirect_stderr(StringIO()):
                ray.init(
                    address=cluster.address,
                    log_to_driver=False,
                    logging_level="CRITICAL",
                    namespace=NAMESPACE,
                    runtime_env=runtime_env,
                )
        except Exception as error:  # ConnectionError, AuthenticationError, RuntimeError of unequal versions ...
            raise unreachable(cluster.address, error) from None
        try:
            signals_as_interrupt()
            yield
        finally:
            ray.shutdown()


def check_listening(cluster: Cluster) -> None:
    """Refuse an address at which nobody listens; Ray itself tries for ten minutes.

    Raises:
        UnreachableError: Nobody does.
    """
    if cluster.address == "auto":
        return
    parts = urlsplit(cluster.address if cluster.elsewhere else f"ray://{cluster.address}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_LISTENING_S).close()
    except OSError as error:
        raise unreachable(cluster.address, error) from None


def shipped(wheel: Path | None, folder: Path) -> dict[str, Any]:
    """The part of Ray's runtime environment that brings a wheel's code to every node; it is unpacked in `folder`.

    Ray would install a wheel with all its dependencies; its code alone is what differs from what is installed.
    """
    if wheel is None:
        return {}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return {"py_modules": [str(folder / "halora")]}


def unreachable(address: str, error: BaseException) -> UnreachableError:
    """What a user is told when a cluster does not take us."""
    text = " ".join(str(error).split())
    if "token" in text.lower() or "auth" in type(error).__name__.lower():
        return UnreachableError(
            f"the cluster at {address} refuses the token of this machine",
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it: the head's is in ~/.ray/auth_token",
        )
    if "version" in text.lower():
        return UnreachableError(
            f"this machine and the cluster at {address} have different versions: {text[:300]}",
            "install the same lock file on both, see docs/cluster.md",
        )
    return UnreachableError(
        f"no Ray cluster answers at {address}: {text[-300:] or type(error).__name__}",
        "check the address, that Ray runs there (`ray status`), and that RAY_AUTH_TOKEN is its token",
    )


def worker_share(sweep: SweepConfig) -> dict[str, float]:
    """What Ray sets aside for each worker of a trial: cores, and its share of the GPUs that are there now."""
    gpus = sweep.resources.gpus
    if gpus is None:
        there = int(ray.cluster_resources().get("GPU", 0))
        gpus = 1 / max(ceil(sweep.concurrent * sweep.workers / there), 1) if there else 0
    return {"CPU": float(sweep.resources.cpus or 1), "GPU": float(gpus)}


def gpus_per_trial(sweep: SweepConfig) -> float:
    """GPUs that Ray sets aside for a trial, all its workers together; see `worker_share`."""
    return worker_share(sweep)["GPU"] * sweep.workers
