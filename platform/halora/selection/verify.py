"""Verifies a bundle: its claims, its base, that plain PEFT loads it, and that its certified scores are those of it.

Nothing of the bundle is run or unpickled: JSON, Markdown and safetensors are all it may hold. What cannot be computed
again is said by name.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from halora.errors import UserError
from halora.hardware.addressing import Role
from halora.reading import read_regular
from halora.selection import signature
from halora.selection.bundle import CHECKSUMS_FILE, FILES, SIGNATURE_FILE, Bundle, most_bytes
from halora.selection.bundle_reading import differences, read_bundle
from halora.selection.claims import asked_scenarios, priced
from halora.settings.trial import TrialConfig
from halora.training.models import BaseModel, plain_base, weights_digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from halora.evaluation.chips import ChipScores
    from halora.trial_runner import TrialRunner

_CHECKED_ROWS = 8
_NOISE_DB = 0.01
"""By which the realised noise of one chip differs from processor to processor."""
_ENERGY = 1e-4
"""By which an energy differs, relatively: the fill of the cells is a sum over weights."""


@dataclass(frozen=True)
class Check:
    """One thing that was verified, or could not be.

    Attributes:
        name: What.
        passed: The result; none where the bundle alone says so.
        text: The figures behind it.
    """

    name: str
    passed: bool | None
    text: str


def verify(
    folder: Path,
    *,
    base: str | None = None,
    task: str | None = None,
    chips: int | None = None,
    key: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    reading: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
) -> list[Check]:
    """Verify a bundle.

    Args:
        folder: The bundle.
        base: Where its base model is, a name, hub id or folder; found by the bundle's own id when left out.
        task: Where its task is, likewise.
        chips: Score only the first chip instances again, and no line of the robustness table; all when left out.
        key: File of the public key whose signature is wanted.
        say: Told of the progress.
        reading: Entered while the bundle's files are read, with what that is called.

    Raises:
        UserError: The bundle is refused, see `read_bundle`; it is not signed by the key; its base or its task cannot be
            loaded, or is another; its adapter has tensors that do not belong to the base.
    """
    from halora.evaluation import chips as _chips  # noqa: F401 (imports torch: not to be counted as reading)

    public_key = signature.public_key(key) if key else None
    with reading(f"reading {folder}"):
        bundle = read_bundle(folder)
        signed = _signature(folder, public_key)
    certification, scores = bundle.certification, bundle.scores
    config = bundle.config.model_copy(update={"model": base or bundle.config.model, "task": task or bundle.config.task})
    say(f"loading {certification.base} and the adapter with transformers and PEFT alone")
    plain = plain_base(config.model, config.training.dtype)
    found = weights_digest(plain.causal_lm)
    if found != certification.base_sha256:
        raise UserError(
            f"{folder}: made for {certification.base} with weights {certification.base_sha256[:12]}; "
            f"'{config.model}' in {config.training.dtype} has {found[:12]}: another base model",
            "give the right one with --base",
        )
    checks = [
        Check("files", True, f"{len(FILES)} files as their checksums say"),
        signed,
        Check("claims", True, "certificate, gates, robustness and model card follow from scores and settings"),
        Check("base", True, f"{certification.base}, weights {found[:12]}"),
        _energy_check(config, bundle),
        _rows_check(config, bundle),
        _plain_check(folder, plain, config, scores),
    ]
    del plain
    return [*checks, *_scored_again(folder, config, bundle, chips, say), *_unverified(bundle, chips)]


def _signature(folder: Path, key: "Ed25519PublicKey | None") -> Check:
    path = folder / SIGNATURE_FILE
    if key is None:
        made = f"there is one in {SIGNATURE_FILE}; give its key with --key" if path.exists() else "none"
        return Check("signature", None, f"{made}; checksums do not say who wrote them")
    if not path.exists():
        raise UserError(f"{folder}: it is not signed", "have it exported with --sign")
    checksums = read_regular(folder / CHECKSUMS_FILE, most_bytes(CHECKSUMS_FILE))
    if not signature.fits(key, read_regular(path, most_bytes(SIGNATURE_FILE)), checksums):
        raise UserError(f"{folder}: {SIGNATURE_FILE} is no signature of this bundle by the key", "do not trust it")
    return Check("signature", True, f"{CHECKSUMS_FILE} signed by the key")


def _energy_check(config: TrialConfig, bundle: Bundle) -> Check:
    recorded = bundle.certification.energy
    again = priced(config, estimated=recorded["fill"].startswith("estimate"))
    if problems := differences(dict(recorded), dict(again), "its description", rounding=_ENERGY):
        return Check("energy", False, "; ".join(problems))
    return Check("energy", True, f"{again['energy_uj_per_token']:.4g} uJ per token, priced again ({again['fill']})")


def _rows_check(config: TrialConfig, bundle: Bundle) -> Check:
    from halora.records.recorder import dataset

    certificate = bundle.certification.certificate
    rows = dataset(config.task, "test", certificate.rows)
    text = f"{rows['rows']} test rows of {certificate.task}, digest {rows['digest'][:12]}"
    same = rows["digest"] == certificate.rows_digest
    return Check("rows", same, text if same else f"{text}; recorded {certificate.rows_digest[:12]}")


def _plain_check(folder: Path, base: BaseModel, config: TrialConfig, scores: "ChipScores") -> Check:
    """Margins of the first rows on clean weights, by PEFT and transformers alone, beside those on record."""
    from halora.evaluation.agreement import TOLERANCE_NATS
    from halora.evaluation.scoring import margin, plain_option_scores
    from halora.training.adapter import attach_saved
    from halora.training.batches import encode
    from halora.training.prompts import prepared_rows
    from halora.training.tasks import load_rows

    rows = load_rows(config.task, "test", len(scores.row_ids))
    if tuple(row.row_id for row in rows) != scores.row_ids:
        raise UserError(f"task '{config.task}' does not give the test rows of the bundle", "name it with --task")
    peft_model = attach_saved(base, folder, config.chip.lora.weight_bits)
    differing = []
    for row, recorded in zip(
        prepared_rows(rows[:_CHECKED_ROWS], base, config.prompt_format), scores.nats[0], strict=False
    ):
        found = plain_option_scores(peft_model, base.tokenizer, row)
        if config.evaluation.scoring == "generation":
            own = found[row.answer] / len(encode(row, base.tokenizer)[1][row.answer])
        else:
            own = margin(found, row.answer)
        differing.append(abs(own - float(recorded)))
    mean, allowed = fmean(differing), TOLERANCE_NATS[config.training.dtype]
    text = f"clean margins of {len(differing)} rows differ by {mean:.2g} nats in the mean (allowed {allowed:g})"
    return Check("plain PEFT", mean <= allowed, text)


def _scored_again(
    folder: Path, config: TrialConfig, bundle: Bundle, chips: int | None, say: Callable[[str], None]
) -> list[Check]:
    """The certified chips, or the first of them, scored again, and what certificate and robustness say by that."""
    from halora.trial_runner import TrialRunner

    certificate, recorded, runner = bundle.certification.certificate, bundle.scores, TrialRunner()
    if chips is not None:
        recorded = recorded.first_chips(chips)
    say(f"scoring {len(recorded.chip_seeds)} certified chips again")
    again = _again(runner, folder, config, bundle, recorded)
    before, now = (
        sum(accuracy < certificate.min_accuracy for accuracy in scores.accuracy_by_chip) for scores in (recorded, again)
    )
    by_these = replace(certificate, failures=certificate.failures - before + now)
    text = f"{now} of {len(recorded.chip_seeds)} chips miss {certificate.min_accuracy:g}, {before} by the record; "
    checks = [
        _scores_check("scores", config, recorded, again),
        Check("certificate", by_these.passed, f"{text}yield at least {by_these.bound:.4f}"),
    ]
    if chips is None and bundle.robustness:
        checks.append(_robustness_check(runner, folder, config, bundle, say))
    return checks


def _robustness_check(
    runner: "TrialRunner", folder: Path, config: TrialConfig, bundle: Bundle, say: Callable[[str], None]
) -> Check:
    """The lines of the robustness table, scored again."""
    differing = []
    for line in asked_scenarios(config, bundle.certification.asked):
        if line.chip is not None:
            say(f"scoring {line.name} again")
            own, recorded = config.model_copy(update={"chip": line.chip}), bundle.robustness[line.name]
            found = _scores_check(line.name, own, recorded, _again(runner, folder, own, bundle, recorded))
            differing += [] if found.passed else [f"{line.name}: {found.text}"]
    text = "; ".join(differing) or f"{len(bundle.robustness)} lines scored again, as recorded"
    return Check("robustness", not differing, text)


def _again(
    runner: "TrialRunner", folder: Path, config: TrialConfig, bundle: Bundle, recorded: "ChipScores"
) -> "ChipScores":
    from halora.evaluation.agreement import as_scored

    series = bundle.certification.certificate.series
    return runner.evaluate(as_scored(config, recorded), folder, split="test", role=Role.CERTIFY, series=series)


def _scores_check(name: str, config: TrialConfig, recorded: "ChipScores", again: "ChipScores") -> Check:
    """Margins and accuracies, by the other way of scoring too, the tasks of the rows, and the noise by layer."""
    import numpy as np

    from halora.evaluation.agreement import agreement

    found, problems = agreement(config, recorded, again), []
    ways = (("clean_beside", found.clean_allowed_nats), ("noisy_beside", found.noisy_allowed_nats))
    for field, allowed in ways if recorded.beside else ():
        apart = np.abs(np.subtract(getattr(recorded, field), getattr(again, field))).mean()
        if not apart <= allowed:
            problems.append(f"{field} differs by {apart:.2g} in the mean (allowed {allowed:.2g})")
    if recorded.beside != again.beside or _parts(recorded.tasks) != _parts(again.tasks):
        problems.append("the rows' tasks, or the way of scoring told beside, are others")
    if recorded.layers != again.layers:
        problems.append("the layers in RRAM are others")
    else:
        apart_db = np.abs(np.subtract(recorded.layer_noise_db, again.layer_noise_db)).max(initial=0.0)
        apart_db = max(apart_db, np.abs(np.subtract(recorded.noise_db, again.noise_db)).max())
        if not apart_db <= _NOISE_DB:
            problems.append(f"the noise of the weights differs by {apart_db:.2g} dB (allowed {_NOISE_DB})")
    return Check(name, found.agrees and not problems, "; ".join([str(found), *problems]))


def _parts(tasks: tuple[str, ...]) -> list[int]:
    """Which rows are of one task, whatever it is called."""
    names = list(dict.fromkeys(tasks))
    return [names.index(task) for task in tasks]


def _unverified(bundle: Bundle, chips: int | None) -> list[Check]:
    """What the bundle says and nothing in it shows."""
    certification, certificate = bundle.certification, bundle.certification.certificate
    counted = f"{certificate.earlier} certifications begun before it on these rows took {certificate.spent:.3g}"
    said = {
        "origin": f"trial {certificate.sweep}/{certificate.trial}, trained as its trial.json says; "
        f"chips of series {certificate.series}, which no search saw",
        "error level": f"{counted} of {1 - certificate.confidence:.3g}",
        "gates asked": "that they were chosen before the scores were known",
        "reload_reproduces": f"{certification.reload_share:.3g} of the difference allowed, on rows of the search",
    }
    if chips is not None and chips < certificate.chips:
        said["other chips"] = f"scores of certified chips {chips} to {certificate.chips - 1}"
    if chips is not None and bundle.robustness:
        said["robustness"] = f"scores of {len(bundle.robustness)} lines; without --chips they are taken again"
    return [Check(name, None, text) for name, text in said.items()]
