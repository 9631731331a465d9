"""Oracles: headless Chromium (its console, its requests, what it lays out), axe-core; brute force over the trials.

$HALORA_SCREENSHOTS names a folder that keeps the pictures.
"""

import base64
import contextlib
import json
import os
import socket
import threading
from pathlib import Path

import pytest
import uvicorn
from page_stores import STORIES, certify_made_up, fill, varied_trial
from recorded_sweeps import begin, finish, made_up_sweep
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from services import axe_core, chrome

from halora.analysis.parallel import parallel_axes
from halora.analysis.summary import view_front
from halora.analysis.trials import DEFAULT_OBJECTIVES, grouped
from halora.dashboard.app import create_app
from halora.records.exporter import recording
from halora.records.index import read_sweep_state
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.records.tracking import open_client
from halora.sweep.run.state import load_sweep_of, only_driver

WIDE, NARROW = 1100, 390
WHITE, BLACK = "rgb(255, 255, 255)", "rgb(0, 0, 0)"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_models, tiny_task):
    found = Store(tmp_path_factory.mktemp("page") / "store")
    fill(found, tiny_models["llama"], tiny_task)
    return found


@contextlib.contextmanager
def serving(store, **options):
    """A server of the page on a free loopback port; its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # a browser may come before the server has begun
    server = uvicorn.Server(uvicorn.Config(create_app(store, **options), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address(store):
    with serving(store) as address:
        yield address


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with chrome(tmp_path_factory.mktemp("chrome")) as browser:
        yield browser


@pytest.fixture
def browser(shared, address):
    """The browser, wide and light; after the test its console is silent and all requests went to the server."""
    _look(shared, WIDE, "light")
    shared.get("about:blank")
    _requests(shared), shared.get_log("browser")
    yield shared
    assert [entry["message"] for entry in shared.get_log("browser")] == []
    assert _foreign(shared, address) == []


def _look(browser, width, scheme, height=900):
    scheme = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _requests(browser):
    told = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in told if event["method"] == "Network.requestWillBeSent"]


def _foreign(browser, address):
    """Requests that did not go to the server."""
    return [url for url in _requests(browser) if not url.startswith((address, "data:", "about:", "blob:"))]


def _until(browser, condition):
    """Wait until it is met, by a page that is changing."""
    passing = [StaleElementReferenceException, NoSuchElementException]
    WebDriverWait(browser, 30, 0.1, ignored_exceptions=passing).until(condition)


def _ready(browser, times=1):
    """Wait until the figures were drawn, since the page was opened, so many times."""
    _until(
        browser, lambda b: int(b.execute_script("return document.body && document.body.dataset.ready || '0'")) >= times
    )


def _open(browser, url):
    browser.get(url)
    _ready(browser)


def _draws(browser):
    return int(browser.execute_script("return document.body.dataset.ready"))


@contextlib.contextmanager
def _hurried(browser):
    """Pages opened inside wait a tenth of the time for what is due in a second or later."""
    source = "const real = window.setTimeout;"
    source += "window.setTimeout = (does, ms, ...more) => real(does, ms < 1000 ? ms : ms / 10, ...more);"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    yield
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@contextlib.contextmanager
def _redrawn(browser):
    """What is done inside changes the page in place."""
    before = _draws(browser)
    yield
    _ready(browser, before + 1)


def _follow(browser, element, part):
    """Click what leads to another page, whose address has this part."""
    assert part not in browser.current_url
    element.click()
    _until(browser, lambda b: part in b.current_url)


def _wait_for_width(browser, width):
    """Wait until the figures have come to the width of the window."""
    widest = "return Math.max(0, ...[...document.querySelectorAll('.chart svg')].map((each) => each.clientWidth))"
    _until(browser, lambda b: b.execute_script(widest) < width)


def _picture(browser, width):
    """The whole page, at most 5000 pixels of it."""
    height = min(browser.execute_script("return document.documentElement.scrollHeight"), 5000)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    asked = {"captureBeyondViewport": True, "clip": clip}
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])


def _text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def _picked(browser):
    rows = browser.find_elements(By.CSS_SELECTOR, "#shortlist + .scroll tbody th a")
    return {int(row.text.removeprefix("trial ")) for row in rows}


def _pixel(browser, x, y):
    """Where a point of the front is, from the upper left corner of the figure's plane."""
    return browser.execute_script(
        "const {xaxis, yaxis} = document.getElementById('chart-front')._fullLayout;"
        "return [xaxis.d2p(arguments[0]), yaxis.d2p(arguments[1])]",
        x,
        y,
    )


