"""Oracle: the words of the rows themselves, whole on lines no longer than the terminal."""

import csv
import io
import json
import re
import sys

import pytest

from halora.cli.output import Format, show_rows
from halora.errors import UserError

ROWS = [
    {
        "trial": number,
        "energy_uj_per_token": 2.5 - number / 10,
        "accuracy": 0.5 if number else None,
        "interval": f"0.{number}21..0.8{number}7",
        "p_front": 0.25,
        "state": "waiting for a worker",
        "params": f"rank={2**number} learning_rate=0.00{number}58 method=noise_lora",
    }
    for number in range(3)
]


@pytest.fixture
def printed(capsys, monkeypatch):
    """What is printed on a terminal of so many columns, or into a pipe for none; lines on stdout, text on stderr."""

    def run(width, **settings):
        if width is not None:
            monkeypatch.setenv("COLUMNS", str(width))
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        show_rows(ROWS, Format.TABLE, "front of s", **settings)
        said = capsys.readouterr()
        return re.sub(r"\x1b\[[\d;]*m", "", said.out).splitlines(), said.err

    return run


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_table_fits_the_terminal_and_cuts_no_word(printed, width):
    lines, told = printed(width, keep=["params"])
    assert max(map(len, lines)) <= width
    text = " ".join(lines).split()
    for row in ROWS:
        assert set(row["params"].split()) <= set(text)
        assert str(row["trial"]) in text
    for name in ("energy_uj_per_token", "interval", "state"):  # whole, or left out and named
        shown = all(
            part in text for row in ROWS for part in (f"{row[name]:.4g}" if name[0] == "e" else row[name]).split()
        )
        assert shown != (name in told)
    assert ("too narrow" in told) == (width < 82)


def test_a_pipe_gets_every_column_with_its_heading_on_one_line(printed):
    lines, told = printed(None)
    assert lines[1].split() == list(ROWS[0])
    assert told == ""


def test_columns_are_chosen_and_rows_sorted_with_none_last(printed):
    lines, _ = printed(None, columns="accuracy,trial", sort="-trial")
    assert [line.split() for line in lines[1:]] == [["accuracy", "trial"], ["0.5", "2"], ["0.5", "1"], ["-", "0"]]
    lines, _ = printed(None, columns="trial", sort="accuracy")
    assert [line.split() for line in lines[-3:]] == [["1"], ["2"], ["0"]]


@pytest.mark.parametrize("form", [Format.JSON, Format.CSV])
def test_programs_get_the_same_choice(capsys, form):
    show_rows(ROWS, form, columns="trial,interval", sort="energy_uj_per_token")
    out = capsys.readouterr().out
    rows = json.loads(out) if form is Format.JSON else list(csv.DictReader(io.StringIO(out)))
    assert [int(row["trial"]) for row in rows] == [2, 1, 0]
    assert set(rows[0]) == {"trial", "interval"}


def test_columns_that_are_not_there_are_refused_together():
    with pytest.raises(UserError) as refused:
        show_rows(ROWS, Format.CSV, columns="trial,acuracy", sort="-states")
    assert refused.value.problems == [
        "no column 'acuracy'; did you mean 'accuracy'?",
        "no column 'states'; did you mean 'state'?",
    ]
