"""Oracles: an HTML parser; brute force over the recorded trials; the command line's figures; the files of a store."""

import html
import json
import os
import re
import shlex
import signal
import socket
from html.parser import HTMLParser
from math import log10
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from page_stores import HOSTILE, LARGE, STORIES, certify_made_up, fill, varied_trial
from recorded_sweeps import LAYERS, begin
from starlette.datastructures import QueryParams
from starlette.testclient import TestClient

from halora.dashboard.app import create_app
from halora.dashboard.query import SweepQuery
from halora.events import Reported
from halora.records.index import read_sweep_state
from halora.records.provenance import program
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.selection.certificate import chips_needed
from halora.sweep.run.state import load_sweep_of, only_driver


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_models, tiny_task):
    found = Store(tmp_path_factory.mktemp("page") / "store")
    fill(found, tiny_models["llama"], tiny_task)
    return found


@pytest.fixture(scope="module")
def client(store):
    with TestClient(create_app(store), base_url="http://127.0.0.1:8050", follow_redirects=False) as client:
        yield client


class _Page(HTMLParser):
    """Elements, addresses, texts by row and data of a page."""

    def __init__(self, answer):
        super().__init__()
        self.opened, self.links, self.scripts, self.data, self.text, self.rows = [], [], [], {}, "", []
        self.inline, self._data, self._in_cell = [], None, False
        self.feed(answer.text)

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.opened.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "hx-get")]
        self.inline += [name for name, _ in attributes if name.startswith("on") or name == "style"]
        self._data = None
        if tag == "script":
            self._data = own.get("id", "")
            self.scripts.append(own)
            self.data[self._data] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._data = None if tag == "script" else self._data
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._data is not None:
            self.data[self._data] += data
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def figure(self, name):
        return json.loads(self.data[f"data-{name}"], parse_constant=lambda text: pytest.fail(text))


def _page(client, address, status=200):
    answer = client.get(address)
    assert answer.status_code == status, answer.text
    return _Page(answer)


def _qualifying(page):
    return int(re.search(r"(\d+) of \d+ finished trials qualify", page.text)[1])


SHOWN = {
    "zero": [
        "0 of 4trials finished",
        "Nothing to recommend yet: no trial has finished.",
        "No trial has been scored yet",
    ],
    "one": ["1 of 4trials finished", "1 of 1 finished trials qualify"],
    "dozen": [
        "11 of 12trials finished",
        "Take trial 9 (lora, rank 4)",
        "Not certified.",
        "1failed",
        "out of memory",
        "clean_accuracy by 0.1",
    ],
    "infeasible": [
        "No trial qualifies. Trial 0 comes nearest",
        "3violate a constraint",
        "0 of 3 finished trials qualify",
        "energy_uj_per_token by 1.5",
    ],
    "failed": ["Nothing to recommend: all 3 trials failed", "3failed", "No trial has been scored yet"],
    "numberless": ["3without a score", "No trial has been scored yet"],
    "hostile": ["4 of 4trials finished"],
    "large": [f"{LARGE} of {LARGE}trials finished"],
}


@pytest.mark.parametrize("name", STORIES)
def test_every_sweep_has_its_page_and_its_cards(client, name):
    addresses = [f"/sweeps/{name}", f"/sweeps/{name}?shown=clean_accuracy&colour=chip&pick=0&pick=1"]
    addresses += [f"/compare?sweep={name}", f"/compare?sweep={name}&by=chip"]
    addresses += [] if name == "zero" else [f"/sweeps/{name}/trials/0", f"/sweeps/{name}/trials/0?against=1"]
    for address in addresses:
        page = _page(client, address)
        assert "img" not in page.opened
        assert page.inline == []
        assert [own.get("type") for own in page.scripts if "src" not in own] == ["application/json"] * len(
            [key for key in page.data if key]
        )
        for key in page.data:
            if key:
                page.figure(key.removeprefix("data-"))
        for link in page.links:
            assert not urlsplit(link).netloc
    page = _page(client, addresses[0])
    for text in SHOWN[name]:
        assert text in page.text
    if name == "hostile":
        assert HOSTILE in page.text


