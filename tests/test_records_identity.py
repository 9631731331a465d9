"""What is recorded of a launch is its own, wherever its store stands and whoever else records there.

Oracle: MLflow's own tables, row by row beside the event log, and the files below each store.
"""

import shutil
import sqlite3

import pytest
from mlflow.tracking._tracking_service import utils as mlflow_utils
from recorded_sweeps import begin, finish, made_up_sweep
from records_audit import differences

from halora.records import names, queries, registry
from halora.records.delivery import undelivered
from halora.records.event_log import read
from halora.records.exporter import recording
from halora.records.store import Store
from halora.records.tracking import MlflowSweep, open_client


@pytest.fixture
def said():
    return []


def _record(store, sweep, said, accuracies, ended=True):
    """Record trials of these accuracies from the first that is not recorded on."""
    with recording(store, sweep, said.append) as recorder:
        for number, accuracy in accuracies.items():
            begin(recorder, sweep, number)
            finish(recorder, store.sweep(sweep.name).root, number, accuracy)
        recorder.finish(interrupted=not ended)


def _content(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_two_stores_in_one_database_keep_to_their_own_launch(tmp_path, tiny_models, tiny_task, said):
    """Both have a sweep of the same name and family."""
    shared = f"sqlite:///{tmp_path}/shared.db"
    stores = [Store(tmp_path / name, shared) for name in ("one", "two")]
    sweeps = [made_up_sweep(store, "same", tiny_models["llama"], tiny_task) for store in stores]
    for store, sweep, accuracies in zip(stores, sweeps, ({0: 0.3, 1: 0.4}, {0: 0.5, 1: 0.6, 2: 0.7}), strict=True):
        _record(store, sweep, said, accuracies)
    _record(stores[0], sweeps[0], said, {2: 0.45})
    assert said == []
    client = open_client(stores[0])
    states = dict.fromkeys(range(3), "finished")
    for store, sweep in zip(stores, sweeps, strict=True):
        log = store.sweep("same").event_log_file
        mlflow = MlflowSweep(store, sweep)
        assert mlflow.trial_states() == {number: ["finished"] for number in range(3)}
        assert mlflow.repair(read(log)[0], states) == {}  # nothing of the other's is taken for its own
        assert differences(shared, "same", log) == []
        run = queries.trial_run(client, "same", sweep.launch, 1)
        assert (run.data.tags["halora.sweep"], run.data.tags["halora.launch"]) == ("same", sweep.launch)
        model = client.get_logged_model(queries.adapter_model_id(run))
        assert model.tags["halora.launch"] == sweep.launch
    parents = {queries.parent_run(client, "same", sweep.launch).info.run_id for sweep in sweeps}
    assert len(parents) == 2
    accuracy = [queries.trial_run(client, "same", sweep.launch, 0).data.metrics["accuracy"] for sweep in sweeps]
    assert accuracy == [0.3, 0.5]
    # and the same attempt at the same number is another version of the registered model
    tags = {names.ATTEMPT: "1", names.ADAPTER_SHA256: "0" * 64}
    made = []
    for sweep in (*sweeps, *sweeps):
        run = queries.trial_run(client, "same", sweep.launch, 0)
        made.append(registry.register(client, "halora.base.task.chip", run, tags, "")[0])
    assert [each.version for each in made] == [1, 2, 1, 2]
    assert [each.tags["halora.launch"] for each in made[:2]] == [sweep.launch for sweep in sweeps]


@pytest.mark.parametrize("way", [shutil.copytree, shutil.move])
def test_a_store_that_is_copied_or_moved_keeps_working(tmp_path, tiny_models, tiny_task, said, way):
    there = Store(tmp_path / "there")
    sweep = made_up_sweep(there, "moving", tiny_models["llama"], tiny_task)
    _record(there, sweep, said, {0: 0.3, 1: 0.4}, ended=False)
    client = open_client(there)
    tags = {names.ATTEMPT: "1", names.ADAPTER_SHA256: "0" * 64}
    run = queries.trial_run(client, "moving", sweep.launch, 1)
    config = queries.logged_config(client, run.info.run_id)
    registry.register(client, "halora.base.task.chip", run, tags, "")
    way(there.root, tmp_path / "another place")
    left = _content(there.root) if there.root.exists() else {}

    mlflow_utils._artifact_repos_cache.clear()  # of this process; runs keep their ids in a copy
    here = Store(tmp_path / "another place")
    assert undelivered(here, "moving") == 0
    client = open_client(here)
    assert queries.logged_config(client, run.info.run_id) == config
    assert queries.logged_json(client, run.info.run_id, names.SCORES_FILE)["chip_seeds"] == [0, 1, 2]
    copy = queries.download_adapter(client, queries.trial_run(client, "moving", sweep.launch, 1), tmp_path)
    assert (copy / "adapter_model.safetensors").read_bytes() == b"weights 1"
    (version,) = client.search_model_versions("name = 'halora.base.task.chip'")
    assert (tmp_path / "another place" / "artifacts").as_uri() in version.source
    _record(here, sweep, said, {2: 0.5})
    assert said == []
    assert differences(here.tracking_uri, "moving", here.sweep("moving").event_log_file) == []
    run = queries.trial_run(client, "moving", sweep.launch, 2)
    assert run.info.artifact_uri.startswith(here.artifacts.as_uri())
    assert queries.logged_json(client, run.info.run_id, names.SCORES_FILE)
    assert (_content(there.root) if there.root.exists() else {}) == left  # of the original nothing was touched
    with sqlite3.connect(here.database_file) as database:
        assert str(there.root) not in "\n".join(database.iterdump())
