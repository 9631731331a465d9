"""Checks a file for Ray's cluster launcher before it costs money.

Ray's own schema and its own check say whether `ray up` takes the file. Beside these there is only what Ray takes and a
user pays for:

- machines that run and no trial ever does: no type of workers or none with CPUs, the head's address or port wrong for
  them, no autoscaling, servers of the head left out or out of order, no token for the nodes to join by;
- a cluster that starts and then refuses the sweep: another wheel, lock or Python than here, Ray's own setup instead of
  ours, what is mounted missing here;
- trials on the head, beside its databases; checkpoints on a cloud's disks, which go with their nodes;
- Ray open to all (no token), or a secret in a file that is copied to every node.
"""

import json
import os
import re
import shlex
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from halora.errors import UserError, nearest
from halora.secret_urls import hidden
from halora.sweep.cluster.versions import LIBRARIES, code_digest, own_code
from halora.yaml_files import read_yaml

HEAD_SCRIPTS = ("postgresql.sh", "mlflow.sh", "ray-head.sh")
"""What the head starts, in this order: each needs the one before."""
WORKER_SCRIPT = "ray-worker.sh"
BOOTSTRAP = "--autoscaling-config=~/ray_bootstrap_config.yaml"
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
_TOKEN = "~/.ray/auth_token"
_LIBRARIES = (*LIBRARIES, "mlflow", "optuna")
_SECRETS = {
    "a key of AWS": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|aws_secret_access_key"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a token or password": re.compile(
        r"(?i)\b(ray_auth_token|hf_token|[a-z_]*(password|secret|api_key|access_key|credentials))['\"]?\s*[=:]\s*['\"]?[^\s'\"$~/]"
    ),
}


@dataclass(frozen=True)
class NodeType:
    """A type of node as the file describes it."""

    name: str
    head: bool
    cpus: float | None
    gpus: float | None
    min_workers: int
    max_workers: int


@dataclass(frozen=True)
class Call:
    """A script of the recipe, called by a command of the file.

    Attributes:
        path: Where in the file: `head_start_ray_commands[0]`.
        folder: Its folder on the node.
        script: Its name.
        settings: What is set before it.
        arguments: What follows it.
    """

    path: str
    folder: str
    script: str
    settings: Mapping[str, str]
    arguments: Sequence[str]


def check_cluster_file(path: Path) -> list[NodeType]:
    """The types of nodes that a cluster file describes; it has no mistake that can be seen from here.

    Paths of its own machine are looked up relative to the working directory, as `ray up` does.

    Raises:
        UserError: With every mistake: where, what was given, what is allowed, and what to do.
    """
    config = _read(path)
    problems = list(_by_schema(config))
    if not problems:
        problems += _by_ray(config)
    if not problems:  # the rest may rely on types
        for check in (_workers, _files, _scripts, _token, _secrets, _setup):
            problems += check(config)
    if problems:
        raise UserError(problems, f"fix '{path}', then check it again before `ray up`")
    return _node_types(config)


def _read(path: Path) -> dict[str, Any]:
    config = read_yaml(path, f"'{path}'")
    if not isinstance(config, dict):
        raise UserError(f"'{path}' holds no settings; ray_cluster.yaml of this project is one to begin with")
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))  # keys and dates as texts, as in JSON
    return plain


def _by_schema(config: dict[str, Any]) -> Iterator[str]:
    """Every mistake that Ray's schema finds; Ray itself tells the first."""
    import ray.autoscaler
    from jsonschema import Draft7Validator  # type: ignore[import-untyped]

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    for error in Draft7Validator(schema).iter_errors(config):
        at = ".".join(map(str, error.absolute_path))
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            for key in set(error.instance) - set(known):
                yield f"{at + '.' if at else ''}{key}: Ray knows no such key{nearest(str(key), known)}"
        elif error.validator == "required":
            missing = sorted(set(error.validator_value) - set(error.instance))
            yield f"{at or 'the file'}: {', '.join(missing)} required, but missing"
        else:
            given = "" if isinstance(error.instance, dict | list) else f", got {error.instance!r}"
            yield f"{at}: {error.validator} {error.validator_value!r} asked by Ray{given}"
    provider = config.get("provider")
    if not isinstance(provider, dict) or provider.get("type") != "local":
        for key in ("available_node_types", "head_node_type", "max_workers"):
            if key not in config:
                yield f"{key}: required, but missing: without it Ray takes a cluster of its own making"


