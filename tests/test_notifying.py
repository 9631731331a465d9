"""Notifications of a sweep. Oracles: what a real HTTP server and a real program were given, beside the event log."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from recorded_sweeps import begin, finish, made_up_sweep

from halora.errors import UserError
from halora.events import Failed, SweepFinished
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.sweep.run import notifying as module
from halora.sweep.run.notifying import NOTIFY, NOTIFY_ON, Notifier, Notify, notifying

SECRET = "T0P-S3CRET"


class _Server(ThreadingHTTPServer):
    """Answers with the codes it is told to, and 200 after them; `got` are the bodies that it took with 200."""

    def __init__(self, *codes):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.codes, self.got, self.asked = list(codes), [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/services/{SECRET}?key={SECRET}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.got.append(body)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def quick(monkeypatch):
    """Waits between tries, and between looks at the event log, of no length."""
    monkeypatch.setattr(module, "backoff_s", lambda *_: iter([0.0] * 3))
    monkeypatch.setattr(module, "_POLL_S", 0.01)


@pytest.fixture
def sweep(tmp_path, tiny_models, tiny_task):
    return made_up_sweep(Store(tmp_path / "store"), "told", tiny_models["llama"], tiny_task)


@pytest.fixture
def folder(tmp_path, sweep):
    return Store(tmp_path / "store").sweep(sweep.name)


def _asked(monkeypatch, where, kinds=""):
    monkeypatch.setenv(NOTIFY, where)
    monkeypatch.setenv(NOTIFY_ON, kinds)
    return Notify.from_environment()


def _scored(recorder, sweep, folder, number, accuracy):
    begin(recorder, sweep, number)
    finish(recorder, folder.root, number, accuracy)


def _drive(sweep, folder, notify, say, *, end=True):
    """Two trials, the better second, and one that fails."""
    with notifying(folder, sweep, notify, say):
        recorder = SweepRecorder(folder, sweep)
        for number, accuracy in ((0, 0.5), (1, 0.4)):
            _scored(recorder, sweep, folder, number, accuracy)
        begin(recorder, sweep, 2)
        recorder.record(Failed(trial=2, cause="no room"))
        if end:
            recorder.finish(interrupted=False)
        recorder.close()


def test_a_webhook_is_told_of_the_front_a_failure_and_the_end_once_each(sweep, folder, server, quick, monkeypatch):
    said = []
    server.codes = [500, 429]
    _drive(sweep, folder, _asked(monkeypatch, server.url), said.append)
    front = [each for each in server.got if each["event"] == "front"]
    assert front[-1]["members"] == [0]
    assert set(front[0]["joined"]) == {0}
    (failed,) = [each for each in server.got if each["event"] == "failed"]
    assert (failed["trial"], failed["cause"]) == (2, "no room")
    ended = server.got[-1]
    assert (ended["event"], ended["state"], ended["launch"]) == ("ended", "finished", sweep.launch)
    assert ended["trials"] == {"finished": 2, "failed": 1}
    assert all(each["text"].startswith("sweep 'told': ") for each in server.got)
    assert server.asked == len(server.got) + 2
    told = len(server.got)
    with notifying(folder, sweep, _asked(monkeypatch, server.url), said.append):  # a resume repeats nothing
        pass
    assert len(server.got) == told
    assert said == []


def test_what_a_driver_that_was_killed_had_not_told_is_told_by_the_next(sweep, folder, server, quick, monkeypatch):
    """And nothing of the time before anybody asked to be notified."""
    recorder = SweepRecorder(folder, sweep)
    _scored(recorder, sweep, folder, 0, 0.3)
    notify = _asked(monkeypatch, server.url, "front,ended")
    first = Notifier(folder, sweep, notify, print)
    first._catch_up()
    first._send_some()
    assert server.got == []  # old
    _scored(recorder, sweep, folder, 1, 0.4)
    first._send_some()
    assert [each["joined"] for each in server.got] == [[1]]
    assert [each["left"] for each in server.got] == [[0]]
    recorder.record(Failed(trial=2, cause="not asked for"))
    _scored(recorder, sweep, folder, 3, 0.6)
    recorder.close()  # the first hears of nothing any more
    with notifying(folder, sweep, notify, print):
        pass
    assert [(each["event"], each.get("joined"), each.get("left")) for each in server.got[1:]] == [("front", [3], [1])]


@pytest.mark.parametrize("where", ["away", "refused", "moved", "failing", "hanging", "gone"])
def test_nobody_to_notify_holds_nothing_up_and_no_secret_is_told(
    where, sweep, folder, server, quick, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "_LONGEST_S", 0.5)
    program = tmp_path / f"{SECRET}.py"
    program.write_text(
        "import subprocess, sys, time\nif 'hang' in sys.argv: time.sleep(600)\nsys.exit('" + SECRET + "')"
    )
    server.codes = {"refused": [403] * 99, "moved": [302] * 99}.get(where, [])
    address = f"http://127.0.0.1:9/{SECRET}" if where == "away" else server.url
    command = f"{sys.executable} {program} {SECRET} {'hang' if where == 'hanging' else ''}"
    notify = _asked(monkeypatch, command if where in ("failing", "hanging", "gone") else address, "failed")
    if where == "gone":
        notify = Notify(module.Command((str(tmp_path / SECRET),)), notify.kinds)
    said = []
    _drive(sweep, folder, notify, said.append)
    assert server.got == []
    assert len(said) == 1
    assert said[0].startswith("nobody could be notified of 'failed': ")
    written = [path.read_bytes() for path in folder.root.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in (*written, said[0].encode()))
    assert SweepFinished.kind in folder.event_log_file.read_text()


def test_a_command_is_given_each_notification_on_its_standard_input(sweep, folder, quick, monkeypatch, tmp_path):
    """Without a shell: `;` and `$` are what they are."""
    got = tmp_path / "got ; $HOME.jsonl"
    program = tmp_path / "take.py"
    program.write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')")
    _drive(sweep, folder, _asked(monkeypatch, f"'{sys.executable}' '{program}' '{got}'", "ended"), print)
    (line,) = got.read_text().splitlines()
    assert json.loads(line)["state"] == "finished"


def test_what_the_environment_asks_for_is_checked_whole_and_not_repeated(monkeypatch):
    monkeypatch.delenv(NOTIFY, raising=False)
    monkeypatch.delenv(NOTIFY_ON, raising=False)
    assert Notify.from_environment() is None
    for where in ("no-such-program-" + SECRET, f"https:///{SECRET}", f"'{SECRET}"):
        monkeypatch.setenv(NOTIFY, where)
        monkeypatch.setenv(NOTIFY_ON, "ended over")
        with pytest.raises(UserError) as told:
            Notify.from_environment()
        assert len(told.value.problems) == 2
        assert f"${NOTIFY_ON}: unknown over; there are ended, failed, front" in str(told.value)
        assert SECRET not in str(told.value) + told.value.next_step