def test_a_sweep_s_page_shows_what_the_chips_do_to_the_bases(client):
    page = _page(client, "/sweeps/dozen")
    assert f"base of {HOSTILE}: what its chips do to it is not known: it was not at hand" in page.text


def test_the_list_shows_every_sweep_and_what_cannot_be_read(client, store):
    damaged = store.sweep("damaged")
    damaged.root.mkdir()
    damaged.sweep_file.write_text("name: [")
    try:
        page = _page(client, "/")
        rows = {row[1].split("\n")[0].split("what")[0].strip(): row for row in page.rows if len(row) > 2}
        assert set(rows) >= {*STORIES[:6], "large", "damaged"}
        assert "cannot be read" in rows["damaged"][2]
        assert rows["failed"][3:8] == ["0 of 4", "3", "0", "0", "–"]
        assert rows["dozen"][3:6] == ["11 of 12", "1", "0"]
        assert _page(client, "/sweeps/damaged", 404)
    finally:
        damaged.sweep_file.unlink()
        damaged.root.rmdir()
    assert (
        "no sweep in this store yet"
        in _page(TestClient(create_app(Store(store.root / "none"), hosts=["testserver"])), "/").text
    )


CONSTRAINTS = [
    ({"accuracy": "0.5"}, lambda p: p.metrics["accuracy"] >= 0.5),
    ({"energy": "3.25"}, lambda p: p.metrics["energy_uj_per_token"] <= 3.25),
    ({"drop": "-0.4"}, lambda p: p.metrics["clean_accuracy"] - p.metrics["accuracy"] <= -0.4),
    ({"rank": "4", "method": "lora"}, lambda p: p.params["lora.rank"] <= 4 and p.labels["method"] == "lora"),
    (
        {"filter": ["rank=2|16", "learning_rate>0.001"]},
        lambda p: p.params["lora.rank"] in (2, 16) and p.params["training.learning_rate"] > 0.001,
    ),
    ({"filter": ["method!=lora|halora"]}, lambda p: p.labels["method"] == "noise_lora"),
]


@pytest.mark.parametrize(("form", "qualifies"), CONSTRAINTS)
def test_a_constraint_leaves_the_trials_that_brute_force_leaves(client, store, form, qualifies):
    wanted = [p for p in read_sweep_state(store, "large").points() if qualifies(p)]
    page = _Page(client.get("/sweeps/large", params=form))
    assert 0 < _qualifying(page) == len(wanted) < LARGE
    front = {
        p.number
        for p in wanted
        if not any(
            q.accuracy >= p.accuracy
            and q.energy_uj_per_token <= p.energy_uj_per_token
            and (q.accuracy > p.accuracy or q.energy_uj_per_token < p.energy_uj_per_token)
            for q in wanted
        )
    }
    drawn = [trace for trace in page.figure("front")["data"] if trace.get("marker", {}).get("size") == 11]
    assert {number for trace in drawn for number in trace["customdata"]} == front
    pale = next(trace for trace in page.figure("front")["data"] if trace["name"] == "does not qualify")
    assert not {p.number for p in wanted} & set(pale["customdata"])


def test_a_constraint_that_makes_no_sense_is_told(client):
    page = _Page(client.get("/sweeps/large", params={"accuracy": "much", "filter": "rnk=4"}))
    assert "accuracy: 'much' is not a number" in page.text
    assert _qualifying(page) == 0
    page = _Page(client.get("/sweeps/large", params={"filter": "rnk=4"}))
    assert "no trial has a field 'rnk'; did you mean 'rank'?" in page.text


