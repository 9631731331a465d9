"""Two workers that both believe a trial theirs. Oracle: all orders of their operations, enumerated, not timed.

The object store is fsspec's own in memory. Each worker is a thread that stops before every operation on it and goes on
at the word of the test, so an order of operations is a word over the workers' names, and a worker that hangs is one
whose letter does not come for a while. After every single operation the store is looked at from outside.
"""

import itertools
import json
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from peft import LoraConfig

from halora.storage import TrialStorage
from halora.training.checkpoint import Checkpoint
from halora.training.engine import save_latest
from halora.trial_folder import OPTIMIZER_FILE

URL = "stepped://storage/00000"
_TURN = threading.local()


class _SteppedFileSystem(MemoryFileSystem):
    """Stops the threads that have a turn to wait for before each request; folders are removed object by object."""

    protocol = ("stepped",)
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("stepped://", "memory://"))

    def put_file(self, lpath, rpath, **options):
        _wait()
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        _wait()
        super().pipe_file(path, value, mode, **options)

    def find(self, path, **options):
        _wait()
        return super().find(path, **options)

    def cat_file(self, path, start=None, end=None, **options):
        _wait()
        return super().cat_file(path, start, end, **options)

    def rm_file(self, path):
        _wait()
        super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        _wait()
        for name in MemoryFileSystem.find(self, path):
            self.rm_file(name)


fsspec.register_implementation("stepped", _SteppedFileSystem, clobber=True)


def _wait():
    if turn := getattr(_TURN, "own", None):
        turn.wait()


class _Worker:
    """Carries work out operation by operation."""

    def __init__(self, work):
        self._go, self._stopped, self.over, self._failed = threading.Semaphore(0), threading.Semaphore(0), False, []
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._stopped.acquire()  # before its first operation

    def _run(self, work):
        _TURN.own = self
        try:
            work()
        except BaseException as error:
            self._failed.append(error)
        self.over = True
        self._stopped.release()

    def wait(self):
        """Of the worker's own thread: stop until the next step."""
        self._stopped.release()
        self._go.acquire()

    def step(self):
        """One operation, up to the next."""
        if not self.over:
            self._go.release()
            self._stopped.acquire()
        if self._failed:
            raise self._failed[0]


def _checkpoint(folder, step, by):
    """A trial's folder with a checkpoint of that step, two files by that worker."""
    (folder / f"step-{step:06d}").mkdir(parents=True)
    (folder / f"step-{step:06d}" / "progress.json").write_text(json.dumps({"step": step, "by": by}))
    (folder / f"step-{step:06d}" / OPTIMIZER_FILE).write_text(f"moments of {by} after {step}")
    return folder


@pytest.fixture
def uploads(tmp_path):
    """A function that gives the upload of a worker's checkpoint of a step, as a call."""
    known = {}

    def upload(by, step):
        if (by, step) not in known:
            known[by, step] = _checkpoint(tmp_path / f"{by}-{step}", step, by)
        return lambda: TrialStorage(URL, retries_s=()).put_checkpoint(known[by, step])

    return upload


@contextmanager
def _empty_store():
    _SteppedFileSystem.store.clear()
    _SteppedFileSystem.pseudo_dirs[:] = [""]
    yield
    _SteppedFileSystem.store.clear()


def _whole():
    """Steps of the whole checkpoints in the store, by their folder's name, seen from outside in one moment."""
    held = {name.removeprefix("/storage/00000/"): file.getvalue() for name, file in _SteppedFileSystem.store.items()}
    found = {}
    for name, content in held.items():
        folder, _, last = name.rpartition("/")
        if last == "manifest.json":
            files = json.loads(content)["files"]
            if all(len(held.get(f"{folder}/{file}", b"")) == said["bytes"] for file, said in files.items()):
                found[folder] = int(folder.split("-")[1])
    return found


def _play(order, works, check=lambda: None):
    """Carry out works side by side in an order, then each to its end; the furthest whole checkpoint never gets lost."""
    workers = {name: _Worker(work) for name, work in works.items()}
    furthest = max(_whole().values(), default=0)
    for name in itertools.chain(order, *(itertools.repeat(name, 60) for name in workers)):
        workers[name].step()
        now = max(_whole().values(), default=0)
        assert now >= furthest, f"a checkpoint of step {furthest} was whole, now {now} is the furthest"
        furthest = now
        check()
    assert all(worker.over for worker in workers.values())
    return furthest


