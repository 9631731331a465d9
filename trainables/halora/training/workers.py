"""The DeepSpeed process group a training runs in: of one worker, or of several that share each step's rows.

A group lasts for one training. Those of one worker are kept, as they hold nothing; a process that was in a larger one
leaves it and joins the next at another address.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from halora.errors import UserError
from halora.training.models import extensions_dir


@dataclass(frozen=True)
class WorkerRank:
    """One worker's place in its process group.

    Attributes:
        rank: 0 for the worker that reports and writes checkpoints.
        workers: Number of workers.
        host: Address of rank 0.
        port: Port on which rank 0 gathers the group.
        timeout_s: Longest wait of one worker for another.
    """

    rank: int = 0
    workers: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    timeout_s: int = 300


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def interface_towards(host: str) -> str:
    """The network interface by which this machine reaches an address.

    Left to themselves, gloo and nccl take the one that the machine's own name leads to, which may be the loopback.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of a datagram socket: sends nothing
        own = probe.getsockname()[0]
    return next(name for name, ones in psutil.net_if_addrs().items() if own in {one.address for one in ones})


def join_process_group(place: WorkerRank | None = None) -> None:
    """Make this process a worker of a DeepSpeed group: of one alone where no place is given."""
    place = place or WorkerRank()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    # This environment's ninja before the system's: each builds DeepSpeed's op anew when it finds the other's log.
    own = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys([own, *os.environ["PATH"].split(os.pathsep)]))
    import deepspeed

    if torch.distributed.is_initialized():
        if place.workers == torch.distributed.get_world_size() == 1:
            return
        leave_process_group()
    os.environ.update(
        {
            "RANK": str(place.rank),
            "LOCAL_RANK": "0",  # a worker sees its own GPU only
            "WORLD_SIZE": str(place.workers),
            "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port or free_port()),
            "GLOO_SOCKET_IFNAME": (interface := interface_towards(place.host)),
            "NCCL_SOCKET_IFNAME": interface,
        }
    )
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=place.timeout_s),
        verbose=False,
    )


def bound_waits(place: WorkerRank) -> None:
    """Put the timeout on every group, those too that DeepSpeed has made with torch's half an hour."""
    for group in list(c10d._world.pg_map):
        torch.distributed.set_timeout(timedelta(seconds=place.timeout_s), group)


def leave_process_group() -> None:
    """Leave the group, whether the other workers are alive or not, and forget what DeepSpeed keeps of it."""
    import deepspeed

    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


@contextmanager
def leaving_on_failure() -> Iterator[None]:
    """Leave the group on a failure of this worker alone, so that the others do not wait for it.

    What a user can fix, and a loss that is not finite, all workers meet together.
    """
    try:
        yield
    except (UserError, FloatingPointError):
        raise
    except Exception:
        leave_process_group()
        raise


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean of each worker's values; every worker must ask."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values
