"""`halora adapter`: from a sweep to a certified, registered, exported and verified adapter."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.arguments import FilterOption, overrides_from
from halora.cli.output import (
    ColumnsOption,
    Format,
    FormatOption,
    ServerOption,
    SortOption,
    StoreOption,
    open_store,
    say,
    show_rows,
    talk,
)
from halora.errors import UserError
from halora.records.store import Store

if TYPE_CHECKING:
    from halora.analysis.candidates import Standing
    from halora.records.registry import RegisteredAdapter
    from halora.records.tracking import MlflowClient
    from halora.selection.claims import Certification
    from halora.spaces.gates import Gates
    from halora.spaces.sweep import SweepConfig

app = typer.Typer(help="Adapters: choose, certify, register, export, verify.", no_args_is_help=True)


class Preference(StrEnum):
    """Which candidate comes first."""

    KNEE = "knee"
    ACCURACY = "accuracy"
    ENERGY = "energy"


class ExportFormat(StrEnum):
    """Forms that an adapter is handed over in."""

    BUNDLE = "bundle"
    PEFT = "peft"
    GGUF = "gguf"
    MERGED = "merged"


SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="Name of a launched sweep.")]
AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="NAME@ALIAS or NAME/VERSION, as `halora adapter list` shows them.")
]


@app.command()
def select(
    sweep: SweepArgument,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Accuracy a chip needs, on the test rows.", show_default=False)
    ] = None,
    max_energy: Annotated[float | None, typer.Option(help="Most uJ per token.", show_default=False)] = None,
    yield_: Annotated[
        float | None, typer.Option("--yield", help="Share of chips that has to reach it.", show_default=False)
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of that share.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="GATE=VALUE", help="Any other of the sweep's gates, e.g. max_drop=0.1."),
    ] = None,
    prefer: Annotated[Preference, typer.Option(help="Which candidate is certified first.")] = Preference.KNEE,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Certify this trial and no other.", show_default=False)
    ] = None,
    filter_: FilterOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say who qualifies and what certifying takes; touch nothing.")
    ] = False,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """Certify the preferred candidate of a sweep on chips no search saw, and register it as `candidate`.

    What is not given here is taken from the sweep's `gates`. Exit code 1 if no candidate passes every gate.
    """
    from halora.api.adapter import Choice

    asked = {
        "min_accuracy": min_accuracy,
        "max_energy_uj_per_token": max_energy,
        "min_yield": yield_,
        "confidence": confidence,
    }
    asked = overrides_from(set_, example="max_drop=0.1") | {k: value for k, value in asked.items() if value is not None}
    choice = Choice.of(open_store(store), sweep, asked, trial=trial, conditions=filter_ or ())
    _tell_chips(choice.place, choice.sweep, choice.gates)
    if dry_run:
        show_rows(_standing_rows(choice.standings(prefer.value), form), form, f"candidates of {sweep}")
        return
    found = choice.certify(prefer.value, say)
    if form is Format.TABLE:
        show_rows(_standing_rows(found.standings, form), form, f"candidates of {sweep}")
        for certification in found.certifications:
            _show_certification(certification)
    else:
        show_rows([each.to_json() for each in found.certifications], form)
    if found.registered is None:
        say("no candidate passed every gate" if found.certifications else "no trial qualifies")
        raise typer.Exit(1)
    state = "registered" if found.changed else "registered already, nothing changed"
    say(f"{state}: {found.registered.name}@candidate (version {found.registered.version})")
    say(f"next: halora adapter export {found.registered.name}@candidate FOLDER")


@app.command("list")
def list_(
    columns: ColumnsOption = None,
    sort: SortOption = None,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
) -> None:
    """Registered adapters."""
    from halora.records.registry import registered_adapters

    rows = [_registered_row(each) for each in registered_adapters(_client(store, tracking_uri)[1])]
    if rows or form is not Format.TABLE:
        show_rows(rows, form, columns=columns, sort=sort)
    else:
        talk.print("no adapter is registered yet; `halora adapter select SWEEP` certifies one", markup=False)


@app.command()
def show(
    adapter: AdapterArgument,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
) -> None:
    """A registered adapter: certificate, gates, robustness."""
    from halora.records.registry import find_adapter
    from halora.selection.certification import logged_certification

    _, client = _client(store, tracking_uri)
    found = find_adapter(client, adapter)
    certification = logged_certification(client, found)
    if form is Format.TABLE:
        show_rows([{"name": name, "value": value} for name, value in _registered_row(found).items()], form)
        _show_certification(certification)
    else:
        show_rows([_registered_row(found) | certification.to_json()], form)


@app.command()
def compare(
    one: AdapterArgument,
    other: AdapterArgument,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
) -> None:
    """Two registered adapters side by side: certificate, scores, gates, energy, and the settings they differ in."""
    from halora.records.queries import logged_config
    from halora.records.registry import find_adapter
    from halora.selection.certification import logged_certification

    _, client = _client(store, tracking_uri)
    sides = []
    for reference in (one, other):
        found = find_adapter(client, reference)
        facts = _facts(logged_certification(client, found))
        facts |= _flat(logged_config(client, found.run_id).model_dump(mode="json"))
        sides.append({"trial": f"{found.sweep}/{found.trial}", **facts})
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [{"name": name, one: sides[0].get(name), other: sides[1].get(name)} for name in names]
    show_rows([row for row in rows if row[one] != row[other]], form, "where they differ")


@app.command()
def register(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="SWEEP/NUMBER of a trial that was certified.")],
    store: StoreOption = None,
) -> None:
    """Register a certified trial as `candidate`, for instance after its alias was moved away."""
    from halora.records.tracking import open_client
    from halora.selection.certification import certifications_of
    from halora.selection.selecting import register_certified

    sweep, _, number = trial.rpartition("/")
    place = open_store(store).serving(sweep)
    found = certifications_of(place.existing(sweep)).values()
    own = [each for each in found if str(each.certificate.trial) == number]
    if not own:
        certified = ", ".join(f"{sweep}/{each.certificate.trial}" for each in found) or "none yet"
        raise UserError(
            f"trial '{trial}' is not certified (certified: {certified})", f"certify: halora adapter select {sweep}"
        )
    adapter, changed = register_certified(place, open_client(place), own[-1])
    say(f"{'registered' if changed else 'nothing changed'}: {adapter.name}@candidate (version {adapter.version})")


@app.command()
def promote(adapter: AdapterArgument, store: StoreOption = None, tracking_uri: ServerOption = None) -> None:
    """Move the alias `champion` to an adapter; the version it replaces is kept in a tag."""
    from halora.records.names import CHAMPION
    from halora.records.registry import find_adapter
    from halora.records.registry import promote as promote_adapter

    _, client = _client(store, tracking_uri)
    found = find_adapter(client, adapter)
    if CHAMPION in found.aliases:
        say(f"{found.name}/{found.version} is the champion already")
        return
    before = promote_adapter(client, found)
    replaced = "no champion before it" if before is None else f"it replaces version {before}"
    say(f"{found.name}@champion is version {found.version} now; {replaced}")


@app.command()
def export(
    adapter: AdapterArgument,
    output: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="A new folder, of a bundle on this machine or on a URL; gguf: a file."),
    ],
    format_: Annotated[
        ExportFormat,
        typer.Option("--format", help="bundle; PEFT's two files; a GGUF LoRA for llama.cpp; base and adapter merged."),
    ] = ExportFormat.BUNDLE,
    base: Annotated[
        str | None, typer.Option(help="Its base model, where its trial does not tell.", show_default=False)
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="File of a private Ed25519 key to sign with.", show_default=False),
    ] = None,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
) -> None:
    """Write a registered adapter as a bundle: PEFT files, chip, energy, certificate, model card, checksums.

    In the other formats ADAPTER may be a folder, or SWEEP/NUMBER, as well.
    """
    from halora.api.adapter import Adapter
    from halora.api.store import Store as Surface
    from halora.selection.bundle import FILES

    exported = Adapter(adapter, store=Surface(open_store(store, tracking_uri)))
    remark = exported.export(output, format=format_.value, base=base, sign=sign)
    if format_ is not ExportFormat.BUNDLE:
        say(f"written: '{output}'")
        if remark:
            say(f"warning: {remark}")
        return
    check = f"halora adapter verify {output}{' --key KEY.pub' if sign else ''}"
    say(f"{len(FILES) + 1 + bool(sign)} files in '{output}'; check them anywhere with: {check}")


@app.command()
def verify(
    bundle: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A bundle, as `halora adapter export` writes it, or its URL.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Its base model: a name, hub id or folder.", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Its task, likewise.", show_default=False)] = None,
    chips: Annotated[
        int | None,
        typer.Option(
            min=1, help="Score only the first chips again, and no line of the robustness table.", show_default=False
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="File of the public key that has to have signed it.", show_default=False),
    ] = None,
    timeout: Annotated[int, typer.Option(min=1, metavar="SECONDS", help="Longest that scoring may take.")] = 86_400,
    form: FormatOption = Format.TABLE,
) -> None:
    """Check a bundle's files, claims, base and adapter, and score its certified chips again.

    What nothing in the bundle shows is listed as unverified. Exit code 1 if anything disagrees.
    """
    from halora.selection.bounded import in_child
    from halora.selection.bundle import bundle_at
    from halora.selection.verify import verify as verify_bundle

    with bundle_at(bundle) as folder:
        arguments = {"folder": folder, "base": base, "task": task, "chips": chips, "key": key}
        checks = in_child(verify_bundle, arguments, say, timeout_s=timeout)
    rows = [{"check": check.name, "result": _result(check.passed), "figures": check.text} for check in checks]
    show_rows(rows, form)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


def _client(folder: Path | None, server: str | None) -> "tuple[Store, MlflowClient]":
    from halora.records.tracking import open_client

    place = open_store(folder, server)
    return place, open_client(place)


def _tell_chips(store: Store, sweep: "SweepConfig", gates: "Gates") -> None:
    """Say what certifications in this store took of the error level of the test rows, and what the next takes."""
    from halora.selection.attempts import chips_by_failures, spent_on
    from halora.selection.certificate import error_share
    from halora.selection.certification import splits_of
    from halora.settings.names import as_sum, task_id

    for task in map(as_sum, sweep.values_of("task")):
        spent = spent_on(store, splits_of(task), gates.confidence)
        needed = ", ".join(f"{chips} with {failures}" for failures, chips in chips_by_failures(gates, spent).items())
        error = error_share(gates.confidence, spent.earlier, spent.error)
        begun = f"{spent.earlier} certification{'' if spent.earlier == 1 else 's'}"
        say(
            f"{begun} begun in this store on test rows of {task_id(task)} took "
            f"{spent.error:.3g} of an error level of {1 - gates.confidence:.3g}; the next takes {error:.3g}. A yield "
            f"of {gates.min_yield:g} then takes this many chips with so many failing: {needed}; "
            f"{gates.failures} may fail"
        )


def _standing_rows(standings: Sequence["Standing"], form: Format) -> list[dict[str, Any]]:
    rows = []
    for each in standings:
        row: dict[str, Any] = {"trial": each.point.number, "qualifies": each.qualifies}
        for name in ("accuracy", "energy_uj_per_token"):
            value = each.point.metrics.get(name)
            row[name] = value if value is None else round(value, 4)
        row["why_not"] = "; ".join(each.reasons) if form is not Format.JSON else list(each.reasons)
        rows.append(row)
    return rows


def _show_certification(certification: "Certification") -> None:
    certificate = certification.certificate
    print()
    gates = [
        {
            "gate": gate.name,
            "measured": gate.measured,
            "threshold": f"{gate.comparison} {gate.threshold:g} {gate.unit}".strip(),
            "result": _result(gate.passed),
        }
        for gate in certification.gates
    ]
    show_rows(gates, Format.TABLE, f"gates of trial {certificate.sweep}/{certificate.trial}")
    if certification.robustness:
        print()
        show_rows([_line(line) for line in certification.robustness], Format.TABLE, "robustness")
    print()
    print(certificate.statement())


def _line(line: Any) -> dict[str, Any]:
    if line.reason:
        return {"condition": line.name, "chips": f"n/a: {line.reason}"}
    return {
        "condition": line.name,
        "chips": f"{line.meeting_spec} of {line.chips}",
        "yield_bound": round(line.bound, 3),
        "accuracy": round(line.accuracy, 4),
        "low": round(line.accuracy_low, 4),
        "worst": round(line.accuracy_worst, 4),
    }


def _registered_row(adapter: "RegisteredAdapter") -> dict[str, Any]:
    from halora.records import names

    return {
        "name": adapter.name,
        "version": adapter.version,
        "aliases": " ".join(adapter.aliases),
        "trial": f"{adapter.sweep}/{adapter.trial}",
        "yield_bound": float(adapter.tags[names.YIELD_BOUND]),
        "replaced": adapter.tags.get(names.REPLACED, ""),
    }


def _facts(certification: "Certification") -> dict[str, Any]:
    from halora.hardware.energy import COSTS

    certificate = certification.certificate
    facts: dict[str, Any] = {"certificate": certificate.statement(), "yield_bound": round(certificate.bound, 4)}
    facts |= {name: round(value, 4) for name, value in certification.scores.items()}
    priced = dict[str, Any](certification.energy)
    facts |= {name: round(priced[name], 4) for name in COSTS if name in priced}
    facts |= {f"gate {gate.name}": _result(gate.passed) for gate in certification.gates}
    facts["adapter_sha256"] = certification.adapter_sha256[:12]
    return facts


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted path."""
    if not isinstance(content, dict):
        return {path: content}
    pairs: Iterable[tuple[str, Any]] = content.items()
    return {at: leaf for key, value in pairs for at, leaf in _flat(value, f"{path}.{key}".lstrip(".")).items()}


def _result(passed: bool | None) -> str:
    return "unverified" if passed is None else "pass" if passed else "FAIL"
