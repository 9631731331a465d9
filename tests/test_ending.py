"""The end of a sweep: deleted, archived, brought back. Oracles: the files of the store and the storage, MLflow's own
answers and tables, Optuna's list of studies; the same undisturbed.

A kill is an exception before one of the calls that remove or move something, after which none of them does any more.
"""

import hashlib
import io
import os
import shutil
import sys
from contextlib import suppress

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from recorded_sweeps import begin, finish, made_up_sweep

from halora import files
from halora.errors import UnreachableError, UserError
from halora.files import write_whole
from halora.records import queries, registry
from halora.records.exporter import recording
from halora.records.store import Store
from halora.records.tracking import open_client
from halora.sweep.run.archive import archive, unarchive
from halora.sweep.run.deletion import delete, end_deletions, holdings
from halora.sweep.run.state import load_sweep_of, only_driver, open_core
from halora.sweep.search.study_storage import STUDY_URL

NAME, OTHER = "mine", "other"
TRIALS = 3


class _Killed(BaseException):
    """As little to be caught as a signal."""


class _Axe:
    """Falls at a call that removes or moves something, and from then on at every other."""

    def __init__(self, monkeypatch):
        self.left, self.calls = None, []
        for where, name in (
            *((MlflowClient, name) for name in ("delete_run", "delete_logged_model", "delete_model_version")),
            (LocalArtifactRepository, "delete_artifacts"),
            (optuna, "delete_study"),
            (files, "write_whole"),
            *((os, name) for name in ("rename", "unlink", "rmdir")),
        ):
            monkeypatch.setattr(where, name, self._guarded(name, getattr(where, name)))

    def _guarded(self, what, call):
        def guarded(*arguments, **named):
            if self.left == 0:
                raise _Killed
            if self.left is not None:
                self.left -= 1
            self.calls.append(what)
            return call(*arguments, **named)

        return guarded


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_models, tiny_task):
    """A folder with a store of two sweeps that share all there is to share, one trial of each registered."""
    root = tmp_path_factory.mktemp("template")
    store = Store(root / "store", checkpoint_url=str(root / "stored"))
    store.check_writable()
    before = os.environ.get(STUDY_URL)
    os.environ[STUDY_URL] = f"sqlite:///{root}/studies.db"
    try:
        for name in (NAME, OTHER):
            _fill(store, made_up_sweep(store, name, tiny_models["llama"], tiny_task))
    finally:
        os.environ.pop(STUDY_URL) if before is None else os.environ.update({STUDY_URL: before})
    return root


def _fill(store, sweep):
    """Finished trials, the first the best of equal costs; each with a checkpoint here and in the storage."""
    folder = store.sweep(sweep.name)
    open_core(sweep, store)
    url = f"{store.checkpoint_url}/{sweep.name}-{sweep.launch}"
    write_whole(folder.checkpoint_url_file, url)
    with recording(store, sweep, print) as recorder:
        for number in range(TRIALS):
            begin(recorder, sweep, number)
            finish(recorder, folder.root, number, accuracy=0.6 - number / 10)
            own = folder.trial(number)
            (own / "step-000004").mkdir()
            (own / "step-000004" / "progress.json").write_text('{"step": 4}')
            shutil.copytree(own / "adapter", own / "step-000004" / "adapter")
            shutil.copytree(
                own / "step-000004", store.root.parent / "stored" / url.rpartition("/")[2] / f"{number:05d}"
            )
        recorder.finish(interrupted=False)
    (folder.selection / "attempt-01").mkdir(parents=True)
    client = open_client(store)
    run = queries.trial_run(client, sweep.name, sweep.launch, 0)
    tags = {"halora.attempt": "1", "halora.adapter_sha256": sweep.name}
    registry.register(client, "halora.base.task.chip-12345678", run, tags, "")


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    """A function that copies it to where nothing else is: the copy's store."""

    def make():
        root = tmp_path / f"{len(list(tmp_path.iterdir())):03d}"
        shutil.copytree(template, root)
        monkeypatch.setenv(STUDY_URL, f"sqlite:///{root}/studies.db")
        store = Store(root / "store")
        for name in store.sweeps():
            file = store.sweep(name).checkpoint_url_file
            file.write_text(f"{root}/stored/{file.read_text().rpartition('/')[2]}")
        return store

    return make


def _contents(store, without=()):
    """Digests of all files beside databases and caches, by their path; the launches' identities are the same in all."""
    root = store.root.parent
    skipped = {"mlflow.db", "index.db", "studies.db", "checkpoint-url", "driver.lock", "lock", *without}
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if path.name not in skipped
    }


