"""Reads a bundle as what it is, somebody else's files: bounded, strictly, and with every claim computed again.

Files are regular ones of bounded size that belong to a bundle; JSON is finite numbers and known fields; nothing that a
file names is opened. Whatever follows from settings and scores is computed anew and compared, field by field.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from halora.errors import UserError, attempt, shortened
from halora.files import sha256_of
from halora.hardware.families import adapted
from halora.reading import check_regular, decoded, parse_json, read_regular
from halora.records.names import CERTIFICATION_FILE, ROBUSTNESS_FILE, SCORES_FILE
from halora.selection.bundle import (
    CARD_FILE,
    CHECKSUMS_FILE,
    CHIP_FILE,
    ENERGY_FILE,
    FILES,
    LIGHTNING_FILE,
    SIGNATURE_FILE,
    Bundle,
    most_bytes,
)
from halora.selection.card import model_card
from halora.selection.certificate import error_share
from halora.selection.claims import Certification, Evidence, Origin, asked_scenarios, concluded
from halora.selection.lightning import lightning_settings
from halora.settings.names import EMBEDDED, KNOWN_TASKS
from halora.settings.trial import TrialConfig
from halora.spaces.mistakes import describe
from halora.training.adapter_config import ADAPTER_CONFIG, read_lora_config
from halora.trial_folder import ADAPTER_WEIGHTS, TRIAL_FILE

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_MOST_FOREIGN_FILES = 20
_MOST_DIFFERENCES = 20
_MOST_EARLIER = 10**6
_ROUNDING = 1e-9
"""By which sums in another order differ, relatively."""
_ANEW = "have it exported anew"


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle, and compute again what follows from its settings and scores.

    Raises:
        UserError: With everything that is wrong: changed, missing or foreign files, pickles, links and devices, files
            that are too large, files that say nothing sensible, claims that do not follow.
    """
    if problems := list(_file_problems(folder)):
        raise UserError([f"{folder}: {problem}" for problem in problems], _ANEW)
    config = attempt(problems, lambda: _trial(folder / TRIAL_FILE))
    certification = attempt(problems, lambda: _certification(folder / CERTIFICATION_FILE))
    scores = attempt(problems, lambda: _scores(folder / SCORES_FILE))
    robustness = attempt(problems, lambda: _robustness(folder / ROBUSTNESS_FILE))
    attempt(problems, lambda: read_lora_config(folder))
    attempt(problems, lambda: _check_weights(folder / ADAPTER_WEIGHTS))
    if problems or config is None or certification is None or scores is None or robustness is None:
        raise UserError(problems, _ANEW)
    bundle = Bundle(config, certification, scores, robustness)
    problems = list(_contradictions(bundle)) or list(_unfounded(folder, bundle))
    if problems:
        raise UserError([f"{folder}: {problem}" for problem in problems], _ANEW)
    return bundle


def _file_problems(folder: Path) -> Iterator[str]:
    if not (folder / CHECKSUMS_FILE).is_file():
        yield f"no bundle: it has no {CHECKSUMS_FILE}"
        return
    foreign = 0
    for place, folders, files in os.walk(folder):
        for name in sorted(files + [each for each in folders if (Path(place) / each).is_symlink()]):
            inside = (Path(place) / name).relative_to(folder).as_posix()
            if inside not in (*FILES, CHECKSUMS_FILE, SIGNATURE_FILE):
                what = "a pickle, which can run code" if inside.endswith(_PICKLES) else "not part of a bundle"
                yield f"{inside} is {what}"
                foreign += 1
                if foreign == _MOST_FOREIGN_FILES:
                    return
    digests = _checksums(folder / CHECKSUMS_FILE)
    if digests.keys() != set(FILES):
        yield f"{CHECKSUMS_FILE} does not list the files of a bundle, one each"
    for name in FILES:
        path = folder / name
        if not os.path.lexists(path):
            yield f"{name} is missing"
            continue
        try:
            check_regular(path, most_bytes(name))
        except UserError as error:
            yield from (problem.removeprefix(f"{folder}/") for problem in error.problems)
            continue
        if name in digests and sha256_of(path) != digests[name]:
            yield f"{name} was changed: its checksum is another"


