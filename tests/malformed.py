"""Files as they should not be: text, YAML and JSON damaged byte by byte, line by line and value by value.

Everything is drawn by hypothesis, so that a failure is shown by the smallest file that has it.
"""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halora.errors import UserError

CPU_S = 10
"""Seconds of processor time that reading one file may take."""
_MOST_BYTES = 2**30
_LONGEST = 300_000

_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 5e-324, 10**18),
    *("", " ", "x", "x" * 5000, "ü", "模型", "a\x00b", "\x1b[2J", "c++", "a+b", "2*", "*", "1e-3", "nan"),
    *("/", "/dev/zero", "/dev/null", "/proc/self/mem", "~", "..", "a" * 300 + ".yaml", "halora-2026", "lora"),
    *("training.steps // 0", "(" * 300, "9**9"),
    *([], [None], [[]], {}, {"x": []}, {"x": None}, {"preset": None}, {"preset": "ideal", "x": 1}),
    *({"kind": "gaussian"}, {"kind": "measured"}, {"kind": "measured", "table": "/dev/zero"}),
    *({"low": 1, "high": 2}, {"low": 1, "high": 10**18, "kind": "int"}, {"low": 1, "high": 2, "when": {"x": []}}),
    *({"choices": [None]}, {"choices": [1, "a", True]}, {"choices": [1], "when": {"x": []}}),
]
_RAW = [
    *("1e400", "-1e400", ".inf", ".nan", "0x" + "f" * 5000, "9" * 5000, "1:30:00"),
    *("2001-13-45", "2001-01-01", "!!int ''", "!!float x", "!!binary '?'", "!!set {a, b}", "!!timestamp x"),
    *("!!python/object/apply:os.system [x]", "*nowhere", "&a [*a]", "&a {k: *a}"),
    *("{a: 1, a: 2}", "{1: 2}", "{[a]: b}", "{null: 1}", '"\\ud800"', '"\\ud83d\\ude00"'),
    *("[" * 2000, "{a: " * 2000, "'", '"', "|", ">", "%", "@", "`"),
    "[" + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 8)}]" for i in range(9)) + "]",
]
_BYTES = [
    *(b"\xff", b"\x00", b"\xed\xa0\x80", b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x0c"),
    *(b"\t", b"\r", b"\n---\n", b"\n...\n", b"NaN"),
]
_CODINGS = ["latin-1", "utf-16", "utf-32", "cp1252", "utf-8-sig"]
_ENDINGS = ["s", " ", "\x00", ".x", "ü", "x" * 300]
_MARK = "a1b2c3d4e5"


def damaged_bytes(data: st.DataObject, content: bytes) -> bytes:
    """A file with one to three pieces of it changed, or in another coding."""
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        to = min(at + data.draw(st.integers(1, 40)), len(content))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "double", "end", "recode", "line"])):
            case "flip" if at < len(content):
                content = content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
            case "cut":
                content = content[:at]
            case "insert":
                content = content[:at] + data.draw(st.sampled_from(_BYTES)) + content[at:]
            case "drop":
                content = content[:at] + content[to:]
            case "double":
                content = content[:to] + content[at:]
            case "end":
                content += data.draw(st.binary(max_size=20))
            case "recode":
                coding = data.draw(st.sampled_from(_CODINGS))
                content = (content.decode("utf-8", "replace") + "\nü").encode(coding, "replace")
            case "line":
                lines = content.splitlines(keepends=True) or [b""]
                i, j = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
                lines[i] = lines[j]
                content = b"".join(lines)
    return content


def damaged_values(data: st.DataObject, value: Any, dump: Callable[[Any], str], raw: bool = True) -> bytes:
    """A description with one to three of its values replaced, left out, renamed or moved."""
    texts: list[str] = []
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = data.draw(st.sampled_from(places), label="place")
        match data.draw(st.sampled_from(["value", "raw", "drop", "rename", "copy", "wrap"])):
            case "value":
                holder[key] = deepcopy(data.draw(st.sampled_from(_VALUES)))
            case "raw" if raw:
                texts.append(data.draw(st.sampled_from(_RAW)))
                holder[key] = f"{_MARK}{len(texts) - 1}"
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[str(key) + data.draw(st.sampled_from(["s", " ", "\x00", ".x", "ü", "x" * 300]))] = holder.pop(
                    key
                )
            case "copy":
                other, name = data.draw(st.sampled_from(places))
                holder[key] = deepcopy(other[name])
            case "wrap":
                holder[key] = data.draw(st.sampled_from([[holder[key]], {"x": holder[key]}, str(holder[key])]))
    text = dump(value)
    for i, each in enumerate(texts):
        text = text.replace(f'"{_MARK}{i}"', each).replace(f"{_MARK}{i}", each)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def yaml_text(value: Any) -> str:
    """A value as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def attack(read: Callable[[st.DataObject], Any], count: int) -> int:
    """Read so many damaged files; the number of those that were refused.

    Raises:
        Exception: Reading one ended in anything but a value or a `UserError` that can be shown, took more than
            `CPU_S` seconds of processor time, or all of them more than a gibibyte of memory.
    """
    refused = 0

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        nonlocal refused
        with _bounded_time():
            try:
                read(data)
                return
            except UserError as error:
                told = error
        refused += 1
        assert all(told.problems)
        assert len(str(told).encode()) < _LONGEST

    before = _peak_bytes(reset=True)
    one()
    assert _peak_bytes() - before < _MOST_BYTES
    return refused


@contextmanager
def _bounded_time() -> Iterator[None]:
    def over(*_: Any) -> None:
        raise TimeoutError(f"more than {CPU_S} s of processor time")

    earlier = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


def _peak_bytes(*, reset: bool = False) -> int:
    """Most memory that this process had resident, since the last reset where the system can do that."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
