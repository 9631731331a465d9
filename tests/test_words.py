"""Oracle: `words.yaml`, the list of words that are not the field's."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "dashboards", "docs", "platform", "search_spaces", "tests", "trainables")
KINDS = {".py", ".md", ".yaml", ".jinja", ".sh", ".js", ".toml"}
OTHERS = {"CHANGELOG.md", "lab.md", "words.yaml"}  # history, in the words of its day; and the list itself
WORDS = yaml.safe_load((ROOT / "tests" / "words.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts():
    paths = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    kept = [path for path in paths if path.suffix in KINDS and path.name not in OTHERS and path.is_file()]
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in kept}


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word["example"])
def test_a_word_that_is_not_the_field_s_is_nowhere(word, texts):
    assert re.search(word["pattern"], word["example"])
    found = [
        f"{path}:{text.count('\n', 0, match.start()) + 1}: '{match[0]}'; write {word['write']}"
        for path, text in texts.items()
        for match in re.finditer(word["pattern"], text)
    ]
    assert not found, "\n".join(found)
