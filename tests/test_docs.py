"""Oracles: the code that reads what the pages show, the command line's own parser, the files on disk.

On a page of `PAGES` a fenced block with a file's name becomes that file and is read by what reads such files, a Python
block is executed, and a shell block's commands are run, in the order of the page. SmolLM2 is a tiny model there. All
other commands, in the text and in indented blocks, are parsed and not run.
"""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from halora.cli.main import app
from halora.hardware.chip import load_chip
from halora.spaces.sweep import load_sweep, load_trial
from halora.training.tasks import load_rows

ROOT = Path(__file__).parents[1]
PAGES = ("adding-a-noise-model", "adding-a-chip", "adding-a-task", "adding-a-search-space", "python")
TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# What the pages show, run.


def _check_file(path):
    """Have the file read by what reads its kind."""
    if path.suffix == ".jsonl":
        assert len(load_rows(str(path.parent), path.stem)) == len(path.read_text().splitlines())
    elif path.suffix == ".yaml":
        content = yaml.safe_load(path.read_text())
        read = load_sweep if "space" in content else load_trial if "model" in content else load_chip
        read(str(path))


def _install(project):
    """What `pip install` of a page's package leaves on the path."""
    groups = tomllib.loads(project)["project"]["entry-points"]
    information = Path("page-1.0.dist-info")
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: page\nVersion: 1.0\n")
    lines = [line for group, entries in groups.items() for line in (f"[{group}]", *_assignments(entries))]
    (information / "entry_points.txt").write_text("\n".join(lines))


def _assignments(entries):
    return [f"{name} = {place}" for name, place in entries.items()]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_s_examples_do_what_it_says(page, halora, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HALORA_STORE", str(tmp_path / "store"))
    text = (ROOT / "docs" / f"{page}.md").read_text().replace("smollm2-135m-instruct", tiny_models["llama"])
    blocks = [match.groups() for match in FENCE.finditer(text)]
    assert {language for language, name, _ in blocks if name is None} <= {"sh", "python"}
    written = [name for _, name, _ in blocks if name]
    for name in written:
        assert f"`{name}`" in text or name == "pyproject.toml", f"{name} is shown without its name"
    for _, name, content in blocks:
        if name:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            if name == "pyproject.toml":
                _install(content)
    for language, name, content in blocks:
        if name:
            _check_file(tmp_path / name)
        elif language == "python":
            exec(compile(content, f"{page}.md", "exec"), {"__name__": "page"})
        else:
            for line in content.splitlines():
                command, _, target = line.partition(" > ")
                assert command.startswith("halora ")
                code, out, err = halora(command.removeprefix("halora "))
                assert code == 0, f"{command}\n{err}"
                if target:
                    (tmp_path / target).write_text(out)
    for name in written:  # one page's modules are not the next one's
        sys.modules.pop(name.removesuffix(".py"), None)


def test_pages_with_fenced_examples_are_run():
    assert {path.stem for path in TEXTS if FENCE.search(path.read_text())} == set(PAGES)


# Commands, parsed.


def _without_blocks(text):
    return re.sub(r"^(?: {4}.*|```\w*)$", "", FENCE.sub("", text), flags=re.MULTILINE)


def _shown(text):
    """Command lines of blocks, whole; and those mentioned in the text, which may leave arguments away."""
    whole = re.findall(r"^(?: {4})?(halora .*)$", text, flags=re.MULTILINE)
    mentioned = re.findall(r"`(halora [^`]+)`", _without_blocks(text))
    return [(line.partition(" > ")[0], True) for line in whole] + [
        (" ".join(line.split()), False) for line in mentioned
    ]


COMMANDS = [
    pytest.param(line, complete, id=f"{path.name}: {line}")
    for path in TEXTS
    for line, complete in dict.fromkeys(_shown(path.read_text()))
]


@pytest.mark.parametrize(("line", "complete"), COMMANDS)
def test_a_shown_command_is_one_that_the_command_line_takes(line, complete):
    _parse([word for word in shlex.split(line, comments=True)[1:] if word != "..."], complete)


def _parse(words, complete):
    """Parse a command's words and run nothing.

    Raises:
        Exception: As the command line would, of its own classes.
    """
    node = get_command(app)
    while hasattr(node, "commands"):
        name, *words = words
        assert name in node.commands, f"no command '{name}', only {', '.join(node.commands)}"
        node = node.commands[name]
        if not words and not complete:
            return
    try:
        node.make_context(node.name, words)
    except Exception as error:
        if complete or type(error).__name__ != "MissingParameter":
            raise


@pytest.mark.parametrize(
    "line",
    ["halora sweep lunch x", "halora front show x --filtre y", "halora train x", "halora evaluate x --rows many"],
)
def test_a_command_that_is_none_is_found(line):
    with pytest.raises(Exception, match=r"no command|No such option|Missing parameter|valid integer"):
        _parse(shlex.split(line)[1:], complete=True)


def test_a_link_leads_to_a_file_and_a_heading():
    broken = []
    for path in TEXTS:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
            name, _, anchor = target.partition("#")
            place = path.parent / name if name else path
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE) if anchor and place.is_file() else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            if not place.exists() or (anchor and anchor not in slugs):
                broken.append(f"{path.name}: {target}")
    assert not broken


# The tree of docs/architecture.md.


def _tree():
    """Paths of the tree, by folder: those of files listed below it, or none where it is named as a whole."""
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## What is where\n")[2].partition("\n## ")[0]
    tree: dict[str, list[str]] = {}
    folder = ""
    for line in filter(str.strip, section.splitlines()):
        names, _, description = line.strip().partition("  ")
        if line.startswith(" " * 8):
            tables = re.findall(r"[\w*/]+\.yaml", description)
            tree[folder] += [f"{folder}{name}" for name in [*names.split(", "), *tables]]
        else:
            folder = names
            tree[folder] = []
    return tree


def test_every_path_of_the_tree_exists():
    patterns = [path for folder, files in _tree().items() for path in files or [folder]]
    assert len(patterns) > 50
    assert not [pattern for pattern in patterns if not list(ROOT.glob(pattern))]


def test_no_module_and_no_page_is_missing_in_the_tree():
    tree = _tree()
    named = {path for files in tree.values() for pattern in files for path in ROOT.glob(pattern)}
    named |= {path for folder, files in tree.items() if not files for path in (ROOT / folder).glob("**/*.py")}
    named |= {ROOT / folder for folder in tree}
    wanted = {path for path in ROOT.glob("*/halora/**/*.py") if path.name != "__init__.py"}
    missing = (wanted | set(ROOT.glob("docs/*.md"))) - named
    assert not sorted(str(path.relative_to(ROOT)) for path in missing)
