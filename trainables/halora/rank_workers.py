"""The other workers of a trial: Ray actors in its placement group that work in step with the trial's own process.

A process alone on its trial has none of them and needs no Ray. The trial's process is rank 0. What it does in a block
of `RankWorkers.in_step`, its peers do meanwhile, and both meet in the collective operations of their process group. A
peer that ends takes its connections with it, so rank 0 learns of it at once; one that hangs is given up when the
group's timeout has passed. Either way the block ends in an error that names the worker, never in a wait without end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halora.errors import UserError
from halora.training.memory import ran_out_of_memory

_ERROR_WAIT_S = 10.0
"""How long a peer may take to say what happened to it, once rank 0 has failed."""


class WorkerLostError(UserError):
    """A worker of a trial ended, hung or failed by itself; the trial can resume from its checkpoint with new ones."""


class WorkerOutOfMemoryError(WorkerLostError):
    """Memory ran out for a worker of a trial, another than that of rank 0."""


class RankWorkers:
    """Actors of rank 1 and up. They outlive a trial, so that each loads the base model once.

    Args:
        actor: Class of the actors, made with its rank.
        count: Number of peers; with none, everything here does nothing.
    """

    def __init__(self, actor: type, count: int) -> None:
        self.count = count
        self._class = actor
        self._actors: list[Any] = []

    @property
    def host(self) -> str:
        """Address at which peers reach this process."""
        if not self.count:
            return "127.0.0.1"
        import ray

        return str(ray.util.get_node_ip_address())

    def start(self) -> None:
        """Start the actors, each in a bundle of its own, unless they run."""
        if self._actors or not self.count:
            return
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.get_current_placement_group()
        for rank in range(1, self.count + 1):
            place = PlacementGroupSchedulingStrategy(group, rank) if group else "DEFAULT"
            bundle = group.bundle_specs[rank] if group else {"CPU": 1}
            remote = ray.remote(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0))(self._class)
            self._actors.append(remote.options(scheduling_strategy=place).remote(rank))

    def kill(self) -> None:
        """End the actors; `start` makes new ones."""
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
        self._actors = []

    @contextmanager
    def in_step(self, method: str, *arguments: Any, timeout_s: float) -> Iterator[None]:
        """Have every peer carry out `method` while the block runs here, and wait for them at its end.

        An error that all workers meet together, as a loss that is not finite, leaves the peers usable.

        Args:
            method: Name of a method of the actors.
            arguments: Its arguments.
            timeout_s: How long a peer may take after this process.

        Raises:
            WorkerLostError: A peer ended, hung or failed; all of them are killed.
        """
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        try:
            yield
        except Exception as error:
            lost = self._lost(calls, _ERROR_WAIT_S)
            together = isinstance(error, UserError | FloatingPointError)
            if lost is not None and not (together and lost.answered):
                self.kill()
            if lost is None or together:
                raise
            raise lost.error from error
        if lost := self._lost(calls, timeout_s):
            self.kill()
            raise lost.error

    def _lost(self, calls: list[Any], timeout_s: float) -> "_Lost | None":
        """What happened to the first peer that did not do its part; one that ended before one that followed it."""
        if not calls:
            return None
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        ended: list[WorkerLostError] = []
        silent: list[WorkerLostError] = []
        failed: list[WorkerLostError] = []
        for rank, call in enumerate(calls, start=1):
            worker = f"worker {rank} of {len(calls) + 1}"
            try:
                ray.get(call, timeout=0)
            except GetTimeoutError:
                silent.append(WorkerLostError(f"{worker} did not answer for {timeout_s:g} s"))
            except RayTaskError as error:
                kind = WorkerOutOfMemoryError if ran_out_of_memory(error.cause) else WorkerLostError
                failed.append(kind(f"{worker} failed: {_first_line(error.cause)}"))
            except RayError as error:
                ended.append(WorkerLostError(f"{worker} ended: {_first_line(error)}"))
        told = ended + silent + failed
        return _Lost(told[0], answered=not ended and not silent) if told else None


class _Lost:
    """A peer that did not do its part, and whether all peers live and answer nevertheless."""

    def __init__(self, error: WorkerLostError, answered: bool) -> None:
        self.error, self.answered = error, answered


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
