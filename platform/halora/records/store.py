"""Where a machine keeps its sweeps: one folder with MLflow's database, its artifacts, and a folder per sweep."""

import os
from dataclasses import dataclass
from pathlib import Path

from halora.errors import UserError, nearest


@dataclass(frozen=True)
class Store:
    """A store on disk.

    Attributes:
        root: Its folder, absolute.
    """

    root: Path

    @classmethod
    def default(cls) -> "Store":
        """The store of `HALORA_STORE`, or `halora-store` in the current folder."""
        return cls(Path(os.environ.get("HALORA_STORE", "halora-store")).expanduser().resolve())

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI: SQLite in the store."""
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Root of MLflow's artifacts."""
        return self.root / "artifacts"

    def sweep(self, name: str) -> "SweepFolder":
        """The folder of a sweep, which need not exist."""
        return SweepFolder(self.root / "sweeps" / name)

    def sweeps(self) -> list[str]:
        """Names of the sweeps in the store, newest last."""
        found = sorted((self.root / "sweeps").glob("*/sweep.yaml"), key=lambda path: path.stat().st_mtime)
        return [path.parent.name for path in found]

    def existing(self, name: str) -> "SweepFolder":
        """The folder of a sweep that was launched.

        Raises:
            UserError: There is none of that name.
        """
        if name not in self.sweeps():
            known = ", ".join(self.sweeps()) or "none yet"
            raise UserError(
                f"no sweep '{name}' in '{self.root}' (there: {known}){nearest(name, self.sweeps())}",
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
    def study_file(self) -> Path:
        """Optuna's journal."""
        return self.root / "study.journal"

    @property
    def database_mark(self) -> Path:
        """There for a sweep whose study is in a database instead."""
        return self.root / "study.database"

    @property
    def curves_file(self) -> Path:
        """Recorded curves that stand for training, in a simulated sweep."""
        return self.root / "curves.csv"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that runs the sweep."""
        return self.root / "driver.lock"

    def trial(self, number: int) -> Path:
        """Checkpoints and result of one trial."""
        return self.root / "trials" / f"{number:05d}"
