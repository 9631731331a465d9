"""Oracle: Ray's own account of where it runs; the limit of a socket's path (AF_UNIX, 107 bytes)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halora.errors import UserError
from halora.sweep.cluster.session import own_folder

_ANOTHER = """
import ray, sys
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
print("runs", flush=True)
sys.stdin.read()
"""
_OURS = """
import ray
from halora.sweep.cluster.session import ray_session
with ray_session(3):
    print(ray.cluster_resources()["CPU"], ray.get(ray.remote(lambda: 7).remote()))
    print(ray._private.worker.global_worker.node.get_temp_dir_path())
"""


def test_ray_is_this_machine_s_own_whatever_the_environment_says(tmp_path):
    """Another Ray runs here, `RAY_ADDRESS` names a third that is away, and `TMPDIR` is longer than a socket's path."""
    long = tmp_path / ("temporary-" * 12)
    long.mkdir()
    start = [sys.executable, "-c", _ANOTHER]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as another:
        assert another.stdout.readline() == "runs\n"
        environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "TMPDIR": str(long)}
        ours = subprocess.run([sys.executable, "-c", _OURS], env=environment, capture_output=True, text=True)
        another.stdin.close()
    assert ours.returncode == 0, ours.stderr
    numbers, folder = ours.stdout.splitlines()
    assert numbers == "3.0 7"
    assert not Path(folder).exists()
    assert not list(long.iterdir())


def test_the_folder_of_sockets_is_the_users_where_that_is_short_and_private(monkeypatch, tmp_path):
    short = Path("/tmp") / f"halora{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        with own_folder("halora-") as folder:
            assert Path(folder).parent == short
            assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert not list(short.iterdir())
    finally:
        short.rmdir()


def test_where_no_folder_is_short_enough_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr("halora.sweep.cluster.session._LONGEST_FOLDER", 19)
    with pytest.raises(UserError, match=r"3 bytes at most; tried .*set RAY_TMPDIR"), own_folder("halora-"):
        pass


_SWEEP = """
name: short
family: tests
trials: 2
trial: {{model: {model}, task: {task}, chip: ideal, training: {{steps: 2}}, evaluation: {{rows: 8}}}}
space: {{lora.rank: {{choices: [2, 4]}}}}
reference_point: {{accuracy: 0.0, energy_uj_per_token: 6.0}}
"""


def test_a_sweep_that_cannot_start_does_not_take_its_name(halora, monkeypatch, tiny_models, tiny_task, tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text(_SWEEP.format(model=tiny_models["llama"], task=tiny_task))
    monkeypatch.setattr("halora.sweep.cluster.session._LONGEST_FOLDER", 19)
    code, _, err = halora(f"sweep launch {file} --store {tmp_path / 'store'}")
    assert code == 2
    assert "Ray's sockets need a folder" in err
    assert not list((tmp_path / "store").rglob("short*"))


def test_everything_that_a_launch_finds_wrong_is_told_at_once(halora, tiny_models, tiny_task, tmp_path):
    task = Path(shutil.copytree(tiny_task, tmp_path / "task"))
    (task / "train.jsonl").write_text('{"prompt": "p", "completion": 3}\n[]\n')
    with (task / "validation.jsonl").open("ab") as rows:
        rows.write(b"\xff\n")
    file = tmp_path / "short.yaml"
    content = _SWEEP.format(model=tiny_models["llama"], task=task)
    file.write_text(content + "comparison: {rows: 4, chip_instances: 1}\nsearch: {warm_start: [nobody, noone]}\n")
    code, _, err = halora(f"sweep launch {file} --store {tmp_path / 'store'}")
    assert code == 2
    for told in (
        "train.jsonl line 1: completion is not text",
        "train.jsonl line 2: a row is a JSON object, got list",
        "validation.jsonl line 25: not UTF-8 (byte 0 of the line)",
        "no sweep 'nobody'",
        "no sweep 'noone'",
    ):
        assert told in " ".join(err.split())