@pytest.mark.parametrize(
    ("sort", "column"), [("energy_uj_per_token", 2), ("-accuracy", 5), ("number", 1), ("-p_front", 9)]
)
def test_the_pages_of_the_table_hold_every_trial_once_in_order(client, sort, column):
    numbers, values = [], []
    address = f"/sweeps/large?accuracy=0.86&sort={sort}"
    first = _page(client, address)
    pages = int(re.search(r"page 1 of (\d+)", first.text)[1])
    for place in range(1, pages + 1):
        for row in _page(client, f"{address}&page={place}").rows:
            if len(row) == 13 and row[1].isdecimal():
                numbers.append(row[1])
                values.append(float(row[column].split()[0]))
    assert len(numbers) == len(set(numbers)) == _qualifying(first)
    assert values == sorted(values, reverse=sort.startswith("-"))


@pytest.mark.parametrize(
    "query",
    [
        SweepQuery(),
        SweepQuery(accuracy="0.5", energy="3e1", drop="-.1", rank="8", method="lora", model="a/b c&d=é"),
        SweepQuery(filter=("rank=4|8", HOSTILE, "a>=1"), pick=(3, 1, 2), colour="chip", page=7),
        SweepQuery(shown="clean_accuracy", sort="-margin"),
    ],
)
def test_the_address_holds_the_state(query):
    assert SweepQuery.of(QueryParams(query.url().removeprefix("?"))) == query


def test_the_shortlist_is_in_the_address_and_leaves_it_by_its_links(client):
    page = _page(client, "/sweeps/dozen?pick=2&pick=4&pick=99&pick=x&sort=-accuracy")
    assert "Shortlist 2 trials" in page.text
    (left,) = [link for link in page.links if link.endswith("?pick=4&pick=99&sort=-accuracy")]
    assert "Shortlist 1 trial" in _page(client, left).text


def test_a_card_has_what_is_recorded_of_its_trial(client, store):
    point = read_sweep_state(store, "dozen").points()[8]
    page = _page(client, "/sweeps/dozen/trials/8?against=4")
    losses = {trace["name"]: trace for trace in page.figure("loss")["data"]}
    assert losses["loss"]["x"] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert losses["loss"]["y"] == pytest.approx([3 / step for step in range(2, 17, 2)])
    gradients = {trace["name"]: trace for trace in page.figure("gradients")["data"]}
    assert gradients["task"]["y"] == [4.0] * 8
    assert gradients["µ · regulariser"]["y"] == [step / 8 for step in range(2, 17, 2)]
    (bar,) = page.figure("energy")["data"]
    energies = dict(zip(bar["y"], bar["x"], strict=True))
    assert energies["trial 8: total"] == pytest.approx(point.energy_uj_per_token, rel=1e-12)
    assert energies["adc"] == point.metrics["energy_uj_per_token.adc"]
    assert {"a100_int8_peak", "a100_bf16_peak"} <= energies.keys()  # the model's own config.json says how large it is
    layers = {trace["name"]: (trace["x"], trace["y"]) for trace in page.figure("layers")["data"]}
    powers = {i: sum(10 ** ((-30 - i - chip) / 10) for chip in range(3)) / 3 for i in range(len(LAYERS))}
    ratios_db = [round(10 * log10(power), 2) for power in powers.values()]
    assert layers == {"q_proj": ([0, 1], ratios_db[::2]), "up_proj": ([0, 1], ratios_db[1::2])}
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert (facts["halora"], facts.get("commit", "")) == (program()["version"], program()["commit"])
    ring = next(trace for trace in page.figure("noise")["data"] if trace["name"] == "trial 8")
    assert (ring["x"], ring["y"]) == ([point.metrics["noise_db"]], [point.accuracy])
    scores = json.loads((store.sweep("dozen").trial(8) / "result.json").read_text())
    by_chip = np.mean(scores["noisy_correct"], axis=1)
    assert "Accuracy on each chip instance: " + ", ".join(f"{share:.3g}" for share in by_chip) in page.text
    compared = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    other = read_sweep_state(store, "dozen").points()[4]
    assert compared["accuracy"] == [f"{each.accuracy:.4f}".rstrip("0") for each in (point, other)]
    assert compared["training.mu"][1] == "–"  # searched for `halora` only
    assert "there is no other trial 99" in _page(client, "/sweeps/dozen/trials/8?against=99").text