def _records(store):
    """What MLflow and Optuna have, by the sweep it is of."""
    client = open_client(store)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, run_view_type=ViewType.ALL, max_results=1000)
    models = client.search_logged_models(experiments)
    return {
        "runs": sorted((run.data.tags["halora.sweep"], run.info.lifecycle_stage) for run in runs),
        "models": sorted(model.tags["halora.sweep"] for model in models),
        "adapters": [(each.sweep, each.version) for each in registry.registered_adapters(client)],
        "studies": [
            each.study_name.partition("-")[0] for each in optuna.get_all_study_summaries(os.environ[STUDY_URL])
        ],
    }


def _of(name):
    return lambda path: f"/{name}/" in path or f"/{name}-" in path


def test_a_deleted_sweep_leaves_nothing_and_touches_nothing_of_another(world):
    store, said = world(), []
    before, name_free = _contents(store), store.sweep(NAME).root
    found = holdings(NAME, store)
    assert (found.runs, found.stored, found.study_in_database) == (1 + TRIALS, 2 * TRIALS, True)
    assert found.adapters == ("halora.base.task.chip-12345678/1",)
    assert any(found.launch in line for line in found.lines())
    with pytest.raises(UserError, match=r"adapter halora\.base\S+/1 of sweep 'mine' is registered"):
        delete(NAME, store, said.append)
    assert _contents(store) == before
    delete(NAME, store, said.append, with_adapters=True)
    assert said == []
    assert not name_free.exists()
    assert store.sweeps() == [OTHER]
    runs = [(NAME, "deleted")] * (1 + TRIALS) + [(OTHER, "active")] * (1 + TRIALS)
    assert _records(store) == {
        "runs": runs,
        "models": [OTHER] * TRIALS,
        "adapters": [(OTHER, 2)],
        "studies": [OTHER],
    }
    left = _contents(store)
    assert left.items() <= before.items()
    assert not [path for path in left if _of(NAME)(path)]
    assert [path for path in before if _of(OTHER)(path)] == [path for path in left if _of(OTHER)(path)]
    artifacts = [path for path in before if path.startswith("store/artifacts/")]
    assert 2 * len([path for path in left if path.startswith("store/artifacts/")]) == len(artifacts)
    assert not (store.root / ".deleted").exists()
    with pytest.raises(UserError, match="no sweep 'mine'"):
        delete(NAME, store, said.append)


