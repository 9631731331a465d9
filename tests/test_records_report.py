"""Oracles: headless Chromium, its console and its picture; an HTML parser; brute force over ten thousand trials."""

import csv
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from recorded_sweeps import begin, finish, generated_event_log, made_up_sweep
from records_audit import differences, logged_events
from services import browse

from halora.events import Compared, Failed, Reported
from halora.records.index import read_sweep_state
from halora.records.publishing import publish
from halora.records.recorder import SweepRecorder
from halora.records.store import Store

HOSTILE = "</script><script>document.title='broken in'</script> <img src=http://203.0.113.1/x onerror=alert(1)> \"'&‮🤖"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def sweep(store, tiny_models, tiny_task):
    return made_up_sweep(store, "made-up", tiny_models["llama"], tiny_task, description=HOSTILE, trials=12)


class _Page(HTMLParser):
    """What a page refers to, which elements were opened, and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.links, self.opened, self.text, self._silent = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.opened.append(tag)
        self._silent = tag in ("script", "style")
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag):
        self._silent = False

    def handle_data(self, data):
        self.text += "" if self._silent else data


def _draw(sweep, store, story):
    """Record what `story` does with a recorder, and draw the report; its path and its parsed page."""
    folder = store.sweep(sweep.name)
    recorder = SweepRecorder(folder, sweep)
    story(recorder, folder.root)
    recorder.finish(interrupted=False)
    recorder.close()
    publish(sweep, read_sweep_state(store, sweep.name), folder)
    page = folder.published / "report.html"
    return page, _Page(page.read_text())


def _nothing(recorder, folder):
    pass


def _one(recorder, folder, sweep):
    begin(recorder, sweep, 0)
    finish(recorder, folder, 0, 0.5)


def _all_infeasible(recorder, folder, sweep):
    for number in range(3):
        begin(recorder, sweep, number)
        finish(recorder, folder, number, 0.5, **{"constraint_violation.energy_uj_per_token": 1.5})


def _all_failed(recorder, folder, sweep):
    for number in range(3):
        begin(recorder, sweep, number)
        recorder.record(Failed(trial=number, cause=f"{HOSTILE} at step {number}"))


def _not_numbers(recorder, folder, sweep):
    for number in range(3):
        begin(recorder, sweep, number)
        finish(recorder, folder, number, float("nan"))


def _many(recorder, folder, sweep):
    rng = np.random.default_rng(0)
    chips = ["halora-2026", {"preset": "halora-2026", "noise": {"sigma": 0.03}}]
    for number in range(12):
        values = {"lora__rank": int(rng.choice([2, 4, 8])), "training__method": ("lora", "halora")[number % 2]}
        begin(recorder, sweep, number, chip=chips[number % 2], **values)
        if number in (3, 7):
            recorder.record(Failed(trial=number, cause=HOSTILE))
        elif number < 11:
            broken = {"constraint_violation.energy": 0.3} if number == 5 else {}
            finish(recorder, folder, number, float(rng.uniform(0.3, 0.8)), noise_db=-30.0 + number, **broken)
    gain = {"mean": 0.1, "low": 0.05, "high": 0.15, "p_different": 0.012, "verdict": "better"}
    cell = {"chip": HOSTILE, "summary": {"clean_accuracy": 0.5, "accuracy": 0.4, "margin": 0.1}}
    cells = [
        {**cell, "contestant": "untrained", "number": None, "accuracy_gain": None, "margin_gain": None},
        {**cell, "contestant": "best", "number": 4, "accuracy_gain": gain, "margin_gain": gain},
    ]
    recorder.record(
        Compared(comparison={"reference": "untrained", "rows": 8, "chip_instances": 2, "seeds": 3, "cells": cells})
    )


@pytest.mark.parametrize(
    ("story", "shown"),
    [
        (None, ["0 of 12", "No trial has been scored yet"]),
        (_one, ["1 of 12", "cheapest"]),
        (_all_infeasible, ["3 of 12", "violates a constraint", "Violate a constraint", "energy_uj_per_token by 1.5"]),
        (_all_failed, ["0 of 12", "Failed", HOSTILE]),
        (_not_numbers, ["3 of 12", "Finished without a score that is a number", "No trial has a score"]),
        (
            _many,
            ["9 of 12", "Closing comparison", "[+0.050 .. +0.150] better, p 0.012", "What matters", HOSTILE],
        ),
    ],
)
def test_the_report_opens_without_a_network_and_shows_every_state(store, sweep, story, shown, tmp_path):
    drawn = _nothing if story is None else lambda recorder, folder: story(recorder, folder, sweep)
    page, parsed = _draw(sweep, store, drawn)
    text = " ".join(parsed.text.split())
    for part in shown:
        assert " ".join(part.split()) in text
    assert HOSTILE in parsed.text  # the description
    assert set(parsed.links) == {"data:,"}
    assert parsed.opened.count("script") == 2
    assert "img" not in parsed.opened
    json.loads((page.parent / "front.json").read_text(), parse_constant=lambda name: pytest.fail(name))

    picture = tmp_path / "report.png"
    assert browse(page, picture) == []
    pixels = matplotlib.image.imread(picture)
    assert np.ptp(pixels[..., :3]) > 0.8


def test_the_console_would_have_said_what_goes_wrong(store, sweep, tmp_path):
    """The check of the checks above: an error and a request to another host do show up."""
    page, _ = _draw(sweep, store, _nothing)
    bad = tmp_path / "bad.html"
    insert = "<script>fetch('http://203.0.113.1/x').catch(() => 0); undefinedFunction()</script>"
    bad.write_text(page.read_text().replace("</body>", insert + "</body>"))
    said = "\n".join(browse(bad, tmp_path / "bad.png"))
    assert "undefinedFunction is not defined" in said
    assert "203.0.113.1" in said
    assert "Content Security Policy" in said


# The command line, over what was recorded.


@pytest.fixture
def command(halora, store):
    return lambda arguments: halora(f"{arguments} --store {store.root}")


def test_front_show_filters_and_takes_other_objectives(store, sweep, command):
    _draw(sweep, store, lambda recorder, folder: _many(recorder, folder, sweep))
    code, out, err = command("front show made-up --all --format json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["trial"] for row in rows if row["front"]] != []
    assert {row["trial"] for row in rows} == {0, 1, 2, 4, 6, 8, 9, 10}
    assert "2 failed; 1 violate a constraint" in err
    assert all(0 <= row["p_front"] <= 1 for row in rows)

    chosen = json.loads(command("front show made-up --all --filter method=halora --filter rank>=4 --format json")[1])
    expected = [row["trial"] for row in rows if row["trial"] % 2 and row["params"]["lora.rank"] >= 4]
    assert [row["trial"] for row in chosen] == expected

    other = "--objective accuracy --objective noise_db:min --objective energy_uj_per_token"
    three = list(csv.DictReader(io.StringIO(command(f"front show made-up {other} --format csv")[1])))
    assert list(three[0])[:4] == ["trial", "energy_uj_per_token", "noise_db", "accuracy"]
    code, _, err = command("front show made-up --objective accuracy")
    assert (code, "two or three different objectives" in err) == (2, True)
    code, _, err = command("front show made-up --filter methd=lora")
    assert (code, "did you mean 'method'" in err) == (2, True)


def test_sweep_list_and_report_read_what_is_on_disk(store, sweep, command):
    assert command("sweep list")[0] == 0
    _draw(sweep, store, lambda recorder, folder: _many(recorder, folder, sweep))
    code, out, _ = command("sweep list --format json")
    (row,) = json.loads(out)
    assert code == 0
    counts = {name: row[name] for name in ("sweep", "state", "finished", "failed")}
    assert counts == {"sweep": "made-up", "state": "finished", "finished": 9, "failed": 2}
    assert row["undelivered"] == len(logged_events(store.sweep("made-up").event_log_file))
    assert row["lowest_energy_uj_per_token"] > 0
    (store.sweep("made-up").published / "report.html").unlink()
    code, out, _ = command("sweep report made-up")
    assert code == 0
    assert Path(out.strip()).read_text().startswith("<!doctype html>")
    assert command("sweep report other")[0] == 2


def test_trial_show_and_logs_say_what_a_trial_left(store, sweep, command):
    _draw(sweep, store, lambda recorder, folder: _many(recorder, folder, sweep))
    told = {row["name"]: row["value"] for row in json.loads(command("trial show made-up/3 --format json")[1])}
    assert (told["state"], told["cause"], told["method"]) == ("failed", HOSTILE, "halora")
    folder = store.sweep("made-up").root / "ray" / "00003"
    folder.mkdir(parents=True)
    (folder / "stderr").write_text("".join(f"line {i}\n" for i in range(300)))
    (folder / "stdout").touch()
    code, out, _ = command("trial logs made-up/3 -n 2")
    assert code == 0
    assert out.splitlines()[0] == f"failed: {HOSTILE}"
    assert out.splitlines()[-2:] == ["line 298", "line 299"]
    assert "left no log" in command("trial logs made-up/0")[2]
    for wrong, reason in (("made-up", "write SWEEP/NUMBER"), ("made-up/x", "write SWEEP/NUMBER"), ("made-up/99", "no")):
        code, _, err = command(f"trial logs {wrong}")
        assert (code, reason in err) == (2, True)


def test_stop_closes_and_delivers_what_a_killed_driver_left(store, sweep, command):
    recorder = SweepRecorder(store.sweep("made-up"), sweep)
    begin(recorder, sweep, 0)
    recorder.record(Reported(trial=0, step=2, metrics={"train_loss": 1.0}))
    recorder.close()  # what was written before a kill
    code, _, err = command("sweep stop made-up")
    assert code == 0, err
    assert "closing and delivering its records" in err
    assert differences(store.tracking_uri, "made-up", store.sweep("made-up").event_log_file) == []
    (row,) = json.loads(command("sweep list --format json")[1])
    assert (row["state"], row["undelivered"]) == ("interrupted", 0)
    assert [point.state for point in read_sweep_state(store, "made-up").points()] == ["interrupted"]
    assert "closing" not in command("sweep stop made-up")[2]


def test_the_front_of_ten_thousand_trials_is_that_of_brute_force_within_a_gibibyte(tmp_path, tiny_models, tiny_task):
    store = Store(tmp_path / "store")
    sweep = made_up_sweep(store, "large", tiny_models["llama"], tiny_task)
    trials = generated_event_log(store.sweep(sweep.name).event_log_file, 10_000)
    accuracy = np.array([trial["accuracy"] for trial in trials])
    energy = np.array([trial["energy_uj_per_token"] for trial in trials])
    dominated = np.zeros(len(trials), dtype=bool)
    for i in range(len(trials)):
        no_worse = (accuracy >= accuracy[i]) & (energy <= energy[i])
        dominated[i] = (no_worse & ((accuracy > accuracy[i]) | (energy < energy[i]))).any()
    halora = f"{Path(sys.executable).parent / 'halora'} front show large --format json --store {store.root}"
    for _ in ("cold", "warm"):
        limited = ["bash", "-c", f"ulimit -d {2**20}; exec {halora}"]  # KiB of memory of its own
        shown = subprocess.run(limited, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert {row["trial"] for row in json.loads(shown.stdout)} == set(np.flatnonzero(~dominated))
