"""The bundle: everything about a certified adapter in one folder, the adapter as PEFT stores it.

`PeftModel.from_pretrained(base, FOLDER)` loads it as it is. The base is named by its id and the digest of its weights;
no path of the machine that made it is inside. On a URL its checksums are written last: what has none is not a bundle.
They say that files belong together, and not who wrote them; a signature over them does, see `signature`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from halora.errors import UserError
from halora.files import sha256_of, sync_folder, write_json, write_whole
from halora.records.names import CERTIFICATION_FILE, ROBUSTNESS_FILE, SCORES_FILE
from halora.selection import signature
from halora.selection.card import model_card
from halora.selection.certification import logged_certification, logged_certified, logged_robustness
from halora.selection.claims import Certification
from halora.selection.lightning import lightning_settings
from halora.settings.names import model_id, task_id
from halora.settings.trial import TrialConfig
from halora.training.adapter_config import ADAPTER_CONFIG
from halora.trial_folder import ADAPTER_WEIGHTS, TRIAL_FILE
from halora.url_folder import UrlFolder, checked_url, is_below, is_url

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.records.registry import RegisteredAdapter
    from halora.records.tracking import MlflowClient

CHIP_FILE = "chip.json"
ENERGY_FILE = "energy.json"
LIGHTNING_FILE = "aihwkit-lightning.json"
CARD_FILE = "README.md"
CHECKSUMS_FILE = "SHA256SUMS"
SIGNATURE_FILE = "SHA256SUMS.sig"
FILES = (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TRIAL_FILE,
    CHIP_FILE,
    ENERGY_FILE,
    CERTIFICATION_FILE,
    SCORES_FILE,
    ROBUSTNESS_FILE,
    LIGHTNING_FILE,
    CARD_FILE,
)
"""All files but the checksums and their signature."""
_MOST_BYTES = {ADAPTER_WEIGHTS: 4 << 30, SCORES_FILE: 128 << 20, ROBUSTNESS_FILE: 128 << 20}
_MOST_BYTES_ELSE = 4 << 20
_MOST_FILES = 1000  # on a URL


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of its adapter.

    Attributes:
        config: The trial that made it; model and task by their ids.
        certification: Gates, certificate, robustness.
        scores: Margins and answers behind the certificate.
        robustness: Those behind the lines of the robustness table, by name of the line.
    """

    config: TrialConfig
    certification: Certification
    scores: "ChipScores"
    robustness: "Mapping[str, ChipScores]"


def most_bytes(name: str) -> int:
    """Size of a file of that name above which it is not part of a bundle."""
    return _MOST_BYTES.get(name, _MOST_BYTES_ELSE)


def export_to(client: "MlflowClient", adapter: "RegisteredAdapter", place: str, key: Path | None = None) -> None:
    """Write the bundle of a registered adapter to a new folder on this machine or on a URL, atomically.

    Args:
        client: Where it is recorded.
        adapter: The adapter.
        place: A new folder, or its URL.
        key: File of a private key to sign with.

    Raises:
        UserError: See `export`; or the URL is none that fsspec knows.
        StorageError: The URL cannot be written.
    """
    url = checked_url(place)
    if not is_url(place):
        export(client, adapter, Path(place), key)
        return
    target = UrlFolder(url, retries_s=())
    there = target.files()
    if CHECKSUMS_FILE in there or there.keys() - {
        *FILES,
        SIGNATURE_FILE,
    }:  # else nothing, or what an interrupted export left
        raise UserError(f"'{place}' exists", "name a new folder")
    target.check_writable()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        export(client, adapter, folder, key)
        target.remove(SIGNATURE_FILE)
        for name in (*FILES, *([SIGNATURE_FILE] if key else []), CHECKSUMS_FILE):
            target.put(folder / name, name)


