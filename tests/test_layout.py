"""Oracles: the interpreter (what `import platform` finds), the syntax tree of every module."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("trainables", "search_spaces", "platform", "dashboards")
LAYERS = (
    {
        "errors",
        "events",
        "files",
        "reading",
        "retries",
        "secret_urls",
        "strict_model",
        "trial_folder",
        "url_folder",
        "yaml_files",
    },
    {"hardware"},
    {"settings"},
    {"training"},
    {"evaluation"},
    {"pricing"},
    {"heartbeat", "rank_workers", "storage"},
    {"trial_runner"},
    {"trainable"},
    {"spaces"},
    {"analysis"},
    {"records"},
    {"sweep"},
    {"selection"},
    {"api"},
    {"dashboard"},
    {"cli"},
    {"__init__"},
)
"""A module imports from its own layer and from those before it."""
PAGES = ("adapters", "chip", "compare", "readiness", "sweep", "sweeps", "trial")


def _modules():
    """(dotted name below `halora`, syntax tree) of every module."""
    for source_root in SOURCE_ROOTS:
        package = ROOT / source_root / "halora"
        for path in sorted(package.rglob("*.py")):
            yield path.relative_to(package).with_suffix("").parts, ast.parse(path.read_text())


def _imports(tree, package):
    """Dotted names imported anywhere in a module, inside functions and type-checking blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    layer_of = {name: index for index, names in enumerate(LAYERS) for name in names}
    seen, against = set(), []
    for parts, tree in _modules():
        seen.add(parts[0])
        for imported in _imports(tree, ["halora", *parts[:-1]]):
            top, _, rest = imported.partition(".")
            if top == "halora" and layer_of[rest.partition(".")[0]] > layer_of[parts[0]]:
                against.append(f"{'.'.join(parts)} imports {imported}")
    assert seen == set(layer_of)
    assert not against


def _room(parts):
    """The package of a module as it counts for circles: those of `sweep` each, all others whole."""
    return ".".join(parts[:2]) if parts[0] == "sweep" else parts[0]


def test_no_packages_import_each_other_in_a_circle():
    """The layers above cannot see one among names that share a layer."""
    needs = defaultdict(set)
    for parts, tree in _modules():
        for imported in _imports(tree, ["halora", *parts[:-1]]):
            top, *rest = imported.split(".")
            if top == "halora" and (room := _room(rest)) != _room(parts):
                needs[_room(parts)].add(room)
    assert {"sweep.search", "sweep.run", "sweep.cluster", "sweep.simulation"} < needs.keys()
    TopologicalSorter(needs).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("library", "importers"),
    [
        (
            "ray",
            {
                "heartbeat",
                "rank_workers",
                "trainable",
                "sweep.cluster.cluster_file",
                "sweep.cluster.loopback",
                "sweep.run.executor",
                "sweep.cluster.preflight",
                "sweep.cluster.remote",
                "sweep.cluster.session",
                "sweep.cluster.slurm_node",
            },
        ),
        (
            "mlflow",
            {"records.queries", "records.registry", "records.removal", "records.tracking", "dashboard.mlflow_app"},
        ),
        (
            "fastapi",
            {
                f"dashboard.{page}"
                for page in [
                    "adapters",
                    "app",
                    "chip",
                    "compare",
                    "mlflow_app",
                    "readiness",
                    "sweep",
                    "sweeps",
                    "trial",
                ]
            },
        ),
        (
            "optuna",
            {"sweep.search.study", "sweep.search.study_storage", "sweep.search.samplers", "analysis.importance"},
        ),
        ("moocore", {"analysis.front"}),
        ("sklearn", {"sweep.simulation.table"}),
        ("scipy", {"evaluation.intervals", "selection.certificate", "sweep.search.samplers"}),
        ("deepspeed", {"training.engine", "training.checkpoint", "training.workers"}),
        ("peft", {"training.adapter"}),
    ],
)
def test_a_library_is_imported_where_it_belongs(library, importers):
    found = {
        ".".join(parts)
        for parts, tree in _modules()
        for imported in _imports(tree, ["halora", *parts[:-1]])
        if imported.partition(".")[0] == library
    }
    assert found == importers


def _opens_text(call):
    """Whether a call reads or writes a text file, by its name and its mode."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open":
        modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        return len(modes) == len(call.args) and not any("b" in mode for mode in modes)
    return name == "write_text" or (name == "read_text" and not call.args)


def test_every_text_file_is_read_and_written_in_a_stated_encoding():
    calls = [
        (".".join(parts), node) for parts, tree in _modules() for node in ast.walk(tree) if isinstance(node, ast.Call)
    ]
    opening = [(name, call) for name, call in calls if _opens_text(call)]
    assert len(opening) > 40
    assert not [
        f"{name}:{call.lineno}" for name, call in opening if "encoding" not in {word.arg for word in call.keywords}
    ]


def test_the_version_is_the_package_s(halora):
    code, out, _ = halora("--version")
    assert code == 0
    assert out.startswith(f"halora-sweep {version('halora-sweep')}")


@pytest.mark.parametrize("root_on_path", [False, True])
def test_platform_is_the_standard_library_s_module(root_on_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); " if root_on_path else ""
    code += "import platform, halora.cli.main, halora.hardware.chip; print(platform.__file__, platform.machine())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    place, machine = run.stdout.split()
    assert Path(place).parent == Path(ast.__file__).parent
    assert machine


def test_the_roots_share_one_package():
    import halora

    inits = [root for root in SOURCE_ROOTS if (ROOT / root / "halora" / "__init__.py").exists()]
    assert inits == ["platform"]  # docs/decisions/027
    assert not [root for root in SOURCE_ROOTS if (ROOT / root / "__init__.py").exists()]
    assert {Path(place).resolve() for place in halora.__path__} == {ROOT / root / "halora" for root in SOURCE_ROOTS}


def test_the_package_has_a_part_below_every_entry_of_the_path_in_its_order(tmp_path):
    (tmp_path / "halora").mkdir()
    (tmp_path / "halora" / "elsewhere.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import halora.elsewhere, halora.hardware.chip\n"
    code += "print(halora.__path__[0], halora.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, file = run.stdout.split()
    assert first == str(tmp_path / "halora")
    assert Path(file) == ROOT / "platform" / "halora" / "__init__.py"


def test_the_lock_pins_every_direct_dependency_and_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    assert not re.findall(r"https?:|--[a-z]|@ ", lock)
    pinned = dict(line.split("==") for line in lock.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[^A-Za-z0-9_.-]", text)[0].lower().replace("_", "-") for text in asked}
    assert names <= {name.lower().replace("_", "-") for name in pinned}
    assert all(re.fullmatch(r"[0-9][\w.+!-]*", version) for version in pinned.values())
