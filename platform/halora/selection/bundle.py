"""The bundle: everything about a certified adapter in one folder, the adapter as PEFT stores it.

`PeftModel.from_pretrained(base, FOLDER)` loads it as it is. The base is named by its id and the digest of its weights;
no path of the machine that made it is inside. On a URL its checksums are written last: what has none is not a bundle.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from halora.errors import UserError
from halora.files import sha256_of, write_json, write_whole
from halora.records.names import CERTIFICATION_FILE, CERTIFICATION_FOLDER, SCORES_FILE
from halora.selection.card import model_card
from halora.selection.certification import Certification, logged_certification
from halora.selection.lightning import lightning_settings
from halora.settings.names import model_id, task_id
from halora.settings.trial import TrialConfig
from halora.trial_folder import ADAPTER_WEIGHTS, TRIAL_FILE
from halora.url_folder import UrlFolder, checked_url, is_below, is_url, shown

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.records.registry import RegisteredAdapter
    from halora.records.tracking import MlflowClient

ADAPTER_CONFIG = "adapter_config.json"
CHIP_FILE = "chip.json"
ENERGY_FILE = "energy.json"
LIGHTNING_FILE = "aihwkit-lightning.json"
CARD_FILE = "README.md"
CHECKSUMS_FILE = "SHA256SUMS"
FILES = (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TRIAL_FILE,
    CHIP_FILE,
    ENERGY_FILE,
    CERTIFICATION_FILE,
    SCORES_FILE,
    LIGHTNING_FILE,
    CARD_FILE,
)
"""All files but the checksums."""


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of its adapter.

    Attributes:
        config: The trial that made it; model and task by their ids.
        certification: Gates, certificate, robustness.
        scores: Margins and answers behind the certificate.
    """

    config: TrialConfig
    certification: Certification
    scores: "ChipScores"


def export_to(client: "MlflowClient", adapter: "RegisteredAdapter", place: str) -> None:
    """Write the bundle of a registered adapter to a new folder on this machine or on a URL, atomically.

    Raises:
        UserError: See `export`; or the URL is none that fsspec knows.
        StorageError: The URL cannot be written.
    """
    if not is_url(place):
        export(client, adapter, Path(place))
        return
    target = UrlFolder(checked_url(place), retries_s=())
    there = target.files()
    if CHECKSUMS_FILE in there or there.keys() - {*FILES}:  # else nothing, or what an interrupted export left
        raise UserError(f"'{shown(place)}' exists", "name a new folder")
    target.check_writable()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        export(client, adapter, folder)
        for name in (*FILES, CHECKSUMS_FILE):
            target.put(folder / name, name)


@contextmanager
def bundle_at(place: str) -> Iterator[Path]:
    """The folder of a bundle; of one on a URL a copy, while the block runs, that errors in it call by its URL.

    What is on the URL and does not belong to a bundle is there in name only.

    Raises:
        UserError: The URL is none that fsspec knows.
        StorageError: The URL cannot be read.
    """
    if not is_url(place):
        yield Path(place)
        return
    source = UrlFolder(checked_url(place), retries_s=())
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        there = source.files()
        if strange := [name for name in there if not is_below(name)]:
            raise UserError([f"{shown(place)}: {name} is not part of a bundle" for name in strange])
        if CHECKSUMS_FILE in there:
            for name in there:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                source.fetch(name, path) if name in (*FILES, CHECKSUMS_FILE) else path.touch()
        try:
            yield folder
        except UserError as error:
            told = [problem.replace(scratch, shown(place)) for problem in error.problems]
            raise type(error)(told, error.next_step) from None


def export(client: "MlflowClient", adapter: "RegisteredAdapter", folder: Path) -> Bundle:
    """Write the bundle of a registered adapter into a new folder, which appears atomically.

    Raises:
        UserError: The folder exists, or MLflow no longer has what was certified.
    """
    from halora.records import queries

    if folder.exists():
        raise UserError(f"'{folder}' exists", "name a new folder")
    run = client.get_run(adapter.run_id)
    config = queries.logged_config(client, adapter.run_id)
    scores_file = f"{CERTIFICATION_FOLDER.format(attempt=adapter.attempt)}/{SCORES_FILE}"
    scores = queries.logged_scores(client, adapter.run_id, scores_file)
    bundle = Bundle(
        config=config.model_copy(update={"model": model_id(config.model), "task": task_id(config.task)}),
        certification=logged_certification(client, adapter),
        scores=replace(scores, tasks=tuple(map(task_id, scores.tasks))),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        source = queries.download_adapter(client, run, Path(scratch) / "source")
        made = Path(scratch) / "bundle"
        made.mkdir()
        assert source is not None  # it was registered
        shutil.copyfile(source / ADAPTER_WEIGHTS, made / ADAPTER_WEIGHTS)
        if sha256_of(made / ADAPTER_WEIGHTS) != bundle.certification.adapter_sha256:
            raise UserError(
                f"the adapter of '{adapter.name}/{adapter.version}' in MLflow is not the one that was certified",
                "select again: `halora adapter select`",
            )
        described = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        write_json(made / ADAPTER_CONFIG, described | {"base_model_name_or_path": bundle.certification.base})
        _describe(made, bundle)
        write_checksums(made)
        made.rename(folder)
    return bundle


def _describe(folder: Path, bundle: Bundle) -> None:
    certification = bundle.certification
    write_json(folder / TRIAL_FILE, bundle.config.model_dump(mode="json"))
    write_json(folder / CHIP_FILE, bundle.config.chip.model_dump(mode="json"))
    write_json(folder / ENERGY_FILE, dict(certification.energy))
    write_json(folder / CERTIFICATION_FILE, certification.to_json())
    write_json(folder / SCORES_FILE, bundle.scores.to_json())
    write_json(folder / LIGHTNING_FILE, lightning_settings(bundle.config.chip).to_json())
    write_whole(folder / CARD_FILE, model_card(bundle.config, certification))


def write_checksums(folder: Path) -> None:
    """Write the digests of all files, as `sha256sum --check` reads them."""
    write_whole(folder / CHECKSUMS_FILE, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in FILES))
