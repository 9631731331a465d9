"""Oracles: the lines of the file itself; a process killed by SIGKILL; a full disk; the state of the whole event log."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from halora.errors import UserError
from halora.events import (
    Answers,
    Began,
    Compared,
    Failed,
    Finished,
    FrontMoved,
    OutOfMemory,
    Reported,
    Resumed,
    Scored,
    Stopped,
    SweepFinished,
    SweepStarted,
    WorkerLost,
)
from halora.records import event_log
from halora.records.delivery import DeliveryOffset, undelivered
from halora.records.event_log import EventLog, events_of, read
from halora.records.index import read_sweep_state, recorded_trial
from halora.records.store import Store
from halora.records.sweep_state import SweepState

_LAUNCH = "a" * 32


def _began(number, **params):
    known = {"labels": {"method": "lora"}, "metrics": {"energy_uj_per_token": 2.0}, "chip_hash": "c", "config": {}}
    return Began(trial=number, time_ms=1000, params=params, **known, datasets=[], program={})


def _reported(number, step, **metrics):
    return Reported(trial=number, time_ms=1000 + step, step=step, metrics=metrics)


def _write(path, events):
    log = EventLog(path, _LAUNCH)
    for event in events:
        log.append(event)
    log.close()


def test_what_is_appended_is_read_back_from_any_place(tmp_path):
    path = tmp_path / "events.jsonl"
    written = [
        _began(0, model="a 'quoted' \"model\"\n<script>", text="\u202eגרסה 🤖 \ud800"),
        _reported(0, 2, train_loss=float("nan"), train_strength=0.1 + 0.2),
        Failed(trial=0, cause="loss nan at step 3"),
    ]
    _write(path, written)
    events, end = read(path)
    assert repr(events) == repr(written)  # a nan equals nothing
    assert end == path.stat().st_size
    assert read(path, end) == ([], end)
    first, middle = read(path, 0, limit=2)  # the header is a line as well
    assert repr(first + read(path, middle)[0]) == repr(written)
    assert len(first) == 1
    _write(path, [Resumed(trial=0)])
    assert read(path, end)[0] == [Resumed(trial=0)]


def test_the_events_of_a_trial_are_those_of_the_whole_log(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [
        _began(1, text='"trial":11,'),
        _began(11),
        Failed(trial=1, cause='{"trial": 11}'),
        _began(111, x={"trial": 11}),
        Stopped(trial=11),
    ]
    _write(path, [SweepStarted(), *events])
    for number in (1, 11, 111, 2):
        assert events_of(path, number) == [event for event in events if event.trial == number]
    with path.open("a") as file:
        file.write('{"kind": "stopped", "trial": 11')  # torn
    assert len(events_of(path, 11)) == 2
    assert events_of(tmp_path / "none", 11) == []
    for damaged in ('{"trial":11,', '{"kind":"unheard_of","trial":11}', '{"kind":"stopped","trial":11,"why":""}'):
        path.write_text(f"{damaged}\n")
        with pytest.raises(UserError, match="damaged"):
            events_of(path, 11)


@pytest.mark.parametrize("torn", [b'{"kind":"reported","trial":0,"st', b'{"kind":"stopped","trial":0}', b"\xff\x00"])
def test_a_line_that_a_crash_cut_off_is_not_there(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    _write(path, [_began(0)])
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(torn)
    assert read(path)[1] == whole
    _write(path, [Finished(trial=0)])
    assert read(path)[0] == [_began(0), Finished(trial=0)]


def test_a_header_that_a_crash_cut_off_is_written_anew(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"log":"ab')
    assert event_log.identity(path) == ""
    _write(path, [_began(0)])
    assert len(event_log.identity(path)) == 32
    assert len(read(path)[0]) == 1


def test_a_log_is_of_one_launch(tmp_path):
    _write(tmp_path / "events.jsonl", [Resumed(trial=0)])
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["launch"] == _LAUNCH
    with pytest.raises(UserError, match=f"is of launch {_LAUNCH}, not of {'b' * 32}"):
        EventLog(tmp_path / "events.jsonl", "b" * 32)
    EventLog(tmp_path / "events.jsonl", _LAUNCH).close()


def test_a_process_that_is_killed_loses_nothing_it_appended(tmp_path):
    path = tmp_path / "events.jsonl"
    program = f"""
