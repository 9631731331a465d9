"""How long a sweep's page takes on the server, beside MLflow's own search of its runs, which a page over it would need.

Cold: the first look at a sweep since the server was started, its index made before. Warm: any later one. Filtered:
with a constraint that was not asked for before. The same trials are runs in a SQLite database of MLflow, with their
params, metrics and tags, and are searched for a thousand at a time through its client, in this process as ours.

    python -m benchmarks.page --rounds 7
"""

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from recorded_sweeps import generated_event_log
from sqlalchemy import create_engine, insert
from starlette.testclient import TestClient

from benchmarks.harness import Record, Way, Work, interleave, parser, record, save
from halora.analysis.trials import RecordedTrial
from halora.dashboard.app import create_app
from halora.records import names
from halora.records.index import read_sweep_state
from halora.records.store import Store
from halora.spaces.sweep import SHIPPED

_SWEEP = "quickstart"
_FOUND = 1000  # runs on one page of a search, the client's default
_LARGEST = 1_000_000  # bytes of a view besides Plotly's code, which a browser keeps


def main() -> None:
    """Run, print and record."""
    arguments = parser(__doc__ or "", rounds=7, threads=None)
    arguments.add_argument("--trials", type=int, nargs="+", default=[2000, 10_000])
    asked = arguments.parse_args()
    records: list[Record] = []
    for trials in asked.trials:
        with tempfile.TemporaryDirectory() as folder:
            records += _measured(Store(Path(folder)), trials, asked.rounds)
    save(records, asked.results)


def _measured(store: Store, trials: int, rounds: int) -> list[Record]:
    folder = store.sweep(_SWEEP)
    folder.root.mkdir(parents=True)
    folder.sweep_file.write_text((SHIPPED / f"{_SWEEP}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    generated_event_log(folder.event_log_file, trials)
    points = read_sweep_state(store, _SWEEP).points()  # makes the index, as a sweep leaves it
    seconds = interleave({"MLflow": searched(store, points), **_pages(store, trials)}, rounds)
    other = seconds.pop("MLflow")
    return [
        record(f"page/{trials} trials, {name}, against MLflow's search", own, other) for name, own in seconds.items()
    ]


def _pages(store: Store, trials: int) -> dict[str, Way]:
    client = TestClient(create_app(store), base_url="http://127.0.0.1")
    thresholds = iter(range(500, 1000))

    def page(query: str = "", own: TestClient = client) -> Work:
        answer = own.get(f"/sweeps/{_SWEEP}{query}")
        found = re.search(r" of (\d+) finished trials qualify", answer.text)
        assert found, answer.text
        assert len(answer.content) < _LARGEST
        return _work(int(found[1]))

    return {
        "cold": lambda: page(own=TestClient(create_app(store), base_url="http://127.0.0.1")),
        "warm": page,
        "filtered": lambda: page(f"?accuracy=0.{next(thresholds)}"),
    }


def searched(store: Store, points: Sequence[RecordedTrial]) -> Way:
    """A search for the trials as runs of MLflow, which are made before."""
    client = MlflowClient(store.tracking_uri)
    experiment = client.create_experiment("beside", artifact_location=(store.root / "artifacts").as_uri())
    fill(store, int(experiment), points)

    def found() -> Iterator[str]:
        token = None
        while token != "":
            query = names.query({names.SWEEP: _SWEEP})
            page = client.search_runs([experiment], query, max_results=_FOUND, page_token=token)
            yield from (run.data.tags[names.NUMBER] for run in page)
            token = page.token or ""

    def search() -> Work:
        return _work(len(set(found())))

    return search


def fill(store: Store, experiment: int, points: Sequence[RecordedTrial]) -> None:
    """Write trials into MLflow's tables as its client would, which takes minutes for ten thousand."""
    runs, params, tags, metrics = [], [], [], []
    for point in points:
        own = {"run_uuid": f"{point.number:032x}"}
        times = {"start_time": point.began_ms, "end_time": point.ended_ms}
        name = f"{_SWEEP}/{point.number}"
        runs.append({**own, **times, "name": name, "user_id": "", "status": "FINISHED", "experiment_id": experiment})
        params += [{**own, "key": key, "value": str(value)} for key, value in point.params.items()]
        told = {names.LABEL.format(label=label): value for label, value in point.labels.items()}
        told |= {names.SWEEP: _SWEEP, names.NUMBER: point.number, "mlflow.runName": name}
        tags += [{**own, "key": key, "value": str(value)} for key, value in told.items()]
        measured = {"timestamp": point.ended_ms, "step": 0, "is_nan": False}
        metrics += [{**own, **measured, "key": key, "value": value} for key, value in point.metrics.items()]
    engine = create_engine(store.tracking_uri)
    with engine.begin() as connection:
        tables = (SqlRun, runs), (SqlParam, params), (SqlTag, tags), (SqlMetric, metrics), (SqlLatestMetric, metrics)
        for table, rows in tables:
            connection.execute(insert(table), rows)
    engine.dispose()


def _work(trials: int) -> Work:
    return Work(rows=trials, dtype="", threads=1, loss_tokens=0)


if __name__ == "__main__":
    main()