@pytest.mark.parametrize("points", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_a_deletion_killed_at_any_call_is_ended_by_the_next(world, monkeypatch, points):
    """Or by `doctor --reconcile`. In CI at a few of them: the first and the last, and some between."""
    axe, store = _Axe(monkeypatch), world()
    axe.calls.clear()
    delete(NAME, store, print, with_adapters=True)
    calls, files_left, records_left = list(axe.calls), _contents(store), _records(store)
    assert {*calls} >= {"delete_run", "delete_logged_model", "delete_model_version", "delete_artifacts", "delete_study"}
    whole = range(len(calls))
    for at in whole if points is None else sorted({0, 1, len(calls) - 1, *whole[:: len(calls) // points]}):
        store = world()
        axe.left = at
        with pytest.raises(_Killed):
            delete(NAME, store, print, with_adapters=True)
        axe.left = None
        if at % 2 and store.half_deleted():
            assert end_deletions(store, print) == 1
        else:
            with suppress(UserError):  # all was gone
                delete(NAME, store, print, with_adapters=True)
        what = f"killed at call {at} after {calls[max(at - 3, 0) : at]}"
        assert _contents(store) == files_left, what
        assert _records(store) == records_left, what
        assert not (store.root / ".deleted").exists(), what


def test_a_sweep_that_took_the_name_of_a_half_deleted_one_stays(world, monkeypatch, tiny_models, tiny_task):
    axe, store, said = _Axe(monkeypatch), world(), []
    axe.left = 4
    with pytest.raises(_Killed):
        delete(NAME, store, print, with_adapters=True)
    axe.left = None
    assert store.half_deleted(NAME)
    again = made_up_sweep(store, NAME, tiny_models["llama"], tiny_task)
    delete(NAME, store, said.append, with_adapters=True)
    assert load_sweep_of(store.existing(NAME)).launch == again.launch
    assert "of another launch, and stays" in said[-1]
    assert not store.half_deleted()


def test_what_runs_or_cannot_be_reached_is_not_deleted(world, monkeypatch):
    store = world()
    before = _contents(store)
    with only_driver(store.sweep(NAME)), pytest.raises(UserError, match="is running in another process"):
        delete(NAME, store, print, with_adapters=True)
    lock = store.sweep(NAME).selection / "lock"
    with files.locked(lock), pytest.raises(UserError, match="is being selected"):
        delete(NAME, store, print, with_adapters=True)
    monkeypatch.setenv(STUDY_URL, "postgresql://halora@127.0.0.1:9/t")
    with pytest.raises(UnreachableError, match="the study's database"):
        delete(NAME, store, print, with_adapters=True)
    monkeypatch.delenv(STUDY_URL)
    with pytest.raises(UserError, match="is in a database"):
        delete(NAME, store, print, with_adapters=True)
    assert _contents(store) == before


def test_an_archived_sweep_is_hidden_and_comes_back_as_it_was(world, halora, halora_json):
    store = world()
    before, stored = _contents(store), f"{store.root.parent}/stored"
    at = f"--store {store.root}"
    assert halora(f"sweep archive {NAME} {at}")[0] == 0
    assert [row["sweep"] for row in halora_json(f"sweep list {at}")] == [OTHER]
    assert {row["sweep"]: row["state"] for row in halora_json(f"sweep list --all {at}")}[NAME] == "archived"
    code, _, said = halora(f"sweep resume {NAME} {at}")
    assert (code, f"halora sweep unarchive {NAME}" in said) == (2, True)
    freed = sorted(path for path in before if path not in _contents(store) and path.startswith("store/"))
    own = "store/sweeps/mine/trials/{}/step-000004/"
    assert freed == sorted(  # trial 0 is the front
        own.format(number) + name
        for number in ("00001", "00002")
        for name in ("adapter/adapter_model.safetensors", "progress.json")
    )
    assert not [path for path in os.listdir(stored) if path.startswith(NAME) and os.listdir(f"{stored}/{path}")]
    assert "0.4" in halora(f"trial show {NAME}/2 {at}")[1]
    assert halora(f"sweep unarchive {NAME} {at}")[0] == 0
    after = _contents(store)
    assert {path: digest for path, digest in before.items() if path.startswith("store/")} == {
        path: digest for path, digest in after.items() if path.startswith("store/")
    }
    assert [row["sweep"] for row in halora_json(f"sweep list {at}")] == [NAME, OTHER]


def test_what_mlflow_lacks_or_has_otherwise_is_kept(world):
    store = world()
    folder = store.sweep(NAME)
    changed = folder.trial(1) / "step-000004" / "adapter" / "adapter_model.safetensors"
    changed.write_bytes(b"not what MLflow has")
    archive(NAME, store, print)
    assert changed.exists()
    assert not (folder.trial(2) / "step-000004").exists()
    unarchive(NAME, store)
    folder.sent_file.unlink()
    with pytest.raises(UserError, match=r"MLflow lacks \d+ records of sweep 'mine'"):
        archive(NAME, store, print)
    assert not folder.archive_file.exists()


@pytest.mark.slow
def test_an_archiving_or_its_undoing_killed_at_any_call_is_ended_by_the_next(world, monkeypatch):
    axe, store = _Axe(monkeypatch), world()
    before = _contents(store)
    axe.calls.clear()
    archive(NAME, store, print)
    there, back = len(axe.calls), None
    archived = _contents(store, without=["archived.json"])
    axe.calls.clear()
    unarchive(NAME, store)
    back = len(axe.calls)
    kept = {path: digest for path, digest in before.items() if path.startswith("store/")}
    for at in range(there):
        store = world()
        axe.left = at
        with pytest.raises(_Killed):
            archive(NAME, store, print)
        axe.left = None
        if at % 2:  # else it is undone at once
            archive(NAME, store, print)
            assert _contents(store, without=["archived.json"]) == archived, f"killed at call {at}"
        unarchive(NAME, store)
        assert {p: d for p, d in _contents(store).items() if p.startswith("store/")} == kept, f"killed at call {at}"
    for at in range(back):
        store = world()
        archive(NAME, store, print)
        axe.left = at
        with pytest.raises(_Killed):
            unarchive(NAME, store)
        axe.left = None
        unarchive(NAME, store)
        assert {p: d for p, d in _contents(store).items() if p.startswith("store/")} == kept, f"killed at call {at}"


def test_a_person_is_told_and_asked_before_anything_is_deleted(world, halora, monkeypatch):
    store = world()
    at, before = f"--store {store.root}", _contents(store)
    code, out, said = halora(f"sweep delete {NAME} --with-adapters {at}")
    assert (code, out) == (2, "")
    assert "say it with --yes" in said
    assert f"{1 + TRIALS} runs in MLflow" in said
    assert "registered adapter halora.base.task.chip-12345678/1" in said
    answers = io.StringIO("n\n")
    answers.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", answers)
    assert halora(f"sweep delete {NAME} --with-adapters {at}")[0] == 1
    assert _contents(store) == before
    assert halora(f"sweep delete {NAME} --yes {at}")[0] == 2  # a registered adapter
    assert halora(f"sweep delete {NAME} --with-adapters --yes {at}")[0] == 0
    assert store.sweeps() == [OTHER]
    assert halora(f"sweep delete {NAME} --yes {at}")[0] == 2
