"""One sweep: choose an adapter by constraints, on the front, in a table and over the searched fields."""

import shlex
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from halora.analysis.charts import Chart, front_charts, hypervolume_chart
from halora.analysis.front import hypervolume
from halora.analysis.summary import FrontView, narrowed
from halora.analysis.trials import RecordedTrial, condition_parts, filtered
from halora.dashboard.parallel_view import ParallelView, parallel_view
from halora.dashboard.query import SweepQuery, page_of, sort_direction
from halora.dashboard.readiness import failed_gates
from halora.dashboard.reading import Snapshot, tail
from halora.dashboard.site import Site, is_fragment
from halora.errors import UserError

_ROWS = 50
_MOST_DRAWN = 2000
_TAIL_LINES = 12
_MOST_FAILURES = 20

COLUMNS: dict[str, str] = {
    "number": "trial",
    "energy_uj_per_token": "µJ per token",
    "latency_us_per_token": "µs per token",
    "area_mm2": "mm²",
    "accuracy": "accuracy",
    "clean_accuracy": "clean",
    "drop": "accuracy drop",
    "margin": "margin (nats)",
    "p_front": "P(front)",
    "noise_db": "weight noise-to-signal (dB)",
}
"""Columns of the tables that can be sorted by, with their headings."""


def routes(site: Site) -> APIRouter:
    """Its addresses."""
    router = APIRouter()

    @router.get("/sweeps/{name}")
    def sweep(request: Request, name: str) -> Response:
        snapshot = site.reader.snapshot(name)
        query = SweepQuery.of(request.query_params)
        if request.query_params.get("version") == snapshot.version:
            return Response(status_code=204)  # htmx leaves the page as it is
        choice = choose(snapshot, query)
        content: dict[str, Any] = {
            "snapshot": snapshot,
            "query": query,
            "choice": choice,
            "columns": COLUMNS,
            "direction": sort_direction,
            "why_not": {point.number: failed_gates(snapshot, point) for point in choice.picked},
            "failures": failures(snapshot),
            "fields": form_fields(snapshot),
            "fragment": is_fragment(request),
            "command": select_command(site, snapshot, query, choice.picked),
            "progress": hypervolume_chart(snapshot.volumes, snapshot.view.objectives)
            if len(snapshot.volumes) > 1
            else None,
        }
        if not is_fragment(request):
            return site.page(request, "sweep", **content)
        answer: HTMLResponse = site.page(request, "sweep_view", **content)
        if "version" not in request.query_params:
            answer.headers["hx-push-url"] = request.url.path + (query.url() if query != SweepQuery() else "")
        return answer

    return router


@dataclass(frozen=True)
class Choice:
    """What a sweep's page shows for a state of its form.

    Attributes:
        problems: What is wrong with the constraints.
        view: Front of the trials that qualify.
        finished: Number of finished trials.
        charts: The front, seen from every side.
        volume: Hypervolume of the front of all trials, and of those that qualify.
        parallel: The searched fields; none where there is nothing to draw.
        rows: Trials of the table's page.
        page: Its number.
        pages: Number of pages.
        picked: The shortlist.
        hidden: Shortlisted trials that the table's page does not have.
    """

    problems: list[str]
    view: FrontView
    finished: int
    charts: list[Chart]
    volume: tuple[float, float]
    parallel: ParallelView | None
    rows: list[RecordedTrial]
    page: int
    pages: int
    picked: list[RecordedTrial]
    hidden: list[int]


