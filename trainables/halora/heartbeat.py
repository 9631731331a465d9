"""Finds workers that hang: Ray notices a process that ended, and not one that stands still.

Every worker process says every few seconds, from a thread of its own, that it lives. An actor beside the driver keeps
when each was last heard; the driver asks it who has been silent too long, and ends those where they are.
"""

import os
import signal
import threading
import time
from dataclasses import dataclass

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_BEATS_IN_TIME = 4  # that a worker has until it counts as silent


@dataclass(frozen=True)
class Process:
    """A worker's process.

    Attributes:
        node_id: Ray's id of its node.
        pid: Its number there.
        started_s: When it began, in seconds since the epoch; tells it from a later one of the same number.
    """

    node_id: str
    pid: int
    started_s: float

    @classmethod
    def own(cls) -> "Process":
        """The process that asks."""
        pid = os.getpid()
        return cls(ray.get_runtime_context().get_node_id(), pid, psutil.Process(pid).create_time())

    def kill(self) -> None:
        """End it, from another process on any node; does nothing where it has ended, or its node."""
        there = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill).remote(self)


def _kill(process: Process) -> None:
    try:
        if psutil.Process(process.pid).create_time() == process.started_s:
            os.kill(process.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass


class Heartbeats:
    """When each worker was last heard, by a monotonic clock; to be a Ray actor."""

    def __init__(self) -> None:
        self._heard: dict[Process, tuple[float, str]] = {}

    def beat(self, process: Process, job: str) -> None:
        """A worker lives, and has that job."""
        self._heard[process] = time.monotonic(), job

    def end(self, process: Process) -> None:
        """A worker ends; nothing more is expected of it."""
        self._heard.pop(process, None)

    def silent(self, longest_s: float) -> list[tuple[Process, str]]:
        """Those not heard for so long, and the jobs they had; each is told once."""
        now = time.monotonic()
        found = [(process, job) for process, (heard, job) in self._heard.items() if now - heard > longest_s]
        for process, _ in found:
            del self._heard[process]
        return found


class HeartbeatSender:
    """The worker's end: a thread that beats while the process runs.

    Args:
        name: Of the `Heartbeats` actor.
        longest_s: Silence after which the worker counts as hung.
    """

    def __init__(self, name: str, longest_s: float) -> None:
        self.job = ""
        self._heartbeats, self._every_s = ray.get_actor(name), longest_s / _BEATS_IN_TIME
        self._process = Process.own()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye."""
        self._stopped.set()
        self._thread.join()
        if ray.is_initialized():
            self._heartbeats.end.remote(self._process)

    def _beat(self) -> None:
        while ray.is_initialized():  # a call after Ray's end would start another Ray, which ends with this thread
            self._heartbeats.beat.remote(self._process, self.job)
            if self._stopped.wait(self._every_s):
                return
