"""A sweep: checked, launched, resumed and looked at."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halora.api.store import Store
from halora.errors import UserError
from halora.spaces.sweep import SweepConfig, load_sweep, sweep_from

if TYPE_CHECKING:
    from halora.api.front import Front
    from halora.sweep.run.launch import Outcome


class Sweep:
    """A sweep by a shipped name, a YAML file or a mapping, and what becomes of it in a store.

    Args:
        source: A shipped sweep's name, the path of a YAML file, a mapping as such a file holds, or a checked sweep.
        overrides: Values by dotted path, e.g. `{"trial.training.steps": 40}`.
        name: Its name in the store; the file's where left out.
        seed: Its seed; the file's where left out.
        store: A `Store` or its folder.
    """

    def __init__(
        self,
        source: str | Path | Mapping[str, Any] | SweepConfig,
        overrides: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        seed: int | None = None,
        store: Store | str | Path | None = None,
    ) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        self._source = str(source) if isinstance(source, Path) else source
        own = {"name": name, "seed": seed}
        self._overrides = {**(overrides or {}), **{key: value for key, value in own.items() if value is not None}}

    @cached_property
    def config(self) -> SweepConfig:
        """The sweep, checked.

        Raises:
            UserError: With every mistake.
        """
        if isinstance(self._source, SweepConfig):
            return self._source
        if isinstance(self._source, str):
            return load_sweep(self._source, self._overrides)
        return sweep_from(self._source, "the sweep", self._overrides)

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self.config.name

    def validate(self) -> "Sweep":
        """Check all of it, without launching anything.

        Raises:
            UserError: With every mistake.
        """
        assert self.config
        return self

    def launch(
        self,
        table: str | Path | None = None,
        *,
        address: str | None = None,
        wheel: Path | None = None,
        metrics_port: int | None = None,
        progress: bool = True,
    ) -> "Outcome":
        """Run it to its end; interrupted, it keeps everything up to the last report, and can be resumed.

        Args:
            table: A CSV table of recorded curves to take results from, instead of training.
            address: Ray cluster, `auto` or `HOST:PORT`; this machine alone where left out.
            wheel: Wheel whose code all nodes of the cluster are to use.
            metrics_port: Port to serve metrics to Prometheus at, on the loopback address.
            progress: Show a bar on a terminal, lines elsewhere.

        Returns:
            Whether it came to its end, how many trials failed, and the closing comparison.

        Raises:
            UserError: With every mistake; or its name is taken, or it could not run.
            UnreachableError: MLflow, the storage or the cluster does not answer.
        """
        from halora.api.progress import shown_progress
        from halora.sweep.run.launch import launch

        cluster, curves = _cluster(address, wheel), None if table is None else Path(table)
        with shown_progress(progress, self.config.trials) as shown:
            return launch(self.config, self.store.place, shown, curves, cluster=cluster, metrics_port=metrics_port)

    def resume(
        self,
        *,
        address: str | None = None,
        wheel: Path | None = None,
        metrics_port: int | None = None,
        progress: bool = True,
    ) -> "Outcome":
        """Go on with it: unfinished trials from their checkpoints, then the rest, and records that MLflow lacks.

        Arguments, results and errors are those of `launch`.
        """
        from halora.api.progress import shown_progress
        from halora.sweep.run.launch import resume
        from halora.sweep.run.state import load_core

        cluster = _cluster(address, wheel)
        config, core = load_core(self.name, self.store.place)
        counts = core.counts()
        with shown_progress(progress, config.trials, counts["finished"], counts["failed"]) as shown:
            return resume(self.name, self.store.place, shown, cluster=cluster, metrics_port=metrics_port)

    def stop(self) -> bool:
        """Ask its driver to pause the trials at their next report, and to end; whether there is one that runs it.

        Raises:
            UserError: It was not launched.
        """
        from halora.sweep.run.state import is_running, load_core

        _, core = load_core(self.name, self.store.place)
        if running := is_running(self.store.place.sweep(self.name)):
            core.request_stop()
        return running

    def stop_trial(self, number: int) -> None:
        """End a trial's training at its next report; it is scored there, and takes its place among the finished.

        Of a sweep that nobody runs, that happens when it is resumed.

        Raises:
            UserError: There is no such trial, or it has ended.
        """
        from halora.sweep.run.state import load_study
        from halora.sweep.search.requests import cut_short

        cut_short(*load_study(self.name, self.store.place), number)

    def discard_trial(self, number: int) -> None:
        """Take a trial out for good: it ends at its next report, its checkpoints go, and it is on no front.

        Records of a sweep that nobody runs are brought up to that at once.

        Raises:
            UserError: There is no such trial, or it was never trained.
            UnreachableError: MLflow does not answer.
        """
        from halora.sweep.run.reconcile import close_records
        from halora.sweep.run.state import is_running, load_study
        from halora.sweep.search.requests import discard

        place = self.store.place
        discard(*load_study(self.name, place), number)
        if not is_running(place.sweep(self.name)):
            close_records(self.name, place, lambda text: None)

    def clone_trial(self, number: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Have a trial begun next that is like another but for some searched values, beside the number asked for.

        Of a sweep that nobody runs, that happens when it is resumed.

        Args:
            number: The other trial.
            overrides: Values by dotted path.

        Returns:
            All its values.

        Raises:
            UserError: With every mistake.
        """
        from halora.sweep.run.state import load_study
        from halora.sweep.search.requests import clone

        return clone(*load_study(self.name, self.store.place), number, overrides)

    def status(self) -> dict[str, Any]:
        """Its name, whether it is `running`, `ended` or `interrupted`, its trials by state, and GPU hours of a budget.

        While it runs also since when, in UTC, and in which `job` of Slurm, where it is one.

        Raises:
            UserError: It was not launched, or its files cannot be read.
        """
        from halora.sweep.run.state import driver_of, is_running, load_core

        config, core = load_core(self.name, self.store.place)
        counts = core.counts()
        ended = counts["waiting"] == counts["unfinished"] == 0
        folder = self.store.place.sweep(self.name)
        state = "running" if is_running(folder) else "ended" if ended else "interrupted"
        driver = {key: value for key, value in driver_of(folder).items() if key in ("job", "since") and value}
        spent = {"gpu_hours": core.spending.gpu_hours} if config.budget.gpu_hours else {}
        return {"sweep": self.name, "state": state, "trials": config.trials, **counts, **spent, **driver}

    def front(self, *, objectives: Sequence[str] = ()) -> "Front":
        """Its Pareto front as recorded now, see `Store.front`."""
        return self.store.front(self.name, objectives=objectives)

    def __repr__(self) -> str:
        return f"Sweep({self._source if isinstance(self._source, str) else self.name!r}, store={self.store.place.root})"


def _cluster(address: str | None, wheel: Path | None) -> Any:
    from halora.sweep.cluster.cluster import Cluster

    cluster = Cluster.at(address, wheel)
    if cluster.elsewhere:
        raise UserError(
            f"address {address}: from Python a sweep is driven on a machine of the cluster",
            f"there, name it `auto`; from here, `halora sweep launch FILE --address {address}` does it",
        )
    return cluster
