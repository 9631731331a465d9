"""The list of a store's sweeps."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from halora.dashboard.reading import Snapshot, Unreadable
from halora.dashboard.site import Site, is_fragment
from halora.records.delivery import undelivered

_WIDTH, _HEIGHT = 96, 22


def routes(site: Site) -> APIRouter:
    """Its address."""
    router = APIRouter()

    @router.get("/")
    def index(request: Request) -> Response:
        found = site.reader.all()
        waiting = {each.name: undelivered(site.store, each.name) for each in found if isinstance(each, Snapshot)}
        version = _version(found, waiting)
        if request.query_params.get("version") == version:
            return Response(status_code=204)  # htmx leaves the page as it is
        rows = [_row(each, waiting[each.name]) if isinstance(each, Snapshot) else each for each in found]
        template = "sweeps_view" if is_fragment(request) else "sweeps"
        live = any(isinstance(each, Snapshot) and each.running for each in found)
        return site.page(request, template, path="/", rows=rows, live=live, version=version)

    return router


def _version(found: Sequence[Snapshot | Unreadable], waiting: Mapping[str, int]) -> str:
    """Differs once there is anything new to show."""
    shown = [
        (each.name, each.version, waiting[each.name]) if isinstance(each, Snapshot) else (each.name, each.problem)
        for each in found
    ]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def _row(snapshot: Snapshot, waiting: int) -> dict[str, Any]:
    members = snapshot.view.members
    return {
        "name": snapshot.name,
        "snapshot": snapshot,
        "counts": snapshot.counts,
        "best": max((p.accuracy for p in members), default=None),
        "cheapest": min((p.energy_uj_per_token for p in members), default=None),
        "spark": sparkline(snapshot.volumes),
        "undelivered": waiting,
    }


def sparkline(values: list[float], width: int = _WIDTH, height: int = _HEIGHT) -> str:
    """The points of a small line over the values, for an SVG of that size; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    every = max(len(values) // width, 1)
    shown = [*values[::every], values[-1]]
    top = max(shown) or 1.0
    step = (width - 2) / (len(shown) - 1)
    return " ".join(f"{1 + i * step:.1f},{height - 2 - v / top * (height - 4):.1f}" for i, v in enumerate(shown))
