"""Oracle: the same changes to a study in memory, which nothing disturbs."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import optuna
import psycopg
import pytest
from optuna.distributions import FloatDistribution
from services import postgres_server

from halora.errors import UnreachableError
from halora.events import Scored
from halora.records.store import SweepFolder
from halora.sweep.search.study import State, SweepStudy
from halora.sweep.search.study_storage import STUDY_URL, PatientStorage, storage_of

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
        rung = Scored(
            trial=number, step=3, metrics={"accuracy": i / TRIALS}, accuracy_by_chip=[i / TRIALS], final=False
        )
        study.scored(study.trial(number), rung)
        if i % 2:
            study.finished(study.trial(number), replace(rung, step=9, final=True))
            study.tell(study.trial(number), {})
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


def test_what_the_database_refuses_is_told_at_once_with_its_cause(server, monkeypatch, tmp_path):
    """Waiting changes nothing about these; the message of one that cannot be opened used to hold no cause at all."""
    said = []
    study = SweepStudy("refused", PatientStorage(server.uri, said.append))
    with psycopg.connect(server.uri, autocommit=True) as connection:
        connection.execute("alter table trials rename to hidden")
        with pytest.raises(UnreachableError, match='database refuses: relation "trials" does not exist'):
            study.trials()
        connection.execute("alter table hidden rename to trials")
        assert study.trials() == []
        connection.execute("alter database t set default_transaction_read_only = on")
    storage = PatientStorage(server.uri, said.append)
    with psycopg.connect(server.uri, autocommit=True) as connection:
        with pytest.raises(UnreachableError, match=r"database refuses: cannot execute .* in a read-only transaction"):
            SweepStudy("refused", storage).request_stop(True)
        connection.execute("set default_transaction_read_only = off")
        connection.execute("alter database t reset default_transaction_read_only")
    assert said == []
    nowhere = server.uri.rpartition("/")[0] + "/nowhere"
    monkeypatch.setenv(STUDY_URL, nowhere.replace("//halora@", "//halora:sesame@"))
    with pytest.raises(UnreachableError, match=r'cannot be opened: .*database "nowhere" does not exist') as told:
        storage_of(SweepFolder(tmp_path / "none"))
    assert "sesame" not in str(told.value)


# The journal file.


def _begin(study, i):
    space = {"x": FloatDistribution(0, 1)}
    return study.begin({"x": i / 100}, space, float(i), system_attrs={}, constraints={})


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b"\xff\x00"])
def test_a_line_of_a_study_that_was_cut_off_goes_with_the_next(tmp_path, torn):
    """Optuna's own file takes the next line for a part of it, and is not read any more after that."""
    folder = SweepFolder(tmp_path)
    study = SweepStudy("torn", storage_of(folder))
    _begin(study, 0)
    whole = folder.study_file.read_bytes()
    folder.study_file.write_bytes(whole + torn)
    again = SweepStudy("torn", storage_of(folder))
    assert len(again.trials()) == 1
    assert [_begin(again, i) for i in (1, 2)] == [1, 2]
    assert [trial.energy_uj_per_token for trial in SweepStudy("torn", storage_of(folder)).trials()] == [0.0, 1.0, 2.0]
    assert folder.study_file.read_bytes().startswith(whole)


def test_a_process_that_is_killed_while_it_writes_keeps_nobody_off(tmp_path):
    """It holds the file's lock, and is gone; Optuna's own lock would stay for half a minute."""
    folder = SweepFolder(tmp_path)
    study = SweepStudy("held", storage_of(folder))
    program = (
        "import fcntl, sys, time\nfile = open(sys.argv[1], 'r+b')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ntime.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(folder.study_file)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    begun = threading.Thread(target=_begin, args=(study, 0))
    begun.start()
    child.kill()
    child.wait()
    begun.join()
    assert len(study.trials()) == 1
    assert not list(tmp_path.glob("*lock*"))
