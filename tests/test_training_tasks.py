"""Oracles: the published sizes of ARC-Easy's splits; rows written by hand."""

import json

import pytest

from halora.errors import UserError
from halora.training.tasks import Row, check_task, load_rows


def _folder(tmp_path, *lines: object, name: str = "train") -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    for split in {"train", "validation", name}:
        (tmp_path / f"{split}.jsonl").write_text("\n".join(texts))
    return str(tmp_path)


PLAIN = {"id": "a", "question": "Which is a fruit?", "choices": ["stone", "apple"], "answer": 1}


def test_arc_easy_has_its_official_splits_and_they_are_disjoint():
    splits = {name: load_rows("arc-easy", name) for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2251, "validation": 570, "test": 2376}
    ids = [row.row_id for rows in splits.values() for row in rows]
    assert len(set(ids)) == 2251 + 570 + 2376


def test_arc_easy_rows_are_well_formed():
    rows = load_rows("arc-easy", "validation")
    assert all(row.prompt.startswith("Question: ") and row.prompt.endswith("\nAnswer:") for row in rows)
    assert all(option.startswith(" ") and option.strip() for row in rows for option in row.options)
    assert all(3 <= len(row.options) <= 5 and 0 <= row.answer < len(row.options) for row in rows)
    shares = [sum(row.answer == place for row in rows) / len(rows) for place in range(4)]
    assert all(0.15 < share < 0.35 for share in shares)


def test_rows_come_in_one_fixed_shuffled_order_and_a_limit_takes_its_head():
    rows = load_rows("arc-easy", "validation")
    assert load_rows("arc-easy", "validation") == rows
    assert load_rows("arc-easy", "validation", 7) == rows[:7]
    assert [row.row_id for row in rows] != sorted(row.row_id for row in rows)


def test_the_order_does_not_depend_on_the_order_of_the_file(tmp_path):
    records = [{**PLAIN, "id": f"row-{i}"} for i in range(20)]
    forward = load_rows(_folder(tmp_path, *records), "train")
    assert load_rows(_folder(tmp_path, *records[::-1]), "train") == forward


def test_a_folder_of_jsonl_files(tmp_path):
    folder = _folder(tmp_path, PLAIN, "")  # a blank line is no row
    assert load_rows(folder, "validation") == [
        Row("a", "Question: Which is a fruit?\nAnswer:", (" stone", " apple"), 1)
    ]


def test_rows_in_the_schema_of_arc(tmp_path):
    choices = {"text": ["stone", "apple", "clay"], "label": ["1", "2", "3"]}
    record = {"id": "b", "question": "Which is a fruit?", "choices": choices, "answerKey": "2"}
    (row,) = load_rows(_folder(tmp_path, record), "train")
    assert row == Row("b", "Question: Which is a fruit?\nAnswer:", (" stone", " apple", " clay"), 1)


def test_rows_without_an_id_get_a_stable_one(tmp_path):
    record = {key: value for key, value in PLAIN.items() if key != "id"}
    other = {**record, "choices": ["stone", "pear"]}
    ids = {row.row_id for row in load_rows(_folder(tmp_path, record, other), "train")}
    assert ids == {row.row_id for row in load_rows(_folder(tmp_path, other, record), "train")}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**PLAIN, "answer": 2}, "train row 1: answer 2 is outside its 2 choices"),
        ({**PLAIN, "answer": -1}, "train row 1: answer -1 is outside its 2 choices"),
        ({**PLAIN, "answer": "B"}, "train row 1: .*'B'"),
        ({**PLAIN, "choices": ["only"], "answer": 0}, "train row 1: 1 choices; a row has two or more"),
        ({"id": "b", "question": "q", "answer": 1}, r"train row 1: KeyError\('choices'\); a row is"),
        ({"id": "b", "choices": ["x", "y"], "answer": 1}, r"train row 1: KeyError\('question'\)"),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"},
            "train row 1: .*'C' is not in list",
        ),
        ("[1, 2]", "train row 1: "),
        ('{"question": ', "train.jsonl line 2 is not JSON"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, record, problem):
    with pytest.raises(UserError, match=problem):
        load_rows(_folder(tmp_path, PLAIN, record), "train")


def test_an_empty_or_missing_split_is_named(tmp_path):
    folder = _folder(tmp_path, "")
    with pytest.raises(UserError, match="no rows in split 'train'"):
        load_rows(folder, "train")
    with pytest.raises(UserError, match=r"lacks test\.jsonl"):
        load_rows(folder, "test")
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"lacks validation\.jsonl"):
        check_task(folder)


def test_a_missing_task_names_the_nearest():
    with pytest.raises(UserError, match=r"no task 'arc-easi'.*did you mean 'arc-easy'\?"):
        load_rows("arc-easi", "train")
    with pytest.raises(UserError, match="no task '/no/such/folder'"):
        check_task("/no/such/folder")