def _by_ray(config: dict[str, Any]) -> Iterator[str]:
    """The first mistake that Ray finds when it fills in its defaults, as `ray up` does."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with redirect_stdout(StringIO()):  # Ray's talk goes there
            validate_config(prepare_config(deepcopy(config)))
    except Exception as error:  # ValueError, RuntimeError, click's and jsonschema's own
        yield f"Ray refuses it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _node_types(config: dict[str, Any]) -> list[NodeType]:
    types = []
    for name, node in config.get("available_node_types", {}).items():
        resources = node.get("resources") or {}
        least, head = node.get("min_workers", 0), name == config["head_node_type"]
        most = node.get("max_workers", config["max_workers"])
        types.append(NodeType(name, head, resources.get("CPU"), resources.get("GPU"), least, most))
    return types


def _workers(config: dict[str, Any]) -> Iterator[str]:
    """The head runs no trials, and other nodes can."""
    if _provider(config) == "local":
        if config.get("available_node_types") or config.get("head_node_type"):
            yield "available_node_types, head_node_type: leave both out where provider.type is 'local'"
        return
    at, types = "available_node_types", _node_types(config)
    for node in types:
        if node.head and (node.cpus != 0 or node.gpus):
            given = f"CPU {_plain(node.cpus)}, GPU {_plain(node.gpus)}"
            yield f"{at}.{node.name}.resources: {given}; the head runs no trials, so write {{CPU: 0}} and no GPU"
        least = max(1, node.gpus or 0)
        if not node.head and (node.cpus is None or node.cpus < least):
            given = f"{at}.{node.name}.resources.CPU: {_plain(node.cpus)}"
            yield f"{given}; a trial takes a CPU for each of its workers, so write at least {least:g}"
    if not any(node.max_workers for node in types if not node.head):
        yield f"{at}: no type beside the head has max_workers of 1 or more, so no trial can run"


def _files(config: dict[str, Any]) -> Iterator[str]:
    """What is mounted is there, and is what runs here."""
    mounts = config.get("file_mounts", {})
    for remote, local in mounts.items():
        if not _here(local).exists() and _tilde(remote) != _TOKEN:
            make = "; build the wheel with `.venv/bin/uv build --wheel`" if "dist" in str(local) else ""
            yield f"file_mounts.{remote}: '{local}' does not exist here{make}"
    wheels = {w: r for r, local in mounts.items() for w in _wheels(_here(local))}
    if len(wheels) != 1 and not any("dist" in str(local) and not _here(local).exists() for local in mounts.values()):
        given = ", ".join(sorted(wheel.name for wheel in wheels)) or "none"
        yield f"file_mounts: wheels of halora-sweep: {given}; mount ./dist with one, of `.venv/bin/uv build --wheel`"
    for wheel, remote in wheels.items():
        there, here = _wheel_code(wheel), own_code()
        if there != here:
            yield f"file_mounts.{remote}: {wheel.name} holds code {there}, here runs {here}; build it anew"
    for remote, lock in ((r, _here(local)) for r, local in mounts.items() if str(local).endswith("requirements.lock")):
        lines = lock.read_text(encoding="utf-8").split() if lock.is_file() else []
        pinned = dict(line.split("==") for line in lines if "==" in line)
        for name in _LIBRARIES if pinned else ():
            if (there := pinned.get(name, "none")) != version(name):
                yield f"file_mounts.{remote}: {name} {there} there, {version(name)} here; they have to be equal"


def _scripts(config: dict[str, Any]) -> Iterator[str]:
    """The recipe's scripts are mounted and called in their order."""
    mounted = {_tilde(remote): _here(local) for remote, local in config.get("file_mounts", {}).items()}
    calls = list(_calls(config))
    for call in calls:
        if call.folder not in mounted:
            given = f"{call.path}: {call.folder}/{call.script}"
            yield f"{given} is below no path of file_mounts; mount ./platform/recipe there"
        elif mounted[call.folder].is_dir() and not os.access(mounted[call.folder] / call.script, os.X_OK):
            known = [path.name for path in mounted[call.folder].glob("*.sh")]
            yield f"{call.path}: '{mounted[call.folder]}' holds no script {call.script}{nearest(call.script, known)}"
    ours = [call.script for call in calls if call.path.startswith("head_start") and call.script in HEAD_SCRIPTS]
    if ours != list(HEAD_SCRIPTS):
        given = ", ".join(ours) or "none"
        yield f"head_start_ray_commands: {given}; write {', '.join(HEAD_SCRIPTS)}: each needs the one before"
    if not any(call.script == WORKER_SCRIPT for call in calls if call.path.startswith("worker_start")):
        yield f"worker_start_ray_commands: {WORKER_SCRIPT} is not called; write `.../{WORKER_SCRIPT} $RAY_HEAD_IP:6379`"
    for call in calls:
        if call.script == "ray-head.sh":
            if BOOTSTRAP not in call.arguments:
                yield f"{call.path}: without {BOOTSTRAP} no node is ever added"
            if _provider(config) != "local" and "://" not in call.settings.get("HALORA_CHECKPOINT_URL", ""):
                given = call.settings.get("HALORA_CHECKPOINT_URL") or "not set"
                why = "nodes of a cloud share no disk, so name a URL (s3://, gs://)"
                yield f"{call.path}: HALORA_CHECKPOINT_URL is {given}; {why}"
    ray_port = next((c.settings["HALORA_RAY_PORT"] for c in calls if "HALORA_RAY_PORT" in c.settings), "6379")
    for call in calls:
        if call.script == WORKER_SCRIPT and (given := " ".join(call.arguments[:1])) not in (
            f"$RAY_HEAD_IP:{ray_port}",
            f"${{RAY_HEAD_IP}}:{ray_port}",
        ):
            yield f"{call.path}: '{given}' as the head's address; only Ray knows it: write $RAY_HEAD_IP:{ray_port}"