def choose(snapshot: Snapshot, query: SweepQuery) -> Choice:
    """What qualifies, and how it is shown."""
    whole = snapshot.clean_view if query.shown == "clean_accuracy" else snapshot.view
    scored = whole.groups.scored
    problems, chosen = list(query.problems), snapshot.points
    if query.conditions:
        try:
            chosen = [] if problems else filtered(snapshot.points, query.conditions)
        except UserError as error:
            problems, chosen = [*problems, *error.problems], []
    view = narrowed(whole, chosen) if query.conditions else whole
    qualified = {point.number for point in view.groups.feasible}
    others = [point for point in whole.groups.feasible if point.number not in qualified]
    picked = [snapshot.by_number[number] for number in query.pick if number in snapshot.by_number]
    drawn = [point for point in picked if all(isfinite(_value(point, each.metric)) for each in view.objectives)]
    ordered = _sorted(view.groups.feasible, query, whole)
    rows, page, pages = page_of(ordered, query.page, _ROWS)
    shown = {point.number for point in rows}
    conditions = [parts for text in query.conditions if (parts := condition_parts(text))]
    charts = front_charts(view, others=others, marked=drawn, by=query.colour, most=_MOST_DRAWN) if scored else []
    return Choice(
        problems=problems,
        view=view,
        finished=snapshot.counts["finished"],
        charts=charts,
        volume=(_volume(whole, snapshot), _volume(view, snapshot)),
        parallel=parallel_view(scored, view, conditions, query.colour),
        rows=list(rows),
        page=page,
        pages=pages,
        picked=picked,
        hidden=[point.number for point in picked if point.number not in shown],
    )


def select_command(site: Site, snapshot: Snapshot, query: SweepQuery, picked: list[RecordedTrial]) -> str:
    """The command that certifies a shortlisted trial under the constraints of the page; empty where none is."""
    if not picked or snapshot.folder.simulated:
        return ""
    options = ["--trial", str(picked[0].number)]
    if len(picked) > 1:
        options = ["--filter", f"trial={'|'.join(str(point.number) for point in picked)}"]
    gates = snapshot.sweep.gates
    if query.accuracy:
        options += ["--min-accuracy", query.accuracy]
    elif not gates.min_accuracy:
        options += ["--min-accuracy", "0.5"]
    options += ["--max-energy", query.energy] if query.energy else []
    options += ["--set", f"max_drop={query.drop}"] if query.drop else []
    return shlex.join(["halora", "adapter", "select", snapshot.name, *options, "--store", str(site.store.root)])


def form_fields(snapshot: Snapshot) -> dict[str, list[str]]:
    """What the constraint form offers: values of labels, and names of fields to filter by."""
    labels = {
        label: sorted({str(point.labels[label]) for point in snapshot.points if label in point.labels})
        for label in ("method", "model", "chip")
    }
    paths = sorted({path for point in snapshot.points for path in point.params})
    metrics = sorted({name for point in snapshot.view.groups.feasible[:50] for name in point.metrics})
    return {**labels, "fields": [*paths, *metrics], "rank": [path for path in paths if path.endswith("rank")]}


def failures(snapshot: Snapshot, most: int = _MOST_FAILURES) -> list[tuple[RecordedTrial, str]]:
    """The last failed trials, each with the end of what its worker printed."""
    failed = sorted(snapshot.view.groups.failed, key=lambda point: -point.ended_ms)[:most]
    return [(point, log_tail(snapshot, point.number, _TAIL_LINES)) for point in failed]


def log_tail(snapshot: Snapshot, number: int, lines: int) -> str:
    """The last lines of the logs of a trial; empty where it left none."""
    tails = []
    for path in snapshot.folder.logs(number):
        if text := tail(path, lines):
            tails.append(f"{path.name}:\n{text}")
    return "\n".join(tails)


def _volume(view: FrontView, snapshot: Snapshot) -> float:
    return hypervolume(view.members, snapshot.reference, view.objectives)


def _value(point: RecordedTrial, column: str) -> float:
    return float(point.metrics.get(column, float("nan")))


def _sorted(points: list[RecordedTrial], query: SweepQuery, whole: FrontView) -> list[RecordedTrial]:
    """Trials in the order asked for; those without a value come last."""
    column, falling = query.sort.removeprefix("-"), query.sort.startswith("-")
    if column not in COLUMNS:
        column = SweepQuery.sort

    def key(point: RecordedTrial) -> tuple[bool, float, int]:
        own = {"number": point.number, "drop": point.drop, "p_front": whole.probability.get(point.number)}
        value = own[column] if column in own else point.metrics.get(column)
        if value is None or not isfinite(value):
            return True, 0.0, point.number
        return False, -value if falling else value, point.number

    return sorted(points, key=key)