def _taken(folder):
    """What a third worker resumes from."""
    assert TrialStorage(URL, retries_s=()).fetch_checkpoint(folder)
    (progress,) = folder.glob("step-*/progress.json")
    told = json.loads(progress.read_text())
    assert (progress.parent / OPTIMIZER_FILE).read_text() == f"moments of {told['by']} after {told['step']}"
    return told["step"]


def _orders(names, length):
    """All orders of so many operations of each of two workers."""
    for places in itertools.combinations(range(2 * length), length):
        yield "".join(names[0] if i in places else names[1] for i in range(2 * length))


def test_every_order_of_two_uploads_of_one_step_leaves_a_whole_checkpoint(uploads, tmp_path):
    """252 orders: the start, two files, the manifest and the listing of each."""
    for i, order in enumerate(_orders("ab", 5)):
        with _empty_store():
            assert _play(order, {"a": uploads("a", 4), "b": uploads("b", 4)}) == 4
            assert _taken(tmp_path / f"there-{i}") == 4


@pytest.mark.parametrize(("first", "second"), [(4, 4), (4, 6), (6, 4)])
def test_a_worker_frozen_at_any_operation_and_woken_at_any_later_one_does_no_harm(uploads, tmp_path, first, second):
    """There is an older checkpoint to remove; the other worker goes on two steps further meanwhile."""

    def goes_on():
        uploads("b", second)()
        uploads("b", second + 2)()

    for frozen_at in range(16):
        for woken_at in range(0, 30, 2):
            with _empty_store():
                uploads("c", 2)()
                order = "a" * frozen_at + "b" * woken_at
                furthest = max(first, second + 2)
                assert _play(order, {"a": uploads("a", first), "b": goes_on}) == furthest
                assert _taken(tmp_path / f"there-{frozen_at}-{woken_at}") == furthest


def test_a_worker_frozen_in_an_upload_wakes_after_its_trial_ended(uploads, tmp_path):
    """The driver keeps the adapter of the other's upload meanwhile; the last moments are gone, the adapter is not."""
    for frozen_at in range(8):
        for woken_at in range(0, 24, 2):
            with _empty_store():
                uploads("b", 4)()
                keep = TrialStorage(URL, retries_s=()).keep_adapter
                assert _play("a" * frozen_at + "d" * woken_at, {"a": uploads("a", 4), "d": keep}) == 4
                there = tmp_path / f"there-{frozen_at}-{woken_at}"
                assert TrialStorage(URL, retries_s=()).fetch_checkpoint(there, moments=False)
                assert (there / "step-000004" / "progress.json").exists()


# In a folder of this machine, where a checkpoint appears by one rename.


def _saved(folder, step, by, meanwhile=lambda: None):
    """Save a worker's checkpoint of a step, as rank 0 of a training does; something else happens while it writes."""

    class Config(LoraConfig):
        def save_pretrained(self, place):
            LoraConfig().save_pretrained(place)
            meanwhile()

    weight = torch.tensor([float(ord(by))])
    checkpoint = Checkpoint(step, {"weight": weight}, {"weight.exp_avg": weight})
    save_latest(SimpleNamespace(step=step, writes=True, save=lambda to: checkpoint.write(to, Config())), folder)


def _kept(folder):
    """Who wrote the checkpoints of a folder, by step; and what is left beside them."""
    found = {path.name: Checkpoint.read(path).weights["weight"].item() for path in folder.glob("step-*")}
    return {int(name.removeprefix("step-")): chr(int(by)) for name, by in found.items()}, [*folder.glob(".*")]


def test_a_worker_that_comes_late_to_a_folder_leaves_the_furthest_checkpoint(tmp_path):
    _saved(tmp_path, 4, "a")
    _saved(tmp_path, 2, "b")
    assert _kept(tmp_path) == ({2: "b", 4: "a"}, [])
    _saved(tmp_path, 4, "b")  # as one does that resumed from it and has nothing to train: it never is away
    assert _kept(tmp_path) == ({4: "a"}, [])
    _saved(tmp_path, 6, "a", meanwhile=lambda: _saved(tmp_path, 6, "b"))
    assert _kept(tmp_path) == ({6: "b"}, [])
    _saved(tmp_path, 8, "a", meanwhile=lambda: _saved(tmp_path, 10, "b"))
    assert _kept(tmp_path) == ({10: "b"}, [])  # b took what a had written of step 8 for that of a killed worker
    (tmp_path / ".step-000010.0123abcd.partial").mkdir()  # of a worker that was killed
    _saved(tmp_path, 10, "a")
    assert len(_kept(tmp_path)[1]) == 1
    _saved(tmp_path, 12, "a")
    assert _kept(tmp_path) == ({12: "a"}, [])
