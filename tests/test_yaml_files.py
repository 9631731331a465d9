"""What a YAML text stands for, or the one sentence that says why it stands for nothing."""

import pytest

from halora.errors import UserError
from halora.yaml_files import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2.5e3),
        (".5e1", 5.0),
        ("3", 3),
        ("0.25", 0.25),
        ("1e", "1e"),
        ("e5", "e5"),
        ("a1e5", "a1e5"),
        ("{low: 1e-4, high: 1e-3}", {"low": 1e-4, "high": 1e-3}),
        ("", None),
    ],
)
def test_numbers_are_numbers_however_they_are_written(text, value):
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_a_key_may_be_laid_over_one_that_is_merged_in():
    text = "base: &base {steps: 10, rows: 4}\ntrial: {<<: *base, steps: 20}"
    assert parse_yaml(text, "x")["trial"] == {"steps": 20, "rows": 4}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\ntrials: 2\nseed: 3", "sweep 's' is not YAML: the key 'seed' is given twice at line 3"),
        ("a: {b: {c: 1, c: 2}}", "the key 'c' is given twice"),
        ("1: a", "the key 1 is not text; write it in quotes"),
        ("on: a", "the key True is not text; write it in quotes"),
        ("? [a, b]\n: c", "the key "),
        ("a: [1", "sweep 's' is not YAML: while parsing a flow sequence at line 1"),
        ("a: 2001-13-45", "is not YAML: month must be in 1..12"),
        ("a: !!int ''", "is not YAML: "),
        ("[" * 20_000, "is not YAML: "),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_what_is_no_yaml_is_told_in_one_sentence(text, told):
    with pytest.raises(UserError) as refused:
        parse_yaml(text, "sweep 's'")
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes("\ufeffname: größer".encode())
    assert read_yaml(path, "s") == {"name": "größer"}
    path.write_bytes("name: größer".encode("latin-1"))
    with pytest.raises(UserError, match=r"s is not YAML: it is not UTF-8 \(byte 8\)"):
        read_yaml(path, "s")
    path.write_bytes("name: a".encode("utf-16"))
    with pytest.raises(UserError, match="it is not UTF-8"):
        read_yaml(path, "s")
    with pytest.raises(UserError, match="s cannot be read: "):
        read_yaml(tmp_path, "s")
