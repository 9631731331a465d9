"""The card of one trial: what it is, what it takes, how it stands the noise, and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from halora.analysis.charts import Chart, noise_chart
from halora.analysis.trial_charts import beside_chart, gradients_chart, layers_chart, loss_chart, time_chart
from halora.analysis.trials import RecordedTrial
from halora.dashboard.readiness import Readiness, readiness
from halora.dashboard.reading import Snapshot
from halora.dashboard.site import Site
from halora.dashboard.sweep import log_tail
from halora.errors import UserError
from halora.events import Answers, Began, Reported, Scored
from halora.pricing import baseline_energies
from halora.records.event_log import events_of
from halora.records.names import ENERGY, is_score
from halora.selection.robustness import TIMES_S
from halora.settings.trial import TrialConfig

_TAIL_LINES = 60


def routes(site: Site) -> APIRouter:
    """Its addresses."""
    router = APIRouter()

    @router.get("/sweeps/{name}/trials/{number}")
    def trial(request: Request, name: str, number: int) -> Response:
        snapshot = site.reader.snapshot(name)
        point = snapshot.point(number)
        against, problem = _against(request.query_params.get("against", ""), snapshot, point)
        ready = readiness(snapshot, point)
        job = site.certifier.last
        version = f"{snapshot.version}-{ready.attempts}-{ready.scored}-{ready.certification is not None}"
        version += f"-{job.version}" if job else ""
        if request.query_params.get("version") == version:
            return Response(status_code=204)  # htmx leaves the page as it is
        return site.page(
            request,
            "trial",
            version=version,
            job=job,
            snapshot=snapshot,
            point=point,
            card=card(snapshot, point, ready),
            ready=ready,
            against=against,
            problem=problem,
            different=differences(point, against) if against else [],
            members=[each.number for each in snapshot.view.members if each is not point],
        )

    @router.get("/sweeps/{name}/mlflow")
    @router.get("/sweeps/{name}/trials/{number}/mlflow")
    def in_mlflow(request: Request, name: str, number: int | None = None) -> Response:
        """To the run in MLflow's own page."""
        snapshot = site.reader.snapshot(name)
        if number is not None:
            snapshot.point(number)
        return RedirectResponse(mlflow_address(site, name, number), 303)

    return router


@dataclass(frozen=True)
class Card:
    """What a trial's card shows besides the trial.

    Attributes:
        scores: Its scores by name.
        by_chip: Accuracy on each chip instance.
        charts: Charts by name; those without data are left out.
        no_time: Why there is no chart of accuracy over time; empty where there is one, or no score.
        config: Its resolved configuration.
        facts: Where it comes from, by name.
        log: The end of what its worker printed.
        adapter: Folder of its adapter, in the sweep's folder; empty where there is none.
    """

    scores: Mapping[str, float]
    by_chip: list[float]
    charts: Mapping[str, Chart]
    no_time: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    log: str
    adapter: str


def card(snapshot: Snapshot, point: RecordedTrial, ready: Readiness) -> Card:
    """The card of a trial."""
    events = events_of(snapshot.folder.event_log_file, point.number)
    began = next((event for event in events if isinstance(event, Began)), None)
    scored = next((event for event in reversed(events) if isinstance(event, Scored) and event.final), None)
    reports = [(event.step, event.metrics) for event in events if isinstance(event, Reported)]
    trial = snapshot.sweep.resolve(point.params)
    over_time = _over_time(ready)
    charts = {
        **_sweep_charts(snapshot, point, trial),
        "loss": loss_chart(reports),
        "gradients": gradients_chart(reports),
        "layers": layers_chart(scored.layer_noise_db if scored else {}),
        "time": over_time,
    }
    return Card(
        scores={name: value for name, value in point.metrics.items() if is_score(name)},
        by_chip=accuracy_by_chip(point.correct) if point.correct else [],
        charts={name: chart for name, chart in charts.items() if chart["data"]},
        no_time=_why_no_time(trial, ready) if scored and not over_time["data"] else "",
        config=began.config if began else {},
        facts=_facts(began, scored),
        log=log_tail(snapshot, point.number, _TAIL_LINES),
        adapter=scored.adapter if scored else "",
    )


def accuracy_by_chip(correct: Answers) -> list[float]:
    """Accuracy on each chip instance."""
    return [float(share) for share in correct.array.mean(axis=1)]