def test_the_card_of_a_failed_trial_ends_with_its_log(client):
    text = _page(client, "/sweeps/dozen/trials/3").text
    assert "RuntimeError: out of memory" in text
    assert f"RuntimeError: {HOSTILE}" in text
    assert text.count("a line") == 40


def test_fronts_are_compared_from_one_reference_point(client, store):
    from halora.analysis.front import front, hypervolume

    page = _page(client, "/compare?sweep=dozen&sweep=large")
    corner = (0.1, 10.0)
    volumes = {row[0]: row[3] for row in page.rows if len(row) == 8}
    for name in ("dozen", "large"):
        points = [p for p in read_sweep_state(store, name).points() if p.state == "finished" and not p.violated]
        assert float(volumes[name]) == pytest.approx(hypervolume(front(points), corner), rel=1e-3)
    methods = {row[0] for row in _page(client, "/compare?sweep=dozen&by=method").rows if len(row) == 8}
    assert methods >= {"lora", "noise_lora", "halora"}


def test_the_chip_explorer_says_what_the_command_line_says(client, halora_json):
    page = _page(client, "/chip?model=qwen2.5-0.5b&preset=halora-2026&bits=6&rows=128&sram=0.1&rank=16&context=64")
    (command,) = re.findall(r"halora energy \S+ .*", page.text)
    answer = halora_json(command.removeprefix("halora ").strip())
    (bar,) = page.figure("energy")["data"]
    total = dict(zip(bar["y"], bar["x"], strict=True))["halora-2026: total"]
    assert total * 64 / 1000 == pytest.approx(answer["total_mj"], rel=1e-12)
    groups = quote("{down: {match: '*.down_proj', adc: {bits: 5}}}")
    page = _page(client, f"/chip?model=qwen2.5-0.5b&layers={groups}&tokens=64")
    (command,) = re.findall(r"halora energy \S+ .*", page.text)
    answer = halora_json(command.removeprefix("halora ").strip())
    assert [group["layers"] for group in answer["groups"]] == ["down", "the others"]
    shown = {row[0]: row for row in page.rows if len(row) == 6}
    for group in answer["groups"]:
        assert float(shown[group["layers"]][3]) == pytest.approx(group["energy_mj"] / 512 * 1000, rel=1e-3)
    assert float(shown["down"][4]) > float(shown["the others"][4]) + 1  # dB
    wrong = _page(client, f"/chip?layers={quote('{down: {match: x, adc: {bitz: 5}}}')}").text
    assert "chip.layers.down.adc.bitz: unknown key" in wrong
    assert "layers is not YAML" in _page(client, "/chip?layers={").text
    assert "the costs 'isaac' cover 4 to 10 bits, got 12" in _page(client, "/chip?bits=12").text
    assert "'x' is not a number" in _page(client, "/chip?rank=x").text
    assert "no chip 'nope'" in _page(client, "/chip?preset=nope").text
    fresh = _page(client, "/chip?preset=isaac&set_for=halora-2026&bits=4&rows=16")  # another preset was chosen
    assert "halora energy llama-3.2-1b --chip isaac --rank 4 --tokens 512\n" in fresh.text


PATHS = [
    "/sweeps/..%2f..%2fetc%2fpasswd",
    "/sweeps/%2e%2e/trials/0",
    "/sweeps/dozen%00/trials/0",
    "/sweeps/dozen/trials/..%2f..%2f0",
    "/sweeps/dozen/trials/-1",
    "/sweeps/dozen/trials/99999999999999999999",
    "/sweeps/no-such",
    "/static/..%2fapp.py",
    "/static/%2e%2e%2f%2e%2e%2fpyproject.toml",
    "/static//etc/passwd",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_there_is_not_found(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "Not available" in answer.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8050", 200),
        ("localhost", 200),
        ("[::1]:8050", 200),
        ("192.0.2.7", 200),
        ("evil.example", 403),
        ("evil.example:8050", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_only_its_own_names_are_answered(client, host, status):
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 403),
        ("null", 403),
        ("http://evil.example", 403),
        ("http://127.0.0.1:9999", 403),
        ("http://127.0.0.1:8050", 405),
    ],
)
def test_another_origin_can_change_nothing(client, origin, status):
    answer = client.post("/sweeps/dozen", headers={"origin": origin} if origin else {})
    assert answer.status_code == status


