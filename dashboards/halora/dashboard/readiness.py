"""Whether an adapter may be deployed: gates, certificates, and the one action that changes anything, registering it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from halora.analysis.candidates import Standing, standings
from halora.analysis.gates import Gate
from halora.analysis.trials import RecordedTrial
from halora.dashboard.reading import Snapshot
from halora.dashboard.security import is_token
from halora.dashboard.site import Site
from halora.errors import UserError
from halora.selection.attempts import Attempt, attempts_of
from halora.selection.certification import certifications_of
from halora.selection.claims import Certification

_LARGEST_FORM = 4096  # bytes


@dataclass(frozen=True)
class Readiness:
    """How far an adapter is on its way to deployment.

    Attributes:
        standing: What the search can say of it.
        certification: Its last finished certification; none before there is one.
        attempt: Its certification that is under way; none where there is none.
        scored: Chips of that attempt that are scored.
        attempts: Certifications that the sweep has begun.
        problem: Why what is kept of certifications cannot be read; empty otherwise.
    """

    standing: Standing
    certification: Certification | None
    attempt: Attempt | None
    scored: int
    attempts: int
    problem: str = ""

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates of its certification, or those that the search can say."""
        return self.certification.gates if self.certification else self.standing.gates


def readiness(snapshot: Snapshot, point: RecordedTrial) -> Readiness:
    """How a trial's adapter stands."""
    (standing,) = standings([point], snapshot.sweep.gates, objectives=snapshot.view.objectives)
    try:
        finished = certifications_of(snapshot.folder)
    except UserError as error:
        return Readiness(standing, None, None, 0, 0, str(error))
    attempts = attempts_of(snapshot.folder)
    own = [attempt for attempt in attempts if attempt.trial == point.number]
    certified = [finished[attempt.number] for attempt in own if attempt.number in finished]
    under_way = next((attempt for attempt in own if attempt.number not in finished), None)
    scored = _scored(snapshot, under_way) if under_way else 0
    return Readiness(standing, certified[-1] if certified else None, under_way, scored, len(attempts))


def failed_gates(snapshot: Snapshot, point: RecordedTrial) -> tuple[str, ...]:
    """Why a trial is not a candidate, by the sweep's gates; none for a candidate."""
    if snapshot.folder.simulated:
        return ("it is simulated: there is no adapter",)
    return standings([point], snapshot.sweep.gates, objectives=snapshot.view.objectives)[0].reasons


def routes(site: Site) -> APIRouter:
    """The addresses that register, certify, and end a certification."""
    router = APIRouter()

    @router.post("/sweeps/{name}/trials/{number}/register")
    async def register(request: Request, name: str, number: int) -> Response:
        form = await _form(request)
        return await run_in_threadpool(_register, site, request, name, number, form)

    @router.post("/sweeps/{name}/trials/{number}/certify")
    async def certify(request: Request, name: str, number: int) -> Response:
        form = await _form(request)
        return await run_in_threadpool(_certify, site, request, name, number, form)

    @router.post("/sweeps/{name}/trials/{number}/cancel")
    async def cancel(request: Request, name: str, number: int) -> Response:
        _check(site, await _form(request), allowed=site.allow_certify, option="--allow-certify")
        await run_in_threadpool(site.certifier.cancel)
        return _back(request, name, number)

    return router


def _check(site: Site, form: Mapping[str, str], *, allowed: bool, option: str) -> None:
    if not allowed:
        raise HTTPException(403, f"this server was started without {option}")
    if not is_token(form.get("token", ""), site.token):
        raise HTTPException(403, "the form is from another run of this server: load the page again")


def _back(request: Request, name: str, number: int) -> Response:
    """To the trial's card."""
    address = f"{request.scope.get('root_path', '')}/sweeps/{quote(name, safe='')}/trials/{number}#gates"
    return RedirectResponse(address, 303)


def _certify(site: Site, request: Request, name: str, number: int, form: Mapping[str, str]) -> Response:
    _check(site, form, allowed=site.allow_certify, option="--allow-certify")
    snapshot = site.reader.snapshot(name)
    point = snapshot.point(number)
    least = form.get("min_accuracy", "").strip()
    problems = [f"trial {number} does not qualify: {reason}" for reason in failed_gates(snapshot, point)]
    try:
        asked = float(least) if least else None
        if asked is not None and not 0 < asked <= 1:
            raise ValueError
    except ValueError:
        asked = None
        problems.append(f"accuracy that a chip needs: '{least[:40]}' is not a number above 0 and up to 1")
    if asked is None and not problems and not snapshot.sweep.gates.min_accuracy:
        problems.append("say which accuracy a chip needs: the sweep asks for none")
    if form.get("confirm") != "yes":
        problems.append("mark the box beside the button: a certification uses up a part of the error level")
    try:
        if not problems:
            site.certifier.start(name, number, asked)
    except UserError as error:
        problems += error.problems
    if problems:
        told = {"snapshot": snapshot, "point": point, "problems": problems, "adapter": None, "what": "certified"}
        return site.page(request, "registered", 409, **told)
    return _back(request, name, number)


def _register(site: Site, request: Request, name: str, number: int, form: Mapping[str, str]) -> Response:
    from halora.records.tracking import open_client
    from halora.selection.selecting import register_certified

    _check(site, form, allowed=site.allow_register, option="--allow-register")
    snapshot = site.reader.snapshot(name)
    point = snapshot.point(number)
    found = readiness(snapshot, point)
    problems: list[str] = []
    if found.certification is None:
        problems.append(f"trial {number} is not certified")
    elif not found.certification.passed:
        problems += [f"it did not pass: {gate}" for gate in found.gates if not gate.passed]
    if form.get("confirm") != "yes":
        problems.append("mark the box beside the button: registering moves the alias `candidate`")
    if found.certification is None or problems:
        return site.page(request, "registered", 409, snapshot=snapshot, point=point, problems=problems, adapter=None)
    store = site.store.serving(name)
    try:
        adapter, changed = register_certified(store, open_client(store), found.certification)
    except UserError as error:
        return site.page(
            request, "registered", 409, snapshot=snapshot, point=point, problems=error.problems, adapter=None
        )
    return site.page(
        request, "registered", snapshot=snapshot, point=point, problems=[], adapter=adapter, changed=changed
    )


async def _form(request: Request) -> dict[str, str]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_FORM:
            raise HTTPException(413, "the form is too large")
    fields: dict[str, list[str]] = parse_qs(body.decode("utf-8", "replace"), max_num_fields=16)
    return {name: values[-1] for name, values in fields.items()}


def _scored(snapshot: Snapshot, attempt: Attempt) -> int:
    """Chips of an attempt that are scored, by the files it keeps."""
    scored = 0
    for file in attempt.folder(snapshot.folder).glob("chips-*.json"):
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            scored += len(content["chip_seeds"])
        except (OSError, ValueError, KeyError):  # being written
            continue
    return scored