import itertools, pathlib
from halora.events import Reported
from halora.records.event_log import EventLog
log = EventLog(pathlib.Path({str(path)!r}), {_LAUNCH!r})
for i in itertools.count():
    log.append(Reported(trial=0, time_ms=i, step=i, metrics={{}}))
    print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    said = [int(line) for line in said if line.endswith("\n")]
    steps = [event.step for event in read(path)[0]]
    assert steps[: len(said)] == said
    assert len(steps) - len(said) in (0, 1)


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """`ulimit -f` stands in for the full disk: a write beyond it is short or fails."""
    path = tmp_path / "events.jsonl"
    program = f"""
import pathlib, resource, signal
from halora.events import Reported
from halora.records.event_log import EventLog
log = EventLog(pathlib.Path({str(path)!r}), {_LAUNCH!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for i in range(100):
    try:
        log.append(Reported(trial=0, time_ms=i, step=i, metrics={{}}))
    except OSError:
        print(i)
        break
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [event.step for event in read(path)[0]] == list(range(int(run.stdout)))
    assert path.read_bytes().endswith(b"\n")


def test_a_damaged_log_is_named_with_the_place(tmp_path):
    path = tmp_path / "events.jsonl"
    _write(path, [_began(0)])
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"not json\n")
    with pytest.raises(UserError, match=rf"events\.jsonl' is damaged at byte {size}"):
        read(path)
    os.truncate(path, size)
    with path.open("ab") as file:
        file.write(b'{"kind":"finished","trial":0,"step":3}\n')  # no such field
    with pytest.raises(UserError, match=rf"damaged at byte {size}"):
        read(path)
    path.write_text('{"log": "x", "version": 99}\n')
    with pytest.raises(UserError, match="is of version 99, this program reads 3"):
        event_log.identity(path)
    path.write_text("[]\n")
    with pytest.raises(UserError, match="is not an event log"):
        event_log.identity(path)


# What the events add up to.

_SCORED = {"step": 4, "metrics": {"accuracy": 0.5}, "accuracy_by_chip": [0.5]}
_STORY = [
    SweepStarted(),
    _began(0, **{"lora.rank": 4}),
    _began(1, **{"lora.rank": 8}),
    _reported(0, 2, train_loss=3.0),
    WorkerLost(trial=0, cause="its node is gone"),
    _reported(0, 4, train_loss=2.0),
    Scored(trial=0, **_SCORED | {"metrics": {"accuracy": 0.25}}, final=False),
    Scored(trial=0, **_SCORED, answers=Answers("g", 1, 3, "oA==")),
    Finished(trial=0),
    FrontMoved(step=1, metrics={"hypervolume": 0.5}),
    OutOfMemory(trial=1, cause="too many rows"),
    Failed(trial=1, cause="boom"),
    Compared(comparison={"rows": 3}),
    SweepFinished(),
]


def _store_with(tmp_path, events, name="s"):
    store = Store(tmp_path / "store")
    store.sweep(name).root.mkdir(parents=True, exist_ok=True)
    _write(store.sweep(name).event_log_file, events)
    return store


def test_a_state_tells_where_every_trial_stands():
    recorded = SweepState()
    recorded.take(_STORY)
    first, second = recorded.points()
    assert (first.number, first.state, first.params, first.labels) == (
        0,
        "finished",
        {"lora.rank": 4},
        {"method": "lora"},
    )
    assert first.metrics == {"energy_uj_per_token": 2.0, "train_loss": 2.0, "rung_accuracy": 0.25, "accuracy": 0.5}
    assert (first.correct.shape, first.correct.packed) == ((1, 3), b"\xa0")
    assert (second.state, second.cause) == ("failed", "boom")
    assert recorded.steps(0) == {2, 4}
    assert (recorded.answers(0), recorded.answers(1)) == (Answers("g", 1, 3, "oA=="), None)
    assert (recorded.begun(1), recorded.begun(2)) == (True, False)
    assert (recorded.front_step, recorded.comparison, recorded.sweep_state) == (1, {"rows": 3}, "finished")


def test_a_trial_of_very_many_reports_takes_no_more_to_keep_than_one_of_few():
    """Each report costs as much as the first: nothing is copied that grows with them."""
    sizes, states = [], [SweepState(), SweepState()]
    for recorded, reports in zip(states, (10, 100_000), strict=True):
        recorded.take(_reported(0, step, train_loss=1.0) for step in range(reports))
        sizes.append(len(json.dumps(recorded.contents)))
    assert sizes[1] - sizes[0] < 10
    many = states[1]
    assert (len(many.steps(0)), many.last_step(0)) == (100_000, 99_999)
    assert many.steps(0) is many.steps(0)


@pytest.mark.parametrize("cut", range(len(_STORY) + 1))
def test_an_index_that_follows_a_log_says_what_the_whole_log_says(tmp_path, cut):
    store = _store_with(tmp_path, _STORY[:cut])
    read_sweep_state(store, "s")
    _store_with(tmp_path, _STORY[cut:])
    whole = SweepState()
    whole.take(_STORY)
    for _ in range(2):
        assert read_sweep_state(store, "s").contents == whole.contents


def test_an_index_follows_a_log_that_was_replaced_and_one_that_it_cannot_keep(tmp_path):
    store = _store_with(tmp_path, _STORY)
    assert len(read_sweep_state(store, "s").points()) == 2
    store.sweep("s").event_log_file.unlink()
    assert read_sweep_state(store, "s").points() == []
    _store_with(tmp_path, _STORY[:2])
    assert [point.number for point in read_sweep_state(store, "s").points()] == [0]
    store.index_file.write_text("no database at all, and long enough to be looked at as one" * 100)
    assert [point.number for point in read_sweep_state(store, "s").points()] == [0]
    store.index_file.unlink()
    store.index_file.mkdir()
    assert [point.number for point in read_sweep_state(store, "s").points()] == [0]


def test_two_readers_of_a_growing_log_do_not_disturb_each_other(tmp_path):
    store = _store_with(tmp_path, [])
    program = f"""
