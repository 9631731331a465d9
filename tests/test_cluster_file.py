"""Oracles: Ray's own `prepare_config` and `validate_config`; each mistake is made on purpose in the shipped file."""

import copy
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from raylets import ROOT

import halora
from halora.errors import UserError
from halora.sweep.cluster.cluster_file import check_cluster_file

SHIPPED = (ROOT / "ray_cluster.yaml").read_text()
START = "head_start_ray_commands"
RECIPE = "~/halora-sweep/platform/recipe"


def form(provider):
    """The shipped file after the edit that its head describes."""
    if provider == "aws":
        return SHIPPED
    gone = r"#(aws|cloud)\b" if provider == "own" else r"#aws\b"
    kept = [line for line in SHIPPED.splitlines() if not re.search(gone, line)]
    return "\n".join(line.removeprefix(f"#{provider} ") for line in kept)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the code that runs here."""
    path = tmp_path_factory.mktemp("wheel") / "halora_sweep-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for portion in map(Path, halora.__path__):
            for file in portion.rglob("*"):
                if file.is_file() and file.suffix != ".pyc":
                    name = f"halora/{file.relative_to(portion).as_posix()}"
                    if name not in archive.namelist():
                        archive.write(file, name)
    return path


@pytest.fixture
def here(tmp_path, wheel, monkeypatch):
    """A folder with all that the shipped file mounts, which is the working directory, and a home with a token."""
    (tmp_path / "dist").mkdir()
    shutil.copy(wheel, tmp_path / "dist")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    shutil.copytree(ROOT / "platform" / "recipe", tmp_path / "platform" / "recipe")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    token.write_text("0123456789")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(config):
    """What is told of a file."""
    Path("cluster.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    with pytest.raises(UserError) as told:
        check_cluster_file(Path("cluster.yaml"))
    return told.value.problems


def changed(*changes):
    """The shipped file with some settings replaced (path of keys, value), or taken out (no value)."""
    config = copy.deepcopy(yaml.safe_load(SHIPPED))
    for keys, *value in changes:
        *parents, last = keys
        place = config
        for key in parents:
            place = place[key]
        if value:
            place[last] = value[0]
        else:
            del place[last]
    return config


@pytest.mark.parametrize(("provider", "workers"), [("aws", 2), ("gcp", 2), ("own", 0)])
def test_the_shipped_file_passes_in_all_its_forms(here, provider, workers):
    Path("cluster.yaml").write_text(form(provider))
    config = yaml.safe_load(form(provider))
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["provider"]["type"] == {"own": "local"}.get(provider, provider)
    types = check_cluster_file(Path("cluster.yaml"))
    assert sum(not node.head for node in types) == workers
    text = form(provider)
    assert not re.search(r"s3://" if provider != "aws" else r"gs://", yaml.safe_dump(config))
    assert all(f"/{script}" in text for script in ("postgresql.sh", "mlflow.sh", "ray-head.sh", "ray-worker.sh"))


NODES = "available_node_types"
MISTAKES = {
    "unknown key": ([(["max_worker"], 1)], "max_worker: Ray knows no such key; did you mean 'max_workers'?"),
    "wrong type": ([(["max_workers"], "many")], "max_workers: type 'integer' asked by Ray, got 'many'"),
    "nothing about nodes": ([([NODES],)], "available_node_types: required, but missing"),
    "no name": ([(["cluster_name"],)], "the file: cluster_name required, but missing"),
    "no such head": (
        [(["head_node_type"], "chief")],
        "Ray refuses it: `head_node_type` must be one of `available_node_types`",
    ),
    "trials on the head": (
        [([NODES, "head", "resources"], {"CPU": 4})],
        "available_node_types.head.resources: CPU 4, GPU n/a; the head runs no trials, so write {CPU: 0}",
    ),
    "no CPU for a trial": (
        [([NODES, "gpu_worker", "resources"], {"CPU": 1, "GPU": 2})],
        "available_node_types.gpu_worker.resources.CPU: 1; a trial takes a CPU for each of its workers",
    ),
    "no workers": (
        [([NODES, name, "max_workers"], 0) for name in ("gpu_worker", "cpu_worker")],
        "available_node_types: no type beside the head has max_workers of 1 or more",
    ),
    "minimum above the whole": (
        [([NODES, "cpu_worker", "min_workers"], 4), (["max_workers"], 3)],
        "Ray refuses it: The specified global `max_workers` is smaller",
    ),
    "no token": ([(["file_mounts", "~/.ray/auth_token"],)], "file_mounts: no ~/.ray/auth_token; Ray does not spread"),
    "token switched off": (
        [([START, 2], f"RAY_AUTH_MODE=disabled {yaml.safe_load(SHIPPED)[START][2]}")],
        "head_start_ray_commands[2]: RAY_AUTH_MODE is switched off",
    ),
    "secret": (
        [([START, 1], f"HALORA_MLFLOW_PASSWORD=hunter2hunter2 {RECIPE}/mlflow.sh")],
        "head_start_ray_commands[1]: holds a token or password",
    ),
    "key of a cloud": ([(["provider", "key"], "AKIAABCDEFGHIJKLMNOP")], "provider.key: holds a key of AWS"),
    "no recipe": (
        [(["file_mounts", RECIPE],)],
        f"head_start_ray_commands[0]: {RECIPE}/postgresql.sh is below no path of file_mounts",
    ),
    "misspelt script": (
        [([START, 1], f"{RECIPE}/mlfow.sh")],
        "head_start_ray_commands[1]: 'platform/recipe' holds no script mlfow.sh; did you mean 'mlflow.sh'?",
    ),
    "script left out": ([([START, 1],)], "head_start_ray_commands: postgresql.sh, ray-head.sh; write"),
    "order": (
        [([START], [yaml.safe_load(SHIPPED)[START][place] for place in (1, 0, 2)])],
        "head_start_ray_commands: mlflow.sh, postgresql.sh, ray-head.sh; write postgresql.sh, mlflow.sh, ray-head.sh",
    ),
    "no autoscaling": (
        [([START, 2], f"HALORA_CHECKPOINT_URL=s3://b/t {RECIPE}/ray-head.sh")],
        "head_start_ray_commands[2]: without --autoscaling-config=~/ray_bootstrap_config.yaml no node is ever added",
    ),
    "no storage": (
        [([START, 2], f"{RECIPE}/ray-head.sh --autoscaling-config=~/ray_bootstrap_config.yaml")],
        "head_start_ray_commands[2]: HALORA_CHECKPOINT_URL is not set; nodes of a cloud share no disk",
    ),
    "another port": (
        [(["worker_start_ray_commands", 0], f"{RECIPE}/ray-worker.sh $RAY_HEAD_IP:6380")],
        "worker_start_ray_commands[0]: '$RAY_HEAD_IP:6380' as the head's address",
    ),
    "head by name": (
        [(["worker_start_ray_commands", 0], f"{RECIPE}/ray-worker.sh head:6379")],
        "worker_start_ray_commands[0]: 'head:6379' as the head's address",
    ),
    "the head's port moved": (
        [([START, 2], f"HALORA_RAY_PORT=6400 {yaml.safe_load(SHIPPED)[START][2]}")],
        "only Ray knows it: write $RAY_HEAD_IP:6400",
    ),
    "another Python": (
        [(["setup_commands", 1], "python3.11 -m venv ~/halora-sweep/.venv")],
        "setup_commands: Python 3.11 there, 3.12 here",
    ),
    "Ray's own set-up": ([(["head_setup_commands"],)], "head_setup_commands: missing, so Ray runs its own"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_told(here, name):
    changes, expected = MISTAKES[name]
    told = problems(changed(*changes))
    assert any(expected in problem for problem in told), told
    assert len(told) <= (2 if name != "no recipe" else 4), told  # nothing is blamed for another's mistake
    assert not any("hunter2" in problem or "AKIA" in problem for problem in told)


def test_what_is_not_there_is_told(here):
    shutil.rmtree("dist")
    os.remove("requirements.lock")
    Path(".ray/auth_token").chmod(0o644)
    told = problems(SHIPPED)
    assert len(told) == 3, told
    assert told[0].endswith("'./dist' does not exist here; build the wheel with `.venv/bin/uv build --wheel`")
    assert "'./requirements.lock' does not exist here" in told[1]
    assert "(mode 644); `chmod 600 ~/.ray/auth_token`" in told[2]


def test_other_versions_and_other_code_are_told(here, wheel):
    lock = Path("requirements.lock")
    lock.write_text(re.sub(r"(?m)^ray==.*$", "ray==2.52.0", lock.read_text()))
    Path("dist/halora_sweep-0.1.0-py3-none-any.whl").unlink()
    with zipfile.ZipFile("dist/halora_sweep-0.0.9-py3-none-any.whl", "w") as archive:
        archive.writestr("halora/errors.py", "")
    told = problems(SHIPPED)
    assert len(told) == 2, told
    assert re.search(r"halora_sweep-0.0.9-py3-none-any.whl holds code \w{12}, here runs \w{12}; build it anew", told[0])
    assert "ray 2.52.0 there, 2.60.0 here; they have to be equal" in told[1]
    shutil.copy(wheel, "dist")
    assert any("wheels of halora-sweep: halora_sweep-0.0.9" in problem for problem in problems(SHIPPED))


def test_several_mistakes_are_told_at_once(here, halora):
    told = problems(
        changed(
            *(change for name in ("trials on the head", "another port", "no token") for change in MISTAKES[name][0])
        )
    )
    assert len(told) == 3
    code, out, err = halora("cluster check cluster.yaml")
    assert (code, out) == (2, "")
    assert all(f"error: {problem}" in err for problem in told)
    Path("cluster.yaml").write_text(SHIPPED)
    code, out, err = halora("cluster check cluster.yaml --format csv")
    assert code == 0, err
    assert out.splitlines() == [
        "node,runs,CPU,GPU,min,max",
        "head,servers and drivers,0,,0,0",
        "gpu_worker,trials,4,1,0,8",
        "cpu_worker,trials,8,,0,4",
    ]


@pytest.mark.parametrize("content", ["- a\n", "", "a: [", None])
def test_no_cluster_file_at_all(here, content):
    if content is None:
        with pytest.raises(UserError, match="cannot be read"):
            check_cluster_file(Path("absent.yaml"))
    else:
        assert len(problems(content)) == 1
