"""Oracle: the same changes to a study in memory, which nothing disturbs."""

import threading
import time

import optuna
import psycopg
import pytest
from optuna.distributions import FloatDistribution
from services import postgres_server

from halora.errors import UnreachableError
from halora.sweep.search.study import State, SweepStudy
from halora.sweep.search.study_storage import PatientStorage

TRIALS = 40


@pytest.fixture(scope="module")
def server():
    with postgres_server() as server:
        yield server


def _change(study: SweepStudy) -> list[tuple]:
    """Begin, score and end many trials; what the study then says of them."""
    for i in range(TRIALS):
        number = study.begin(
            {"x": i / TRIALS}, {"x": FloatDistribution(0, 1)}, float(i), system_attrs={}, constraints={"c": -1.0}
        )
        study.count_lost_workers(study.trial(number), 1)
        study.scored(study.trial(number), {"accuracy": i / TRIALS, "step": 3})
        if i % 2:
            study.finished(study.trial(number), i / TRIALS, {})
        else:
            study.failed(number)
        study.spend(i / 60)
    return [
        (trial.number, trial.state, dict(trial.values), trial.energy_uj_per_token, trial.lost_workers, trial.accuracy)
        for trial in study.trials()
    ]


def test_connections_that_break_at_any_moment_lose_and_repeat_nothing(server):
    expected = _change(SweepStudy("plain", optuna.storages.InMemoryStorage()))
    assert [state for _, state, *_ in expected] == [State.FAILED, State.FINISHED] * (TRIALS // 2)
    said, ended, broken = [], threading.Event(), 0

    def disturb():
        nonlocal broken
        kill = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname = 't'"
        with psycopg.connect(server.uri, autocommit=True) as connection:
            while not ended.wait(0.25):
                broken += len(connection.execute(kill).fetchall())

    storage = PatientStorage(server.uri, said.append)
    study = SweepStudy("disturbed", storage)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        found = _change(study)
    finally:
        ended.set()
        thread.join()
    assert found == expected
    assert broken > 5
    assert said.count("the study's database has gone; the sweep waits for it") > 0
    again = SweepStudy("disturbed", PatientStorage(server.uri, said.append))
    assert [trial.number for trial in again.trials()] == list(range(TRIALS))


def test_a_server_that_stops_is_waited_for_but_not_for_ever(server, monkeypatch):
    said = []
    study = SweepStudy("away", PatientStorage(server.uri, said.append))
    server.stop()
    threading.Timer(2.0, server.start).start()
    began = time.monotonic()
    study.request_stop(True)
    assert study.stopping
    assert time.monotonic() - began > 1
    assert said[-1] == "the study's database is back"
    monkeypatch.setattr("halora.sweep.search.study_storage._PATIENCE_S", 0.5)
    server.stop()
    with pytest.raises(UnreachableError, match="has been away"):
        study.request_stop(False)
    server.start()
