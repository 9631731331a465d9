"""Bundles with something changed at random: told in a sentence or read as they were. Oracle: nothing but `UserError`.

Bytes, and values within JSON, with checksums that fit. The generator is seeded, so that a failure comes again.
"""

import json
import random
import resource
import shutil

import pytest
from bundles import make_bundle

from halora.errors import UserError
from halora.selection.bundle import CHECKSUMS_FILE, FILES, write_checksums
from halora.selection.bundle_reading import read_bundle

CASES = 1500
ODD = [
    *(None, True, -1, 0, 1, 2**63, 10**400, 0.5, -1e308, 5e-324, "", "x", "\x00", "\u202e", "/dev/zero", "../x"),
    *([], {}, [[]], {"path": "/etc/passwd"}, {"kind": "measured", "path": "/dev/zero"}, [0] * 1000, "a" * 100_000),
    *("(a+)+$", "inf", {"": {}}, "http://u:hush@h", "\ud800"),
]


def _places(content, path=()):
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from _places(value, (*path, key))


def _with_odd_value(chance, text):
    content = json.loads(text)
    path = chance.choice([path for path in _places(content) if path])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, dict) and chance.random() < 0.2:
        value = parent.pop(path[-1])
        if chance.random() < 0.5:
            parent[chance.choice(["path", "preset", "kind", "name", "x"])] = value
    else:
        parent[path[-1]] = chance.choice(ODD)
    return json.dumps(content).encode()


def _with_odd_bytes(chance, content):
    kind, at = chance.randrange(5), chance.randrange(max(len(content), 1))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + chance.choice([b"\x00", b"\xff", b"[" * 50_000, b"NaN", b"1e999", b'"']) + content[at:]
    return b"" if kind == 3 else content + content


@pytest.mark.slow
def test_a_bundle_changed_anywhere_is_told_in_a_sentence(tmp_path, tiny_models, tiny_task):
    made = make_bundle(tmp_path, tiny_models["llama"], tiny_task)
    chance, right, told = random.Random(22), read_bundle(made), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES):
        folder = shutil.copytree(made, tmp_path / "changed")
        file = folder / chance.choice([*FILES, *FILES, CHECKSUMS_FILE])
        content = file.read_bytes()
        odd_value = file.suffix == ".json" and chance.random() < 0.7
        file.write_bytes(_with_odd_value(chance, content) if odd_value else _with_odd_bytes(chance, content))
        if file.name != CHECKSUMS_FILE:
            write_checksums(folder)
        try:
            found = read_bundle(folder)  # a margin may differ without moving a claim; it is scored again later
            assert (found.config, found.certification.scores) == (right.config, right.certification.scores), case
        except UserError as error:
            told += 1
            said = str(error)
            assert len(said) < 50_000, (case, file.name)
            assert said.isprintable(), (case, file.name)
            assert "hush" not in said, (case, file.name)
            assert "root:" not in said, (case, file.name)
        shutil.rmtree(folder)
    assert told > CASES * 0.7
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
