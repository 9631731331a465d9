"""Verifies a bundle: its files, its base, that plain PEFT loads it, and that its certified scores are reproduced.

Nothing of the bundle is run or unpickled: JSON, Markdown and safetensors are all it may hold.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from halora.errors import UserError
from halora.files import sha256_of
from halora.hardware.addressing import Role
from halora.records.names import CERTIFICATION_FILE, SCORES_FILE
from halora.selection.bundle import CHECKSUMS_FILE, CHIP_FILE, FILES, Bundle
from halora.selection.certification import Certification
from halora.settings.trial import TrialConfig
from halora.training.models import BaseModel, plain_base, weights_digest
from halora.trial_folder import ADAPTER_WEIGHTS, TRIAL_FILE

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_CHECKED_ROWS = 8


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    Attributes:
        name: What.
        passed: The verdict.
        text: The figures behind it.
    """

    name: str
    passed: bool
    text: str


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle once its files are as its checksums say.

    Raises:
        UserError: With everything that is wrong: changed, missing or foreign files, pickles, a file that says
            nothing sensible.
    """
    from pydantic import ValidationError

    from halora.evaluation.chips import ChipScores
    from halora.spaces.mistakes import describe

    if problems := _file_problems(folder):
        raise UserError([f"{folder}: {problem}" for problem in problems], "have it exported anew")
    try:
        config = TrialConfig.model_validate(_json(folder / TRIAL_FILE))
    except ValidationError as error:
        raise UserError([f"{folder / TRIAL_FILE}: {problem}" for problem in describe(error, TrialConfig)]) from None
    try:
        certification = Certification.from_json(_json(folder / CERTIFICATION_FILE))
        scores = ChipScores.from_json(_json(folder / SCORES_FILE))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its certification or its scores lack a field: {error}") from None
    problems = _inner_problems(folder, config, certification, scores)
    if problems:
        raise UserError([f"{folder}: {problem}" for problem in problems], "have it exported anew")
    return Bundle(config, certification, scores)


def verify(
    folder: Path,
    *,
    base: str | None = None,
    task: str | None = None,
    chips: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Check]:
    """Verify a bundle.

    Args:
        folder: The bundle.
        base: Where its base model is, a name, hub id or folder; found by the bundle's own id when left out.
        task: Where its task is, likewise.
        chips: Score only the first chip instances again; all of the certificate's when left out.
        say: Told of the progress.

    Raises:
        UserError: The bundle is refused, see `read_bundle`; its base or its task is not available, or is another; its
            adapter has tensors that do not belong to the base.
    """
    bundle = read_bundle(folder)
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
        Check("base", True, f"{certification.base}, weights {found[:12]}"),
        _plain_check(folder, plain, config, scores),
    ]
    del plain
    say(f"scoring {chips or certification.certificate.chips} certified chips again")
    return [*checks, *_scored_again(folder, config, bundle, chips)]


def _file_problems(folder: Path) -> list[str]:
    sums = folder / CHECKSUMS_FILE
    if not sums.is_file():
        return [f"no bundle: it has no {CHECKSUMS_FILE}"]
    lines = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in sums.read_text(encoding="utf-8").splitlines()]
    digests = {match[2]: match[1] for match in lines if match}
    problems = []
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(there - {CHECKSUMS_FILE, *FILES}):
        what = "a pickle, which can run code" if name.endswith(_PICKLES) else "not part of a bundle"
        problems.append(f"{name} is {what}")
    for name in FILES:
        if name not in there:
            problems.append(f"{name} is missing")
        elif name not in digests:
            problems.append(f"{name} has no checksum in {CHECKSUMS_FILE}")
        elif sha256_of(folder / name) != digests[name]:
            problems.append(f"{name} was changed: its checksum is another")
    return problems


def _inner_problems(folder: Path, config: TrialConfig, certification: Certification, scores: "ChipScores") -> list[str]:
    """Where the files contradict each other."""
    certificate, problems = certification.certificate, []
    if sha256_of(folder / ADAPTER_WEIGHTS) != certification.adapter_sha256:
        problems.append(f"{ADAPTER_WEIGHTS} is not the adapter that was certified")
    if config.chip.content_hash != certificate.chip_hash or _json(folder / CHIP_FILE) != config.chip.model_dump(
        mode="json"
    ):
        problems.append("its chip is not the one that was certified on")
    if config.evaluation.scoring != "generation" and not scores.answers_follow_margins:
        problems.append("its scores contradict themselves: right answers are not those of positive margins")
    if scores.chip_seeds != tuple(range(certificate.chips)) or len(scores.row_ids) != certificate.rows:
        problems.append("its scores are not those of the certificate")
    failures = sum(accuracy < certificate.min_accuracy for accuracy in scores.accuracy_by_chip)
    if failures != certificate.failures:
        problems.append(f"its scores have {failures} failing chips, its certificate {certificate.failures}")
    return problems


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
    differences = []
    for row, recorded in zip(
        prepared_rows(rows[:_CHECKED_ROWS], base, config.prompt_format), scores.nats[0], strict=False
    ):
        found = plain_option_scores(peft_model, base.tokenizer, row)
        if config.evaluation.scoring == "generation":
            own = found[row.answer] / len(encode(row, base.tokenizer)[1][row.answer])
        else:
            own = margin(found, row.answer)
        differences.append(abs(own - float(recorded)))
    mean, allowed = fmean(differences), TOLERANCE_NATS[config.training.dtype]
    text = f"clean margins of {len(differences)} rows differ by {mean:.2g} nats in the mean (allowed {allowed:g})"
    return Check("plain PEFT", mean <= allowed, text)


def _scored_again(folder: Path, config: TrialConfig, bundle: Bundle, chips: int | None) -> list[Check]:
    """The certified chips, or the first of them, scored again, and what the certificate says by that."""
    from halora.evaluation.agreement import agreement, as_scored
    from halora.trial_runner import TrialRunner

    certificate, recorded = bundle.certification.certificate, bundle.scores
    if chips is not None:
        recorded = recorded.first_chips(chips)
    again = TrialRunner().evaluate(
        as_scored(config, recorded), folder, split="test", role=Role.CERTIFY, series=certificate.series
    )
    found = agreement(config, recorded, again)
    before, now = (
        sum(accuracy < certificate.min_accuracy for accuracy in scores.accuracy_by_chip) for scores in (recorded, again)
    )
    by_these = replace(certificate, failures=certificate.failures - before + now)
    text = f"{now} of {len(recorded.chip_seeds)} chips miss {certificate.min_accuracy:g}, {before} by the record; "
    return [
        Check("scores", found.agrees, str(found)),
        Check("certificate", by_these.passed, f"{text}yield at least {by_these.bound:.4f}"),
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