def _checksums(path: Path) -> dict[str, str]:
    """Digest by name; nothing where a line is no checksum or a name is given twice."""
    lines = read_regular(path, most_bytes(CHECKSUMS_FILE)).decode("utf-8", "replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    digests = {match[2]: match[1] for match in found if match}
    return digests if len(digests) == len(lines) else {}


def read_json(path: Path) -> Any:
    """The content of a JSON file of a bundle.

    Raises:
        UserError: It is none, or holds what is not a number, or is nested too deep.
    """
    most = most_bytes(path.name)
    return parse_json(decoded(read_regular(path, most), str(path), "JSON"), str(path), most)


def _typed(path: Path, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_json(read_regular(path, most_bytes(path.name)), strict=True)
    except ValidationError as error:
        told = error.errors(include_url=False, include_input=False, include_context=False)[:_MOST_DIFFERENCES]
        raise UserError([f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in told]) from None


def _trial(path: Path) -> TrialConfig:
    """The trial as it was resolved: its model and task by names that are not looked up here, its chip whole."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of keys to values but {type(content).__name__}")
    model, task = content.get("model"), content.get("task")
    problems = [
        f"{name}: {problem}" for name, given in (("model", model), ("task", task)) for problem in _not_id(given)
    ]
    problems += _places(content)
    if not problems:
        try:
            named = {"model": next(iter(EMBEDDED)), "task": next(iter(KNOWN_TASKS))}
            config = TrialConfig.model_validate(content | named).model_copy(update={"model": model, "task": task})
            problems += differences(content, config.model_dump(mode="json"), "its settings")
        except ValidationError as error:
            problems += describe(error, TrialConfig)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError([f"{path}: {problem}" for problem in problems])
    return config


def _not_id(given: Any) -> Iterator[str]:
    """Why a text is no name that leads nowhere by itself."""
    if not isinstance(given, str) or not given.isprintable() or not 0 < len(given) <= 200:
        yield "a name is wanted"
    elif any(re.match(r"[/.~]|.*(\\|:|(^|/)\.\.(/|$))", part.rpartition("*")[2].strip()) for part in given.split("+")):
        yield "a name is wanted, and no path or address: '--base' and '--task' say where they are"


def _places(content: Mapping[str, Any]) -> Iterator[str]:
    """Where a resolved description names files or presets, which are not part of a bundle."""
    chip = content.get("chip")
    if not isinstance(chip, dict):
        yield "chip: the whole description is wanted, and no name or path of one"
        return
    if "preset" in chip:
        yield "chip.preset: the whole description is wanted, and no name of one"
    retention = chip.get("retention")
    models = {"noise": chip.get("noise"), "retention.ageing": isinstance(retention, dict) and retention.get("ageing")}
    for name, model in models.items():
        if isinstance(model, dict) and "path" in model:
            yield f"chip.{name}.path: a bundle names no files; the states themselves are wanted"


def _certification(path: Path) -> Certification:
    found: Certification = _typed(path, Certification)
    certificate, problems = found.certificate, []
    for name, pattern in (("sweep", r"[\w.-]{1,80}"), ("launch", r"\w{1,64}")):
        if not re.fullmatch(pattern, getattr(certificate, name)):
            problems.append(f"certificate.{name}: not a name")
    if not (certificate.trial >= 0 and certificate.attempt >= 1 and 0 <= certificate.earlier <= _MOST_EARLIER):
        problems.append("certificate: trial, attempt and earlier are not counts")
    if certificate.spent < 0 or not error_share(found.asked.confidence, certificate.earlier, certificate.spent) > 0:
        problems.append("certificate.spent: nothing is left of the error level")
    if not re.fullmatch(r"[0-9a-f]{64}", found.base_sha256):
        problems.append("base_sha256: not a digest")
    if problems:
        raise UserError([f"{path}: {problem}" for problem in problems])
    return found


def _scores(path: Path) -> "ChipScores":
    from halora.evaluation.chips import ChipScores

    found: ChipScores = _typed(path, ChipScores)
    if problems := found.misshapen():
        raise UserError([f"{path}: {problem}" for problem in problems])
    return found


def _robustness(path: Path) -> "dict[str, ChipScores]":
    from halora.evaluation.chips import ChipScores

    found: dict[str, ChipScores] = _typed(path, dict[str, ChipScores])
    problems = [f"{path}: '{name}': {problem}" for name, scores in found.items() for problem in scores.misshapen()]
    if problems:
        raise UserError(problems)
    return found


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not in the safetensors format: {shortened(str(error), 200)}") from None


def _contradictions(bundle: Bundle) -> Iterator[str]:
    """Why nothing can be computed from a bundle's scores."""
    config, certification, scores = bundle.config, bundle.certification, bundle.scores
    if scores.chip_seeds != tuple(range(len(scores.chip_seeds))):
        yield f"{SCORES_FILE}: its chips are not those from 0 on"
    lines = {line.name for line in asked_scenarios(config, certification.asked) if line.chip is not None}
    if lines != bundle.robustness.keys():
        yield f"{ROBUSTNESS_FILE} has not the scores of the lines asked for: {', '.join(sorted(lines)) or 'none'}"
    chips = tuple(range(min(certification.asked.robustness_chips, len(scores.chip_seeds))))
    for name, one in {"": scores, **bundle.robustness}.items():
        where = f"{ROBUSTNESS_FILE}: '{name}'" if name else SCORES_FILE
        if name and (one.row_ids != scores.row_ids or one.chip_seeds != chips):
            yield f"{where} is not of the certified rows and the first {len(chips)} certified chips"
        if one.strengths:
            yield f"{where} has other strengths of noise, at which nothing is certified"
        if config.evaluation.scoring != "generation" and not one.answers_follow_margins:
            yield f"{where} contradicts itself: right answers are not those of positive margins"
    if not any(gate.name == "reload_reproduces" for gate in certification.gates):
        yield f"{CERTIFICATION_FILE}: it lacks the gate reload_reproduces"


def _unfounded(folder: Path, bundle: Bundle) -> Iterator[str]:
    """Claims that do not follow from settings and scores."""
    config, certification, weights = bundle.config, bundle.certification, folder / ADAPTER_WEIGHTS
    expected = concluded(
        Evidence(
            origin=Origin.of(certification.certificate),
            config=config,
            asked=certification.asked,
            scores=bundle.scores,
            robustness=bundle.robustness,
            task=config.task,
            rows_digest=certification.certificate.rows_digest,
            base=config.model,
            base_sha256=certification.base_sha256,
            energy=certification.energy,
            adapter_sha256=sha256_of(weights),
            adapter_bytes=weights.stat().st_size,
            reload_share=certification.reload_share,
        )
    )
    claims: dict[str, Any] = {
        CERTIFICATION_FILE: expected.to_json(),
        CHIP_FILE: config.chip.model_dump(mode="json"),
        ENERGY_FILE: dict(certification.energy),
        LIGHTNING_FILE: lightning_settings(config.chip).to_json(),
    }
    for name, content in claims.items():
        yield from (f"{name}: {problem}" for problem in differences(read_json(folder / name), content, "the rest"))
    yield from _adapter_problems(read_json(folder / ADAPTER_CONFIG), bundle)
    yield from _card_problems(folder / CARD_FILE, model_card(config, expected))


def _adapter_problems(stored: Mapping[str, Any], bundle: Bundle) -> Iterator[str]:
    lora = bundle.config.lora
    wanted = {
        "r": lora.rank,
        "lora_alpha": lora.rank * lora.alpha_over_rank,
        "target_modules": sorted(lora.targets),
        "use_rslora": lora.variant == "rslora",
        "use_dora": lora.variant == "dora",
        "base_model_name_or_path": bundle.certification.base,
    }
    found = {**stored, "target_modules": _as_asked(stored["target_modules"], lora.targets)}
    for key, value in wanted.items():
        if found.get(key, False) != value:
            yield f"{ADAPTER_CONFIG}: {key} is {_told(found.get(key))}, {TRIAL_FILE} says {_told(value)}"
    for key in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if stored.get(key):
            yield f"{ADAPTER_CONFIG}: {key} is {_told(stored[key])}, which {TRIAL_FILE} does not say"


def _as_asked(stored: Any, targets: Sequence[str]) -> Any:
    """Stored names of adapted layers, sorted; those that were asked for where the stored ones are what they mean."""
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        return stored
    meant = set(adapted(stored, targets)) == set(stored) and all(adapted(stored, [target]) for target in targets)
    return sorted(targets if meant else stored)


def _card_problems(path: Path, expected: str) -> Iterator[str]:
    try:
        found = read_regular(path, most_bytes(path.name)).decode()
    except UnicodeDecodeError:
        yield f"{path.name} is not text in UTF-8"
        return
    if found != expected:
        lines = found.splitlines(), expected.splitlines()
        at = next((i for i, pair in enumerate(zip(*lines, strict=False)) if pair[0] != pair[1]), min(map(len, lines)))
        said, says = (own[at] if at < len(own) else "" for own in lines)
        yield f"{path.name}: line {at + 1} says {_told(said)}, the certification {_told(says)}"


def differences(found: Any, expected: Any, whose: str, rounding: float = _ROUNDING) -> list[str]:
    """Where two JSON values differ by more than rounding, a sentence each by dotted path; the first of them.

    Args:
        found: As given.
        expected: As computed.
        whose: What says otherwise.
        rounding: By which numbers differ, relatively.
    """
    return [
        f"{where} is {_told(one)}, by {whose} {_told(other)}"
        for where, one, other in islice(_differing(found, expected, rounding), _MOST_DIFFERENCES)
    ]


_ABSENT = object()


def _differing(found: Any, expected: Any, rounding: float, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(expected, tuple):
        expected = list(expected)
    if isinstance(expected, Mapping) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            yield from _differing(
                found.get(key, _ABSENT), expected.get(key, _ABSENT), rounding, f"{path}.{key}".lstrip(".")
            )
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            name = other.get("name", place) if isinstance(other, dict) else place
            yield from _differing(one, other, rounding, f"{path}.{name}".lstrip("."))
    elif not _same(found, expected, rounding):
        yield path or "it", found, expected


def _same(found: Any, expected: Any, rounding: float) -> bool:
    numbers = (int, float)
    if type(found) in numbers and type(expected) in numbers:
        return isclose(found, expected, rel_tol=rounding, abs_tol=1e-12)
    return type(found) is type(expected) and bool(found == expected)


def _told(value: Any) -> str:
    return "missing" if value is _ABSENT else shortened(json.dumps(value, ensure_ascii=False, default=str), 100)
