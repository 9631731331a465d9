"""Oracles: a literal list of every recorded name; MLflow's own tables, row by row beside the event log; MLflow's own
answers on a real SQLite store."""

import getpass
import json
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import pytest
import typer
import yaml
from recorded_sweeps import SCORES, begin, finish, made_up_sweep
from records_audit import differences, logged_events

from halora.analysis.front import front, hypervolume
from halora.cli.sweep import _close
from halora.errors import UnreachableError, UserError
from halora.events import Compared, Failed, Interrupted, Reported, Scored, Stopped
from halora.pricing import trial_energy
from halora.records import names, queries, registry
from halora.records.delivery import refused as refused_of
from halora.records.delivery import undelivered
from halora.records.event_log import read
from halora.records.exporter import MlflowExporter, recording
from halora.records.index import read_sweep_state
from halora.records.provenance import commit_of, program
from halora.records.publishing import Publisher
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.records.tracking import MlflowClient, MlflowSweep, open_client
from halora.settings.trial import TrialConfig
from halora.spaces.mistakes import field_paths
from halora.sweep.run.launch import Outcome


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = Store(tmp_path_factory.mktemp("records") / "store")
    place.check_writable()
    return place


@pytest.fixture(scope="module")
def client(store):
    return open_client(store)


@pytest.fixture
def sweep(request, store, tiny_models, tiny_task):
    """A sweep of its own for each test; all share a family."""
    return made_up_sweep(store, request.node.name[:80], tiny_models["llama"], tiny_task)


@pytest.fixture
def folder(store, sweep):
    return store.sweep(sweep.name)


@pytest.fixture
def said():
    return []


def _runs(client, sweep, kind):
    experiment = client.get_experiment_by_name(sweep.family)
    query = f"tags.`halora.sweep` = '{sweep.name}' and tags.`halora.kind` = '{kind}'"
    found = client.search_runs([experiment.experiment_id], query)
    return sorted(found, key=lambda run: int(run.data.tags.get("halora.trial", -1)))


def test_the_recorded_names_are_frozen():
    public = {name: value for name, value in vars(names).items() if name.isupper()}
    assert public == {
        "SWEEP": "halora.sweep",
        "KIND": "halora.kind",
        "LAUNCH": "halora.launch",
        "NUMBER": "halora.trial",
        "CHIP_HASH": "halora.chip_hash",
        "VERSION": "halora.version",
        "COMMIT": "halora.commit",
        "STATE": "halora.state",
        "CLONE_OF": "halora.clone_of",
        "CUT_SHORT_AT": "halora.cut_short_at",
        "STRENGTH_METRIC": "accuracy_at.",
        "RUNG_METRIC": "rung_{score}",
        "RUNG_SCORES": ("accuracy", "clean_accuracy", "margin"),
        "FRONT_PROBABILITY": "front_probability",
        "CAUSE": "halora.cause",
        "WARNING": "halora.warning",
        "LABEL": "halora.{label}",
        "LABELS": ("method", "model", "chip", "task", "noise", "noise_strength"),
        "TRAINING_METRICS": (
            "train_loss",
            "train_task_loss",
            "train_reg_loss",
            "train_strength",
            "train_task_grad_norm",
            "train_reg_grad_norm",
            "train_reg_share",
            "train_reg_share_a",
            "train_reg_share_b",
        ),
        "SCORE_METRICS": (
            "clean_accuracy",
            "clean_accuracy_low",
            "clean_accuracy_high",
            "clean_margin",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "accuracy_std_chips",
            "accuracy_worst",
            "drop_low",
            "drop_high",
            "margin",
            "margin_low",
            "margin_high",
            "noise_db",
        ),
        "BESIDE_METRICS": (
            "clean_accuracy_per_byte",
            "clean_margin_per_byte",
            "accuracy_per_byte",
            "margin_per_byte",
            "clean_accuracy_summed",
            "clean_margin_summed",
            "accuracy_summed",
            "margin_summed",
        ),
        "TASK_METRICS": (
            "accuracy.",
            "clean_accuracy.",
            "accuracy_per_byte.",
            "clean_accuracy_per_byte.",
            "accuracy_summed.",
            "clean_accuracy_summed.",
        ),
        "ENERGY": "energy_uj_per_token",
        "COSTS": ("energy_uj_per_token", "latency_us_per_token", "tokens_per_s", "power_w", "area_mm2"),
        "ENERGY_COMPONENT": "energy_uj_per_token.{component}",
        "VIOLATION": "constraint_violation",
        "HYPERVOLUME": "hypervolume",
        "FRONT_SIZE": "front_size",
        "TRIALS_DONE": "trials_done",
        "CONFIG_FILE": "config.json",
        "SCORES_FILE": "scores.json",
        "ADAPTER": "adapter",
        "SWEEP_FILE": "sweep.yaml",
        "FRONT_JSON": "front.json",
        "FRONT_CSV": "front.csv",
        "SUMMARY_FILE": "summary.md",
        "FRONT_PNG": "front.png",
        "REPORT_FILE": "report.html",
        "COMPARISON_FILE": "comparison.json",
        "DAMAGE_FILE": "damage.json",
        "CERTIFICATION_FOLDER": "selection/attempt-{attempt:02d}",
        "CERTIFICATION_FILE": "certification.json",
        "ROBUSTNESS_FILE": "robustness.json",
        "CANDIDATE": "candidate",
        "CHAMPION": "champion",
        "ATTEMPT": "halora.attempt",
        "ADAPTER_SHA256": "halora.adapter_sha256",
        "GATE": "halora.gate.{gate}",
        "YIELD_BOUND": "halora.yield_bound",
        "REPLACED": "halora.replaced",
    }


