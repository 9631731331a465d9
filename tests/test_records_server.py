"""Records on an MLflow server with PostgreSQL behind it, which is killed, and from a driver that is killed.

Oracle: MLflow's tables in PostgreSQL, row by row beside the event log.
"""

import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from recorded_sweeps import begin, finish, made_up_sweep
from records_audit import differences
from services import mlflow_server, new_database

from halora.events import Reported
from halora.records import queries
from halora.records.delivery import undelivered
from halora.records.exporter import recording
from halora.records.index import read_sweep_state
from halora.records.store import Store
from halora.records.tracking import open_client


@pytest.fixture(scope="module")
def database(postgresql):
    return new_database(postgresql, "records")  # of its own, as Optuna's and MLflow's tables share a name


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    with mlflow_server(database, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def store(server, tmp_path):
    place = Store(tmp_path / "store", server.uri)
    place.check_writable()
    return place


def test_a_server_that_is_killed_costs_only_delay(database, server, store, tiny_models, tiny_task, tmp_path):
    sweep = made_up_sweep(store, "killed-server", tiny_models["llama"], tiny_task, trials=30)
    folder, said = store.sweep(sweep.name), []
    with recording(store, sweep, said.append) as recorder:
        for number in range(30):
            begin(recorder, sweep, number)
            for step in range(1, 11):
                recorder.record(
                    Reported(trial=number, step=step, metrics={"train_loss": 1 / step, "train_strength": 0.01})
                )
                time.sleep(0.01)
            finish(recorder, folder.root, number, accuracy=0.3 + number / 100)
            if number == 12:
                server.kill()  # with requests on their way
        while not any("does not answer" in line for line in said):
            time.sleep(0.1)
        assert undelivered(store, sweep.name) > 0
        server.start()
        recorder.finish(interrupted=False)
    assert differences(database, sweep.name, folder.event_log_file) == []
    assert undelivered(store, sweep.name) == 0
    assert [line.partition(",")[0] for line in said][:2] == ["MLflow does not answer", "MLflow answers again"]

    client = open_client(store)
    run = queries.trial_run(client, sweep.name, sweep.launch, 29)
    assert (queries.download_adapter(client, run, tmp_path) / "adapter_model.safetensors").read_bytes() == b"weights 29"
    assert queries.logged_config(client, run.info.run_id).lora.rank == 4
    parent = queries.parent_run(client, sweep.name, sweep.launch).info.run_id
    assert {"report.html", "front.json", "sweep.yaml"} <= {item.path for item in client.list_artifacts(parent)}


@pytest.mark.slow
def test_a_driver_that_is_killed_three_times_loses_and_doubles_nothing(
    database, server, store, tiny_models, tiny_task, tmp_path
):
    sweep = made_up_sweep(store, "killed-driver", tiny_models["llama"], tiny_task, trials=25)
    folder = store.sweep(sweep.name)
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from halora.events import Reported
        from halora.records.exporter import recording
        from halora.records.store import Store
        from halora.sweep.run.state import load_sweep_of
        from recorded_sweeps import begin, finish
        store = Store(Path({str(store.root)!r}), {store.server!r})
        sweep = load_sweep_of(store.sweep({sweep.name!r}))
        with recording(store, sweep, print) as recorder:
            print("ready", flush=True)
            for number in range(25):
                if recorder.recorded.state(number) != "finished":
                    begin(recorder, sweep, number)
                    for step in range(1, 6):
                        recorder.record(Reported(trial=number, step=step, metrics={{"train_loss": 1 / step}}))
                        time.sleep(0.02)
                    finish(recorder, store.sweep(sweep.name).root, number, 0.3 + number / 100)
            recorder.finish(interrupted=False)
    """)
    rng = random.Random(0)
    for kill in (True, True, True, False):
        driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert driver.stdout.readline() == "ready\n"
        if kill:
            time.sleep(rng.uniform(0.05, 2.5))
            driver.kill()
        said = driver.stdout.read()
        assert driver.wait(300) == (-9 if kill else 0), said
    assert differences(database, sweep.name, folder.event_log_file) == []
    points = read_sweep_state(store, sweep.name).points()
    assert [(point.number, point.state) for point in points] == [(number, "finished") for number in range(25)]
    assert undelivered(store, sweep.name) == 0


def test_a_server_that_stays_away_keeps_no_one_waiting_for_ever(
    database, server, store, tiny_models, tiny_task, monkeypatch
):
    monkeypatch.setattr("halora.records.exporter._PATIENCE_S", 1.0)
    sweep = made_up_sweep(store, "away", tiny_models["llama"], tiny_task)
    folder, said = store.sweep(sweep.name), []
    away = Store(store.root, "http://127.0.0.1:9")
    with recording(away, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        finish(recorder, folder.root, 0, accuracy=0.5)
        recorder.finish(interrupted=False)
    assert re.match(r"MLflow at http://127.0.0.1:9 lacks [1-9]\d* records, which are kept", said[-1])
    assert "halora sweep resume away" in said[-1]
    assert (folder.published / "report.html").exists()
    with recording(store, sweep, said.append) as recorder:
        recorder.finish(interrupted=False)
    assert differences(database, sweep.name, folder.event_log_file) == []