import pathlib, time
from halora.records.index import read_sweep_state
from halora.records.store import Store
while not pathlib.Path({str(tmp_path / "stop")!r}).exists():
    read_sweep_state(Store(pathlib.Path({str(store.root)!r})), "s")
"""
    readers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    log = EventLog(store.sweep("s").event_log_file, _LAUNCH)
    try:
        for number in range(300):
            log.append(_began(number))
            log.append(Finished(trial=number))
            if number % 50 == 0:
                time.sleep(0.3)
                assert len(read_sweep_state(store, "s").points()) == number + 1
    finally:
        (tmp_path / "stop").touch()
        assert [reader.wait(60) for reader in readers] == [0, 0]
    points = read_sweep_state(store, "s").points()
    assert [point.number for point in points] == list(range(300))
    assert {point.state for point in points} == {"finished"}


def test_a_trial_that_is_not_there_is_named_with_those_that_are(tmp_path):
    store = _store_with(tmp_path, _STORY)
    assert recorded_trial(store, "s", 1).cause == "boom"
    with pytest.raises(UserError, match=r"no trial 's/7' \(numbers of 's': 0, 1\)"):
        recorded_trial(store, "s", 7)
    with pytest.raises(UserError, match=r"numbers of 'other': none"):
        recorded_trial(store, "other", 0)


def test_a_position_counts_for_its_log_and_its_mlflow_only(tmp_path):
    store = _store_with(tmp_path, _STORY)
    folder = store.sweep("s")
    assert undelivered(store, "s") == len(_STORY)
    offset = DeliveryOffset(folder, store.server)
    offset.move(read(folder.event_log_file, 0, limit=5)[1])
    assert undelivered(store, "s") == len(_STORY) - 4
    assert DeliveryOffset(folder, "http://127.0.0.1:1").left() == len(_STORY)
    folder.event_log_file.unlink()
    assert undelivered(store, "s") == 0
    _store_with(tmp_path, _STORY[:1])
    assert undelivered(store, "s") == 1


# The store.


def test_a_store_names_its_server_and_keeps_no_password(tmp_path, monkeypatch):
    monkeypatch.delenv("HALORA_TRACKING_URI", raising=False)
    monkeypatch.setenv("HALORA_STORE", str(tmp_path / "there"))
    assert Store.at().tracking_uri == f"sqlite:///{tmp_path}/there/mlflow.db"
    assert Store.at(tmp_path).root == tmp_path
    monkeypatch.setenv("HALORA_TRACKING_URI", "http://tracking:5000")
    assert Store.at().tracking_uri == "http://tracking:5000"
    assert Store.at(None, "http://other:5000").tracking_uri == "http://other:5000"
    monkeypatch.chdir(tmp_path)
    assert Store.at(None, "sqlite:///own.db").server == f"sqlite:///{tmp_path}/own.db"  # a resume may stand elsewhere
    for uri in ("http://me:secret@host:5000", "postgresql://me:secret@host/db"):
        with pytest.raises(UserError, match="tracking URI holds a user or a password") as caught:
            Store.at(None, uri)
        assert "secret" not in str(caught.value)


def test_a_sweep_remembers_the_server_it_is_recorded_in(tmp_path):
    store = _store_with(tmp_path, [])
    assert store.serving("s").tracking_uri == store.tracking_uri
    store.sweep("s").server_file.write_text("http://tracking:5000")
    assert store.serving("s").tracking_uri == "http://tracking:5000"
    assert Store(store.root, "http://moved:5000").serving("s").tracking_uri == "http://moved:5000"


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/store' cannot be written: Not a directory"):
        Store(tmp_path / "file" / "store").check_writable()


def test_a_store_lists_the_sweeps_it_holds(tmp_path):
    store = Store(tmp_path)
    assert store.sweeps() == []
    for name in ("first", "second"):
        store.sweep(name).root.mkdir(parents=True)
    store.sweep("second").sweep_file.touch()
    assert store.sweeps() == ["second"]
    assert store.existing("second").name == "second"
    with pytest.raises(UserError, match=r"no sweep 'secnd' in .*did you mean 'second'"):
        store.existing("secnd")


def test_lines_are_json_that_other_programs_read(tmp_path):
    path = tmp_path / "events.jsonl"
    _write(path, _STORY)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()][1:]
    assert [(line["kind"], line["trial"]) for line in lines] == [(event.kind, event.trial) for event in _STORY]
    assert lines[7] == {
        **{"kind": "scored", "trial": 0, "time_ms": 0, "step": 4, "metrics": {"accuracy": 0.5}},
        **{"accuracy_by_chip": [0.5], "answers": {"group": "g", "chips": 1, "rows": 3, "bits": "oA=="}},
    }
