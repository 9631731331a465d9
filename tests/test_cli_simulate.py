"""Oracles: Optuna's storage and MLflow's database read on their own; the same sweep undisturbed; the recorded table.

Simulated sweeps through the real command: everything but the training is real.
"""

import csv
import fcntl
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from commands import study_of
from records_audit import differences

HALORA = Path(sys.executable).parent / "halora"
STEPS, TRIALS = 12, 10


def _start(store, *args, **options):
    own = {"HALORA_STORE": str(store), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([HALORA, *map(str, args)], env=os.environ | own, **piped | options)


def _halora(store, *args):
    process = _start(store, *args)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_models, tiny_task):
    """A function that writes a sweep over a recorded table: the paths of both."""
    folder = tmp_path_factory.mktemp("simulated")
    chance = random.Random(0)
    table = folder / "curves.csv"
    with table.open("w", newline="") as file:
        columns = ["trial", "step", "accuracy", "clean_accuracy", "train_loss", "seconds"]
        writer = csv.writer(file)
        writer.writerow([*columns, "lora.rank", "training.learning_rate", "chip.adc.bits"])
        for trial in range(60):
            rank, bits = chance.choice([2, 4, 8]), chance.randint(5, 9)
            rate = 10 ** chance.uniform(-3, -1)
            best = 0.3 + 0.05 * bits + 0.01 * rank - 0.1 * abs(rate - 0.02)
            for step in range(1, STEPS + 1):
                accuracy = best * (1 - 0.5**step)
                writer.writerow([trial, step, accuracy, accuracy + 0.02, 2 - accuracy, step, rank, rate, bits])

    def write(name, **changes):
        content = {
            "name": name,
            "family": "simulated",
            "seed": 3,
            "trials": TRIALS,
            "concurrent": 2,
            "trial": {
                "model": tiny_models["llama"],
                "task": tiny_task,
                "chip": "halora-2026",
                "training": {"steps": STEPS, "report_every": 2},
                "evaluation": {"chip_instances": 3, "rows": 8},
            },
            "space": {
                "lora.rank": {"choices": [2, 4, 8]},
                "training.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
                "chip.adc.bits": {"low": 5, "high": 9, "kind": "int"},
            },
            "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
            "early_stopping": {"rungs": [{"steps": 4, "chip_instances": 2, "rows": 4}], "reduction_factor": 2.5},
            "search": {"sampler": "random"},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path, table

    return write


def _runs(store, name, kind="trial"):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("simulated")
    query = f"tags.`halora.sweep` = '{name}' and tags.`halora.kind` = '{kind}'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1000)
    losses = {run.info.run_id: client.get_metric_history(run.info.run_id, "train_loss") for run in found}
    return found, losses


def _check_whole(store, name, count=TRIALS):
    """Every number ended exactly once in both stores, its metrics without gap, nothing left running."""
    trials, (runs, losses) = study_of(store, name).trials, _runs(store, name)
    assert [trial.number for trial in trials] == list(range(count))
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    assert sorted(int(run.data.tags["halora.trial"]) for run in runs) == list(range(count))
    assert {run.info.status for run in [*runs, *_runs(store, name, "sweep")[0]]} == {"FINISHED"}
    assert len(_runs(store, name, "sweep")[0]) == 1
    for run in runs:
        trial = trials[int(run.data.tags["halora.trial"])]
        finished = trial.state.name == "COMPLETE"
        assert run.data.tags["halora.state"] == ("finished" if finished else "stopped")
        assert ("accuracy" in run.data.metrics) == finished
        steps = sorted(metric.step for metric in losses[run.info.run_id])
        assert steps == list(range(2, (STEPS if finished else 4) + 1, 2))
        if finished:
            assert run.data.metrics["accuracy"] == pytest.approx(trial.values[0])
            assert run.data.metrics["energy_uj_per_token"] == pytest.approx(trial.values[1])
            assert "front_probability" in run.data.metrics
        assert run.data.metrics["rung_accuracy"] == pytest.approx(trial.user_attrs["scores 0"]["metrics"]["accuracy"])
    return trials


@pytest.fixture(scope="module")
def undisturbed(store, files):
    path, table = files("undisturbed")
    return _halora(store, "sweep", "launch", path, "--simulate", table)


def test_a_simulated_sweep_is_recorded_as_a_real_one(undisturbed, store):
    code, out, err = undisturbed
    assert code == 0, err
    assert "front of undisturbed" in out
    trials = _check_whole(store, "undisturbed")
    assert 4 <= sum(trial.state.name == "COMPLETE" for trial in trials) <= 5
    code, out, _ = _halora(store, "sweep", "status", "undisturbed", "--format", "json")
    (row,) = json.loads(out)
    assert (row["state"], row["unfinished"], row["waiting"]) == ("ended", 0, 0)
    assert row["finished"] + row["stopped"] == TRIALS


def _kill_and_resume(store, name, launch, kills, seed):
    """Launch, and resume until the end; the first processes are killed at random moments. How many were."""
    chance, killed = random.Random(seed), 0
    arguments = launch
    while True:
        process = _start(store, *arguments)
        if killed < kills:
            recorded = store / "sweeps" / name / "events.jsonl"
            until = _lines(recorded) + chance.randint(1, 20)  # in facts, as a machine's speed is its own
            while _lines(recorded) < until and process.poll() is None:
                time.sleep(chance.uniform(0, 0.01))
            if process.poll() is None:
                process.kill()
                killed += 1
                process.communicate()
                if (store / "sweeps" / name / "sweep.yaml").exists():
                    arguments = ["sweep", "resume", name]
                continue
        _, err = process.communicate(timeout=1500)
        assert process.returncode == 0, err
        return killed


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _check_disturbed(store, name, whole, count=TRIALS):
    trials = _check_whole(store, name, count)
    assert [trial.params for trial in trials] == [trial.params for trial in study_of(store, whole).trials]
    assert differences(f"sqlite:///{store / 'mlflow.db'}", name, store / "sweeps" / name / "events.jsonl") == []
    code, out, _ = _halora(store, "sweep", "status", name, "--format", "json")
    (row,) = json.loads(out)
    assert (code, row["finished"] + row["stopped"], row["unfinished"], row["waiting"]) == (0, count, 0, 0)


def test_kills_at_random_moments_lose_and_repeat_nothing(undisturbed, store, files):
    path, table = files("disturbed")
    assert _kill_and_resume(store, "disturbed", ["sweep", "launch", path, "--simulate", table], 2, seed=2) >= 1
    _check_disturbed(store, "disturbed", "undisturbed")


def test_sigterm_ends_a_sweep_as_ctrl_c_does(undisturbed, store, files):
    """What a batch system sends: nothing is left open, and the records are delivered."""
    path, table = files("terminated", trials=400)
    process = _start(store, "sweep", "launch", path, "--simulate", table)
    while _lines(store / "sweeps" / "terminated" / "events.jsonl") < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    assert "halora sweep resume terminated" in err
    assert "Traceback" not in err
    assert {run.info.status for run in _runs(store, "terminated")[0]} <= {"KILLED", "FINISHED"}
    assert [run.info.status for run in _runs(store, "terminated", "sweep")[0]] == ["KILLED"]
    log = store / "sweeps" / "terminated" / "events.jsonl"
    assert differences(f"sqlite:///{store / 'mlflow.db'}", "terminated", log) == []


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_lost_terminal_ends_a_sweep_as_ctrl_c_does_unless_it_is_to_be_ignored(store, files, ignored):
    name = "nohup" if ignored else "hung-up"
    path, table = files(name, trials=100 if ignored else 400)
    leader, terminal = pty.openpty()

    def in_terminal():
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = _start(
        store,
        *("sweep", "launch", path, "--simulate", table),
        stdin=terminal,
        stdout=subprocess.DEVNULL if ignored else terminal,
        stderr=subprocess.DEVNULL if ignored else terminal,
        start_new_session=True,
        preexec_fn=in_terminal,
    )
    os.close(terminal)
    log = store / "sweeps" / name / "events.jsonl"
    while _lines(log) < 20:
        assert process.poll() is None
        if not ignored and select.select([leader], [], [], 0.05)[0]:
            os.read(leader, 65536)
    os.close(leader)
    assert process.wait(600) == (0 if ignored else 1)
    state = "FINISHED" if ignored else "KILLED"
    assert [run.info.status for run in _runs(store, name, "sweep")[0]] == [state]
    assert {run.info.status for run in _runs(store, name)[0]} <= {state, "FINISHED"}
    assert differences(f"sqlite:///{store / 'mlflow.db'}", name, log) == []


@pytest.mark.slow
@pytest.mark.parametrize("database", [False, True], ids=["journal", "postgresql"])
def test_fifteen_kills_of_a_long_sweep_lose_and_repeat_nothing(database, store, files, request, monkeypatch):
    """With rungs; a race needs scores of single chips, which a table of curves has not."""
    names = [f"{kind}-{'database' if database else 'file'}" for kind in ("long", "disturbed-long")]
    if database:
        monkeypatch.setenv("HALORA_STUDY_URL", request.getfixturevalue("postgresql"))
    trials = 60 if database else 150  # a database takes longer
    path, table = files(names[0], trials=trials)
    assert _halora(store, "sweep", "launch", path, "--simulate", table)[0] == 0
    path, table = files(names[1], trials=trials)
    assert _kill_and_resume(store, names[1], ["sweep", "launch", path, "--simulate", table], 15, seed=20) == 15
    _check_disturbed(store, names[1], names[0], trials)


def test_reconciling_shows_and_mends_what_differs(undisturbed, store, tmp_path):
    from mlflow import MlflowClient

    torn = tmp_path / "torn"
    shutil.copytree(store, torn, ignore=shutil.ignore_patterns("disturbed*"))
    client = MlflowClient(f"sqlite:///{torn / 'mlflow.db'}")
    runs = {int(run.data.tags["halora.trial"]): run for run in _runs(torn, "undisturbed")[0]}
    for number in (0, 3):
        client.update_run(runs[number].info.run_id, status="RUNNING")
        client.set_tag(runs[number].info.run_id, "halora.state", "running")
    double = client.create_run(runs[1].info.experiment_id, tags=runs[1].data.tags)
    client.delete_run(runs[4].info.run_id)
    folder = torn / "sweeps" / "undisturbed"
    with (folder / "events.jsonl").open("a") as log:  # a kill came before the trial's end was written
        entry = {"kind": "resumed", "trial": 2, "time_ms": 0}
        log.write(json.dumps(entry) + "\n")
    ended = {number: run.data.tags["halora.state"] for number, run in runs.items()}
    code, out, err = _halora(torn, "doctor", "--reconcile", "--format", "json")
    assert code == 0, err
    rows = {row["trial"]: row for row in json.loads(out)}
    told = {number: (row["study"], row["event_log"], row["mlflow"], row["fixed"]) for number, row in rows.items()}
    assert told == {
        0: (ended[0], ended[0], "running", "delivered again"),
        1: (ended[1], ended[1], f"{ended[1]}, running", "a second run is deleted"),
        2: (ended[2], "running", ended[2], f"recorded as {ended[2]}"),
        3: (ended[3], ended[3], "running", "delivered again"),
        4: (ended[4], ended[4], "-", "delivered again"),
    }
    assert client.get_run(double.info.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(runs[1].info.run_id).info.lifecycle_stage == "active"
    _check_whole(torn, "undisturbed")
    _, _, err = _halora(torn, "doctor", "--reconcile")
    assert "the records say of every trial what its study says" in err


def test_a_table_that_does_not_fit_is_refused_before_anything_is_written(files, tmp_path):
    path, table = files("refused")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(table.read_text().replace("lora.rank", "lora.rnk"))
    code, _, err = _halora(tmp_path / "store", "sweep", "launch", path, "--simulate", wrong)
    assert code == 2
    assert "column 'lora.rnk' is neither a score nor a searched field; did you mean 'lora.rank'?" in err
    assert not (tmp_path / "store" / "sweeps").exists()


def test_a_launch_or_resume_takes_the_very_same_sweep_only(files, tmp_path):
    path, table = files("either")
    launch = ("sweep", "launch", path, "--simulate", table, "--or-resume")
    for _ in range(2):  # the second time nothing is left to do
        code, _, err = _halora(tmp_path, *launch)
        assert code == 0, err
        _check_whole(tmp_path, "either")
    code, _, err = _halora(tmp_path, *launch, "--seed", "4", "--set", "trials=11")
    assert code == 2
    assert "sweep 'either' was launched before with another seed, trials" in err
    assert "--name" in err
