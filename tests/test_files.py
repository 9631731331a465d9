"""Oracles: the kernel (what is in the folder, who holds a lock, which files were synced); arithmetic on the waits."""

import os
import subprocess
import sys
from itertools import islice

import pytest

from halora import files
from halora.files import locked, locked_now, sync_folder, write_whole
from halora.retries import backoff_s, retried


@pytest.fixture
def synced(monkeypatch):
    """Names of what is synced, in order."""
    names, fsync = [], os.fsync

    def noted(opened):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{opened}")))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", noted)
    return names


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(tmp_path, synced):
    write_whole(tmp_path / "text", "gr\u00fc\u00df")
    write_whole(tmp_path / "bytes", b"\x00\xff")
    assert ((tmp_path / "text").read_text(encoding="utf-8"), (tmp_path / "bytes").read_bytes()) == ("grüß", b"\x00\xff")
    (first, folder, second, _) = synced
    assert folder == tmp_path.name
    assert first.startswith(".text.")
    assert second.startswith(".bytes.")
    synced.clear()
    write_whole(tmp_path / "drawn", "anew", durable=False)
    assert synced == []


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path, monkeypatch):
    write_whole(tmp_path / "kept", "before")

    def full(opened):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "kept", "after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "before"}


def test_a_folder_is_on_the_disk_with_all_below_it(tmp_path, synced):
    (tmp_path / "step" / "adapter").mkdir(parents=True)
    for name in ("adapter/weights", "progress"):
        (tmp_path / "step" / name).write_bytes(b"x")
    sync_folder(tmp_path / "step")
    assert sorted(synced[:-1]) == ["adapter", "progress", "weights"]
    assert synced[-1] == "step"


def test_a_file_system_without_fsync_of_folders_is_none_the_worse(tmp_path, monkeypatch):
    fsync = os.fsync

    def refused(opened):
        if os.path.isdir(f"/proc/self/fd/{opened}"):
            raise OSError(22, "Invalid argument")
        fsync(opened)

    monkeypatch.setattr(os, "fsync", refused)
    write_whole(tmp_path / "there", "text")
    assert (tmp_path / "there").read_text() == "text"


@pytest.mark.parametrize("name", ["", "lock"])
def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path, name):
    """Of a folder and of a file, which is made."""
    place = tmp_path / name
    program = f"""
import pathlib, sys
from halora.files import locked
with locked(pathlib.Path({str(place)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    waited = []

    def end():
        waited.append(True)
        holder.kill()

    with locked(place, waiting=end):
        assert waited == [True]
        with pytest.raises(BlockingIOError):
            files.fcntl.flock(os.open(place, os.O_RDONLY), files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
    with locked(place, waiting=end):
        assert waited == [True]  # nobody held it
    holder.wait()


def test_a_lock_that_is_held_is_told_at_once(tmp_path):
    (tmp_path / "lock").touch()
    first = locked_now(tmp_path / "lock")
    assert locked_now(tmp_path / "lock") is None
    first.close()
    locked_now(tmp_path / "lock").close()


def test_waits_double_up_to_the_longest_and_end_in_time():
    assert list(islice(backoff_s(0.5, 3.0), 5)) == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert list(backoff_s(0.5, 3.0, within_s=0.0)) == []


def test_what_may_pass_is_tried_again_and_nothing_else():
    left, told = [OSError("gone"), OSError("gone"), ValueError("wrong"), OSError("gone")], []

    def call():
        if left:
            raise left.pop(0)
        return "there"

    def passes(error):
        return isinstance(error, OSError)

    with pytest.raises(ValueError, match="wrong"):
        retried(call, passes, (0.0,) * 5, lambda: told.append("waits"))
    assert told == ["waits"] * 2
    assert retried(call, passes, (0.0,)) == "there"
    left += [OSError("first"), OSError("last")]
    with pytest.raises(OSError, match="last"):
        retried(call, passes, (0.0,))
