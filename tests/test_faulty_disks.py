"""A store on a disk that is full or read-only. Oracle: the kernel's own refusals, on a file system of a megabyte."""

import itertools
import os
import subprocess
from contextlib import contextmanager, suppress

import pytest
from recorded_sweeps import begin, made_up_sweep

from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.sweep.run.state import open_core

READING = ("sweep status", "sweep list", "trial show kept/0", "front show kept")


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def store(disk, tiny_models, tiny_task):
    """A store with a simulated sweep, one trial of which was begun by a process that was killed."""
    place = Store(disk / "store")
    sweep = made_up_sweep(place, "kept", tiny_models["llama"], tiny_task)
    folder = place.sweep("kept")
    folder.curves_file.write_text(
        "trial,step,accuracy,clean_accuracy,lora.rank,training.method\n0,4,0.5,0.6,4,halora\n"
    )
    open_core(sweep, place).suggest()
    recorder = SweepRecorder(folder, sweep)
    begin(recorder, sweep, 0)
    recorder.close()
    return place


@contextmanager
def _read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


@contextmanager
def _full(disk):
    file = os.open(disk / "filling", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(file, b"\0" * 4096)
    os.close(file)
    try:
        yield
    finally:
        (disk / "filling").unlink()


@pytest.fixture
def ask(halora, store, monkeypatch):
    monkeypatch.setenv("HALORA_STORE", str(store.root))
    return halora


@pytest.mark.parametrize(
    ("fault", "said", "of_sqlite"),
    [
        (_read_only, "cannot be written or read: Read-only file system", "unable to open database file"),
        (_full, "no space is left", "database or disk is full"),
    ],
)
def test_a_command_that_cannot_write_says_so_in_one_sentence(disk, ask, fault, said, of_sqlite):
    with fault(disk):
        for command in READING:
            code, _, err = ask(command)
            assert code == 0, (command, err)
        for command, expected in (
            ("sweep resume kept", said),
            ("sweep stop kept", said),
            ("doctor --reconcile", of_sqlite),
        ):
            code, _, err = ask(command)
            assert code == 3, (command, err)
            (told,) = [line for line in err.splitlines() if line.startswith("error: ")]
            assert expected in told
            assert "Traceback" not in err


def test_a_full_disk_leaves_a_study_that_goes_on_when_there_is_room(disk, store, ask):
    sweep = made_up_sweep(store, "filled", "none", "none")
    core = open_core(sweep, store)
    asks = itertools.cycle([True, False])
    with _full(disk), pytest.raises(OSError, match="No space left"):
        any(map(core.request_stop, asks))  # until the last page is full; each gives none
    core.request_stop(False)
    before = store.sweep("filled").study_file.read_bytes()
    assert before.endswith(b"\n")
    core.request_stop(True)
    assert open_core(sweep, store).stopping
    assert store.sweep("filled").study_file.read_bytes().startswith(before)