@contextmanager
def bundle_at(place: str) -> Iterator[Path]:
    """The folder of a bundle; of one on a URL a copy, while the block runs, that errors in it call by its URL.

    What is on the URL and does not belong to a bundle is there in name only.

    Raises:
        UserError: The URL is none that fsspec knows.
        StorageError: The URL cannot be read.
    """
    url = checked_url(place)
    if not is_url(place):
        yield Path(place)
        return
    source = UrlFolder(url, retries_s=())
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        there = source.files()
        if len(there) > _MOST_FILES:
            raise UserError(f"{place}: no bundle: it has {len(there):,} files")
        if foreign := [name for name in there if not is_below(name)]:
            raise UserError([f"{place}: {name} is not part of a bundle" for name in foreign])
        if CHECKSUMS_FILE in there:
            for name in there:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                wanted = name in (*FILES, CHECKSUMS_FILE, SIGNATURE_FILE)
                if wanted and there[name] > most_bytes(name):
                    raise UserError(f"{place}: {name} has {there[name]:,} bytes, more than such a file may have")
                source.fetch(name, path) if wanted else path.touch()
        try:
            yield folder
        except UserError as error:
            told = [problem.replace(scratch, place) for problem in error.problems]
            raise type(error)(told, error.next_step) from None


def export(client: "MlflowClient", adapter: "RegisteredAdapter", folder: Path, key: Path | None = None) -> Bundle:
    """Write the bundle of a registered adapter into a new folder, atomically.

    Raises:
        UserError: The folder exists, MLflow no longer has what was certified, or the key is none to sign with.
    """
    from halora.records import queries

    if folder.exists():
        raise UserError(f"'{folder}' exists", "name a new folder")
    private_key = signature.private_key(key) if key else None
    run = client.get_run(adapter.run_id)
    config = queries.logged_config(client, adapter.run_id)
    bundle = Bundle(
        config=config.model_copy(update={"model": model_id(config.model), "task": task_id(config.task)}),
        certification=logged_certification(client, adapter),
        scores=_without_paths(logged_certified(client, adapter)),
        robustness={name: _without_paths(scores) for name, scores in logged_robustness(client, adapter).items()},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        source = queries.download_adapter(client, run, Path(scratch) / "source")
        made = Path(scratch) / "bundle"
        assert source is not None  # it was registered
        if sha256_of(source / ADAPTER_WEIGHTS) != bundle.certification.adapter_sha256:
            raise UserError(
                f"the adapter of '{adapter.name}/{adapter.version}' in MLflow is not the one that was certified",
                "select again: `halora adapter select`",
            )
        write_bundle(made, bundle, source)
        if private_key:
            write_whole(made / SIGNATURE_FILE, signature.sign(private_key, (made / CHECKSUMS_FILE).read_bytes()))
        sync_folder(made)
        made.rename(folder)
    return bundle


def _without_paths(scores: "ChipScores") -> "ChipScores":
    return replace(scores, tasks=tuple(map(task_id, scores.tasks)))


def write_bundle(folder: Path, bundle: Bundle, adapter: Path) -> None:
    """Write a bundle's files and their checksums into a new folder.

    Args:
        folder: The folder.
        bundle: What they say.
        adapter: Folder of the adapter, as PEFT stores it.
    """
    certification = bundle.certification
    folder.mkdir()
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    described = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    write_json(folder / ADAPTER_CONFIG, described | {"base_model_name_or_path": certification.base})
    write_json(folder / TRIAL_FILE, bundle.config.model_dump(mode="json"))
    write_json(folder / CHIP_FILE, bundle.config.chip.model_dump(mode="json"))
    write_json(folder / ENERGY_FILE, dict(certification.energy))
    write_json(folder / CERTIFICATION_FILE, certification.to_json())
    write_json(folder / SCORES_FILE, bundle.scores.to_json())
    write_json(folder / ROBUSTNESS_FILE, {name: scores.to_json() for name, scores in bundle.robustness.items()})
    write_json(folder / LIGHTNING_FILE, lightning_settings(bundle.config.chip).to_json())
    write_whole(folder / CARD_FILE, model_card(bundle.config, certification))
    write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """Write the digests of all files, as `sha256sum --check` reads them."""
    write_whole(folder / CHECKSUMS_FILE, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in FILES))
