"""What all pages share: the store, its sweeps in memory, and how a template becomes an answer."""

import hashlib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from time import localtime, strftime
from typing import Any
from urllib.parse import quote

import plotly
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from halora.analysis.charts import described
from halora.analysis.formats import duration, number, script_json
from halora.dashboard.certifying import Certifier
from halora.dashboard.reading import SweepReader
from halora.dashboard.security import new_token
from halora.records.store import Store

STATIC = Path(str(files("halora.dashboard") / "static"))
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


@dataclass(frozen=True)
class Site:
    """What the pages are of.

    Attributes:
        store: The store.
        allow_register: Whether adapters can be registered from the pages.
        allow_certify: Whether they can be certified from there, which registers those that pass.
        reader: Its sweeps.
        certifier: What certifies them.
        token: What a form that changes something has to bring along.
    """

    store: Store
    allow_register: bool
    allow_certify: bool = False
    reader: SweepReader = field(init=False)
    certifier: Certifier = field(init=False)
    token: str = field(default_factory=new_token)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reader", SweepReader(self.store))
        object.__setattr__(self, "certifier", Certifier(self.store))

    def page(self, request: Request, template: str, status: int = 200, **content: Any) -> HTMLResponse:
        """A page from a template."""
        shared = {"base": request.scope.get("root_path", ""), "site": self, "versions": _versions(), "path": ""}
        text = _environment().get_template(f"{template}.html.jinja").render(shared | content)
        return HTMLResponse(text.encode("utf-8", "replace"), status)


def is_fragment(request: Request) -> bool:
    """Whether htmx asks for the part of the page that depends on the form."""
    return request.headers.get("hx-request") == "true" and "hx-history-restore-request" not in request.headers


def decibel(value: float | None) -> str:
    """A ratio in dB; `none` for no noise."""
    if value is None or value != value:
        return "–"
    return f"{value:.1f}" if value > -200 else "none"


def moment(time_ms: int) -> str:
    """A time of day on a date; a dash where none is recorded."""
    return strftime("%Y-%m-%d %H:%M", localtime(time_ms / 1000)) if time_ms else "–"


def shortened(text: Any, length: int = 200) -> str:
    """The beginning of a long text."""
    text = str(text)
    return text if len(text) <= length else f"{text[:length]}…"


@cache
def _environment() -> Environment:
    loader = PackageLoader("halora.dashboard")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "db": decibel,
        "duration": duration,
        "moment": moment,
        "described": described,
        "json_script": script_json,
        "short": shortened,
        "segment": lambda text: quote(str(text), safe="", errors="replace"),
    }
    return environment


@cache
def _versions() -> dict[str, str]:
    """A short digest of each static file, for its address."""
    served = {path.name: path for path in STATIC.iterdir()} | {PLOTLY.name: PLOTLY}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in served.items()}
