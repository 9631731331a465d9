"""Compares what MLflow's own tables hold of a sweep with the sweep's event log, row by row."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy

_RUNS = """
select r.run_uuid, r.status, r.end_time, n.value as number from runs r
join tags l on l.run_uuid = r.run_uuid and l.key = 'halora.launch' and l.value = :launch
join tags s on s.run_uuid = r.run_uuid and s.key = 'halora.sweep' and s.value = :sweep
left join tags n on n.run_uuid = r.run_uuid and n.key = 'halora.trial'
where r.lifecycle_stage = 'active'
"""
_METRICS = "select run_uuid, key, value, timestamp, step, is_nan from metrics"
STATES = {
    **dict.fromkeys(("sweep_started", "began", "resumed", "out_of_memory"), "running"),
    **dict.fromkeys(("sweep_finished", "finished"), "finished"),
    **dict.fromkeys(("sweep_interrupted", "interrupted"), "interrupted"),
    "stopped": "stopped",
    "failed": "failed",
    "discarded": "discarded",
}
"""Where an event says that its trial, or the sweep, stands."""
_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "discarded": "KILLED",
}


def logged_events(path: Path) -> list[dict[str, Any]]:
    """All entries of an event log but its header."""
    return [entry for line in path.read_text().splitlines() if "kind" in (entry := json.loads(line))]


def differences(database: str, sweep: str, log: Path) -> list[str]:
    """What MLflow's database lacks, doubles or has otherwise than the event log; empty if it is exactly the same.

    Args:
        database: SQLAlchemy URI of MLflow's database.
        sweep: Name of the sweep.
        log: Its event log, which names the launch.
    """
    launch = json.loads(log.read_text().partition("\n")[0])["launch"]
    engine = sqlalchemy.create_engine(database)
    with engine.connect() as connection:
        runs = connection.execute(sqlalchemy.text(_RUNS), {"launch": launch, "sweep": sweep}).all()
        metrics = connection.execute(sqlalchemy.text(_METRICS)).all()
    engine.dispose()
    numbers = {run.run_uuid: None if run.number is None else int(run.number) for run in runs}
    doubled = [number for number, count in Counter(numbers.values()).items() if count > 1]
    found = [f"{'sweep' if number is None else f'trial {number}'} has several runs" for number in doubled]

    expected: Counter[tuple[Any, ...]] = Counter()
    states: dict[int | None, dict[str, Any]] = {}
    for entry in logged_events(log):
        for name, value in entry.get("metrics", {}).items():
            at_rung = entry["kind"] == "scored" and not entry.get("final", True)
            row = (entry["trial"], f"rung_{name}" if at_rung else name, entry["time_ms"], entry.get("step", 0))
            expected[(*row, "nan" if value != value else float(value))] += 1
        if entry["kind"] in STATES:
            states[entry["trial"]] = entry
    recorded = Counter(
        (numbers[m.run_uuid], m.key, m.timestamp, m.step, "nan" if m.is_nan else m.value)
        for m in metrics
        if m.run_uuid in numbers
    )
    found += [f"lost: {row}" for row in expected - recorded]
    found += [f"doubled or foreign: {row}" for row in recorded - expected]

    missing = states.keys() - set(numbers.values())
    found += [f"trial {number} has no run" for number in missing]
    for run in runs:
        state = states[numbers[run.run_uuid]]
        status = _STATUS[STATES[state["kind"]]]
        ended = None if status == "RUNNING" else state["time_ms"]
        if (run.status, run.end_time) != (status, ended):
            found.append(f"trial {numbers[run.run_uuid]} is {run.status}, recorded as {state['kind']}")
    return found
