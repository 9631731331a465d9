"""Looks at every node of a cluster before a sweep begins there, so that what cannot work is told at once."""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from halora.errors import UnreachableError, attempt
from halora.records.store import Store
from halora.storage import check_storage
from halora.sweep.cluster.cluster import Cluster
from halora.sweep.cluster.session import joined
from halora.sweep.cluster.versions import own_versions
from halora.training.models import check_available

_LOOKING_S = 180.0  # a node that installs a wheel first takes a while


@dataclass(frozen=True)
class NodeReport:
    """What one node has to say.

    Attributes:
        address: Its address.
        cpus: Cores that Ray gives to trials there.
        gpus: GPUs likewise.
        problems: Why no trial could run there; one sentence each.
    """

    address: str
    cpus: float
    gpus: float
    problems: tuple[str, ...]


def check_cluster(cluster: Cluster, store: Store, storage: str = "", models: Sequence[str] = ()) -> None:
    """Refuse a cluster on which a sweep could not run.

    Args:
        cluster: The cluster.
        store: Where the sweep will be recorded.
        storage: Where its trials keep their files, where that is not the store.
        models: Base models that every node must be able to load.

    Raises:
        UnreachableError: It does not answer, or a node differs from this process, or does not reach what it needs.
    """
    refuse(look_at(cluster, store, storage, models))


def refuse(reports: Sequence[NodeReport]) -> None:
    """Refuse a cluster whose nodes have problems.

    Raises:
        UnreachableError: With all of them.
    """
    problems = [f"node {report.address}: {problem}" for report in reports for problem in report.problems]
    if problems:
        raise UnreachableError(problems, "fix the nodes and run again; `halora cluster check --address` looks again")


def look_at(cluster: Cluster, store: Store, storage: str = "", models: Sequence[str] = ()) -> list[NodeReport]:
    """What every living node of a cluster has to say.

    Raises:
        UnreachableError: The cluster does not answer, or not to us.
    """
    with joined(cluster, {}), _probe(store.root) as probe:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        expected, asked = own_versions(), {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_look)
            asked[node["NodeID"]] = look.remote(expected, str(probe), storage, list(models))
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LOOKING_S)
        return [_report(node, asked[node["NodeID"]]) for node in nodes]


def _report(node: Mapping[str, object], asked: "ray.ObjectRef[list[str]]") -> NodeReport:
    try:
        problems = ray.get(asked, timeout=0)
    except RayError as error:
        text = " ".join(str(error).split())
        missing = "No module named 'halora" in text
        problems = [
            "halora is not installed there; install the wheel, or bring it along with --wheel"
            if missing
            else f"it did not answer: {text[-300:]}"
        ]
    resources = node["Resources"]
    assert isinstance(resources, Mapping)
    return NodeReport(
        str(node["NodeManagerAddress"]), resources.get("CPU", 0), resources.get("GPU", 0), tuple(problems)
    )


def _look(expected: Mapping[str, str], probe: str, storage: str, models: list[str]) -> list[str]:
    """What is wrong on the node that runs this."""
    own = own_versions()
    problems = [
        f"{name} {own[name]} there, {asked} here; install the same wheel and lock file on both"
        for name, asked in expected.items()
        if own[name] != asked
    ]
    if storage:
        attempt(problems, lambda: check_storage(storage))
    elif not Path(probe).exists():
        problems.append(
            f"it does not see '{Path(probe).parent}'; name a place that all nodes reach with --checkpoint-url"
        )
    elif not os.access(Path(probe).parent, os.W_OK):
        problems.append(f"it cannot write the store '{Path(probe).parent}'")
    for model in models:
        attempt(problems, lambda model=model: check_available(model))  # type: ignore[misc]
    return problems


@contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """A file that a node sees if it sees the folder."""
    path = folder / f".seen-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
