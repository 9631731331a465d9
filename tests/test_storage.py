"""Oracles: the bytes that were put; fsspec's and the file system's own listings; the uninterrupted training.

S3 is a moto server of its own, a process; whatever is killed here is another process, with SIGKILL.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
from optuna.trial import create_trial
from services import free_port

import halora.storage
from halora.errors import StorageError, UnreachableError, UserError
from halora.hardware.energy import ENERGY
from halora.records.store import Store, SweepFolder
from halora.settings.trial import Goal
from halora.storage import TrialStorage, WorkFolder, check_storage, read_adapter
from halora.sweep.run.trial_files import TrialFiles
from halora.sweep.search.jobs import Job
from halora.sweep.search.study import State, Trial
from halora.trial_folder import OPTIMIZER_FILE, adapter_folder, latest_checkpoint
from halora.url_folder import UrlFolder, checked_url

SCRATCH = "halora-trial-*"


@pytest.fixture(params=["local", "s3"])
def base(request, tmp_path):
    """A place for storages: a path, and a URL of the S3 server."""
    if request.param == "local":
        return str(tmp_path / "storage")
    request.getfixturevalue("s3")
    return f"s3://bucket/{uuid.uuid4().hex}"


def _checkpoint(folder, step, files=0):
    """A trial's folder with a checkpoint of that step, of made-up content."""
    checkpoint = folder / f"step-{step:06d}"
    (checkpoint / "adapter").mkdir(parents=True)
    (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(3000))
    (checkpoint / "adapter" / "adapter_config.json").write_text("{}")
    (checkpoint / OPTIMIZER_FILE).write_bytes(os.urandom(5000))
    (checkpoint / "progress.json").write_text(json.dumps({"step": step}))
    for i in range(files):
        (checkpoint / f"part-{i:04d}").write_bytes(os.urandom(1000))
    (folder / "reports.json").write_text(json.dumps([{"step": i + 1} for i in range(step)]))
    (folder / "trial.json").write_text("{}")
    return folder


def _content(folder):
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _objects(url):
    """Names below a URL, by a file system of their own."""
    fs, root = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    return sorted(name.removeprefix(root).lstrip("/") for name in fs.find(root))


def _fs(url):
    return fsspec.url_to_fs(url)[0]


# What is put there comes back.


def test_a_checkpoint_comes_back_as_it_was_and_takes_the_place_of_older_ones(base, tmp_path):
    storage = TrialStorage(f"{base}/00003")
    assert not storage.fetch_checkpoint(tmp_path / "none")
    assert storage.reports() == []
    storage.put_checkpoint(_checkpoint(tmp_path / "old", 2))
    own = _checkpoint(tmp_path / "own", 4)
    storage.put_checkpoint(own)
    assert {name.partition("/")[0].rpartition("-")[0] for name in _objects(f"{base}/00003")} == {"step-000004"}
    assert storage.reports() == [{"step": step} for step in (1, 2, 3, 4)]
    there = shutil.copytree(tmp_path / "old", tmp_path / "there")
    assert storage.fetch_checkpoint(there)
    assert _content(there) == _content(own)
    assert storage.fetch_checkpoint(tmp_path / "light", moments=False)
    assert _content(own).keys() - _content(tmp_path / "light").keys() == {f"step-000004/{OPTIMIZER_FILE}"}


def test_scores_are_kept_by_the_goal_they_were_taken_at(base, tmp_path):
    storage = TrialStorage(f"{base}/00000")
    for chips in (2, 4):
        (tmp_path / "result.json").write_text(json.dumps({"chips": chips}))
        storage.put_result(tmp_path, 6, chips)
    for chips in (2, 4):
        assert storage.fetch_result(tmp_path / "there", 6, chips)
        assert json.loads((tmp_path / "there" / "result.json").read_text()) == {"chips": chips}
    assert not storage.fetch_result(tmp_path / "there", 8, 4)
    assert len(_objects(base)) == 2  # nothing is left beside


def test_a_worker_that_comes_late_does_no_harm(base, tmp_path):
    """It was frozen at step 2; another went on with its trial to step 4."""
    storage, newest = TrialStorage(f"{base}/00000"), _checkpoint(tmp_path / "b", 4)
    storage.put_checkpoint(newest)
    storage.put_checkpoint(_checkpoint(tmp_path / "a", 2))
    assert storage.fetch_checkpoint(tmp_path / "there")
    assert _content(tmp_path / "there") == _content(newest)
    assert len(storage.reports()) == 4


# What was interrupted or damaged is not taken.

_CHILD = """
import os, signal, sys
from pathlib import Path
from halora.storage import TrialStorage, UrlFolder

what, url, folder = sys.argv[1:]
files = iter(range(20))
copy_file = getattr(UrlFolder, what)

def copy_or_die(*arguments):
    if next(files, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    copy_file(*arguments)

setattr(UrlFolder, what, copy_or_die)
getattr(TrialStorage(url), what + "_checkpoint")(Path(folder))
"""


