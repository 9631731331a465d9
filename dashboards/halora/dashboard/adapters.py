"""Registered adapters: what each is certified for, where it comes from, and how to take it along."""

import shlex
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from halora.dashboard.site import Site


def routes(site: Site) -> APIRouter:
    """Its address."""
    router = APIRouter()

    @router.get("/adapters")
    def adapters(request: Request) -> Response:
        return site.page(request, "adapters", path="/adapters", rows=_rows(site))

    return router


def _rows(site: Site) -> list[dict[str, Any]]:
    """The registry's adapters, those that somebody chose first, then the newest."""
    if not site.store.server and not site.store.database_file.exists():
        return []  # nothing was recorded yet, and looking makes nothing
    from halora.records import names
    from halora.records.registry import registered_adapters
    from halora.records.tracking import open_client

    found = registered_adapters(open_client(site.store))
    here = set(site.store.sweeps())
    rows = []
    for each in sorted(found, key=lambda a: (names.CHAMPION not in a.aliases, not a.aliases, a.name, -a.version)):
        reference = f"{each.name}@{each.aliases[0]}" if each.aliases else f"{each.name}/{each.version}"
        command = ["halora", "adapter", "export", reference, "bundle", "--store", str(site.store.root)]
        rows.append(
            {
                "adapter": each,
                "here": each.sweep in here,
                "yield_bound": float(each.tags[names.YIELD_BOUND]),
                "command": shlex.join(command),
            }
        )
    return rows
