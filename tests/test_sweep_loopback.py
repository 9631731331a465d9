"""Ray of a local sweep. Oracle: what the kernel says listens, and the files of a fresh home folder."""

import os
import subprocess
import sys

import pytest

_SESSION = """
import os, pathlib, psutil, ray
from halora.sweep.cluster.session import ray_session

before = dict(os.environ)
with ray_session(1):
    @ray.remote
    def token():
        return os.environ["RAY_AUTH_TOKEN"]
    print("token", ray.get(token.remote()), os.environ["RAY_AUTH_MODE"])
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for each in ours:
        for connection in each.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                print("listens", connection.laddr.ip)
        print("command", " ".join(each.cmdline()))
changed = {name for name in before | os.environ if before.get(name) != os.environ.get(name)}
print("changed", *sorted(name for name in changed if "AUTH" in name or "CLUSTER" in name))
"""


@pytest.mark.slow
def test_ray_of_a_local_sweep_listens_on_loopback_alone_and_leaves_no_token_in_a_file(tmp_path):
    home, own = tmp_path / "home", {"RAY_TMPDIR": "/tmp"}
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", _SESSION],
        env=kept | own | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = [line.partition(" ") for line in run.stdout.splitlines()]
    addresses = [value for kind, _, value in said if kind == "listens"]
    assert len(addresses) > 4
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    (token, mode), *_ = (value.split() for kind, _, value in said if kind == "token")
    assert (len(token), mode) == (64, "token")
    assert not any(token in value for kind, _, value in said if kind == "command")
    assert not [path for path in home.rglob("*") if path.is_file() and token in path.read_text(errors="replace")]
    assert not (home / ".ray" / "auth_token").exists()
    assert ("changed", "", "") in said


_SLOW_FIRST_START = """
import psutil, ray
from ray._private import services
from halora.sweep.cluster.session import ray_session

asked, whole = [], services.get_node
def get_node(*arguments):
    asked.append(arguments)
    if len(asked) == 1:
        raise Exception("The current node timed out during startup.")
    return whole(*arguments)
services.get_node = get_node
with ray_session(1):
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    print(sum("raylet/raylet" in " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)))
"""


@pytest.mark.slow
def test_a_start_that_ray_gave_too_little_time_is_made_again_and_leaves_nothing(tmp_path):
    run = subprocess.run([sys.executable, "-c", _SLOW_FIRST_START], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.split()) == (0, ["1"]), run.stderr
