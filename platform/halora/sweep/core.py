"""The decision core: what to try next, and what to do with a report. It knows no Ray; its only state is the study.

The study is an Optuna study in a journal file. The number of a trial there is its identity everywhere: in Ray, in
MLflow, in its checkpoint folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.hardware.energy import EnergyBreakdown
from halora.records.store import SweepFolder
from halora.spaces.language import Categorical, Distribution
from halora.spaces.sweep import SweepConfig
from halora.trial import TrialConfig, trial_energy

optuna.logging.set_verbosity(optuna.logging.WARNING)

_VALUES = "values"  # user attribute: searched values, written once all are chosen
_STOP = "stop_requested"


class Decision(StrEnum):
    """What to do with a trial after a report."""

    CONTINUE = "continue"
    PAUSE = "pause"
    """Stop it at its checkpoint; a resume goes on from there."""


@dataclass(frozen=True)
class Suggestion:
    """A trial to run.

    Attributes:
        number: Its identity in the sweep.
        values: Searched values by dotted path.
        config: The resolved trial.
        energy: Its energy per token, known before it is trained.
    """

    number: int
    values: dict[str, Any]
    config: TrialConfig
    energy: EnergyBreakdown


def open_study(sweep: SweepConfig, folder: SweepFolder) -> optuna.Study:
    """The sweep's study, created with its points to try first if it is new."""
    storage = JournalStorage(JournalFileBackend(str(folder.study_file)))
    try:
        return optuna.load_study(study_name=sweep.name, storage=storage)  # writes nothing
    except KeyError:
        study = optuna.create_study(
            study_name=sweep.name, storage=storage, directions=["maximize", "minimize"], load_if_exists=True
        )
    for point in sweep.first[: sweep.trials]:
        study.enqueue_trial(point)
    return study


class DecisionCore:
    """Suggests trials and judges their reports.

    Args:
        sweep: The sweep.
        study: Its study; everything decided is in there, so a new core goes on where another ended.
    """

    def __init__(self, sweep: SweepConfig, study: optuna.Study) -> None:
        self._sweep, self._study = sweep, study
        self._handed_out: set[int] = set()

    def suggest(self) -> Suggestion | None:
        """The next trial: first those that an earlier run left unfinished, then new ones; None when there is none."""
        if self.stopping:
            return None
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in self._handed_out:
                continue
            if _VALUES in trial.user_attrs:
                return self._hand_out(trial.number, trial.user_attrs[_VALUES])
            self.on_failure(trial.number)  # ended before its values were chosen
        if self.num_started >= self._sweep.trials:
            return None
        self._study.sampler = self._sampler(self.num_started)
        new = self._study.ask()
        values = choose(new, self._sweep.space)
        new.set_user_attr(_VALUES, values)
        return self._hand_out(new.number, values)

    def on_report(self, number: int, report: Mapping[str, Any]) -> Decision:
        """Judge a trial's intermediate report."""
        return Decision.PAUSE if self.stopping else Decision.CONTINUE

    def on_complete(self, number: int, accuracy: float, energy_uj_per_token: float) -> None:
        """Take a trial's objectives."""
        self._study.tell(number, [accuracy, energy_uj_per_token])

    def on_failure(self, number: int) -> None:
        """Take a trial's failure; the sampler sees it as failed."""
        self._study.tell(number, state=TrialState.FAIL)

    @property
    def num_started(self) -> int:
        """Trials asked for so far, however they ended."""
        trials = self._study.get_trials(deepcopy=False)
        return sum(trial.state != TrialState.WAITING for trial in trials)

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the trials that were begun and have not ended."""
        return [t.number for t in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]

    @property
    def stopping(self) -> bool:
        """Whether someone asked the sweep to stop."""
        return bool(self._study.user_attrs.get(_STOP, False))

    def request_stop(self, stop: bool = True) -> None:
        """Ask the process that runs the sweep to pause its trials and end; from any process."""
        self._study.set_user_attr(_STOP, stop)

    def counts(self) -> dict[str, int]:
        """Number of trials by state: finished, failed, unfinished, waiting (not begun yet)."""
        states = [trial.state for trial in self._study.get_trials(deepcopy=False)]
        begun = len(states) - states.count(TrialState.WAITING)
        return {
            "finished": states.count(TrialState.COMPLETE),
            "failed": states.count(TrialState.FAIL),
            "unfinished": states.count(TrialState.RUNNING),
            "waiting": max(self._sweep.trials - begun, 0),
        }

    def completed(self) -> list[FrozenTrial]:
        """Trials with objectives, by number."""
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def suggestion(self, number: int) -> Suggestion:
        """A trial that was suggested before."""
        values = self._study.get_trials(deepcopy=False)[number].user_attrs[_VALUES]
        return self._suggestion(number, values)

    def _hand_out(self, number: int, values: dict[str, Any]) -> Suggestion:
        self._handed_out.add(number)
        return self._suggestion(number, values)

    def _suggestion(self, number: int, values: dict[str, Any]) -> Suggestion:
        config = self._sweep.resolve(values)
        return Suggestion(number, values, config, trial_energy(config))

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Seeded by (sweep seed, number): a suggestion depends on the history it sees, not on who asks."""
        seed = derive_seed("sampler", self._sweep.seed, number) % 2**32
        return optuna.samplers.TPESampler(seed=seed)


def choose(trial: optuna.Trial, space: Mapping[str, Distribution]) -> dict[str, Any]:
    """Values for every searched field whose condition holds, in the order of the sweep file."""
    values: dict[str, Any] = {}
    for path, distribution in space.items():
        if not distribution.applies(values):
            continue
        if isinstance(distribution, Categorical):
            values[path] = trial.suggest_categorical(path, distribution.choices)
        elif distribution.kind == "int":
            low, high = int(distribution.low), int(distribution.high)
            values[path] = trial.suggest_int(path, low, high, log=distribution.log)
        else:
            values[path] = trial.suggest_float(path, distribution.low, distribution.high, log=distribution.log)
    return values


def free_knobs(sweep: SweepConfig) -> list[str]:
    """Searched settings of the chip that change no energy the chip counts, so that the search takes them for free."""
    free = []
    for path, distribution in sweep.space.items():
        if not path.startswith("chip."):
            continue
        trials = [sweep.resolve({**distribution.condition, path: value}) for value in distribution.probes]
        if len({trial_energy(trial).total_uj_per_token for trial in trials}) == 1:
            free.append(path)
    return free


def check_not_launched(folder: SweepFolder) -> None:
    """Refuse a sweep name that is taken.

    Raises:
        UserError: With the ways to go on.
    """
    if folder.root.exists():
        raise UserError(
            f"sweep '{folder.name}' was launched before",
            f"go on with `halora sweep resume {folder.name}`, or launch under another name with --name",
        )
