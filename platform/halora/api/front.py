"""The Pareto front of a sweep, to be filtered, tabulated and drawn."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from halora.analysis.summary import FrontView, view_front
from halora.analysis.trials import RecordedTrial, check_objectives, filtered, objective, sweep_objectives
from halora.api.store import Store, data_frame
from halora.errors import UserError
from halora.sweep.run.state import load_sweep_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from halora.api.adapter import Adapter


class Front:
    """The trials of a sweep that no other beats in every objective; made by `Store.front` and `Sweep.front`.

    Iterating gives its members, from the best to the worst in the last objective, as records with `number`, `params`,
    `labels` and `metrics`.

    Attributes:
        sweep: Name of the sweep.
        view: Members, all other trials by why they are not, and how sure each one's place is.
    """

    def __init__(
        self,
        store: Store,
        sweep: str,
        objectives: Sequence[str] = (),
        conditions: Sequence[str] = (),
    ) -> None:
        self.sweep = sweep
        self._store, self._named, self._conditions = store, tuple(objectives), tuple(conditions)
        points = store.trials(sweep)
        aims = [objective(text) for text in objectives] or sweep_objectives(load_sweep_of(store.place.existing(sweep)))
        check_objectives(points, aims)
        self.view: FrontView = view_front(filtered(points, conditions), aims)

    def filter(self, *conditions: str) -> "Front":
        """The front of the trials that meet all conditions as well, e.g. `"method=halora"` or `"rank>=4"`.

        Raises:
            UserError: A condition is malformed, or no trial has its field.
        """
        return Front(self._store, self.sweep, self._named, (*self._conditions, *conditions))

    def knee(self) -> RecordedTrial | None:
        """The member furthest beyond the line through the front's ends; none of an empty front."""
        return self.view.knee

    def adapter(self, trial: int | None = None) -> "Adapter":
        """The adapter of a trial; of the knee where none is named.

        Raises:
            UserError: The front is empty, or there is no such trial.
        """
        if trial is None:
            if self.view.knee is None:
                raise UserError(f"the front of '{self.sweep}' is empty")
            trial = self.view.knee.number
        return self._store.adapter(f"{self.sweep}/{trial}")

    def to_pandas(self, *, everything: bool = False) -> "DataFrame":
        """Members as a table, see docs/records.md for its columns; with `everything` all trials of the sweep.

        Filtered, the trials that meet the conditions.
        """
        groups = self.view.groups
        shown = self.view.members
        if everything:
            ended = (groups.failed, groups.stopped, groups.discarded)
            parts = (groups.feasible, groups.violating, groups.unscored, *ended, groups.open)
            shown = sorted((point for part in parts for point in part), key=lambda point: point.number)
        return data_frame(self._store.place, [(self.sweep, point, self.view) for point in shown])

    def figure(self) -> "Figure":
        """The objectives against each other, accuracy with its intervals, for a notebook or `savefig`."""
        from halora.analysis.figures import front_figure

        return front_figure(self.view, f"{self.sweep}: {len(self.view.groups.feasible)} trials")

    def __len__(self) -> int:
        return len(self.view.members)

    def __iter__(self) -> Iterator[RecordedTrial]:
        return iter(self.view.members)

    def __repr__(self) -> str:
        return f"Front({self.sweep!r}, {len(self)} of {len(self.view.groups.feasible)} finished trials)"
