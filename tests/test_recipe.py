"""Oracles: HTTP answers of the servers, PostgreSQL's catalogue, the kernel's list of processes, Ray's list of nodes.

The scripts are those that `ray_cluster.yaml` calls.
"""

import json
import os
import re
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

import psutil
import psycopg
import pytest
from raylets import ROOT
from recipe_stack import RECIPE, recipe_stack

from halora.sweep.cluster.cluster import RUNS

WHAT_A_DRIVER_FINDS = """
import json, os, shutil
import mlflow, optuna, ray

ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
def where():
    return os.getpid(), "MLFLOW_TRACKING_PASSWORD" in os.environ

client = mlflow.MlflowClient(os.environ["HALORA_TRACKING_URI"])
run = client.create_run(client.create_experiment("from a driver"))
client.log_text(run.info.run_id, "said", "note.txt")
study = optuna.create_study(storage=os.environ["HALORA_STUDY_URL"], study_name="one")
found = {
    "nodes": sorted(node["NodeName"] for node in ray.nodes() if node["Alive"]),
    "cpus": ray.cluster_resources()["CPU"],
    "tasks": ray.get([where.options(resources={name: 1}).remote() for name in ("first", "second")]),
    "store": os.environ["HALORA_STORE"],
    "halora": shutil.which("halora"),
    "artifacts": [file.path for file in client.list_artifacts(run.info.run_id)],
}
print("driver:", json.dumps(found))
"""


