"""A store of sweeps, read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halora.analysis.summary import FrontView, view_front
from halora.analysis.table import table
from halora.analysis.trials import Objective, RecordedTrial, sweep_objectives
from halora.api.progress import say
from halora.errors import UserError
from halora.records import store as records
from halora.records.index import read_sweep_state

if TYPE_CHECKING:
    from pandas import DataFrame

    from halora.api.adapter import Adapter
    from halora.api.front import Front
    from halora.api.sweep import Sweep


class Store:
    """The folder of sweeps, records and files; looking into it makes nothing.

    Args:
        folder: Its folder, or itself as the commands take it; `$HALORA_STORE`, or `./halora-store`.
        tracking_uri: MLflow server or database to record in; `$HALORA_TRACKING_URI`, or a SQLite file in the store.
        checkpoint_url: Path or URL for checkpoints, which every worker reaches; `$HALORA_CHECKPOINT_URL`, or the store.

    Attributes:
        place: The same, as the commands take it.

    Raises:
        UserError: A URL holds a secret, or is none that fsspec knows.
    """

    def __init__(
        self,
        folder: str | Path | records.Store | None = None,
        *,
        tracking_uri: str | None = None,
        checkpoint_url: str | None = None,
    ) -> None:
        if isinstance(folder, records.Store):
            self.place = folder
        else:
            self.place = records.Store.at(None if folder is None else Path(folder), tracking_uri, checkpoint_url)

    def sweeps(self, *, archived: bool = False) -> list[str]:
        """Names of the sweeps in the store, newest last; with `archived` those that are, too."""
        return self.place.sweeps(archived=archived)

    def archive(self, sweep: str) -> None:
        """Put a sweep aside: lists and the page leave it out, and what MLflow has as well is freed here.

        Raises:
            UserError: There is no such sweep, it is running, or MLflow lacks records of it.
            UnreachableError: MLflow or the storage does not answer; to be repeated.
        """
        from halora.sweep.run.archive import archive

        archive(sweep, self.place, say)

    def unarchive(self, sweep: str) -> None:
        """Bring an archived sweep back as it was.

        Raises:
            UserError: There is no such sweep, or MLflow has lost an adapter.
            UnreachableError: MLflow does not answer; to be repeated.
        """
        from halora.sweep.run.archive import unarchive

        unarchive(sweep, self.place)

    def delete(self, sweep: str, *, with_adapters: bool = False) -> None:
        """Delete a sweep: its folder, study, runs in MLflow with their artifacts, and checkpoints. Nobody is asked.

        Interrupted, it is to be repeated; the name is free from its first moment on.

        Args:
            sweep: Its name.
            with_adapters: Delete its registered adapters as well.

        Raises:
            UserError: There is no such sweep, it is running or being certified, or adapters of it are registered.
            UnreachableError: MLflow, the study's database or the storage does not answer; to be repeated.
        """
        from halora.sweep.run.deletion import delete

        delete(sweep, self.place, say, with_adapters=with_adapters)

    def sweep(self, name: str) -> "Sweep":
        """A launched sweep, to be resumed, stopped or looked at.

        Raises:
            UserError: There is none of that name.
        """
        from halora.api.sweep import Sweep
        from halora.sweep.run.state import load_sweep_of

        return Sweep(load_sweep_of(self.place.existing(name)), store=self)

    def front(self, sweep: str, *, objectives: Sequence[str] = ()) -> "Front":
        """The Pareto front of a sweep.

        Args:
            sweep: Its name.
            objectives: Two or three metrics instead of accuracy and energy; `METRIC:max` or `METRIC:min` where the name
                does not tell which is better.

        Raises:
            UserError: There is no such sweep, or no trial has such a metric.
        """
        from halora.api.front import Front

        return Front(self, sweep, objectives)

    def adapter(self, reference: str) -> "Adapter":
        """The adapter of a trial, `SWEEP/NUMBER`, or a registered one, `NAME@ALIAS` or `NAME/VERSION`.

        Raises:
            UserError: There is none.
        """
        from halora.api.adapter import Adapter

        return Adapter(reference, store=self)

    def trials(self, sweep: str) -> list[RecordedTrial]:
        """Trials of a sweep as they are recorded, by number.

        Raises:
            UserError: There is no such sweep, or its records are damaged.
        """
        self.place.existing(sweep)
        return read_sweep_state(self.place, sweep).points()

    def to_pandas(self, *sweeps: str) -> "DataFrame":
        """All trials of some sweeps, of all where none is named, as a table with the columns of docs/records.md.

        Raises:
            UserError: There is no such sweep.
        """
        found = {name: self.trials(name) for name in sweeps or self.sweeps()}
        views = {name: view_front(points, self._objectives(name)) for name, points in found.items()}
        return data_frame(
            self.place, [(name, point, views[name]) for name, points in found.items() for point in points]
        )

    def _objectives(self, sweep: str) -> tuple[Objective, ...]:
        from halora.sweep.run.state import load_sweep_of

        return sweep_objectives(load_sweep_of(self.place.sweep(sweep)))

    def export(self, file: str | Path, *sweeps: str) -> int:
        """Write what `to_pandas` gives to a new `.csv` or `.parquet` file; the number of trials.

        Raises:
            UserError: The file exists, cannot be written or has another ending, or there is no such sweep.
        """
        path = Path(file)
        if path.suffix not in (".csv", ".parquet"):
            raise UserError(f"'{path}': the name must end in .csv or .parquet")
        if path.exists():
            raise UserError(f"'{path}' exists", "name a new file")
        found = self.to_pandas(*sweeps)
        try:
            if path.suffix == ".csv":
                found.to_csv(path, index=False, date_format="%Y-%m-%dT%H:%M:%S.%f%z")
            else:
                found.to_parquet(path, index=False)
        except OSError as error:
            raise UserError(f"'{path}' cannot be written: {error.strerror or error}") from None
        return len(found)

    def __repr__(self) -> str:
        return f"Store({str(self.place.root)!r}, {len(self.sweeps())} sweeps)"


def data_frame(place: records.Store, trials: Sequence[tuple[str, RecordedTrial, FrontView]]) -> "DataFrame":
    """Trials, each with its sweep and the front it is seen in, as a table with the columns of docs/records.md."""
    from pandas import DataFrame

    from halora.sweep.run.state import load_sweep_of

    launches = {name: load_sweep_of(place.sweep(name)).launch for name in {name for name, *_ in trials}}
    columns, rows = table([(name, launches[name], point, view) for name, point, view in trials])
    return DataFrame(rows, columns=list(columns)).astype(columns)
