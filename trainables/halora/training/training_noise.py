"""The noise a training meets, step by step, as its schedule says.

The strength follows the step; a redraw changes what is drawn. Everything is a function of (trial, step), so a restored
run meets the same noise. Nothing here draws: a schedule names the chip instance of a step by its address, and the same
address at another strength is the same draw, scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from random import Random

from halora.hardware.addressing import NoiseKey, Role, derive_seed
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.settings.schedule import NoiseSchedule, at_time

MOST_MOVED = 0.05
"""Noisy weights keep the strength they were made with until the schedule's has moved from it by more than this share,
0.4 dB; see `TrainingNoise`."""


@dataclass(frozen=True)
class Draw:
    """The noise in force at a step.

    Attributes:
        index: Number of the draw; equal for the steps that share it.
        strength: Strength of the noise model of the trial's chip in force; 0 for a clean draw.
        instance: The chip instance; none for a clean draw.
    """

    index: int
    strength: float
    instance: ChipInstance | None


@dataclass(frozen=True)
class _Choice:
    """What is chosen once per draw.

    Attributes:
        index: Number of the draw.
        key: Address of the chip instance.
        chance: Where the shape `random` stands.
        chip: The chip; none for a clean draw.
        other_strength: The chip's own strength of noise where it is not the trial's chip.
    """

    index: int
    key: NoiseKey
    chance: float
    chip: Chip | None = None
    other_strength: float | None = None


class TrainingNoise:
    """The chip instances that one training meets, and how strong the noise of each is at a step.

    Another strength means making the noisy weights again, from the same draws. That takes tenths of a second to seconds
    (docs/decisions/012), so it is done only where the schedule has moved by more than `MOST_MOVED` of the strength in
    force; and exactly at a redraw, at the last step, and where the schedule rests or turns, so that all its ends are
    met as they are written. What is in force follows from the steps since the redraw alone, whichever of them this
    process took itself, and is the same whether a copy is kept or not.

    Args:
        schedule: When, how strong and where.
        chip: The trial's chip.
        seed: The trial's seed.
        steps: Optimiser steps of the whole training.
        epoch_steps: Optimiser steps of one pass over the rows; may be a fraction.
        layers: Canonical names of the mapped layers, in the order of the forward pass.
    """

    def __init__(
        self, schedule: NoiseSchedule, chip: Chip, seed: int, steps: int, epoch_steps: float, layers: Sequence[str]
    ) -> None:
        self.redraw_steps = ceil(epoch_steps) if schedule.redraw_steps == "epoch" else schedule.redraw_steps
        self._schedule, self._chip, self._seed, self._steps = schedule, chip, seed, steps
        self._multipliers = schedule.layers.multipliers(layers, chip)
        self._chosen = self._choose(0)
        self._known = -1, 0.0  # the last step asked for, and the strength in force then

    def at(self, step: int) -> Draw:
        """The noise in force at a step."""
        if self._chosen.index != (index := step // self.redraw_steps):
            self._chosen = self._choose(index)
        choice = self._chosen
        if choice.chip is None:
            return Draw(index, 0.0, None)
        strength = self._in_force(step, choice)
        own = strength if choice.other_strength is None else choice.other_strength * strength / self._chip.noise.level
        return Draw(index, strength, ChipInstance(choice.chip, choice.key, own, self._multipliers))

    def _strength(self, step: int, choice: _Choice) -> float:
        return self._schedule.strength(step, self._steps, choice.chance)

    def _in_force(self, step: int, choice: _Choice) -> float:
        """The strength that the noisy weights were made with, the last time that was called for up to a step."""
        first = choice.index * self.redraw_steps
        known, held = self._known
        if not first <= known <= step:
            known, held = first, self._strength(first, choice)
        for each in range(known + 1, step + 1):
            before, now, after = (self._strength(near, choice) for near in (each - 1, each, each + 1))
            turns = (now - before) * (after - now) <= 0
            if turns or each == self._steps - 1 or abs(now - held) > MOST_MOVED * held:
                held = now
        self._known = step, held
        return held

    def _choose(self, index: int) -> _Choice:
        """What the address of a draw chooses."""
        schedule, chance = self._schedule, Random(derive_seed("draw", self._seed, index))
        number = index if schedule.chips is None else index % schedule.chips
        choice = _Choice(
            index,
            NoiseKey(role=Role.TRAIN, chip_seed=derive_seed(self._seed, number)),
            chance.random() if schedule.shape == "random" else 0.0,
        )
        if chance.random() < schedule.clean_probability:
            return choice
        others = schedule.others
        other = chance.choices([None, *others], [1.0, *(other.weight for other in others)])[0]
        chip = other.chip if other else self._chip
        if schedule.time_s is not None:
            shortest, longest = schedule.time_s
            chip = at_time(chip, shortest * (longest / shortest) ** chance.random())
        return replace(choice, chip=chip, other_strength=other.chip.noise.level if other else None)