def test_every_answer_carries_the_policy_and_only_files_are_kept(client):
    for address in ("/", "/sweeps/dozen", "/sweeps/none", "/static/page.js", "/chip"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert ("immutable" in headers["cache-control"]) == address.startswith("/static")


def test_static_files_are_those_that_the_pages_name(client):
    page = _page(client, "/sweeps/dozen")
    named = [link for link in page.links if link.startswith("/static/")]
    assert len(named) == 4
    for link in named:
        assert client.get(link).status_code == 200
        assert re.fullmatch(r"/static/[\w.-]+\?v=[0-9a-f]{12}", link)


def test_looking_changes_nothing_but_the_index(client, store):
    def content():
        return {p: p.read_bytes() for p in sorted(store.root.rglob("*")) if p.is_file() and "index.db" not in p.name}

    before = content()
    for address in ("/", "/sweeps/dozen", "/sweeps/zero", "/sweeps/dozen/trials/3", "/compare?sweep=dozen", "/chip"):
        assert client.get(address).status_code == 200
    assert content() == before


def test_a_page_follows_a_running_sweep(tmp_path, tiny_models, tiny_task):
    store = Store(tmp_path / "store")
    fill(store, tiny_models["llama"], tiny_task, ["zero"])
    folder = store.sweep("zero")
    client = TestClient(create_app(store), base_url="http://127.0.0.1")
    assert 'data-every="30"' in client.get("/sweeps/zero").text  # it may be resumed
    sweep = load_sweep_of(folder)
    with only_driver(folder):
        recorder = SweepRecorder(folder, sweep)
        varied_trial(recorder, sweep, folder.root, 0)
        begin(recorder, sweep, 1)
        recorder.record(Reported(trial=1, step=6, metrics={"train_loss": 1.25}))
        page = client.get("/sweeps/zero")
        (poll,) = re.findall(r'hx-get="([^"]*version=[^"]*)" [^>]*data-every="5"', page.text)
        poll, asked = poll.replace("&amp;", "&"), {"hx-request": "true"}
        assert client.get(poll, headers=asked).status_code == 204
        varied_trial(recorder, sweep, folder.root, 2)
        answer = client.get(poll, headers=asked)
        assert answer.status_code == 200
        assert "hx-push-url" not in answer.headers
        parsed = _Page(answer)
        assert "2 of 4trials finished" in parsed.text
        assert ["1", "6", "1.25"] in [row[:3] for row in parsed.rows]
        assert "html" not in parsed.opened
        recorder.close()
    stopped = client.get(poll, headers=asked)
    assert 'data-every="30"' in stopped.text
    assert "interrupted" in stopped.text


def test_pages_are_sent_again_only_where_there_is_anything_new(tmp_path, tiny_models, tiny_task):
    store = Store(tmp_path / "store")
    fill(store, tiny_models["llama"], tiny_task, ["dozen", "zero"])
    client = TestClient(create_app(store), base_url="http://127.0.0.1")
    asked = {"hx-request": "true"}

    def poll(address):
        (found,) = re.findall(r'hx-get="([^"]*version=[^"]*)"', client.get(address).text)
        return found.replace("&amp;", "&")

    waiting = [poll(address) for address in ("/", "/sweeps/zero", "/sweeps/dozen/trials/9")]
    assert [client.get(address, headers=asked).status_code for address in waiting] == [204] * 3
    certify_made_up(store, "dozen", 9)  # begun: eight chips are scored
    assert [client.get(address, headers=asked).status_code for address in waiting] == [204, 204, 200]
    recorder = SweepRecorder(store.sweep("zero"), load_sweep_of(store.sweep("zero")))
    varied_trial(recorder, load_sweep_of(store.sweep("zero")), store.sweep("zero").root, 0)
    recorder.close()
    assert [client.get(address, headers=asked).status_code for address in waiting[:2]] == [200, 200]
    renewed = client.get(waiting[1], headers=asked).text
    (methods,) = re.findall(r'<label id="by-method"[^>]*hx-swap-oob="true".*?</label>', renewed, re.DOTALL)
    assert re.findall(r'<option value="([^"]+)">', methods) == ["lora"]  # the form learns of what is new
    assert "lora.rank" in re.findall(r'<datalist id="fields">(.*?)</datalist>', renewed, re.DOTALL)[0]


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("pick=4", ["--trial", "4", "--min-accuracy", "0.5"]),
        (
            "pick=4&pick=9&accuracy=0.4&energy=3",
            ["--filter", "trial=4|9", "--min-accuracy", "0.4", "--max-energy", "3"],
        ),
        ("pick=4&drop=0.1", ["--trial", "4", "--min-accuracy", "0.5", "--set", "max_drop=0.1"]),
        ("pick=4&accuracy=%3B+rm", ["--trial", "4", "--min-accuracy", "; rm"]),
    ],
)
def test_the_command_that_certifies_has_the_shortlist_and_the_constraints(client, store, query, options):
    text = html.unescape(client.get(f"/sweeps/dozen?{query}").text)
    (command,) = re.findall(r"halora adapter select dozen .*(?=</pre>)", text)
    assert shlex.split(command)[4:] == [*options, "--store", str(store.root)]