def _in_plane(browser, places, hold=False):
    """Click at a place of the front's plane, or drag from the first to the second."""
    plane = browser.find_element(By.CSS_SELECTOR, "#chart-front .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plane)
    box = plane.rect
    at = [(round(x - box["width"] / 2), round(y - box["height"] / 2)) for x, y in places]
    actions = ActionChains(browser, duration=30).move_to_element_with_offset(plane, *at[0])
    if hold:
        actions.click_and_hold().move_to_element_with_offset(plane, *at[1]).release()
    else:
        actions.pause(0.3).click()  # Plotly takes a click where it shows the point's text
    actions.perform()


VIEWS = {
    "list": "/",
    **{name: f"/sweeps/{name}" for name in STORIES},
    "picked": "/sweeps/dozen?pick=2&pick=4&filter=bits%3E%3D7",
    "card": "/sweeps/dozen/trials/8?against=4",
    "failed-card": "/sweeps/dozen/trials/3",
    "hostile-card": "/sweeps/hostile/trials/0",
    "compare": "/compare?sweep=dozen&sweep=large",
    "chip": "/chip",
    "adapters": "/adapters",
    "error": "/sweeps/none",
}
LAYOUT = """
const root = document.documentElement;
const beyond = (rect, box) => rect.left < box.left - 1 || rect.right > box.right + 1
  || rect.top < box.top - 1 || rect.bottom > box.bottom + 1;
const over = (one, other) => Math.min(one.right, other.right) - Math.max(one.left, other.left) > 2
  && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 2;
const found = [...document.querySelectorAll('main > *, #view > *, .columns > *, .chart')]
  .filter((each) => each.getBoundingClientRect().right > root.clientWidth + 1)
  .map((each) => 'too wide: ' + each.outerHTML.slice(0, 80));
for (const chart of document.querySelectorAll('.chart')) {
  const box = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll('svg text')].map((text) => [text.textContent, text.getBoundingClientRect()])
    .filter(([text, rect]) => text.trim() && rect.width);
  texts.forEach(([text, rect], i) => {
    if (beyond(rect, box)) found.push(`cut: ${text} in ${chart.id}`);
    texts.slice(i + 1).filter(([, its]) => over(rect, its))
      .forEach(([other]) => found.push(`${text} over ${other} in ${chart.id}`));
  });
}
if (root.scrollWidth > root.clientWidth) found.push(`the page is ${root.scrollWidth} wide`);
return found;
"""
"""What overlaps, is cut or is wider than the window."""


@pytest.fixture(scope="module", params=VIEWS)
def opened(request, shared, address):
    """A view, opened once, wide and light; its name."""
    _look(shared, WIDE, "light")
    shared.get("about:blank")
    _requests(shared), shared.get_log("browser")
    _open(shared, address + VIEWS[request.param])
    return request.param


def test_every_view_fits_wide_and_light_as_well_as_narrow_and_dark(shared, address, opened, tmp_path):
    folder = Path(os.environ.get("HALORA_SCREENSHOTS", tmp_path))
    folder.mkdir(exist_ok=True)
    grounds = []
    for scheme, width in (("light", WIDE), ("dark", NARROW)):
        if scheme == "dark":
            with _redrawn(shared):
                _look(shared, width, scheme)
            _wait_for_width(shared, width)
        found = shared.execute_script(LAYOUT)
        grounds.append(shared.execute_script("return getComputedStyle(document.documentElement).backgroundColor"))
        if "HALORA_SCREENSHOTS" in os.environ:
            (folder / f"{opened}-{scheme}-{width}.png").write_bytes(_picture(shared, width))
        assert found == []
    assert grounds[0] == WHITE != grounds[1]
    assert shared.title.endswith("HaLoRA Sweep")
    told = [entry["message"] for entry in shared.get_log("browser")]
    assert opened == "error" or told == []
    assert _foreign(shared, address) == []


def test_axe_finds_no_serious_violation(shared, opened):
    code = axe_core()
    shared.execute_cdp_cmd("Runtime.evaluate", {"expression": code})
    asked = "{exclude: ['.chart svg']}, {resultTypes: ['violations']}"  # what Plotly draws has thousands of nodes
    found = shared.execute_async_script(f"axe.run({asked}).then(arguments[0])")
    serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"]) for each in serious] == []
    assert len(found["passes"]) > 5


def test_figures_keep_their_height_as_the_window_changes(browser, address):
    _open(browser, f"{address}/sweeps/dozen/trials/8")
    sizes = "const both = (chart) => [chart.clientHeight, chart.querySelector('svg').clientHeight];"
    sizes += "return [...document.querySelectorAll('.chart')].map(both)"
    before = browser.execute_script(sizes)
    _look(browser, NARROW, "light")
    _wait_for_width(browser, NARROW)
    assert browser.execute_script(sizes) == before
    assert all(own == drawn > 200 for own, drawn in before)


def test_a_click_on_the_front_leads_to_the_shortlist_and_the_card(browser, address, store):
    _open(browser, f"{address}/sweeps/dozen")
    point = max(
        (p for p in read_sweep_state(store, "dozen").points() if p.state == "finished"), key=lambda p: p.accuracy
    )
    with _redrawn(browser):
        _in_plane(browser, [_pixel(browser, point.energy_uj_per_token, point.accuracy)])
    assert _picked(browser) == {point.number}
    assert browser.current_url == f"{address}/sweeps/dozen?pick={point.number}"
    _open(browser, browser.current_url)  # a shared link
    assert _picked(browser) == {point.number}
    with _redrawn(browser):  # again: not any more
        _in_plane(browser, [_pixel(browser, point.energy_uj_per_token, point.accuracy)])
    assert _picked(browser) == set()
    browser.back()
    _until(browser, lambda b: _picked(b) == {point.number})
    card = browser.find_element(By.CSS_SELECTOR, "#shortlist + .scroll tbody th a")
    _follow(browser, card, "/trials/")
    assert browser.current_url == f"{address}/sweeps/dozen/trials/{point.number}"
    assert _text(browser, "h1").startswith(f"Trial {point.number}")


def test_a_box_on_the_front_shortlists_what_is_in_it(browser, address, store):
    _open(browser, f"{address}/sweeps/dozen")
    points = [p for p in read_sweep_state(store, "dozen").points() if p.state == "finished"]
    places = {p.number: _pixel(browser, p.energy_uj_per_token, p.accuracy) for p in points}
    plane = browser.find_element(By.CSS_SELECTOR, "#chart-front .nsewdrag").rect
    corner = (plane["width"] * 0.45, plane["height"] - 3)
    with _redrawn(browser):
        _in_plane(browser, [(2, 2), corner], hold=True)
    inside = {number for number, (x, _) in places.items() if x < corner[0]}
    assert 1 < len(inside) < len(points)
    assert _picked(browser) == inside


def test_the_form_answers_while_it_is_typed_in_and_the_address_follows(browser, address, store):
    _open(browser, f"{address}/sweeps/dozen")
    field = browser.find_element(By.NAME, "accuracy")
    field.send_keys("0.45")
    wanted = [p for p in grouped(read_sweep_state(store, "dozen").points()).feasible if p.accuracy >= 0.45]
    _until(browser, lambda b: b.current_url == f"{address}/sweeps/dozen?accuracy=0.45")
    _until(browser, lambda b: int(_text(b, "#qualifying")) == len(wanted))
    assert browser.switch_to.active_element == field
    further = browser.find_element(By.CSS_SELECTOR, "input[list]")
    further.send_keys("rank=4|8", Keys.ENTER)
    left = [p for p in wanted if p.params["lora.rank"] in (4, 8)]
    assert 0 < len(left) < len(wanted)
    _until(browser, lambda b: int(_text(b, "#qualifying")) == len(left))
    _open(browser, browser.current_url)
    assert browser.find_element(By.NAME, "accuracy").get_attribute("value") == "0.45"
    assert _text(browser, ".chips bdi") == "rank=4|8"


def test_the_keyboard_alone_shortlists(browser, address):
    _open(browser, f"{address}/sweeps/dozen")
    first = browser.find_element(By.CSS_SELECTOR, "td input[name=pick]")
    for _ in range(60):
        if browser.switch_to.active_element == first:
            break
        ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element == first
    outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", first)
    assert outline == "solid"
    number = int(first.get_attribute("value"))
    with _redrawn(browser):
        ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert _picked(browser) == {number}


def test_paper_is_white_without_forms_whatever_the_screen(browser, address):
    _look(browser, WIDE, "dark")
    _open(browser, f"{address}/sweeps/dozen")
    ink = "return getComputedStyle(document.querySelector('.xtitle')).fill"
    assert browser.execute_script(ink) != BLACK
    with _redrawn(browser):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script(ink) == BLACK
        shown = ("#constraints", "nav", ".modebar", "#trials + .scroll td", "#chart-front")
        places = [browser.find_element(By.CSS_SELECTOR, selector).is_displayed() for selector in shown]
        assert places == [False, False, False, True, True]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_brush_on_an_axis_filters_every_view(browser, address, store):
    _open(browser, f"{address}/sweeps/dozen")
    groups = grouped(read_sweep_state(store, "dozen").points())
    points = groups.feasible
    axis = next(
        a
        for a in parallel_axes([*points, *groups.violating], DEFAULT_OBJECTIVES)
        if a.field == "training.learning_rate"
    )
    grabs = browser.find_elements(By.CSS_SELECTOR, "[data-axis]")
    (grab,) = [each for each in grabs if json.loads(each.get_attribute("data-axis"))["field"] == axis.field]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", grab)
    height = grab.rect["height"]
    with _redrawn(browser):
        moves = ActionChains(browser, duration=30).move_to_element_with_offset(grab, 0, round(-height * 0.3))
        moves.click_and_hold().move_by_offset(0, round(height * 0.4)).release().perform()
    chips = [chip.text for chip in browser.find_elements(By.CSS_SELECTOR, ".chips bdi")]
    low, high = (float(chip.split(sign)[1]) for chip, sign in zip(chips, (">=", "<="), strict=True))
    places = axis.place(low), axis.place(high)
    assert places == pytest.approx((0.4 - 0.03, 0.8 + 0.06), abs=0.08)  # the hit area reaches a little past the axis
    inside = [p for p in points if low <= p.params[axis.field] <= high]
    assert int(_text(browser, "#qualifying")) == len(inside)
    pale = browser.execute_script(
        "return document.getElementById('chart-front').data.find((trace) => trace.name == 'does not qualify').x.length"
    )
    assert 0 < len(inside) < len(points)
    assert pale == len(points) - len(inside)
    assert browser.find_elements(By.CSS_SELECTOR, "svg.coordinates rect.brush")
    (grab,) = [
        each
        for each in browser.find_elements(By.CSS_SELECTOR, "[data-axis]")
        if json.loads(each.get_attribute("data-axis"))["field"] == axis.field
    ]
    with _redrawn(browser):
        ActionChains(browser, duration=30).click(grab).perform()
    assert not browser.find_elements(By.CSS_SELECTOR, ".chips bdi")
    assert int(_text(browser, "#qualifying")) == len(points)


def test_every_point_of_the_front_shortlists_itself_among_near_ties(browser, address, store):
    """Two thousand trials, dominated ones a pixel beside the front's."""
    view = view_front(read_sweep_state(store, "large").points())
    _open(browser, f"{address}/sweeps/large")
    clicked = set()
    for member in view.members:
        with _redrawn(browser):
            _in_plane(browser, [_pixel(browser, member.energy_uj_per_token, member.accuracy)])
        clicked.add(member.number)
        assert _picked(browser) == clicked


def test_a_running_sweep_renews_itself_and_keeps_the_zoom(browser, address, store):
    folder = store.sweep("zero")
    sweep = load_sweep_of(folder)
    with _hurried(browser), only_driver(folder):
        recorder = SweepRecorder(folder, sweep)
        for number in range(2):
            varied_trial(recorder, sweep, folder.root, number)
        _open(browser, f"{address}/sweeps/zero")
        assert _text(browser, "#qualifying") == "2"
        browser.execute_script("Plotly.relayout('chart-front', {'yaxis.range': [0.1, 0.9]})")
        with _redrawn(browser):
            varied_trial(recorder, sweep, folder.root, 2)
            begin(recorder, sweep, 3)
        _until(browser, lambda b: _text(b, "#qualifying") == "3")
        kept = browser.execute_script("return document.getElementById('chart-front')._fullLayout.yaxis.range")
        assert kept == [0.1, 0.9]
        assert len([url for url in _requests(browser) if url.endswith("/sweeps/zero")]) == 1
        recorder.close()
    _until(browser, lambda b: b.find_element(By.ID, "poll").get_attribute("data-every") == "30")  # it has ended


def test_the_chip_s_sliders_answer_at_once(browser, address):
    _open(browser, f"{address}/chip")
    before = float(_text(browser, ".big"))
    browser.find_element(By.NAME, "bits").send_keys(Keys.ARROW_LEFT)
    _until(browser, lambda b: "bits=7" in b.current_url and float(_text(b, ".big")) < before)
    browser.find_element(By.NAME, "preset").send_keys("isaac")
    _until(browser, lambda b: "--chip isaac --rank 4 --tokens 512" in _text(b, "pre.command"))


def test_forms_and_tables_work_without_javascript(browser, address, store):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"{address}/sweeps/dozen")
        browser.find_element(By.NAME, "accuracy").send_keys("0.4")
        browser.find_element(By.CSS_SELECTOR, "td input[name=pick]").click()
        _follow(browser, browser.find_element(By.CSS_SELECTOR, "form button"), "accuracy=0.4")
        points = [p for p in read_sweep_state(store, "dozen").points() if p.state == "finished" and not p.violated]
        assert int(_text(browser, "#qualifying")) == len([p for p in points if p.accuracy >= 0.4])
        assert len(_picked(browser)) == 1
        browser.get(f"{address}/")
        for box in browser.find_elements(By.NAME, "sweep")[:2]:
            box.click()
        _follow(browser, browser.find_element(By.CSS_SELECTOR, "form button"), "/compare?")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_an_adapter_is_picked_and_registered(browser, tmp_path, tiny_models, tiny_task):
    """From the front over shortlist and card to the alias in MLflow's registry."""
    store = Store(tmp_path / "store")
    sweep = made_up_sweep(store, "whole", tiny_models["llama"], tiny_task, trials=3, gates={"min_accuracy": 0.3})
    folder = store.sweep("whole")
    with recording(store, sweep, print) as recorder:
        for number in range(3):
            begin(recorder, sweep, number, lora__rank=2 ** (number + 1))
            finish(recorder, folder.root, number, 0.4 + number / 10)
        recorder.finish(interrupted=False)
    adapter = (folder.trial(1) / "adapter" / "adapter_model.safetensors").read_bytes()
    certify_made_up(store, "whole", 1, adapter=adapter)
    client = open_client(store)
    assert client.search_registered_models() == []
    with serving(store, allow_register=True) as address:
        _open(browser, f"{address}/sweeps/whole")
        point = read_sweep_state(store, "whole").point(1)
        with _redrawn(browser):
            _in_plane(browser, [_pixel(browser, point.energy_uj_per_token, point.accuracy)])
        _follow(browser, browser.find_element(By.CSS_SELECTOR, "#shortlist + .scroll tbody th a"), "/trials/1")
        assert "certified" in _text(browser, "#gates")
        browser.find_element(By.CSS_SELECTOR, "form[method=post] button").click()
        assert browser.current_url.endswith("/trials/1")  # the box beside it is not marked
        browser.find_element(By.NAME, "confirm").click()
        _follow(browser, browser.find_element(By.CSS_SELECTOR, "form[method=post] button"), "/register")
        name, _, alias = _text(browser, "#registered").partition("@")
        assert alias == "candidate"
        _open(browser, f"{address}/adapters")
        assert _text(browser, "tbody th") == name
        assert f"halora adapter export {name}@candidate bundle" in _text(browser, "tbody pre")
        _follow(browser, browser.find_element(By.CSS_SELECTOR, "tbody a"), "/sweeps/whole/trials/1")
        assert _foreign(browser, address) == []
        browser.get("about:blank")
    version = client.get_model_version_by_alias(name, "candidate")
    assert version.tags["halora.trial"] == "1"
    assert version.tags["halora.gate.min_yield"].startswith("min_yield ")
    assert "chip instances that no search saw did" in version.description
