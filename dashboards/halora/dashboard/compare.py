"""Fronts of several sweeps, or of one sweep's methods and models, from one reference point."""

from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from halora.analysis.charts import fronts_chart
from halora.analysis.front import hypervolume
from halora.analysis.summary import FrontView, narrowed
from halora.dashboard.reading import Snapshot
from halora.dashboard.site import Site

_MOST = 7
_BY = ("sweep", "method", "model", "chip", "task")


@dataclass(frozen=True)
class Compared:
    """One front of a comparison.

    Attributes:
        name: What it is of.
        view: Its trials and their front.
        volume: Its hypervolume from the shared reference point.
    """

    name: str
    view: FrontView
    volume: float


def routes(site: Site) -> APIRouter:
    """Its address."""
    router = APIRouter()

    @router.get("/compare")
    def compare(request: Request) -> HTMLResponse:
        names = list(dict.fromkeys(request.query_params.getlist("sweep")))[:_MOST]
        by = request.query_params.get("by", "sweep")
        by = by if by in _BY else "sweep"
        snapshots = [site.reader.snapshot(name) for name in names]
        reference = common_reference(snapshots)
        rows = compared(snapshots, by, reference)
        chart = fronts_chart({row.name: row.view for row in rows}, reference) if rows else None
        tasks = sorted(
            {str(p.labels["task"]) for s in snapshots for p in s.plain_view.groups.feasible if "task" in p.labels}
        )
        return site.page(
            request,
            "compare",
            path="/compare",
            names=names,
            known=list(reversed(site.store.sweeps())),
            by=by,
            choices=_BY,
            rows=rows,
            reference=reference,
            chart=chart,
            tasks=tasks,
        )

    return router


def common_reference(snapshots: list[Snapshot]) -> tuple[float, float]:
    """Accuracy and energy worse than every sweep's own reference point, or as bad."""
    corners = [snapshot.plain_reference for snapshot in snapshots] or [(0.0, 1.0)]
    return min(accuracy for accuracy, _ in corners), max(energy for _, energy in corners)


def compared(snapshots: list[Snapshot], by: str, reference: tuple[float, float]) -> list[Compared]:
    """The fronts side by side, the largest hypervolume first; of too many groups those with the largest."""
    views: dict[str, FrontView] = {}
    for snapshot in snapshots:
        if by == "sweep":
            views[snapshot.name] = snapshot.plain_view
            continue
        for value in sorted({str(point.labels.get(by, "other")) for point in snapshot.plain_view.groups.feasible}):
            name = value if len(snapshots) == 1 else f"{snapshot.name}: {value}"
            own = [p for p in snapshot.plain_view.groups.feasible if str(p.labels.get(by, "other")) == value]
            views[name] = narrowed(snapshot.plain_view, own)
    rows = [Compared(name, view, hypervolume(view.members, reference)) for name, view in views.items()]
    return sorted(rows, key=lambda row: -row.volume)[:_MOST]