def test_adapters_are_listed_and_looking_for_them_makes_nothing(client, store):
    assert "No adapter is registered yet" in _page(client, "/adapters").text
    assert not store.database_file.exists()


def test_a_simulated_sweep_is_marked_and_offers_no_certificate(tmp_path, tiny_models, tiny_task):
    store = Store(tmp_path / "store")
    fill(store, tiny_models["llama"], tiny_task, ["dozen"])
    store.sweep("dozen").curves_file.write_text("trial,step\n")
    client = TestClient(create_app(store), base_url="http://127.0.0.1")
    page = _page(client, "/sweeps/dozen?pick=4")
    assert "simulated" in page.text
    assert "there is no adapter to deploy" in page.text
    assert "adapter select" not in page.text
    assert "simulated" in _page(client, "/").text


def test_a_fragment_puts_the_state_into_the_address(client):
    asked = {"accuracy": "0.5", "energy": "", "pick": "3", "sort": "energy_uj_per_token"}
    answer = client.get("/sweeps/large", params=asked, headers={"hx-request": "true"})
    assert answer.headers["hx-push-url"] == "/sweeps/large?accuracy=0.5&pick=3"
    plain = client.get("/sweeps/large", params={"accuracy": ""}, headers={"hx-request": "true"})
    assert plain.headers["hx-push-url"] == "/sweeps/large"


def test_the_way_to_mlflow_is_told_where_it_has_no_page_or_does_not_answer(client, store):
    page = _page(client, "/sweeps/dozen/mlflow", 404)
    assert f"mlflow server --app-name halora --backend-store-uri 'sqlite:///{store.root}/mlflow.db'" in page.text
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        away = Store(store.root, f"http://127.0.0.1:{taken.getsockname()[1]}")
        client = TestClient(create_app(away), base_url="http://127.0.0.1")
        assert "cannot be opened" in _page(client, "/sweeps/dozen/trials/0/mlflow", 503).text
        assert _page(client, "/sweeps/dozen")  # all else is there without it


@pytest.fixture
def certified(tmp_path, tiny_models, tiny_task):
    """A store whose sweep has a trial that is certified (4), one that failed (6), one under way (8)."""
    store = Store(tmp_path / "store")
    fill(store, tiny_models["llama"], tiny_task, ["dozen"])
    certify_made_up(store, "dozen", 4, adapter=b"weights")
    certify_made_up(store, "dozen", 6, failures=9, adapter=b"weights")
    certify_made_up(store, "dozen", 8)
    return store


