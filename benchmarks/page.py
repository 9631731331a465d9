"""How long the page takes on the server, and how much it sends, beside MLflow's own search of the same runs.

Cold: the first look at a sweep since the server was started, its index made before. Warm: any later one. Filtered:
with a constraint that was not asked for before. The same trials are in a SQLite database of MLflow, as runs with their
params, metrics and tags, and searched for through its client. docs/lab.md has the result.

    python benchmarks/page.py
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from recorded_sweeps import generated_journal
from starlette.testclient import TestClient

from halora.dashboard.app import create_app
from halora.records import names
from halora.records.index import read_ledger
from halora.records.store import Store
from halora.spaces.sweep import SHIPPED

_FOUND = 1000  # runs on one page of a search


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most-runs", type=int, default=2000, help="in MLflow; making 10,000 takes minutes")
    arguments = parser.parse_args()
    print(f"{'trials':>7} {'what':<28}{'median ms':>10}{'worst ms':>10}{'kB':>8}")
    for trials in arguments.trials:
        with tempfile.TemporaryDirectory() as folder:
            _measure(Store(Path(folder)), trials, arguments.rounds, arguments.most_runs)


def _measure(store: Store, trials: int, rounds: int, most_runs: int) -> None:
    folder = store.sweep("quickstart")
    folder.root.mkdir(parents=True)
    folder.sweep_file.write_text((SHIPPED / "quickstart.yaml").read_text())
    generated_journal(folder.journal_file, trials)
    read_ledger(store, folder.name)  # the index, as a sweep leaves it

    def cold() -> int:
        return _size(TestClient(create_app(store), base_url="http://127.0.0.1"), "/sweeps/quickstart")

    client = TestClient(create_app(store), base_url="http://127.0.0.1")
    number = iter(range(10**6))
    _size(client, "/sweeps/quickstart")
    ways: dict[str, Callable[[], int]] = {
        "page, cold": cold,
        "page, warm": lambda: _size(client, "/sweeps/quickstart"),
        "page, filtered": lambda: _size(client, f"/sweeps/quickstart?accuracy=0.{500 + next(number)}"),
        "card": lambda: _size(client, f"/sweeps/quickstart/trials/{next(number)}"),
        "list": lambda: _size(client, "/"),
    }
    if trials <= most_runs:
        ways["MLflow search_runs"] = _searched(store, trials)
    for name, way in ways.items():
        times_ms, size = [], 0
        for _ in range(rounds):
            began = time.perf_counter()
            size = way()
            times_ms.append(1000 * (time.perf_counter() - began))
        print(f"{trials:>7} {name:<28}{median(times_ms):>10.0f}{max(times_ms):>10.0f}{size / 1000:>8.0f}", flush=True)


def _size(client: TestClient, address: str) -> int:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return len(answer.content)


def _searched(store: Store, trials: int) -> Callable[[], int]:
    """The same trials as runs, and a search for all of them, which a page over MLflow alone would have to make."""
    client = MlflowClient(store.tracking_uri)
    experiment = client.create_experiment("beside")
    for point in read_ledger(store, "quickstart").points():
        run_id = client.create_run(experiment).info.run_id
        metrics = [Metric(name, value, point.ended_ms, 0) for name, value in point.metrics.items()]
        params = [Param(name, str(value)) for name, value in point.params.items()]
        tags = [RunTag(names.SWEEP, "quickstart"), RunTag(names.NUMBER, str(point.number))]
        tags += [RunTag(names.LABEL.format(label=label), str(value)) for label, value in point.labels.items()]
        client.log_batch(run_id, metrics, params, tags)

    def search() -> int:
        found, token = 0, None
        while True:
            page = client.search_runs(
                [experiment], names.query({names.SWEEP: "quickstart"}), max_results=_FOUND, page_token=token
            )
            found += len(page)
            token = page.token
            if not token:
                assert found == trials
                return 0

    return search


if __name__ == "__main__":
    main()
