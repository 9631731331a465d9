"""Oracles: a literal list of every recorded name; MLflow's own answers on a real SQLite store."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from halora.analysis.front import TrialPoint, front, hypervolume
from halora.errors import UnreachableError, UserError
from halora.records import names, queries
from halora.records.store import Store
from halora.records.tracking import SweepRecorder, open_client
from halora.spaces.sweep import SweepConfig
from halora.trial import trial_energy

_SCORES = {name: 0.25 + i / 100 for i, name in enumerate(names.SCORE_METRICS)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = Store(tmp_path_factory.mktemp("records") / "store")
    place.check_writable()
    return place


@pytest.fixture(scope="module")
def client(store):
    return open_client(store)


@pytest.fixture
def sweep(request, tiny_models, tiny_task):
    """A sweep of its own for each test; all share a family."""
    return SweepConfig.model_validate(
        {
            "name": request.node.name.replace("[", "-").rstrip("]")[:80],
            "family": "records",
            "description": "what it is for",
            "trials": 4,
            "trial": {
                "model": tiny_models["llama"],
                "task": tiny_task,
                "chip": "halora-2026",
                "training": {"steps": 4},
            },
            "space": {"lora.rank": {"choices": [2, 4, 8]}},
            "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
        }
    )


@pytest.fixture
def sweep_file(sweep, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep.model_dump(mode="json")))
    return path


def _begin(recorder, sweep, number, rank=4):
    values = {"lora.rank": rank}
    config = sweep.resolve(values)
    energy = trial_energy(config)
    recorder.begin_trial(number, config, values, energy)
    return config, energy


def _finish(recorder, sweep, tmp_path, number, accuracy, rank=4):
    config, energy = _begin(recorder, sweep, number, rank)
    per_task = {"accuracy.arc-easy": 0.25, "clean_accuracy./rows/my (own)": 0.75, "not.of.these": 1.0}
    scores = (
        _SCORES | per_task | {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
    )
    point = TrialPoint(
        number=number,
        energy_uj_per_token=energy.total_uj_per_token,
        params={"lora.rank": rank},
        **{name: scores[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "margin", "clean_accuracy")},
    )
    scores_file = tmp_path / "result.json"
    scores_file.write_text(json.dumps({"trial": number}))
    adapter = tmp_path / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
    recorder.finish_trial(point, config.training.steps, scores, scores_file, adapter)
    return point


def _runs(client, sweep, kind):
    experiment = client.get_experiment_by_name(sweep.family)
    query = f"tags.`halora.sweep` = '{sweep.name}' and tags.`halora.kind` = '{kind}'"
    return client.search_runs([experiment.experiment_id], query)


def test_the_recorded_names_are_frozen():
    public = {name: value for name, value in vars(names).items() if name.isupper()}
    assert public == {
        "SWEEP": "halora.sweep",
        "KIND": "halora.kind",
        "NUMBER": "halora.trial",
        "CHIP_HASH": "halora.chip_hash",
        "STATE": "halora.state",
        "RUNG_METRIC": "rung_{score}",
        "RUNG_SCORES": ("accuracy", "clean_accuracy", "margin"),
        "VIOLATION": "constraint_violation",
        "FRONT_PROBABILITY": "front_probability",
        "CAUSE": "halora.cause",
        "TRAINING_METRICS": ("train_loss", "train_task_loss", "train_reg_loss", "train_sigma"),
        "SCORE_METRICS": (
            "clean_accuracy",
            "clean_margin",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "accuracy_std_chips",
            "accuracy_worst",
            "margin",
            "margin_low",
            "margin_high",
            "noise_db",
        ),
        "TASK_METRICS": ("accuracy.", "clean_accuracy."),
        "ENERGY": "energy_uj_per_token",
        "ENERGY_COMPONENT": "energy_uj_per_token.{component}",
        "HYPERVOLUME": "hypervolume",
        "FRONT_SIZE": "front_size",
        "TRIALS_DONE": "trials_done",
        "CONFIG_FILE": "config.json",
        "SCORES_FILE": "scores.json",
        "ADAPTER_FOLDER": "adapter",
        "SWEEP_FILE": "sweep.yaml",
        "FRONT_JSON": "front.json",
        "FRONT_CSV": "front.csv",
        "FRONT_PNG": "front.png",
        "COMPARISON_FILE": "comparison.json",
    }


def test_a_finished_trial_is_read_back_whole(client, store, sweep, sweep_file, tmp_path):
    recorder = SweepRecorder(client, store, sweep, sweep_file)
    config, energy = _begin(recorder, sweep, 0)
    for step in (2, 4):
        recorder.report_step(0, step, {"train_loss": 3.0 / step, "train_sigma": 0.01, "step": step, "other": 1.0})
    _finish(recorder, sweep, tmp_path, 0, accuracy=0.5)

    record = queries.trial(client, f"{sweep.name}/0")
    assert (record.number, record.state, record.cause) == (0, "finished", "")
    assert record.params == {"lora.rank": "4"}
    components = {k: v for k, v in record.metrics.items() if k.startswith("energy_uj_per_token.")}
    assert sum(components.values()) == pytest.approx(record.metrics["energy_uj_per_token"], rel=1e-12)
    assert components == {f"energy_uj_per_token.{k}": pytest.approx(v) for k, v in energy.components_uj.items()}
    limits = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
    assert {name: record.metrics[name] for name in names.SCORE_METRICS} == _SCORES | limits
    per_task = {name: value for name, value in record.metrics.items() if name.startswith(names.TASK_METRICS)}
    assert per_task == {"accuracy.arc-easy": 0.25, "clean_accuracy./rows/my _own_": 0.75}
    assert "not.of.these" not in record.metrics
    history = client.get_metric_history(record.run_id, "train_loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(2, 1.5), (4, 0.75)]
    assert "other" not in record.metrics
    assert queries.logged_config(client, record.run_id) == config
    assert queries.logged_json(client, record.run_id, names.SCORES_FILE) == {"trial": 0}
    adapter = queries.download_adapter(client, record.run_id, tmp_path / "again")
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"weights 0"

    (run,) = _runs(client, sweep, "trial")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"{sweep.name}/0"
    assert run.data.tags["halora.chip_hash"] == config.chip.content_hash
    assert run.data.tags["mlflow.parentRunId"] == queries.parent_run(client, sweep.name).info.run_id


def test_trials_end_in_mlflow_s_terminal_states(client, store, sweep, sweep_file, tmp_path):
    recorder = SweepRecorder(client, store, sweep, sweep_file)
    _finish(recorder, sweep, tmp_path, 0, accuracy=0.5)
    for number in (1, 2):
        _begin(recorder, sweep, number)
    assert {r.info.status for r in _runs(client, sweep, "trial")} == {"FINISHED", "RUNNING"}
    recorder.fail_trial(1, "loss nan at step 3")
    recorder.interrupt_trial(2)
    recorder.finish(interrupted=True)
    states = {r.number: (r.state, r.cause) for r in queries.trials(client, sweep.name)}
    assert states == {0: ("finished", ""), 1: ("failed", "loss nan at step 3"), 2: ("interrupted", "")}
    by_number = {int(r.data.tags["halora.trial"]): r.info for r in _runs(client, sweep, "trial")}
    assert {n: info.status for n, info in by_number.items()} == {0: "FINISHED", 1: "FAILED", 2: "KILLED"}
    assert all(info.end_time >= info.start_time for info in by_number.values())
    parent = queries.parent_run(client, sweep.name)
    assert (parent.info.status, parent.data.tags["halora.state"]) == ("KILLED", "interrupted")
    assert [r.point() is not None for r in queries.trials(client, sweep.name)] == [True, False, False]


def test_a_second_recorder_goes_on_with_the_same_runs(client, store, sweep, sweep_file, tmp_path):
    first = SweepRecorder(client, store, sweep, sweep_file)
    done = _finish(first, sweep, tmp_path, 0, accuracy=0.4, rank=2)
    _begin(first, sweep, 1, rank=8)
    first.interrupt_trial(1)
    first.finish(interrupted=True)
    before = {r.number: r.run_id for r in queries.trials(client, sweep.name)}

    again = SweepRecorder(client, store, sweep, sweep_file)
    assert again.parent.info.run_id == first.parent.info.run_id
    again.add_point(done, "halora")
    _begin(again, sweep, 1, rank=8)
    assert [r.state for r in queries.trials(client, sweep.name)] == ["finished", "running"]
    assert _runs(client, sweep, "sweep")[0].info.status == "RUNNING"
    _finish(again, sweep, tmp_path, 1, accuracy=0.6, rank=8)
    again.finish(interrupted=False)

    assert {r.number: r.run_id for r in queries.trials(client, sweep.name)} == before
    assert len(_runs(client, sweep, "trial")) == 2
    (parent,) = _runs(client, sweep, "sweep")
    assert (parent.info.status, parent.data.metrics["trials_done"]) == ("FINISHED", 2)
    assert [p.number for p in again.points] == [0, 1]


def test_the_parent_run_keeps_the_front(client, store, sweep, sweep_file, tmp_path):
    recorder = SweepRecorder(client, store, sweep, sweep_file)
    points = [
        _finish(recorder, sweep, tmp_path, number, accuracy, rank)
        for number, (accuracy, rank) in enumerate([(0.5, 8), (0.4, 2), (0.3, 4)])  # the last is dominated
    ]
    recorder.record_comparison({"gain": 0.1})
    recorder.finish(interrupted=False)
    parent = queries.parent_run(client, sweep.name)
    run_id = parent.info.run_id
    rows = queries.logged_json(client, run_id, names.FRONT_JSON)
    assert [(row["number"], row["accuracy"], row["on_front"]) for row in rows] == [
        (0, 0.5, True),
        (1, 0.4, True),
        (2, 0.3, False),
    ]
    assert len(front(points)) == parent.data.metrics["front_size"] == 2
    expected = hypervolume(points, accuracy=0.0, energy_uj_per_token=1.0)
    assert parent.data.metrics["hypervolume"] == pytest.approx(expected)
    volumes = {m.step: m.value for m in client.get_metric_history(run_id, "hypervolume")}
    assert sorted(volumes) == [1, 2, 3]
    assert volumes[1] < volumes[2] == volumes[3] == pytest.approx(expected)

    files = {item.path for item in client.list_artifacts(run_id)}
    assert files == {"sweep.yaml", "front.json", "front.csv", "front.png", "comparison.json"}
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    header, *lines = (folder / "front.csv").read_text().splitlines()
    assert header.split(",")[-1] == "lora.rank"
    assert len(lines) == 3
    assert matplotlib.image.imread(folder / "front.png").shape[:2] == (500, 800)
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["name"] == sweep.name
    assert parent.data.tags["mlflow.note.content"] == "what it is for"


def test_a_trial_that_is_not_there_is_named_with_those_that_are(client, store, sweep, sweep_file, tmp_path):
    recorder = SweepRecorder(client, store, sweep, sweep_file)
    _finish(recorder, sweep, tmp_path, 0, accuracy=0.5)
    with pytest.raises(UserError, match=rf"no trial '{sweep.name}/7' \(numbers of '{sweep.name}': 0\)"):
        queries.trial(client, f"{sweep.name}/7")
    for malformed in (sweep.name, f"{sweep.name}/x", "/3"):
        with pytest.raises(UserError, match="write SWEEP/NUMBER"):
            queries.trial(client, malformed)
    with pytest.raises(UserError, match="nothing is recorded of sweep 'other'"):
        queries.parent_run(client, "other")
    with pytest.raises(UserError, match=r"has no 'nothing\.json'; it did not get that far"):
        queries.logged_json(client, recorder.parent.info.run_id, "nothing.json")


def test_a_store_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/store' cannot be written: Not a directory") as caught:
        Store(tmp_path / "file" / "store").check_writable()
    assert not isinstance(caught.value, UnreachableError)
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(UnreachableError, match=r"cannot be opened: .*file is not a database"):
        open_client(Store(tmp_path))


def test_a_store_lists_the_sweeps_it_holds(tmp_path):
    store = Store(tmp_path)
    assert store.sweeps() == []
    for name in ("first", "second"):
        store.sweep(name).root.mkdir(parents=True)
    store.sweep("second").sweep_file.touch()
    assert store.sweeps() == ["second"]
    assert store.existing("second").name == "second"
    with pytest.raises(UserError, match=r"no sweep 'secnd' in .*did you mean 'second'"):
        store.existing("secnd")
