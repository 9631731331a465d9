"""What a sweep's chips do to its untrained bases: which of them are scored before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halora.errors import UserError
from halora.evaluation.damage import Damage, described
from halora.settings.names import model_id
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import SweepConfig
from halora.training.tasks import load_rows

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores


@dataclass(frozen=True)
class Base:
    """A bare base on a chip.

    Attributes:
        name: Which base on which chip, in words.
        config: A trial that has them, to be scored on the probe's rows and chip instances.
    """

    name: str
    config: TrialConfig

    def damage(self, scores: "ChipScores") -> Damage:
        """What the scores of the base show."""
        evaluation = self.config.evaluation
        rows = load_rows(self.config.task, "validation", evaluation.rows)
        return Damage.of(self.name, scores, rows, evaluation.scoring)


def bases(sweep: SweepConfig, say: Callable[[str], None]) -> list[Base]:
    """Pairs of a model and a chip that the sweep names: the fixed ones, those of `first`, of choices, its named chips.

    No more than `probe.most`; none where the sweep does not probe.
    """
    probe = sweep.probe
    if probe is None:
        return []
    points: list[Mapping[str, Any]] = [{}, *sweep.first]
    for path in ("model", "chip"):
        points += [{path: value} for value in sweep.values_of(path)] if path in sweep.space else []
    named = [(point, sweep.resolve(point)) for point in points]
    named += [({}, named[0][1].model_copy(update={"chip": sweep.chip(chip)})) for chip in sweep.chips]
    found: list[Base] = []
    for point, config in named:
        if all((config.model, config.chip) != (known.config.model, known.config.chip) for known in found):
            own = config.evaluation
            rows = probe.rows if own.rows is None else min(own.rows, probe.rows)
            few = own.at_own_strength().model_copy(update={"rows": rows, "chip_instances": probe.chip_instances})
            found.append(Base(_name(point, config), config.model_copy(update={"evaluation": few})))
    if left_out := len(found[probe.most :]):
        say(f"{left_out} of {len(found)} pairs of a base and a chip are not looked at before training, see probe.most")
    return found[: probe.most]


def _name(point: Mapping[str, Any], config: TrialConfig) -> str:
    changed = [f"{path.removeprefix('chip.')} {value}" for path, value in point.items() if path.startswith("chip.")]
    return f"{model_id(config.model)} on {config.chip.name}{f' ({", ".join(changed)})' if changed else ''}"


class Probing:
    """Bases to score before the first trial, each once, and what comes of them.

    Args:
        bases: The bases.
        say: Given each line that is to be told.
        done: Given all outcomes once the last base is scored, see `halora.evaluation.damage.described`.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        say: Callable[[str], None],
        done: Callable[[Sequence[dict[str, Any]]], None] = lambda outcomes: None,
    ) -> None:
        self._waiting = list(bases)
        self._in_hand: dict[str, Base] = {}
        self._outcomes: list[dict[str, Any]] = []
        self._say, self._done = say, done

    @property
    def over(self) -> bool:
        """Whether nothing is left to score."""
        return not self._waiting and not self._in_hand

    def begin(self, key: str) -> Base | None:
        """The next base, kept under the key; none where all are in hand."""
        if not self._waiting:
            return None
        self._in_hand[key] = self._waiting.pop(0)
        return self._in_hand[key]

    def holds(self, key: str) -> bool:
        """Whether a base is in hand under the key."""
        return key in self._in_hand

    def scored(self, key: str, scores: "ChipScores") -> None:
        """Take the scores of a base."""
        try:
            outcome = self._in_hand[key].damage(scores).to_json()
        except UserError as error:
            self.failed(key, str(error))
        else:
            self._take(key, outcome)

    def failed(self, key: str, cause: str) -> None:
        """Take why a base could not be scored."""
        self._take(key, {"base": self._in_hand[key].name, "cause": cause})

    def _take(self, key: str, outcome: dict[str, Any]) -> None:
        del self._in_hand[key]
        self._outcomes.append(outcome)
        for line in described([outcome]):
            self._say(line)
        if self.over:
            self._done(self._outcomes)