def test_a_finished_trial_is_read_back_whole(client, store, sweep, folder, said, tmp_path):
    named = {"accuracy.arc-easy": 0.25, "clean_accuracy./rows/my (own)": 0.75, "accuracy_at.0.02": 0.2}
    with recording(store, sweep, said.append) as recorder:
        config, energy = begin(recorder, sweep, 0)
        for step in (2, 4):
            told = {"train_loss": 3.0 / step, "train_strength": 0.01, "other": 1.0}
            recorder.record(Reported(trial=0, step=step, metrics=told))
        finish(recorder, folder.root, 0, accuracy=0.5, **named, **{"not.of.these": 1.0})
        recorder.finish(interrupted=False)
    assert said == []
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []
    assert undelivered(store, sweep.name) == 0

    run = queries.trial_run(client, sweep.name, sweep.launch, 0)
    metrics, tags = run.data.metrics, run.data.tags
    assert run.data.params == {"lora.rank": "4"}
    components = {k: v for k, v in metrics.items() if k.startswith("energy_uj_per_token.")}
    assert sum(components.values()) == pytest.approx(metrics["energy_uj_per_token"], rel=1e-12)
    assert components == {f"energy_uj_per_token.{k}": pytest.approx(v) for k, v in energy.components_uj.items()}
    assert {name: metrics[name] for name in names.COSTS} == pytest.approx(energy.metrics)
    limits = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
    assert {name: metrics[name] for name in names.SCORE_METRICS} == SCORES | limits
    prefixes = (*names.TASK_METRICS, names.STRENGTH_METRIC)
    assert {name: value for name, value in metrics.items() if name.startswith(prefixes)} == {
        "accuracy.arc-easy": 0.25,
        "clean_accuracy./rows/my _own_-1bba51f3": 0.75,
        "accuracy_at.0.02": 0.2,
    }
    assert not {"not.of.these", "other"} & metrics.keys()
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(2, 1.5), (4, 0.75)]
    assert queries.logged_config(client, run.info.run_id) == config
    assert queries.logged_json(client, run.info.run_id, names.SCORES_FILE)["chip_seeds"] == [0, 1, 2]

    assert run.info.run_name == f"{sweep.name}/0"
    assert tags["halora.chip_hash"] == config.chip.content_hash
    assert tags["halora.version"] == version("halora-sweep")
    assert tags.get("halora.commit", "") == program()["commit"]
    assert {label: tags[f"halora.{label}"] for label in names.LABELS} == {
        "method": config.training.method,
        "model": config.model,
        "chip": "halora-2026",
        "task": config.task,
        "noise": "gaussian",
        "noise_strength": "0.01",
    }
    assert tags["mlflow.parentRunId"] == queries.parent_run(client, sweep.name, sweep.launch).info.run_id


def test_the_noise_of_each_layer_is_recorded_by_kind_and_depth(sweep, folder):
    recorder = SweepRecorder(folder, sweep)
    begin(recorder, sweep, 0)
    finish(recorder, folder.root, 0, accuracy=0.5)
    recorder.close()
    (scores,) = [entry for entry in logged_events(folder.event_log_file) if entry["kind"] == "scored"]
    mean_db = 10 * math.log10((1 + 10**-0.1 + 10**-0.2) / 3)  # over three chips, each 1 dB less than the one before
    assert scores["layer_noise_db"] == {
        "q_proj": [[0, round(-30 + mean_db, 2)], [1, round(-32 + mean_db, 2)]],
        "up_proj": [[0, round(-31 + mean_db, 2)], [1, round(-33 + mean_db, 2)]],
    }


