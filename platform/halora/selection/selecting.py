"""From a sweep to its registered candidate: the preferred of those that qualify is certified, then the next."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halora.analysis.candidates import Preference, Standing, standings
from halora.analysis.trials import RecordedTrial, sweep_objectives
from halora.errors import UserError
from halora.files import locked
from halora.records import names
from halora.records.store import Store
from halora.selection.attempts import only_selection
from halora.selection.certification import certify
from halora.selection.claims import Certification
from halora.spaces.gates import Gates
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.launched import base_and_task
from halora.sweep.run.state import load_sweep_of

if TYPE_CHECKING:
    from halora.records.registry import RegisteredAdapter
    from halora.records.tracking import MlflowClient


@dataclass(frozen=True)
class Selection:
    """How a selection ended.

    Attributes:
        standings: All trials, candidates first in the order they are preferred.
        certifications: Those of the candidates that were certified, in that order.
        registered: The registered adapter; none if no candidate passed every gate.
        changed: Whether the registry was changed.
    """

    standings: tuple[Standing, ...]
    certifications: tuple[Certification, ...] = ()
    registered: "RegisteredAdapter | None" = None
    changed: bool = False


def select(
    store: Store,
    sweep: SweepConfig,
    points: list[RecordedTrial],
    gates: Gates,
    prefer: Preference = "knee",
    say: Callable[[str], None] = lambda text: None,
) -> Selection:
    """Certify candidates in their order, `gates.candidates` at most, until one passes, and register that one.

    Raises:
        UserError: Certification is refused, see `certify`.
        UnreachableError: MLflow does not answer.
    """
    found = tuple(standings(points, gates, prefer, sweep_objectives(sweep)))
    chosen = [standing.point for standing in found if standing.qualifies]
    if not chosen:
        return Selection(found)

    from halora.records.tracking import open_client

    client, folder = open_client(store), store.sweep(sweep.name)
    tried: list[Certification] = []
    with only_selection(folder, lambda: say("another selection of this sweep is running; waiting for it")):
        for point in chosen[: gates.candidates]:
            tried.append(certify(client, sweep, store, point, gates, say))
            if tried[-1].passed:
                registered, changed = register_certified(store, client, tried[-1])
                return Selection(found, tuple(tried), registered, changed)
    return Selection(found, tuple(tried))


def register_certified(
    store: Store, client: "MlflowClient", certification: Certification
) -> "tuple[RegisteredAdapter, bool]":
    """Register a certified adapter as `candidate`; the second time changes nothing.

    Returns:
        The version, and whether anything was changed.

    Raises:
        UserError: It did not pass every gate.
    """
    from halora.records import queries, registry

    if not certification.passed:
        raise UserError(
            f"trial '{certification.certificate.sweep}/{certification.certificate.trial}' did not pass: "
            + "; ".join(str(gate) for gate in certification.gates if not gate.passed)
        )
    certificate = certification.certificate
    run = queries.trial_run(client, certificate.sweep, certificate.launch, certificate.trial)
    sweep, config = load_sweep_of(store.existing(certificate.sweep)), queries.logged_config(client, run.info.run_id)
    identity = (*base_and_task(sweep, config), certificate.chip_hash)
    name = names.registered_name(certification.base, certificate.task, certificate.chip, identity)
    tags = {names.GATE.format(gate=gate.name): str(gate) for gate in certification.gates}
    tags |= {
        names.ATTEMPT: str(certificate.attempt),
        names.ADAPTER_SHA256: certification.adapter_sha256,
        names.YIELD_BOUND: f"{certificate.bound:.6f}",
    }
    with locked(store.root / "registry.lock"):
        return registry.register(client, name, run, tags, certificate.statement())