def test_a_card_tells_gates_certificate_and_how_far_it_is(certified):
    client = TestClient(create_app(certified), base_url="http://127.0.0.1")
    passed, failed, begun, none = (_page(client, f"/sweeps/dozen/trials/{number}") for number in (4, 6, 8, 0))
    verdicts = {row[0]: row[3] for row in passed.rows if len(row) == 4 and row[3] in ("pass", "FAIL")}
    assert verdicts.keys() >= {"no_nan", "min_accuracy", "min_chips", "min_yield", "reload_reproduces"}
    assert set(verdicts.values()) == {"pass"}
    assert "certified" in passed.text
    chips, of_the_third = chips_needed(0.9, 0.05 / 2), chips_needed(0.9, 0.05 / 12)
    assert f"{chips} of {chips} chip instances that no search saw did" in passed.text
    assert f"n/a: {HOSTILE}" in passed.text
    assert "halora adapter register dozen/4" in passed.text
    assert "failed its certification" in failed.text
    assert ["min_yield", "FAIL"] in [[row[0], row[3]] for row in failed.rows if len(row) == 4]
    assert f"8 of {of_the_third} chips scored" in begun.text
    assert "begun 3 certifications" in none.text
    assert "halora adapter select dozen --trial 0" in none.text
    for page in (passed, failed, begun, none):
        assert "button" in page.opened
        assert page.text.count("Register") == 0  # this server was not asked to
    shortlist = _page(client, "/sweeps/dozen?pick=4&pick=5")
    reasons = {row[0].split()[1]: row[9] for row in shortlist.rows if row and row[0].startswith("trial ")}
    assert reasons == {"4": "candidate", "5": "violates clean_accuracy by 0.1"}


def test_accuracy_over_time_is_drawn_as_certified_or_said_to_be_unknown(certified, client):
    passed = _page(TestClient(create_app(certified), base_url=OWN), "/sweeps/dozen/trials/4")
    lines = {trace["name"]: (trace["x"], trace["y"]) for trace in passed.figure("time")["data"]}
    times_s = [1, 86400]
    assert lines == {
        "mean over chips": (times_s, [0.5, 0.42]),
        "worst chip": (times_s, [0.375, 0.28]),
        "threshold": (times_s, [0.3, 0.3]),
    }
    said = {
        "dozen": "Over time: the chip's description has no ageing, so nothing changes.",
        "one": "Over time: not measured; a certification does so, at 1 second, 1 day, 1 year, 10 years after",
    }
    for name, text in said.items():
        page = _page(client, f"/sweeps/{name}/trials/0")
        assert "data-time" not in page.data
        assert text in page.text
    assert "ver time" not in _page(client, "/sweeps/dozen/trials/3").text  # it failed


def test_damaged_certifications_are_told(certified):
    (certified.sweep("dozen").selection / "attempt-01" / "attempt.json").write_text("{")
    client = TestClient(create_app(certified), base_url="http://127.0.0.1")
    assert "cannot be read" in _page(client, "/sweeps/dozen/trials/4").text


OWN = "http://127.0.0.1"