def _status(address, user=None, token=None, data=None):
    """HTTP status of a request."""
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = "Basic " + b64encode(":".join(user).encode()).decode()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(address, data and json.dumps(data).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_whole_recipe_starts_twice_serves_and_ends():
    with recipe_stack() as stack:
        first = stack.start_head()
        assert "drew a token" in first[2]
        for name in ("first", "second"):
            joined = stack.start_node(name)
            assert joined.returncode == 0, joined.stderr
        before = {process.pid for process in stack.processes()}
        assert [line.split("\n")[0] for line in stack.start_head()] == [
            "postgresql runs already",
            "mlflow runs already",
            "ray-head runs already",
        ]
        assert "first runs already" in stack.start_node("first").stdout
        starters = {int(path.read_text().split()[0]) for path in stack.state.glob("*.pid")}
        assert len(starters) == 4
        assert starters <= before & {process.pid for process in stack.processes()}

        # Secrets: of their owner alone, and in no command line, log or message.
        password, token = stack.settings["HALORA_MLFLOW_PASSWORD"], (stack.state / "token").read_text()
        assert (stack.state / "secrets" / "mlflow-admin").read_text() == password
        kept = [stack.state / "token", *(stack.state / "secrets").iterdir()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
        hidden = {path.read_text().strip() for path in kept if path.name != "pgpass"}
        assert {password, token} < hidden
        open_texts = [" ".join(process.cmdline()) for process in stack.processes()] + first
        open_texts += [path.read_text(errors="replace") for path in stack.state.glob("*.log*")]
        assert not [text for text in open_texts for secret in hidden if secret in text]

        # MLflow
        search, query = f"{stack.tracking_uri}/api/2.0/mlflow/experiments/search", {"max_results": 1}
        assert _status(search, None, data=query) == 401
        assert _status(search, ("admin", "password1234"), data=query) == 401
        assert _status(search, ("admin", password), data=query) == 200

        # PostgreSQL
        found = stack.environment()
        as_user = {"host": "127.0.0.1", "port": stack.settings["HALORA_POSTGRESQL_PORT"], "user": "halora"}
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(**as_user, dbname="tracking", passfile="/nowhere")
        with psycopg.connect(**as_user, dbname="tracking", passfile=found["PGPASSFILE"]) as database:
            names = {name for (name,) in database.execute("select datname from pg_database")}
            tables = {name for (name,) in database.execute("select tablename from pg_tables")}
        assert {"tracking", "studies"} <= names
        assert {"runs", "users"} <= tables

        # Ray
        assert _status(f"{stack.jobs_address}/api/jobs/") in (401, 403)
        assert _status(f"{stack.jobs_address}/api/jobs/", token="x" * 48) in (401, 403)
        assert _status(f"{stack.jobs_address}/api/jobs/", token=token) == 200
        (stack.state / "wrong").write_text("x" * 48)
        refused = stack.start_node("thief", RAY_AUTH_TOKEN_PATH=str(stack.state / "wrong"))
        assert refused.returncode == 1
        assert "InvalidAuthToken" in refused.stderr
        absent = stack.start_node("thief", RAY_AUTH_TOKEN_PATH=str(stack.state / "none"))
        assert absent.returncode == 1
        assert "copy the head's token file there" in absent.stderr

        submitted = subprocess.run(
            [
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "job",
                "submit",
                "--",
                sys.executable,
                "-c",
                WHAT_A_DRIVER_FINDS,
            ],
            env={**os.environ, "RAY_ADDRESS": stack.jobs_address, "RAY_AUTH_MODE": "token"}
            | {"RAY_AUTH_TOKEN_PATH": str(stack.state / "token")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        driver = json.loads(re.search(r"^driver: (.*)$", submitted.stdout, re.MULTILINE)[1])
        assert {"first", "second"} < set(driver["nodes"])
        assert len(driver["nodes"]) == 3
        assert driver["cpus"] == 2  # none of the head's
        assert [knows for _, knows in driver["tasks"]] == [False, False]
        assert driver["store"] == str(stack.state / "store")
        assert driver["halora"] == str(Path(sys.prefix) / "bin" / "halora")
        assert driver["artifacts"] == ["note.txt"]
        assert list((stack.state / "artifacts").rglob("note.txt"))

        # What crashed is started again, on the same data and with the same password.
        crashed = int((stack.state / "mlflow.pid").read_text().split()[0])
        crashing = [*psutil.Process(crashed).children(recursive=True), psutil.Process(crashed)]
        crashing += [
            process for process in stack.processes() if "autoscaler/_private/monitor.py" in str(process.cmdline())
        ]
        assert len(crashing) >= 3
        for process in crashing:
            process.kill()
        psutil.wait_procs(crashing)
        assert "answers at" in stack.up("mlflow.sh")
        assert _status(search, ("admin", password), data=query) == 200
        assert _status(f"{stack.jobs_address}/api/jobs/", token=token) == 200  # the head outlives its autoscaler

        stack.up("down.sh", "first")
        assert not (stack.state / "first.pid").exists()
        assert "second has ended" in (said := stack.up("down.sh"))
        assert said.index("second has ended") < said.index("ray-head has ended") < said.index("postgresql has ended")
        assert stack.processes() == []
        assert stack.up("down.sh") == ""


@pytest.mark.slow
def test_a_real_sweep_is_submitted_stopped_resumed_and_reported(tmp_path):
    """SmolLM2 through the whole recipe, by a wheel, from a process that knows nothing but the address and the token."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "build", "--wheel", "--out-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")

    def from_afar(stack, *arguments):
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(stack.state / "token"), "COLUMNS": "200"}
        command = [Path(sys.executable).with_name("halora"), "sweep", *map(str, arguments)]
        command += ["--address", stack.jobs_address]
        environment = os.environ | token
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with recipe_stack() as stack:
        stack.start_head()
        assert [stack.start_node(name).returncode for name in ("first", "second")] == [0, 0]
        short = ["trials=4", "trial.training.steps=8", "trial.training.report_every=2", "trial.training.batch_size=2"]
        short += ["trial.evaluation.rows=8", "trial.evaluation.chip_instances=1", "comparison=null", "racing=null"]
        options = [part for setting in short for part in ("--set", setting)]
        assert RUNS in from_afar(stack, "launch", "quickstart", "--name", "real", "--wheel", wheel, *options)
        (row,) = json.loads(from_afar(stack, "status", "real", "--format", "json"))
        assert (row["state"], row["trials"]) == ("running", 4)
        from_afar(stack, "stop", "real")
        while json.loads(from_afar(stack, "status", "real", "--format", "json"))[0]["state"] == "running":
            time.sleep(1)
        assert "front of real" in from_afar(stack, "resume", "real", "--follow", "--wheel", wheel)
        assert json.loads(from_afar(stack, "status", "real", "--format", "json"))[0]["finished"] == 4
        assert Path(from_afar(stack, "report", "real").strip()).is_file()
        lines = from_afar(stack, "logs", "real", "--format", "json").splitlines()
        assert len({json.loads(line).get("node") for line in lines} - {None}) == 1  # both nodes are this machine
        stack.up("down.sh")
        assert stack.processes() == []


def test_what_is_missing_is_said(tmp_path):
    with recipe_stack() as stack:
        early = stack.run("mlflow.sh")
        assert (early.returncode, early.stderr) == (1, "error: PostgreSQL is not there yet: run postgresql.sh first\n")
        no_python = stack.run("ray-head.sh", HALORA_VENV=str(tmp_path))
        assert no_python.returncode == 1
        assert "set HALORA_VENV" in no_python.stderr
        nowhere = stack.run("ray-worker.sh")
        assert "ray-worker.sh HEAD:PORT" in nowhere.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in RECIPE.glob("*.sh")))
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", RECIPE / script], check=False).returncode == 0
    runnable = os.access(RECIPE / script, os.X_OK)
    assert runnable == (script not in ("common.sh", "environment.sh"))
    assert str(script) in (ROOT / "ray_cluster.yaml").read_text() or not runnable or script == "down.sh"
