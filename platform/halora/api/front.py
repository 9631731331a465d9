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

    from halora.analysis.recommendation import Recommendation
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
        """The member furthest beyond the line through the front's ends; none where nothing lies beyond it."""
        return self.view.knee

    def recommendation(self) -> "Recommendation":
        """Which of the trials to take, how sure that is and what to run next; `text` has it in words.

        Raises:
            UserError: What is kept of the sweep's certifications is damaged.
        """
        from halora.analysis.recommendation import Progress, named_baselines, recommend
        from halora.records.index import read_sweep_state
        from halora.selection.certification import certified_trials
        from halora.sweep.run.state import is_running

        folder = self._store.place.existing(self.sweep)
        sweep, recorded = load_sweep_of(folder), read_sweep_state(self._store.place, self.sweep)
        progress = Progress(is_running(folder), folder.simulated, recorded.comparison, certified_trials(folder))
        return recommend(sweep, self.view, progress, named_baselines(sweep, self.view))

    def adapter(self, trial: int | None = None) -> "Adapter":
        """The adapter of a trial; of the recommended one where none is named.

        Raises:
            UserError: There is no such trial, or none to recommend.
        """
        if trial is None:
            recommended = self.recommendation()
            if recommended.trial is None:
                raise UserError(f"sweep '{self.sweep}': {recommended.text}")
            trial = recommended.trial.number
        return self._store.adapter(f"{self.sweep}/{trial}")

    def to_pandas(self, *, everything: bool = False) -> "DataFrame":
        """Members as a table, see docs/records.md for its columns; with `everything` all trials of the sweep.

        Filtered, the trials that meet the conditions.
        """
        shown = self.view.groups.all if everything else self.view.members
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