def test_a_commit_is_that_of_the_files_git_keeps(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        run = subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    kept, other = tmp_path / "kept.py", tmp_path / "other.py"
    kept.write_text("1")
    assert commit_of(kept) == ""
    git("init")
    git("add", "kept.py")
    git("commit", "-m", "first")
    other.write_text("2")
    assert commit_of(kept) == git("rev-parse", "HEAD")
    assert commit_of(other) == ""  # installed into somebody else's repository
    kept.write_text("3")
    assert commit_of(kept) == git("rev-parse", "HEAD") + "+"


def test_a_trial_has_its_adapter_as_a_logged_model_and_its_rows_as_data_sets(
    client, store, sweep, folder, said, tmp_path
):
    with recording(store, sweep, said.append) as recorder:
        for number in (0, 1):
            begin(recorder, sweep, number)
        finish(recorder, folder.root, 0, accuracy=0.5)
        recorder.record(Failed(trial=1, cause="boom"))
        recorder.finish(interrupted=False)
    run, failed = (queries.trial_run(client, sweep.name, sweep.launch, number) for number in (0, 1))
    adapter = queries.download_adapter(client, run, tmp_path)
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"weights 0"
    assert queries.download_adapter(client, failed, tmp_path) is None
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("trial-0", "READY", run.info.run_id)
    linked = {metric.key: metric.value for metric in model.metrics}
    assert linked == {name: run.data.metrics[name] for name in linked}
    assert linked.keys() >= {"accuracy", "clean_accuracy", "noise_db"}
    assert model.tags["halora.trial"] == "0"
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert (run.data.tags["mlflow.user"], run.data.tags["mlflow.source.name"]) == (getpass.getuser(), "halora")
    note = queries.parent_run(client, sweep.name, sweep.launch).data.tags["mlflow.note.content"]
    assert note.startswith("what it is for\n\n**Take trial 0")
    assert "| trial | accuracy under noise | energy per token (µJ) | P(front) | searched values |" in note
    datasets = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert set(datasets) == {"train", "validation"}
    assert {dataset.name for dataset in datasets.values()} == {sweep.trial["task"]}
    assert json.loads(datasets["train"].profile) == {"rows": 64}
    assert json.loads(datasets["validation"].profile) == {"rows": 24}
    assert datasets["train"].digest != datasets["validation"].digest


def test_trials_end_in_mlflow_s_terminal_states(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        for number in range(5):
            begin(recorder, sweep, number)
        finish(recorder, folder.root, 0, accuracy=0.5)
        recorder.record(Failed(trial=1, cause="loss nan at step 3"))
        recorder.record(Interrupted(trial=2))
        recorder.record(Stopped(trial=4))
        recorder.finish(interrupted=True)  # trial 3 was never heard of again
    states = {point.number: (point.state, point.cause) for point in read_sweep_state(store, sweep.name).points()}
    interrupted = ("interrupted", "")
    assert states == {
        0: ("finished", ""),
        1: ("failed", "loss nan at step 3"),
        2: interrupted,
        3: interrupted,
        4: ("stopped", ""),
    }
    runs = _runs(client, sweep, "trial")
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED", "KILLED", "KILLED", "FINISHED"]
    told = ["finished", "failed", "interrupted", "interrupted", "stopped"]
    assert [run.data.tags["halora.state"] for run in runs] == told
    assert runs[1].data.tags["halora.cause"] == "loss nan at step 3"
    parent = queries.parent_run(client, sweep.name, sweep.launch)
    assert (parent.info.status, parent.data.tags["halora.state"]) == ("KILLED", "interrupted")
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []


def test_a_second_recorder_goes_on_with_the_same_runs_and_repeats_nothing(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0, lora__rank=2)
        finish(recorder, folder.root, 0, accuracy=0.4)
        begin(recorder, sweep, 1, lora__rank=8)
        recorder.record(Reported(trial=1, step=2, metrics={"train_loss": 1.0}))
        recorder.finish(interrupted=True)
    before = [run.info.run_id for run in _runs(client, sweep, "trial")]
    entries = len(logged_events(folder.event_log_file))

    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 1, lora__rank=8)
        for report in ({"step": 2, "train_loss": 1.0}, {"step": 4, "train_loss": 0.5}):
            recorder.record(Reported.of(1, report))
        assert {point.number: point.state for point in recorder.recorded.points()} == {0: "finished", 1: "running"}
        finish(recorder, folder.root, 1, accuracy=0.6)
        finish(recorder, folder.root, 0, accuracy=0.4)  # a crash came before the study heard of it: scored again
        recorder.finish(interrupted=False)
        assert [point.number for point in recorder.points] == [0, 1]
        assert recorder.points[0].accuracy == 0.4
    new = logged_events(folder.event_log_file)[entries:]
    assert [(entry["kind"], entry["trial"]) for entry in new] == [
        ("sweep_started", None),
        ("resumed", 1),
        ("reported", 1),
        ("scored", 1),
        ("finished", 1),
        ("front_moved", None),
        ("finished", 0),
        ("placed", 1),
        ("sweep_finished", None),
    ]
    assert [run.info.run_id for run in _runs(client, sweep, "trial")] == before
    (parent,) = _runs(client, sweep, "sweep")
    assert (parent.info.status, parent.data.metrics["trials_done"]) == ("FINISHED", 2)
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []


def test_a_trial_scored_again_on_more_chips_has_both_scores_and_stands_where_the_last_put_it(
    client, store, sweep, folder, said
):
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        for accuracy in (0.6, 0.4):
            finish(recorder, folder.root, 0, accuracy)
        assert recorder.points[0].accuracy == 0.4
        recorder.finish(interrupted=False)
    run = queries.trial_run(client, sweep.name, sweep.launch, 0)
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert sorted(metric.value for metric in history) == [0.4, 0.6]
    assert len(run.outputs.model_outputs) == 1
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []


def test_rungs_and_simulated_scores_are_recorded_once(client, store, sweep, folder, said, tmp_path):
    rungs = {1: 0.2, 2: 0.3}
    scores = SCORES | {"accuracy": 0.5}
    folder.trial(0).mkdir(parents=True)
    result = folder.trial(0) / "result.json"
    result.write_text(json.dumps({"accuracy_by_chip": [0.4, 0.6]}))  # without answers
    for _ in range(2):  # the second time as after a kill
        with recording(store, sweep, said.append) as recorder:
            begin(recorder, sweep, 0)
            for step, accuracy in rungs.items():
                told = {
                    "accuracy": accuracy,
                    "clean_accuracy": 0.4,
                    "margin": -1.0,
                    "accuracy_per_byte": 0.75,
                    "other": 1.0,
                }
                recorder.record(Scored(trial=0, step=step, metrics=told, accuracy_by_chip=[accuracy], final=False))
            kept = str(result.relative_to(folder.root))
            recorder.record(Scored(trial=0, step=4, metrics=scores, accuracy_by_chip=[0.4, 0.6], scores_file=kept))
            recorder.finish(interrupted=False)
    run = queries.trial_run(client, sweep.name, sweep.launch, 0)
    history = client.get_metric_history(run.info.run_id, "rung_accuracy")
    assert {metric.step: metric.value for metric in history} == rungs
    assert len(history) == len(client.get_metric_history(run.info.run_id, "accuracy")) + 1 == 2
    assert run.data.metrics["rung_margin"] == -1.0
    assert run.data.metrics["rung_accuracy_per_byte"] == 0.75
    assert run.data.metrics["front_probability"] == 1.0
    assert read_sweep_state(store, sweep.name).point(0).correct is None
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []


def test_runs_that_mlflow_doubled_lost_or_changed_are_mended(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        for number in range(4):
            begin(recorder, sweep, number)
            finish(recorder, folder.root, number, accuracy=0.3 + number / 10)
        recorder.finish(interrupted=False)
        states = {point.number: point.state for point in recorder.points}
    doubled, lost, changed, whole = _runs(client, sweep, "trial")
    client.create_run(doubled.info.experiment_id, tags=doubled.data.tags)
    client.create_run(doubled.info.experiment_id, tags=doubled.data.tags | {"halora.trial": "77"})
    client.delete_run(lost.info.run_id)
    client.set_terminated(changed.info.run_id, "FAILED")
    mlflow = MlflowSweep(store, sweep)
    assert mlflow.trial_states() == {
        0: ["finished", "running"],
        2: ["failed"],
        3: ["finished"],
        77: ["running"],
    }
    assert mlflow.repair(read(folder.event_log_file)[0], states) == {
        0: "a second run is deleted",
        1: "delivered again",
        2: "delivered again",
        77: "its run is deleted",
    }
    assert mlflow.repair(read(folder.event_log_file)[0], states) == {}
    assert mlflow.trial_states() == {number: ["finished"] for number in range(4)}
    assert {doubled.info.run_id, changed.info.run_id, whole.info.run_id} < {
        run.info.run_id for run in _runs(client, sweep, "trial")
    }
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []


def test_the_parent_run_keeps_the_front(client, store, sweep, folder, said, tmp_path):
    with recording(store, sweep, said.append) as recorder:
        for number, (accuracy, rank) in enumerate([(0.5, 8), (0.4, 2), (0.3, 4)]):  # the last is dominated
            begin(recorder, sweep, number, lora__rank=rank)
            finish(recorder, folder.root, number, accuracy)
        recorder.record(Compared(comparison=_COMPARISON))
        recorder.finish(interrupted=False)
        points = recorder.points
    parent = queries.parent_run(client, sweep.name, sweep.launch)
    run_id = parent.info.run_id
    rows = queries.logged_json(client, run_id, names.FRONT_JSON)
    assert [(row["number"], row["accuracy"], row["on_front"]) for row in rows] == [
        (0, 0.5, True),
        (1, 0.4, True),
        (2, 0.3, False),
    ]
    assert len(front(points)) == parent.data.metrics["front_size"] == 2
    expected = hypervolume(points, (0.0, 1.0))
    assert parent.data.metrics["hypervolume"] == pytest.approx(expected)
    volumes = {m.step: m.value for m in client.get_metric_history(run_id, "hypervolume")}
    assert sorted(volumes) == [1, 2, 3]
    assert volumes[1] < volumes[2] == volumes[3] == pytest.approx(expected)

    files = {item.path for item in client.list_artifacts(run_id)}
    drawn = {"front.json", "front.csv", "front.png", "report.html", "summary.md"}
    assert files == {"sweep.yaml", *drawn, "comparison.json"}
    copy = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    header, *lines = (copy / "front.csv").read_text().splitlines()
    assert header.split(",")[-1] == "lora.rank"
    assert len(lines) == 3
    assert matplotlib.image.imread(copy / "front.png").shape[:2] == (500, 800)
    assert yaml.safe_load((copy / "sweep.yaml").read_text())["name"] == sweep.name
    assert "<title>the_parent" not in (copy / "report.html").read_text()
    assert f"<title>{sweep.name}</title>" in (copy / "report.html").read_text()
    assert parent.data.tags["mlflow.note.content"] == (copy / "summary.md").read_text()


_COMPARISON = {"reference": "untrained", "rows": 8, "chip_instances": 2, "seeds": 1, "cells": []}


def test_a_log_sent_again_from_its_beginning_leaves_the_same_rows(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        for number in range(3):
            begin(recorder, sweep, number)
            recorder.record(Reported(trial=number, step=2, metrics={"train_loss": float("nan")}))
            recorder.record(
                Reported(trial=number, step=4, metrics={"train_loss": float("inf") if number == 1 else 0.5})
            )
            finish(recorder, folder.root, number, accuracy=0.3 + number / 10)
        recorder.finish(interrupted=False)
    runs = [(run.info.run_id, run.data, run.inputs, run.outputs) for run in _runs(client, sweep, "trial")]
    folder.sent_file.unlink()  # as after a crash between a delivery and its note, at the worst
    with recording(store, sweep, said.append) as recorder:
        recorder.finish(interrupted=False)
    again = [(run.info.run_id, run.data, run.inputs, run.outputs) for run in _runs(client, sweep, "trial")]
    assert list(map(repr, again)) == list(map(repr, runs))
    found = differences(store.tracking_uri, sweep.name, folder.event_log_file)
    assert all("1.797" in line or "inf" in line for line in found)  # MLflow keeps infinity as the largest number
    assert len(found) == 2


def test_what_mlflow_refuses_is_kept_and_told_and_holds_nothing_up(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        recorder._write(Reported(trial=0, step=1, metrics={"bad$name": 1.0}))
        recorder.record(Reported(trial=0, step=2, metrics={"train_loss": 1.0}))
        finish(recorder, folder.root, 0, accuracy=0.5)
        begin(recorder, sweep, 1)
        finish(recorder, folder.root, 1, accuracy=0.6)
        shutil.rmtree(folder.trial(1))  # before the exporter came to it, or after
        recorder.finish(interrupted=False)
    assert [run.info.status for run in _runs(client, sweep, "trial")] == ["FINISHED", "FINISHED"]
    refused = [json.loads(line) for line in folder.refused_file.read_text().splitlines()]
    assert refused[0]["event"]["metrics"] == {"bad$name": 1.0}
    assert "Invalid value" in refused[0]["error"]
    assert any("MLflow refused a record of trial 0" in line for line in said)
    assert list(refused_of(folder)) == [0, 1]
    assert "Invalid value" in refused_of(folder)[0]
    (lost,) = differences(store.tracking_uri, sweep.name, folder.event_log_file)
    assert lost.startswith("lost: (0, 'bad$name', ")
    assert undelivered(store, sweep.name) == 0


def test_what_was_refused_and_is_delivered_later_is_refused_no_more(store, sweep, folder, said, capsys):
    """The command that ends a sweep has exit code 1 while a record is refused, and 0 once all are delivered."""
    ended = Outcome(complete=True, failed=0, comparison=None)
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        finish(recorder, folder.root, 0, accuracy=0.5)
        recorder.finish(interrupted=False)
    for there, refused in ((False, [0]), (False, [0]), (True, [])):  # twice without the adapter's folder
        place = folder.trial(0) if there else folder.root / "elsewhere"
        if not place.exists():
            (folder.root / "elsewhere" if there else folder.trial(0)).rename(place)
        folder.sent_file.unlink()  # as for another server, all is sent again
        with recording(store, sweep, said.append):
            pass
        assert list(refused_of(folder)) == refused
        assert folder.refused_file.exists() == bool(refused)
        if refused:
            (line,) = folder.refused_file.read_text().splitlines()
            assert json.loads(line)["event"]["kind"] == "scored"
            with pytest.raises(typer.Exit) as code:
                _close(sweep.name, store, ended)
            assert code.value.exit_code == 1
            assert "records of trial 0 are not in MLflow, which refused them" in capsys.readouterr().err
        else:
            _close(sweep.name, store, ended)
            assert "which refused them" not in capsys.readouterr().err


def test_a_locked_database_costs_only_delay(client, store, sweep, folder, said):
    database = sqlite3.connect(store.root / "mlflow.db", isolation_level=None, check_same_thread=False)
    database.execute("begin exclusive")
    threading.Timer(12, database.close).start()  # longer than MLflow's own patience
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        finish(recorder, folder.root, 0, accuracy=0.5)
        recorder.finish(interrupted=False)
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []
    assert undelivered(store, sweep.name) == 0


def test_hostile_names_are_recorded_as_they_are(client, store, tiny_models, tiny_task, said, tmp_path):
    name = "<script>alert(1)</script> 'quoted' \"model\" ‮גרסה 🤖" + "x" * 100
    model = tmp_path / name
    shutil.copytree(tiny_models["llama"], model)
    sweep = made_up_sweep(store, "hostile", str(model), tiny_task, description=f"{name}" * 50)
    folder = store.sweep("hostile")
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0, model=str(model))
        recorder.record(Failed(trial=0, cause=f"{name}: no such\nthing" * 1000))
        recorder.finish(interrupted=False)
    assert said == []
    run = queries.trial_run(client, "hostile", sweep.launch, 0)
    assert run.data.params["model"] == run.data.tags["halora.model"] == str(model)
    assert run.data.tags["halora.cause"].startswith(name)
    page = folder.published / "report.html"
    assert "<script>alert" not in page.read_text()
    assert "&lt;script&gt;alert" in page.read_text()


def test_nothing_of_a_long_and_odd_sweep_is_refused(client, store, tiny_models, tiny_task, said, tmp_path):
    """Folders of tasks by names that MLflow takes for other paths, or for too long; all fields searched at once."""
    task = "+".join(str(shutil.copytree(tiny_task, tmp_path / ("a task " * 30) / str(i))) for i in range(4))
    sweep = made_up_sweep(store, "odd", tiny_models["llama"], task, description="what it is for " * 2000)
    folder = store.sweep("odd")
    scored = ("/rows/my/", "/rows//my", "/rows/../my", "rows/.", "a+b", "a*b", "模型", "x" * 300, "x" * 301, "/")
    named = {f"accuracy.{name}": i / 16 for i, name in enumerate(scored)}
    with recording(store, sweep, said.append) as recorder:
        config = sweep.resolve({})
        params = dict.fromkeys(field_paths(TrialConfig), "x" * 7000)
        assert len(params) > 100
        recorder.begin_trial(0, config, params, trial_energy(config))
        finish(recorder, folder.root, 0, accuracy=0.5, **named)
        recorder.finish(interrupted=False)
    assert said == []
    assert not folder.refused_file.exists()
    (run,) = _runs(client, sweep, "trial")
    assert run.data.params.keys() == params.keys()
    assert len(run.inputs.dataset_inputs) == 2
    found = {name: value for name, value in run.data.metrics.items() if name.startswith("accuracy.")}
    assert sorted(found.values()) == sorted(named.values())  # each by a name of its own
    assert found["accuracy.模型"] == named["accuracy.模型"]


def test_a_run_that_is_not_there_is_named(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        recorder.finish(interrupted=False)
    with pytest.raises(UserError, match=f"MLflow has no run of trial '{sweep.name}/7' yet"):
        queries.trial_run(client, sweep.name, sweep.launch, 7)
    with pytest.raises(UserError, match="nothing is recorded of sweep 'other'"):
        queries.parent_run(client, "other", "0" * 32)
    run_id = queries.parent_run(client, sweep.name, sweep.launch).info.run_id
    with pytest.raises(UserError, match=r"has no 'nothing\.json'; it did not get that far"):
        queries.logged_json(client, run_id, "nothing.json")


def test_a_database_that_is_none_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(UnreachableError, match=r"cannot be opened: .*file is not a database"):
        open_client(Store(tmp_path))
    with pytest.raises(UnreachableError, match=r"MLflow at 'http://127\.0\.0\.1:9' cannot be opened"):
        open_client(Store(tmp_path, "http://127.0.0.1:9"))


def test_a_recorder_leaves_a_torn_log_usable(store, sweep, folder):
    recorder = SweepRecorder(folder, sweep)
    begin(recorder, sweep, 0)
    recorder.close()
    os.truncate(folder.event_log_file, folder.event_log_file.stat().st_size - 7)
    again = SweepRecorder(folder, sweep)
    assert not again.recorded.begun(0) or again.recorded.state(0) == "running"
    begin(again, sweep, 0)
    again.close()
    assert [entry["kind"] for entry in logged_events(folder.event_log_file)].count("began") == 1


# What ends between two requests, and what is no fault of MLflow's.

_REQUESTS = (
    *("create_run", "update_run", "set_terminated", "log_batch", "log_inputs", "log_outputs"),
    *("log_text", "log_artifact", "log_artifacts"),
    *("create_logged_model", "log_model_artifacts", "finalize_logged_model"),
    *("create_registered_model", "create_model_version", "set_model_version_tag", "set_registered_model_alias"),
)


class _Killed(BaseException):
    """As little to be caught as a signal."""


def _killed_after_each_request(monkeypatch, deliver):
    """Carry out a delivery in ever new processes, the first of which ends after its first request, and so on; how many.

    A request is made, and its maker ends before it can note that it was.
    """
    left = 0

    def guarded(request):
        def call(*arguments, **named):
            nonlocal left
            answer = request(*arguments, **named)
            left -= 1
            if left < 0:
                raise _Killed
            return answer

        return call

    with monkeypatch.context() as patch:
        for name in _REQUESTS:
            patch.setattr(MlflowClient, name, guarded(getattr(MlflowClient, name)))
        for kills in range(100):
            left = kills
            try:
                deliver()
            except _Killed:
                continue
            return kills
    raise AssertionError("it never ends")


def test_a_process_that_ends_after_any_request_loses_and_doubles_nothing(
    client, store, sweep, folder, said, monkeypatch
):
    recorder = SweepRecorder(folder, sweep)
    begin(recorder, sweep, 0)
    recorder.record(Reported(trial=0, step=2, metrics={"train_loss": 1.0}))
    at_rung = {"accuracy": 0.25, "clean_accuracy": 0.5, "margin": -1.0}
    recorder.record(Scored(trial=0, step=2, metrics=at_rung, accuracy_by_chip=[0.25], final=False))
    finish(recorder, folder.root, 0, accuracy=0.5)
    begin(recorder, sweep, 1)
    recorder.record(Failed(trial=1, cause="boom"))
    recorder.finish(interrupted=False)
    recorder.close()

    def deliver():
        exporter = MlflowExporter(store, sweep, Publisher(folder, sweep, recorder.recorded), said.append)
        while exporter._deliver_some():
            pass
        exporter._mlflow.remove_duplicates()

    assert _killed_after_each_request(monkeypatch, deliver) >= 15
    assert said == []
    assert differences(store.tracking_uri, sweep.name, folder.event_log_file) == []
    assert undelivered(store, sweep.name) == 0
    run, failed = _runs(client, sweep, "trial")
    assert [output.model_id for output in run.outputs.model_outputs] == [queries.adapter_model_id(run)]
    assert len(client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")) == 1
    assert [len(each.inputs.dataset_inputs) for each in (run, failed)] == [2, 2]

    tags = {names.ATTEMPT: "1", names.ADAPTER_SHA256: "ab"}

    def register():
        (found, _) = registry.register(client, "halora.registered-once", run, tags, "what it states")
        registry.promote(client, found)

    assert _killed_after_each_request(monkeypatch, register) == 2  # after those of earlier processes
    (version,) = client.search_model_versions("name = 'halora.registered-once'")
    aliases = client.get_registered_model("halora.registered-once").aliases
    assert aliases == {"candidate": version.version, "champion": version.version}


def test_a_double_that_an_ended_process_left_is_removed(client, store, sweep, folder, said):
    """A request that made a run though its answer was lost, twice, before the process ended."""
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        recorder.finish(interrupted=True)
    (run,) = _runs(client, sweep, "trial")
    double = client.create_run(run.info.experiment_id, tags=run.data.tags)
    with recording(store, sweep, said.append) as recorder:
        recorder.record(Interrupted(trial=0))
        recorder.finish(interrupted=True)
    assert [each.info.run_id for each in _runs(client, sweep, "trial")] == [run.info.run_id]
    assert client.get_run(double.info.run_id).info.lifecycle_stage == "deleted"


def test_a_fault_of_ours_is_told_as_one_and_holds_nothing_up(client, store, sweep, folder, said):
    with recording(store, sweep, said.append) as recorder:
        begin(recorder, sweep, 0)
        recorder._write(Reported(trial=0, step=1, metrics={"train_loss": "not a number"}))
        recorder.record(Reported(trial=0, step=2, metrics={"train_loss": 1.0}))
        recorder.finish(interrupted=False)
    (told,) = said
    assert told.startswith("a record of trial 0 cannot be delivered, kept in ")
    assert "ValueError: could not convert string to float" in told
    (kept,) = [json.loads(line) for line in folder.refused_file.read_text().splitlines()]
    assert kept["event"]["metrics"] == {"train_loss": "not a number"}
    assert undelivered(store, sweep.name) == 0
    (run,) = _runs(client, sweep, "trial")
    assert run.data.metrics["train_loss"] == 1.0
    folder.sent_file.unlink()  # delivered anew
    with recording(store, sweep, said.append) as recorder:
        recorder.finish(interrupted=False)
    assert len(folder.refused_file.read_text().splitlines()) == 1


@pytest.fixture
def silent():
    """Address of a server that takes connections and never says a word, like one that is frozen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "{}:{}".format(*server.getsockname())


def test_a_server_that_never_answers_is_told(silent, store, sweep, folder, said, monkeypatch):
    """The request itself would wait for half a minute, MLflow's own tries to open a database for two."""
    monkeypatch.setattr("halora.records.tracking.ANSWERING_S", 0.5)
    monkeypatch.setattr("halora.records.exporter._PATIENCE_S", 0.5)
    for uri in (f"http://{silent}", f"postgresql://halora@{silent}/mlflow"):
        away = Store(store.root, uri)
        with pytest.raises(UnreachableError, match=r"cannot be opened: .*no answer within"):
            open_client(away)
        said.clear()
        with recording(away, sweep, said.append) as recorder:
            recorder.finish(interrupted=False)
        assert re.match(r"MLflow does not answer, records wait on disk: .*no answer within", said[0])
        assert re.search(r"lacks \d+ records, which are kept", said[-1])
    with pytest.raises(UnreachableError, match=r"cannot be opened: .*Connection refused"):
        open_client(Store(store.root, "postgresql://halora@127.0.0.1:9/mlflow"))


def test_a_folder_that_means_something_in_a_url_holds_its_own_database(client, store, tmp_path):
    place = Store(tmp_path / "a?b=c%20d#e &f" / "store")
    place.root.mkdir(parents=True)
    shutil.copy(store.root / "mlflow.db", place.root)
    client = open_client(place)
    run = client.create_run(client.create_experiment("own", artifact_location=(place.artifacts / "own").as_uri()))
    client.log_text(run.info.run_id, "there", "file.txt")
    with closing(sqlite3.connect(place.root / "mlflow.db")) as database:
        assert run.info.run_id in {row[0] for row in database.execute("select run_uuid from runs")}
    assert [path.read_text() for path in place.root.rglob("file.txt")] == ["there"]
    assert not [path for path in tmp_path.rglob("*.db") if path.parent != place.root]