@pytest.mark.parametrize(
    ("allowed", "origin", "number", "change", "status", "reason"),
    [
        (False, OWN, 4, {}, 403, "without --allow-register"),
        (True, "http://evil.example", 4, {}, 403, "only this page itself"),
        (True, OWN, 4, {"token": "wrong"}, 403, "another run of this server"),
        (True, OWN, 4, {"token": ""}, 403, "another run of this server"),
        (True, OWN, 4, {"confirm": ""}, 409, "mark the box"),
        (True, OWN, 6, {}, 409, "did not pass: min_yield"),
        (True, OWN, 8, {}, 409, "trial 8 is not certified"),
        (True, OWN, 99, {}, 404, "no trial 99"),
        (True, OWN, 4, {"confirm": "x" * 5000}, 413, "too large"),
    ],
)
def test_registering_is_refused_without_all_that_it_takes(certified, allowed, origin, number, change, status, reason):
    app = create_app(certified, allow_register=allowed)
    client = TestClient(app, base_url=OWN)
    page = client.get("/sweeps/dozen/trials/4")
    tokens = re.findall(r'name="token" value="([^"]+)"', page.text)
    assert bool(tokens) == allowed
    form = {"token": tokens[0] if tokens else "", "confirm": "yes", **change}
    path = f"/sweeps/dozen/trials/{number}/register"
    answer = client.post(path, data=form, headers={"origin": origin})
    assert answer.status_code == status
    assert reason in answer.text
    assert client.get(path).status_code == 405
    assert not (certified.root / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("allowed", "origin", "number", "change", "status", "reason"),
    [
        (False, OWN, 0, {}, 403, "without --allow-certify"),
        (True, "http://evil.example", 0, {}, 403, "only this page itself"),
        (True, OWN, 0, {"token": "wrong"}, 403, "another run of this server"),
        (True, OWN, 0, {"confirm": ""}, 409, "mark the box"),
        (True, OWN, 0, {"min_accuracy": ""}, 409, "say which accuracy a chip needs"),
        (True, OWN, 0, {"min_accuracy": "0.4; rm"}, 409, "is not a number above 0 and up to 1"),
        (True, OWN, 0, {"min_accuracy": "nan"}, 409, "is not a number above 0 and up to 1"),
        (True, OWN, 5, {}, 409, "trial 5 does not qualify: violates clean_accuracy"),
        (True, OWN, 99, {}, 404, "no trial 99"),
    ],
)
def test_certifying_is_refused_without_all_that_it_takes(certified, allowed, origin, number, change, status, reason):
    app = create_app(certified, allow_certify=allowed)
    client = TestClient(app, base_url=OWN)
    tokens = re.findall(r'name="token" value="([^"]+)"', client.get("/sweeps/dozen/trials/0").text)
    assert bool(tokens) == allowed
    form = {"token": tokens[0] if tokens else "", "confirm": "yes", "min_accuracy": "0.3", **change}
    answer = client.post(f"/sweeps/dozen/trials/{number}/certify", data=form, headers={"origin": origin})
    assert answer.status_code == status
    assert reason in html.unescape(answer.text)
    assert app.state.certifier.last is None


def test_a_certification_is_started_followed_and_cancelled_from_its_card(certified):
    """The process is real; it is cancelled before it has scored the made-up adapter."""
    app = create_app(certified, allow_certify=True)
    client, card = TestClient(app, base_url=OWN, follow_redirects=False), "/sweeps/dozen/trials/0"
    (token,) = re.findall(r'name="token" value="([^"]+)"', client.get(card).text)
    form = {"token": token, "confirm": "yes", "min_accuracy": "0.3"}
    started = client.post(f"{card}/certify", data=form, headers={"origin": OWN})
    assert (started.status_code, started.headers["location"]) == (303, f"{card}#gates")
    job = app.state.certifier.last
    assert (job.sweep, job.trial) == ("dozen", 0)
    os.kill(job.process.pid, signal.SIGSTOP)  # it is there as long as it is looked at
    running = _page(client, card)
    assert "Certifying, on this server" in running.text
    other = client.post("/sweeps/dozen/trials/1/certify", data=form, headers={"origin": OWN})
    assert other.status_code == 409
    assert "trial dozen/0 is being certified; wait, or cancel that" in html.unescape(other.text)
    assert "dozen/0 is being certified" in _page(client, "/sweeps/dozen/trials/1").text
    os.kill(job.process.pid, signal.SIGCONT)
    cancelled = client.post(f"{card}/cancel", data={"token": token}, headers={"origin": OWN})
    assert cancelled.status_code == 303
    assert not job.running
    ended = _page(client, card)
    assert f"Certification started here: {job.outcome}" in ended.text
    assert job.outcome in ("cancelled", "ended with an error")
    assert "Certify" in ended.text  # again
