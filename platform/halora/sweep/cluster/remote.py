"""Carries a `halora` command out in a cluster, whichever machine it is typed on.

Three ways, by the address: as a Ray job on the head (`http://`), by an actor there through Ray's client (`ray://`), or,
on a machine of the cluster itself, as a process of its own that outlives the terminal.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import ray
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from halora.sweep.cluster.cluster import BEGINS, Cluster
from halora.sweep.cluster.session import check_listening, joined, shipped, unreachable
from halora.sweep.cluster.versions import CLIENT, own_code

_POLL_S = 0.5
_HEAD_NODE = {"node:__internal_head__": 0.001}
_RAY_S_OWN = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_WORKER_ID")  # variables of the worker that starts a process
_KEPT_S = 60.0  # that an actor stays after its command, for whoever asks how it ended


class Running(Protocol):
    """A command that was started."""

    def output(self) -> str:
        """All it has said so far."""

    def code(self) -> int | None:
        """Its exit code, once it has ended."""


def carry_out(
    cluster: Cluster, arguments: Sequence[str], show: Callable[[str], None], *, stdin: str = "", until: str = ""
) -> int | None:
    """Run `halora` on the head of a cluster and show what it says.

    Args:
        cluster: The cluster.
        arguments: Of the command.
        show: Given what it said since the last time.
        stdin: What it reads, on another machine.
        until: Leave it alone once it has said this; it runs on.

    Returns:
        Its exit code; none where it runs on.

    Raises:
        UnreachableError: The cluster does not answer, or not to us.
    """
    check_listening(cluster)
    shown = 0
    with _started(cluster, arguments, stdin) as running:
        while True:
            try:
                code, said = running.code(), running.output()
            except (RayError, RuntimeError, OSError) as error:  # the head, or the way to it, has gone
                raise unreachable(cluster.address, error) from None
            _, mark, own = said.partition(f"{BEGINS}\n")
            show(own[shown:])
            shown = len(own)
            if code is not None or (until and until in own):
                if not mark:  # the command was not found, or could not begin
                    show(said)
                return code
            time.sleep(_POLL_S)


@contextmanager
def _started(cluster: Cluster, arguments: Sequence[str], stdin: str) -> Iterator[Running]:
    if cluster.address.startswith("ray://"):
        with joined(cluster, {CLIENT: own_code()}):
            yield _Actor(_command(arguments, stdin))
    elif cluster.elsewhere:
        yield _Job(cluster, _command(arguments, stdin))
    else:
        yield _Process([sys.executable, "-m", "halora.cli.main", *arguments], {CLIENT: own_code()})


def _command(arguments: Sequence[str], stdin: str) -> str:
    """For a shell on the head, in the home folder: where Ray was started there means nothing."""
    halora = f"halora {shlex.join(arguments)}"
    return f"cd && printf %s {shlex.quote(stdin)} | {halora}" if stdin else f"cd && exec {halora}"


class _Job:
    """A Ray job."""

    def __init__(self, cluster: Cluster, command: str) -> None:
        try:
            self._client = JobSubmissionClient(cluster.address)
            with tempfile.TemporaryDirectory() as folder:
                environment = {"env_vars": {CLIENT: own_code()}, **shipped(cluster.wheel, Path(folder))}
                self._id = self._client.submit_job(entrypoint=command, runtime_env=environment)
        except Exception as error:  # ConnectionError, AuthenticationError, RuntimeError with an HTTP status
            raise unreachable(cluster.address, error) from None

    def output(self) -> str:
        return str(self._client.get_job_logs(self._id))

    def code(self) -> int | None:
        job = self._client.get_job_info(self._id)
        if not JobStatus(job.status).is_terminal():
            return None
        if job.driver_exit_code is None and job.status != JobStatus.SUCCEEDED:
            raise RuntimeError(f"its job did not start: {job.message}")
        return job.driver_exit_code or 0


class _Actor:
    """A process of the head, held by a detached actor."""

    def __init__(self, command: str) -> None:
        remote = ray.remote(num_cpus=0, resources=_HEAD_NODE)(_Shell)
        self._shell = remote.options(lifetime="detached").remote(command)

    def output(self) -> str:
        return str(ray.get(self._shell.output.remote()))

    def code(self) -> int | None:
        code: int | None = ray.get(self._shell.code.remote())
        return code


class _Process:
    """A process of this machine, in a session of its own."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        file, name = tempfile.mkstemp(prefix="halora-", suffix=".log")
        self._log = Path(name)
        own = {name: value for name, value in os.environ.items() if name not in _RAY_S_OWN} | environment
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=own, start_new_session=True
        )
        os.close(file)

    def output(self) -> str:
        return self._log.read_text(errors="replace", encoding="utf-8")

    def code(self) -> int | None:
        return self._process.poll()


class _Shell(_Process):
    """The actor of `_Actor`: leaves some time after its command."""

    def __init__(self, command: str) -> None:
        super().__init__(["bash", "-c", command], {})
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        self._process.wait()
        time.sleep(_KEPT_S)
        os._exit(0)
