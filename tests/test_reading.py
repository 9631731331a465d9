"""Oracle: for every kind of file a list of what people and programs get wrong, with the sentence that says so."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from halora.errors import UserError
from halora.reading import is_file, is_folder, json_lines, parse_json, read_csv, read_object, read_text, tensor_shapes


def test_text_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "a"
    for content in (b"gr\xc3\xb6\xc3\x9fer", b"\xef\xbb\xbfgr\xc3\xb6\xc3\x9fer"):
        path.write_bytes(content)
        assert read_text(path, "a") == "größer"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("größer".encode("latin-1"), r"^the file is not text: it is not UTF-8 \(byte 2\)$"),
        ("größer".encode("utf-16"), r"it is not UTF-8 but UTF-16 \(byte 0\)$"),
        (b"\xed\xa0\x80", "it is not UTF-8"),
        (b"x" * 101, "is too large: 101 bytes, 100 at most"),
    ],
)
def test_what_is_no_text(content, told, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_text(tmp_path / "a", "the file", most_bytes=100)


def test_devices_pipes_folders_and_odd_names_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, told in (
        ("/dev/zero", "it is a device"),
        (tmp_path / "pipe", "it is a pipe"),
        (tmp_path, "it is a folder"),
        (tmp_path / "nothing", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(UserError, match=f"^it cannot be read: .*{told}"):
            read_text(tmp_path / name, "it")
        assert not is_file(name)
    assert is_folder(tmp_path)
    assert not any(map(is_folder, ("x" * 5000, "a\0b", "/dev/null", tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value at column 1"),
        ('{"a": 1,\n}', "at line 2, column 1"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("1e400", "the number 1e400 is too large"),
        ("[-1e999]", "the number -1e999 is too large"),
        ("9" * 30, "the number 9999999999"),
        ("9" * 5000, "the number 9999999999"),
        ("NaN", "NaN is not a number in JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number in JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": "\\ud800"}', r"half of a surrogate pair, '\\ud800', is no character"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json(text, told):
    with pytest.raises(UserError, match=told) as refused:
        parse_json(text, "it")
    assert str(refused.value).startswith("it is not JSON: ")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, null, true, "\\ud83d\\ude00 ü"]}', "[]", "1e300", str(2**63 - 1), '"\\\\ud800"']
)
def test_json_is_what_it_says(text):
    assert parse_json(text, "it") == json.loads(text)


def test_an_object_is_one(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match=r"^it is not a JSON object but list$"):
        read_object(tmp_path / "a.json", "it")


def test_every_line_of_jsonl_comes_with_its_place_or_its_cause(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": \xff}\n{"a"\n[2]\n{"a": 1e400}\n"\\ud800"\n3')
    found = dict(json_lines(path))
    assert {where.rpartition(" ")[2]: str(value) for where, value in found.items()} == {
        "1": "{'a': 1}",
        "4": "not UTF-8 (byte 6 of the line)",
        "5": "not JSON: Expecting ':' delimiter at column 5",
        "6": "[2]",
        "7": "not JSON: the number 1e400 is too large",
        "8": "not JSON: half of a surrogate pair, '\\ud800', is no character",
        "9": "3",
    }
    with pytest.raises(UserError, match="is not a file"):
        list(json_lines(tmp_path))


def test_a_table_is_read_cell_by_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfa, "b, c"\r\n\r\n1,2,3\r\n')
    assert read_csv(path, "it") == [["a", "b, c"], [], ["1", "2", "3"]]
    path.write_text("a\n" + "x" * 200_000)
    with pytest.raises(UserError, match=r"^it is not a table: field larger"):
        read_csv(path, "it")


def test_shapes_of_tensors_are_told_without_loading_them(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones((2, 3), dtype=np.float16), "b": np.ones(4)}, path)
    assert tensor_shapes(path, "it") == {"a": (2, 3), "b": (4,)}
    save_file({"a": np.ones((2, 0)), "b": np.ones(4)}, path)
    with pytest.raises(UserError, match=r"^it: tensor 'a' has no elements, its shape is \[2, 0\]$"):
        tensor_shapes(path, "it")
    for content in (b"", b"\xff" * 8, path.read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^it is not safetensors: \w"):
            tensor_shapes(path, "it")
    with pytest.raises(UserError, match="is not a file"):
        tensor_shapes(tmp_path, "it")


def test_a_message_is_bounded_and_can_be_printed():
    error = UserError(["x" * 10_000_000 + "end", "a\ud800b\x1b[2J\x00c\nd", *map(str, range(300))], "next")
    assert len(error.problems) == 200
    assert len(error.problems[0]) < 1000
    assert error.problems[0].endswith("xend")
    assert error.problems[1] == "a\\ud800b\\x1b[2J\\x00c\nd"
    assert error.problems[-1] == "and 103 more problems"
    assert len(str(error).encode()) < 5000
    assert UserError(error.problems, error.next_step).problems == error.problems