def _killed(what, url, folder):
    """Put or fetch a checkpoint of many files in another process, which is killed after twenty."""
    child = subprocess.run([sys.executable, "-c", _CHILD, what, url, str(folder)], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL


def test_an_upload_that_was_killed_is_not_taken_for_a_checkpoint(base, tmp_path):
    url = f"{base}/00000"
    storage, whole = TrialStorage(url), _checkpoint(tmp_path / "whole", 2)
    storage.put_checkpoint(whole)
    _killed("put", url, _checkpoint(tmp_path / "partly", 4, files=40))
    left = [name for name in _objects(url) if name.startswith("step-000004")]
    assert len(left) == 20
    assert not [name for name in left if name.endswith("manifest.json")]
    assert storage.fetch_checkpoint(tmp_path / "there")
    assert _content(tmp_path / "there") == _content(whole)
    assert len(storage.reports()) == 2
    storage.put_checkpoint(_checkpoint(tmp_path / "again", 4))
    assert len(_objects(url)) == 20 + 7  # whoever wrote the 20 may only be frozen
    storage.put_checkpoint(_checkpoint(tmp_path / "further", 6))
    assert len(_objects(url)) == 7  # files of one checkpoint and its manifest


def test_a_download_that_was_killed_leaves_no_checkpoint(base, tmp_path):
    url = f"{base}/00000"
    storage, whole, there = TrialStorage(url), _checkpoint(tmp_path / "whole", 4, files=40), tmp_path / "there"
    storage.put_checkpoint(whole)
    _checkpoint(there, 2)
    before = _content(there)
    _killed("fetch", url, there)
    partial = [name for name in _content(there) if ".partial" in name]
    assert len(partial) == 20
    assert {name: content for name, content in _content(there).items() if name not in partial} == before
    assert storage.fetch_checkpoint(there)
    assert _content(there) == _content(whole)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_taken_of_it(base, tmp_path, damage):
    url = f"{base}/00000"
    storage, there = TrialStorage(url), tmp_path / "there"
    storage.put_checkpoint(_checkpoint(tmp_path / "own", 4))
    (name,) = [
        name for name in _objects(url) if name.endswith("manifest.json" if damage == "manifest" else OPTIMIZER_FILE)
    ]
    fs, path = _fs(url), f"{url}/{name}"
    content = fs.cat_file(path)
    if damage == "gone":
        fs.rm_file(path)
    else:
        fs.pipe_file(path, content[:-1] + (b"" if damage != "changed" else bytes([content[-1] ^ 1])))
    with pytest.raises(UserError, match=r"step-000004-.* is damaged: .*delete it; the trial starts over") as told:
        storage.fetch_checkpoint(there)
    assert not isinstance(told.value, StorageError)
    assert latest_checkpoint(there) is None
    assert not any(there.rglob("*"))


# What nobody needs again goes.


def test_pruning_keeps_what_is_asked_and_may_be_interrupted_and_repeated(base, tmp_path):
    url = f"{base}/00000"
    storage, own = TrialStorage(url), _checkpoint(tmp_path / "own", 4)
    (own / "result.json").write_text("[]")
    storage.put_checkpoint(own)
    storage.put_result(own, 4, 2)
    moments = next(name for name in _objects(url) if name.endswith(OPTIMIZER_FILE))
    whole = _objects(url)
    storage.keep_adapter()
    assert _objects(url) == [name for name in whole if name != moments]
    _fs(url).pipe_file(f"{url}/{moments}", b"interrupted before it was gone")
    for _ in range(2):
        storage.keep_adapter()
        assert _objects(url) == [name for name in whole if name != moments]
    assert storage.has(4, 2)
    assert storage.fetch_checkpoint(tmp_path / "light")
    assert adapter_folder(tmp_path / "light")
    _fs(url).rm_file(f"{url}/{moments.replace(OPTIMIZER_FILE, 'manifest.json')}")  # a removal that was interrupted
    assert not storage.has(4, 2)
    for _ in range(2):
        storage.remove()
        assert _objects(url) == []


# Workers.


def test_a_scratch_folder_goes_with_its_job_and_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    url, goal = str(tmp_path / "storage" / "00000"), Goal(steps=4, chip_instances=1)
    TrialStorage(url).put_checkpoint(_checkpoint(tmp_path / "own", 2))
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from halora.storage import WorkFolder\nfrom halora.settings.trial import Goal\n"
        "own = WorkFolder(Path('none'), sys.argv[1])\nprint(own.fetch(Goal(4, 1)), flush=True)\ntime.sleep(600)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    child = subprocess.Popen([sys.executable, "-c", code, url], env=environment, stdout=subprocess.PIPE, text=True)
    theirs = Path(child.stdout.readline().strip())
    first, second = WorkFolder(tmp_path / "none", url), WorkFolder(tmp_path / "none", url)
    folders = [first.fetch(goal), second.fetch(goal)]
    assert len({theirs, *folders}) == 3
    assert all(latest_checkpoint(folder) for folder in [theirs, *folders])
    assert first.fetch(goal) == folders[0]
    first.close()
    assert [folder.exists() for folder in [theirs, *folders]] == [True, False, True]
    child.kill()
    child.wait()
    third = WorkFolder(tmp_path / "none", url)
    third.fetch(goal)
    assert [folder.exists() for folder in [theirs, *folders]] == [False, False, True]
    second.close()
    third.close()
    assert not list((tmp_path / "tmp").glob(SCRATCH))
    assert not (tmp_path / "none").exists()


def test_a_scratch_folder_that_was_taken_for_an_orphan_is_made_anew(tmp_path, monkeypatch):
    """Another process looks for orphans after the folder's lock is made and before it is locked."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flock, taken = fcntl.flock, []

    def late(file, operation):
        if not taken:
            taken.extend(tmp_path.glob(SCRATCH))
            halora.storage._remove_orphans()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    work = WorkFolder(tmp_path / "none", str(tmp_path / "storage" / "00000"))
    folder = work.fetch(Goal(steps=4, chip_instances=1))
    assert [place.exists() for place in taken] == [False]
    halora.storage._remove_orphans()
    assert folder.is_dir()
    work.close()
    assert not list(tmp_path.glob(SCRATCH))


# Drivers.


def test_two_sweeps_of_one_name_do_not_meet(base, tmp_path):
    urls = []
    for store in ("a", "b"):  # and the identity of its launch
        folder = SweepFolder(tmp_path / store / "sweeps" / "same")
        folder.root.mkdir(parents=True)
        TrialFiles(folder).keep_at(base, store * 32, [])
        TrialFiles(folder).keep_at(base, store * 32, [])  # a resume that names it again
        urls.append(folder.trial_url(0))
        TrialStorage(urls[-1]).put_checkpoint(_checkpoint(tmp_path / store, 2))
    assert len(set(urls)) == 2
    for store, url in zip("ab", urls, strict=True):
        assert url.startswith(f"{base}/same-{store * 32}/")
        TrialStorage(url).fetch_checkpoint(tmp_path / "there")
        assert (
            adapter_folder(tmp_path / "there").joinpath("adapter_model.safetensors").read_bytes()
            == (adapter_folder(tmp_path / store) / "adapter_model.safetensors").read_bytes()
        )


def test_unfinished_trials_move_with_their_sweep(base, tmp_path):
    folder = SweepFolder(tmp_path / "sweeps" / "moving")
    _checkpoint(folder.trial(1), 2)
    files, whole = TrialFiles(folder), _content(folder.trial(1))
    for place in (base, f"{base}-other"):
        files.keep_at(place, "0" * 32, [0, 1])
        assert folder.checkpoint_url.startswith(f"{place}/moving-")
        assert len(files.reports(1)) == 2
        assert files.reports(0) == []
        TrialStorage(folder.trial_url(1)).fetch_checkpoint(tmp_path / "there")
        assert _content(tmp_path / "there") == whole
        shutil.rmtree(folder.trial(1))


def test_a_trial_that_ended_keeps_what_a_race_needs_and_no_more(base, tmp_path):
    """Two finished trials, one of which is wanted in the end, a failed and a running one."""
    folder = SweepFolder(tmp_path / "sweeps" / "ended")
    folder.root.mkdir(parents=True)
    files, trials = TrialFiles(folder), []
    files.keep_at(base, "0" * 32, [])
    states = (State.FINISHED, State.FINISHED, State.FAILED, State.RUNNING)
    jobs = [Job(number, {}, {ENERGY: 1.0 + number}, Goal(4, 2), True, "") for number in range(4)]
    for job, state in zip(jobs, states, strict=True):
        worker = _checkpoint(tmp_path / f"worker-{job.number}", 4)
        (worker / "result.json").write_text(json.dumps({"of": job.number}))
        TrialStorage(folder.trial_url(job.number)).put_checkpoint(worker)
        TrialStorage(folder.trial_url(job.number)).put_result(worker, 4, 2)
        kept_as = {"rung": 0, "scores": (), "skipped": "", "lost_workers": 0, "halvings": 0, "violation": 0.0}
        trials.append(Trial(job.number, {}, job.costs, state=state, frozen=create_trial(value=0.0), **kept_as))
        if state is State.FINISHED:
            files.fetch(job)

    def kept(number):
        return {name.rpartition("/")[2] for name in _objects(folder.trial_url(number))}

    whole = kept(3)
    files.prune(trials, {0, 1})
    assert [kept(number) for number in range(4)] == [whole - {OPTIMIZER_FILE}, whole - {OPTIMIZER_FILE}, set(), whole]
    for driver in (files, TrialFiles(folder)):  # the second of a resume
        driver.prune(trials, {0})
        assert [kept(number) for number in range(4)] == [whole - {OPTIMIZER_FILE}, set(), set(), whole]
    race = Job(1, {}, {ENERGY: 2.0}, Goal(4, 3, first_chip=2), True, "")
    files.provide(race)
    work = WorkFolder(tmp_path / "none", folder.trial_url(1))
    there = work.fetch(race.goal)
    assert json.loads((there / "result.json").read_text()) == {"of": 1}
    assert read_adapter(adapter_folder(there)) == read_adapter(adapter_folder(tmp_path / "worker-1"))
    work.close()
    own = SweepFolder(tmp_path / "sweeps" / "without")  # no storage: the sweep's folder alone
    for trial in trials:
        _checkpoint(own.trial(trial.number), 4)
    TrialFiles(own).prune(trials, {0})
    moments = {int(path.parts[-3]) for path in own.root.rglob(OPTIMIZER_FILE)}
    adapters = {number for number in range(4) if adapter_folder(own.trial(number))}
    assert (moments, adapters) == ({3}, {0, 1, 3})


def test_an_adapter_is_sent_by_its_content(tmp_path):
    adapter = adapter_folder(_checkpoint(tmp_path, 2))
    assert read_adapter(adapter) == _content(adapter)


# What a user can get wrong.


def test_a_storage_that_cannot_be_used_is_told_by_name(s3, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for url, kind, said in (
        ("foo://bucket/x", UserError, "storage 'foo://bucket/x': Protocol not known: foo"),
        ("gs://bucket/x", UserError, "a package is missing on this machine: .*gcsfs"),
        ("s3://no-such-bucket/x", StorageError, "'s3://no-such-bucket/x' cannot be written: .*bucket does not exist"),
        (f"{tmp_path}/file/x", StorageError, "cannot be written: .*Not a directory"),
    ):
        with pytest.raises(kind, match=said):
            check_storage(url)
    check_storage("s3://bucket/x")
    assert _objects("s3://bucket/x") == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-told")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UnreachableError, match="'s3://bucket/x' cannot be written: Could not connect") as told:
        check_storage("s3://bucket/x")
    assert "not-to-be-told" not in str(told.value)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from halora.url_folder import UrlFolder\n"
        "try: UrlFolder('s3://bucket/x')\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "storage 's3://bucket/x': a package is missing" in run.stdout
    assert "pip install 'halora-sweep[s3]'" in run.stdout


def test_a_url_with_a_password_is_refused_and_a_path_made_absolute(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"holds a user or a password.*AWS_SECRET_ACCESS_KEY") as told:
        Store.at(tmp_path, checkpoint_url="s3://user:hidden@host/bucket")
    assert "hidden" not in str(told.value)
    with pytest.raises(UserError, match="holds a user or a password"):
        checked_url("simplecache::s3://user:hidden@host/bucket")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALORA_CHECKPOINT_URL", "shared/")
    assert Store.at(tmp_path).checkpoint_url == str(tmp_path / "shared")
    assert Store.at(tmp_path, checkpoint_url="s3://bucket/x/").checkpoint_url == "s3://bucket/x"


class _Relay(socketserver.BaseRequestHandler):
    """Passes a connection on to the address that its server has as `target`."""

    def handle(self):
        with socket.create_connection(self.server.target) as target:
            back = threading.Thread(target=_pass_on, args=(target, self.request))
            back.start()
            _pass_on(self.request, target)
            back.join()


def _pass_on(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def test_a_server_that_is_away_for_a_moment_is_waited_for(s3, monkeypatch):
    """Nobody listens at the address of the server until a relay does."""
    here, target = ("127.0.0.1", free_port()), os.environ["AWS_ENDPOINT_URL"].rpartition("/")[2].split(":")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{here[1]}")
    fsspec.filesystem("s3").clear_instance_cache()
    place = UrlFolder("s3://bucket/x")
    with pytest.raises(StorageError):
        UrlFolder("s3://bucket/x", retries_s=()).write("early", b"")
    with socketserver.ThreadingTCPServer(here, _Relay, bind_and_activate=False) as relay:
        relay.target, relay.daemon_threads, relay.block_on_close = (target[0], int(target[1])), True, False

        def listen():
            relay.server_bind()
            relay.server_activate()
            relay.serve_forever()

        threading.Timer(0.5, listen).start()
        place.write("late", b"there")
        assert place.read("late") == b"there"
        relay.shutdown()
    fsspec.filesystem("s3").clear_instance_cache()