def _token(config: dict[str, Any]) -> Iterator[str]:
    """Ray's token authentication is on, everywhere with the same token."""
    for path, text in _texts(config):
        if re.search(r"RAY_AUTH_MODE['\"]?[=:\s]+['\"]?(?!token\b)\w", text):
            yield f"{path}: RAY_AUTH_MODE is switched off; the recipe sets it to 'token', so leave it out"
    local = {_tilde(remote): local for remote, local in config.get("file_mounts", {}).items()}.get(_TOKEN)
    if local is None:
        yield f"file_mounts: no {_TOKEN}; Ray does not spread its token itself: add `{_TOKEN}: {_TOKEN}`"
        return
    file = _here(local)
    if not file.is_file() or not file.read_text(encoding="utf-8").strip():
        yield f"file_mounts.{_TOKEN}: no token in '{local}'; make one with `ray get-auth-token --generate`"
    elif (mode := stat.S_IMODE(file.stat().st_mode)) & 0o077:
        yield f"file_mounts.{_TOKEN}: others on this machine may read '{local}' (mode {mode:o}); `chmod 600 {local}`"


def _secrets(config: dict[str, Any]) -> Iterator[str]:
    """The file holds no secret: it is copied to every node, and into version control. What is found is not repeated."""
    for path, text in _texts(config):
        found = [what for what, pattern in _SECRETS.items() if pattern.search(text)]
        if found := found or (["a password or a token in an address"] if hidden(text) != text else []):
            yield f"{path}: holds {found[0]}; keep it in a file of mode 600 on the node, or in a role of the cloud"


def _setup(config: dict[str, Any]) -> Iterator[str]:
    """The same Python, set up by our commands and not by Ray's defaults."""
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if name not in config and _provider(config) != "local":
            yield f"{name}: missing, so Ray runs its own, with another Ray and Python; write a list, if an empty one"
    text = "\n".join(config.get("setup_commands") or [])
    own = ".".join(map(str, sys.version_info[:2]))
    found = set(re.findall(r"python(3\.\d+)(?=[\s/]|$)|--python[= ](3\.\d+)", text))
    versions = {one or other for one, other in found}
    if versions != {own}:
        given = ", ".join(sorted(versions)) or "of no said version"
        yield f"setup_commands: Python {given} there, {own} here; they have to be equal: write python{own}"


def _calls(config: dict[str, Any]) -> Iterator[Call]:
    """Every call of a script in a folder `recipe`."""
    for name in _COMMANDS:
        for index, command in enumerate(config.get(name) or []):
            try:
                words = shlex.split(command)
            except ValueError:
                continue
            for place, word in enumerate(words):
                folder, _, script = word.rpartition("/")
                if folder.endswith("/recipe") and script.endswith(".sh"):
                    settings = dict(w.split("=", 1) for w in words[:place] if re.match(r"\w+=", w))
                    yield Call(f"{name}[{index}]", _tilde(folder), script, settings, words[place + 1 :])


def _texts(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting of the file as `key: value`, with its path."""
    if isinstance(config, dict):
        for key, value in config.items():
            at = f"{path}.{key}" if path else str(key)
            if isinstance(value, dict | list):
                yield from _texts(value, at)
            else:
                yield at, f"{key}: {value}"
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from (
                _texts(value, f"{path}[{index}]")
                if isinstance(value, dict | list)
                else [(f"{path}[{index}]", str(value))]
            )


def _provider(config: dict[str, Any]) -> str:
    return str(config["provider"]["type"])


def _here(local: Any) -> Path:
    return Path(str(local)).expanduser()


def _tilde(remote: Any) -> str:
    """A path of a node, with its home folder as `~`."""
    return re.sub(r"^(\$HOME|\$\{HOME\}|/home/[^/]+|/root)(?=/|$)", "~", str(remote)).rstrip("/")


def _wheels(local: Path) -> list[Path]:
    found = local.glob("halora_sweep-*.whl") if local.is_dir() else [local]
    return [path for path in found if re.fullmatch(r"halora_sweep-.*\.whl", path.name) and path.is_file()]


def _wheel_code(wheel: Path) -> str:
    """Digest of the package's files in a wheel, as `own_code` has it of the installed ones."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.startswith("halora/")]
            return code_digest({name.removeprefix("halora/"): archive.read(name) for name in inside})
    except (OSError, zipfile.BadZipFile):
        return "unreadable"


def _plain(number: float | None) -> str:
    return "n/a" if number is None else f"{number:g}"