def differences(one: RecordedTrial, other: RecordedTrial) -> list[tuple[str, Any, Any]]:
    """What two trials differ in: labels, searched values, and scores."""
    rows = []
    for own, others in ((one.labels, other.labels), (one.params, other.params), (one.metrics, other.metrics)):
        for name in sorted({*own, *others}):
            if own.get(name) != others.get(name) and (own is not one.metrics or is_score(name) or name == ENERGY):
                rows.append((name, own.get(name), others.get(name)))
    return rows


def mlflow_address(site: Site, sweep: str, number: int | None) -> str:
    """Address of a run in MLflow's page.

    Raises:
        UserError: It is not known: the records are in a database without a page, or MLflow has no such run.
        UnreachableError: MLflow does not answer.
    """
    from halora.records.queries import parent_run, trial_run
    from halora.records.tracking import open_client

    store = site.store.serving(sweep)
    if not store.tracking_uri.startswith("http"):
        command = f"mlflow server --app-name halora --backend-store-uri '{store.tracking_uri}'"
        raise UserError(f"sweep '{sweep}' is recorded in a database, which has no page of its own", f"run {command}")
    client = open_client(store)
    launch = site.reader.snapshot(sweep).sweep.launch
    run = parent_run(client, sweep, launch) if number is None else trial_run(client, sweep, launch, number)
    return f"{store.tracking_uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _against(text: str, snapshot: Snapshot, point: RecordedTrial) -> tuple[RecordedTrial | None, str]:
    """The second trial that a card asks for, or what is wrong with it."""
    if not text.strip():
        return None, ""
    number = int(text) if text.isdecimal() and len(text) < 9 else -1
    if number not in snapshot.by_number or number == point.number:
        return None, f"there is no other trial {text[:40]}"
    return snapshot.by_number[number], ""


def _over_time(ready: Readiness) -> Chart:
    """Accuracy over the time since programming, as the last certification measured it."""
    found = ready.certification
    measured = [
        (TIMES_S[line.name], line.accuracy, line.accuracy_worst)
        for line in (found.robustness if found else ())
        if line.group == "time" and line.accuracy is not None and line.accuracy_worst is not None
    ]
    return time_chart(sorted(measured), found.certificate.min_accuracy if found else 0.0)


def _why_no_time(trial: TrialConfig, ready: Readiness) -> str:
    """Why nothing is measured of accuracy over time."""
    if not trial.chip.ages:
        return "the chip's description has no ageing, so nothing changes."
    if ready.certification is None:
        return f"not measured; a certification does so, at {', '.join(TIMES_S)} after programming."
    reasons = [line.reason for line in ready.certification.robustness if line.group == "time"]
    return f"not measured: {'; '.join(dict.fromkeys(reasons)) or 'the certification had no robustness chips'}."


def _sweep_charts(snapshot: Snapshot, point: RecordedTrial, trial: TrialConfig) -> Mapping[str, Chart]:
    """The trial beside named baselines and beside the other trials of its sweep."""
    prefix = f"{ENERGY}."
    own = {name.removeprefix(prefix): value for name, value in point.metrics.items() if name.startswith(prefix)}
    shape = snapshot.sweep.shape(str(point.labels.get("model", "")))
    named = baseline_energies(trial, shape) if shape else {}
    groups = snapshot.view.groups
    scored = groups.scored
    strengths = {strength for each in scored for strength in each.accuracy_by_strength}
    field, title = (
        ("noise_strength", "noise strength of the chip (unit of its model)")
        if len(strengths) > 1
        else ("noise_db", "noise to signal of the weights (dB)")
    )
    shown = sorted(scored, key=lambda each: -each.accuracy)[:1000]
    shown += [point] if point in scored and point not in shown else []
    return {
        "energy": beside_chart(own, named, f"trial {point.number}") if own else {"data": []},
        "noise": noise_chart(shown, field, title, marked=[point] if point in scored else []),
    }


def _facts(began: Began | None, scored: Scored | None) -> dict[str, str]:
    facts: dict[str, str] = {}
    if began:
        facts |= {"halora": began.program.get("version", ""), "commit": began.program.get("commit", "")}
        facts |= {"seed": str(began.config.get("seed", "")), "chip hash": began.chip_hash}
    if scored:
        facts |= {"scores": scored.scores_file, "adapter": scored.adapter}
    for dataset in began.datasets if began else ():
        facts[f"{dataset['split']} rows"] = f"{dataset['rows']} of {dataset['name']}, digest {dataset['digest']}"
    return {name: text for name, text in facts.items() if text}
