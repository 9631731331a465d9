"""The head's recipe (platform/recipe) run on this machine, in a folder and on ports of its own."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from raylets import OBJECT_STORE_BYTES, ROOT, source_environment
from services import free_port, required

RECIPE = ROOT / "platform" / "recipe"
_PORTS = ("POSTGRESQL", "MLFLOW", "RAY", "DASHBOARD", "CLIENT")


class Stack:
    """The recipe's scripts with their settings.

    Attributes:
        state: `HALORA_STATE`: data, secrets, logs and process ids.
        settings: What is set for the scripts beside the environment of this process.
    """

    def __init__(self) -> None:
        # Short, for Ray's sockets lie below; open to `postgres`, as which the server runs for root.
        self.state = Path(tempfile.mkdtemp(prefix="hrs-"))
        self.state.chmod(0o755)
        self.settings = {f"HALORA_{name}_PORT": str(free_port()) for name in _PORTS} | {
            "HALORA_STATE": str(self.state),
            "HALORA_VENV": sys.prefix,
            "RAY_TMPDIR": str(self.state),
            "RAY_AUTH_TOKEN_PATH": str(self.state / "token"),
            "HALORA_MLFLOW_PASSWORD": secrets.token_hex(16),
        }

    @property
    def address(self) -> str:
        """For drivers and nodes: `HOST:PORT`."""
        return f"127.0.0.1:{self.settings['HALORA_RAY_PORT']}"

    @property
    def jobs_address(self) -> str:
        """For job submission: `http://HOST:PORT`."""
        return f"http://127.0.0.1:{self.settings['HALORA_DASHBOARD_PORT']}"

    @property
    def tracking_uri(self) -> str:
        """MLflow's address."""
        return f"http://127.0.0.1:{self.settings['HALORA_MLFLOW_PORT']}"

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the recipe."""
        environment = source_environment() | self.settings | settings
        command = [str(RECIPE / script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)

    def up(self, script: str, *arguments: str, **settings: str) -> str:
        """Run a script that must succeed; what it said."""
        done = self.run(script, *arguments, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_head(self) -> list[str]:
        """PostgreSQL, MLflow and Ray's head, as `ray_cluster.yaml` starts them; what was said."""
        ray = f"--object-store-memory={OBJECT_STORE_BYTES}"
        return [self.up("postgresql.sh"), self.up("mlflow.sh"), self.up("ray-head.sh", ray, self._agent_port())]

    def start_node(self, name: str, cpus: int = 1, **settings: str) -> subprocess.CompletedProcess[str]:
        """A raylet beside the head, with its name as a custom resource."""
        arguments = [f"--num-cpus={cpus}", "--num-gpus=0", f"--node-name={name}", f'--resources={{"{name}": 1}}']
        arguments += [f"--object-store-memory={OBJECT_STORE_BYTES}", self._agent_port()]
        return self.run("ray-worker.sh", self.address, *arguments, HALORA_NODE_NAME=name, **settings)

    def environment(self) -> dict[str, str]:
        """Environment of a process on the head after `source environment.sh`."""
        command = ["bash", "-c", f"source {RECIPE}/environment.sh && env -0"]
        shown = subprocess.run(
            command, env=source_environment() | self.settings, capture_output=True, text=True, check=True
        )
        return dict(line.split("=", 1) for line in shown.stdout.split("\0") if line)

    def processes(self) -> list[psutil.Process]:
        """Living processes that were given this folder in command or environment, or work in it."""
        found = []
        for process in psutil.process_iter():
            try:
                given = [*process.cmdline(), *process.environ().values(), process.cwd()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(str(self.state) in text for text in given):
                found.append(process)
        return found

    def _agent_port(self) -> str:
        return f"--dashboard-agent-listen-port={free_port()}"  # by default one per machine


@contextmanager
def recipe_stack() -> Iterator[Stack]:
    """The recipe with nothing started; everything has ended afterwards, and its folder is gone."""
    required("PostgreSQL", shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin")), None))
    stack = Stack()
    try:
        yield stack
    finally:
        ended = stack.run("down.sh")
        left = stack.processes()
        for process in left:
            process.kill()
        shutil.rmtree(stack.state, ignore_errors=True)
        assert ended.returncode == 0, ended.stderr
        assert not left, left
