"""Where a machine keeps its sweeps: one folder with MLflow's database, its artifacts, and a folder per sweep."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from halora.errors import UserError, nearest
from halora.secret_urls import secrets_in
from halora.url_folder import checked_url


@dataclass(frozen=True)
class Store:
    """A store on disk.

    Attributes:
        root: Its folder, absolute.
        server: URI of the MLflow server or database to record in; empty for the store's own SQLite file.
        checkpoint_url: URL below which sweeps keep their trials' checkpoints; empty for the store's own folder.
    """

    root: Path
    server: str = ""
    checkpoint_url: str = ""

    @classmethod
    def at(cls, folder: Path | None = None, server: str | None = None, checkpoint_url: str | None = None) -> "Store":
        """The store in `folder`, in `$HALORA_STORE`, or in `./halora-store`; its server and storage likewise.

        Raises:
            UserError: The server's URI or the storage's holds a secret, or may.
        """
        root = folder or Path(os.environ.get("HALORA_STORE", "halora-store"))
        uri = os.environ.get("HALORA_TRACKING_URI", "") if server is None else server
        if found := secrets_in(uri):
            raise UserError(
                f"the tracking URI holds {' and '.join(found)}, which would be written to disk",
                "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD",
            )
        url = os.environ.get("HALORA_CHECKPOINT_URL", "") if checkpoint_url is None else checkpoint_url
        return cls(root.expanduser().resolve(), _absolute(uri), checked_url(url))

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI."""
        from sqlalchemy.engine import URL

        own = URL.create("sqlite", database=str(self.database_file))  # which quotes what means something in a URL
        return self.server or own.render_as_string()

    @property
    def database_file(self) -> Path:
        """MLflow's database where no other is named."""
        return self.root / "mlflow.db"

    @property
    def remote(self) -> bool:
        """Whether the tracking URI is that of a server, and not of a file of this machine."""
        return bool(urlsplit(self.tracking_uri).hostname)

    def serving(self, sweep: "str | SweepFolder") -> "Store":
        """This store with the server that a sweep is recorded in, where none was asked for."""
        file = (self.sweep(sweep) if isinstance(sweep, str) else sweep).server_file
        return replace(self, server=file.read_text(encoding="utf-8")) if not self.server and file.exists() else self

    @property
    def artifacts(self) -> Path:
        """Root of MLflow's artifacts."""
        return self.root / "artifacts"

    @property
    def index_file(self) -> Path:
        """Cache of what the event logs add up to."""
        return self.root / "index.db"

    @property
    def certifications_file(self) -> Path:
        """Every certification begun in the store, and what it took of the error level of its test rows."""
        return self.root / "certifications.json"

    def sweep(self, name: str) -> "SweepFolder":
        """The folder of a sweep, which need not exist."""
        return SweepFolder(self.root / "sweeps" / name)

    def sweeps(self, *, archived: bool = False) -> list[str]:
        """Names of the sweeps in the store, newest last; with `archived` those that are, too."""
        found = sorted((self.root / "sweeps").glob("*/sweep.yaml"), key=lambda path: path.stat().st_mtime)
        folders = [SweepFolder(path.parent) for path in found]
        return [folder.name for folder in folders if archived or not folder.archive_file.exists()]

    def to_delete(self, launch: str, name: str) -> "SweepFolder":
        """Where the folder of a launch goes whose deletion begins."""
        return SweepFolder(self.root / ".deleted" / launch / name)

    def half_deleted(self, name: str = "*") -> list["SweepFolder"]:
        """Folders of launches of a name, of all names where none is given, whose deletion has begun and not ended."""
        return [SweepFolder(path) for path in sorted((self.root / ".deleted").glob(f"*/{name}"))]

    def existing(self, name: str) -> "SweepFolder":
        """The folder of a sweep that was launched.

        Raises:
            UserError: There is none of that name.
        """
        if name not in (there := self.sweeps(archived=True)):
            known = ", ".join(there) or "none yet"
            raise UserError(
                f"no sweep '{name}' in '{self.root}' (there: {known}){nearest(name, there)}",
                "name one of these, or another store with --store",
            )
        return self.sweep(name)

    def check_writable(self) -> None:
        """Make the store's folder.

        Raises:
            UserError: It cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"store '{self.root}' cannot be written: {error.strerror}", "name another with --store"
            ) from None


def _absolute(uri: str) -> str:
    """The URI of a SQLite file by its absolute path, as a resume may stand elsewhere; others as they are."""
    path = uri.removeprefix("sqlite:///")
    return uri if path in (uri, "") or path.startswith(("/", ":")) else f"sqlite:///{Path(path).absolute()}"


@dataclass(frozen=True)
class SweepFolder:
    """Files of one sweep outside MLflow.

    Attributes:
        root: The sweep's folder.
    """

    root: Path

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.root.name

    @property
    def sweep_file(self) -> Path:
        """The sweep as launched."""
        return self.root / "sweep.yaml"

    @property
    def warm_start_file(self) -> Path:
        """Trials of other sweeps that it was started warm from."""
        return self.root / "warm-start.json"

    @property
    def study_file(self) -> Path:
        """Optuna's journal."""
        return self.root / "study.journal"

    @property
    def archive_file(self) -> Path:
        """There while it is archived."""
        return self.root / "archived.json"

    @property
    def database_mark(self) -> Path:
        """There for a sweep whose study is in a database instead."""
        return self.root / "study.database"

    @property
    def curves_file(self) -> Path:
        """Recorded curves that stand for training, in a simulated sweep."""
        return self.root / "curves.csv"

    @property
    def simulated(self) -> bool:
        """Whether recorded curves stand for training."""
        return self.curves_file.exists()

    @property
    def event_log_file(self) -> Path:
        """Everything learned, in the order it was."""
        return self.root / "events.jsonl"

    @property
    def sent_file(self) -> Path:
        """How much of the event log MLflow has."""
        return self.root / "sent.json"

    @property
    def refused_file(self) -> Path:
        """Entries that MLflow refused, with its reason."""
        return self.root / "refused.jsonl"

    @property
    def notified_file(self) -> Path:
        """How much of the event log somebody was notified of."""
        return self.root / "notified.json"

    @property
    def server_file(self) -> Path:
        """URI of the MLflow server or database, where it is not the store's own."""
        return self.root / "tracking-uri"

    @property
    def checkpoint_url_file(self) -> Path:
        """URL of the sweep's place in the storage, where its trials do not have their checkpoints here."""
        return self.root / "checkpoint-url"

    @property
    def checkpoint_url(self) -> str:
        """That URL; empty where there is none."""
        return self.checkpoint_url_file.read_text(encoding="utf-8") if self.checkpoint_url_file.exists() else ""

    def trial_url(self, number: int) -> str:
        """URL of a trial's place in the storage; empty where there is none."""
        url = self.checkpoint_url
        return f"{url}/{number:05d}" if url else ""

    @property
    def log_file(self) -> Path:
        """What its drivers said, in lines of JSON."""
        return self.root / "driver.jsonl"

    @property
    def published(self) -> Path:
        """Front and report as last drawn."""
        return self.root / "published"

    @property
    def selection(self) -> Path:
        """Certifications of its trials, and the scores they rest on."""
        return self.root / "selection"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that runs the sweep."""
        return self.root / "driver.lock"

    @property
    def comparison(self) -> "ComparisonFolder":
        """Trainings of the closing comparison, laid out as a sweep's trials, and the scores it rests on."""
        return ComparisonFolder(self.root / "comparison")

    def logs(self, number: int) -> list[Path]:
        """What the workers of a trial printed, and the error that ended it, of every run of the sweep."""
        files = ("stdout", "stderr", "error.txt")
        return [path for path in sorted(self.root.glob(f"ray*/{number:05d}*/*")) if path.name in files]

    def logs_command(self, number: int) -> str:
        """How to look at them."""
        return f"halora trial logs {self.name}/{number}"

    def trial(self, number: int) -> Path:
        """Checkpoints and result of one trial."""
        return self.root / "trials" / f"{number:05d}"


class ComparisonFolder(SweepFolder):
    """Files of a closing comparison; its trainings stand where a sweep has trials."""

    @property
    def scores(self) -> Path:
        """Scores it took, a file for each evaluation."""
        return self.root / "scores"

    def logs_command(self, number: int) -> str:
        """How to look at what the workers of a training printed."""
        return f"ls {self.root}/ray*/{number:05d}*"
