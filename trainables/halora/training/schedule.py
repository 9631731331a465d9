"""The noise a training meets, step by step: how strong, how often redrawn, on which chips and where it is stronger.

Everything is a function of (trial, step), so a restored run meets the same noise. Nothing here draws or needs torch:
a schedule names the chip instance of a step by its address.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, cos, floor, pi
from random import Random
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role, derive_seed
from halora.hardware.chip import Chip, ChipSetting
from halora.hardware.description import Frozen
from halora.hardware.instance import ChipInstance

Shape = Literal["constant", "linear", "cosine", "step", "cyclic", "random"]


class LayerLaw(Frozen):
    """Multiplier of sigma per layer, from `first` to `last` by equal factors along an order of the layers."""

    order: Literal["depth", "sensitivity"] = "depth"
    """By block, or as `chip.mapping.ranking` has the layers, most sensitive first and the layers it leaves out last."""
    first: float = Field(default=1.0, gt=0, le=100)
    last: float = Field(default=1.0, gt=0, le=100)

    def multipliers(self, layers: Sequence[str], chip: Chip) -> dict[str, float]:
        """The multiplier of every layer, given their canonical names in the order of the forward pass."""
        if self.first == self.last == 1:
            return {}
        places = _block_numbers(layers) if self.order == "depth" else _ranks(layers, chip)
        span = max(max(places.values()), 1)
        return {name: self.first * (self.last / self.first) ** (place / span) for name, place in places.items()}


class OtherChip(Frozen):
    """A chip that some draws are made on instead of the trial's own, so that training meets a mixture of noise."""

    chip: ChipSetting
    weight: float = Field(default=1.0, gt=0)
    """Share of the draws, relative to 1 for the trial's own chip."""


class NoiseSchedule(Frozen):
    """The training noise over the steps. It changes only where it is redrawn."""

    shape: Shape = "constant"
    """How sigma goes from `sigma_start` to `sigma_end`: at once, straight, along half a cosine, in `stages` equal
    steps, to and fro `cycles` times, or anywhere between them at random for every draw."""
    sigma_start: float = Field(default=0.01, ge=0, le=100)
    """Level of the chip's noise model, in its own measure: sigma of Gaussian noise, strength of a model of cells."""
    sigma_end: float | None = Field(default=None, ge=0, le=100)
    """Required by every shape but `constant`, which must not have it."""
    stages: int = Field(default=4, ge=2)
    """Read by `step` only."""
    cycles: int = Field(default=4, ge=1)
    """Read by `cyclic` only."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which sigma rises from 0 to what the shape says."""
    redraw_steps: Annotated[int, Field(ge=1)] | Literal["epoch"] = 400
    """Optimiser steps between two draws; the paper redraws every 400."""
    chips: int | None = Field(default=None, ge=1)
    """Train on this many chip instances, in turn; every draw is a new one when left out."""
    clean_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of the draws that are no noise at all."""
    layers: LayerLaw = LayerLaw()
    others: tuple[OtherChip, ...] = ()
    """Further chips to draw from; each is at its own noise level where sigma is at the trial's chip's."""
    time_s: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Shortest and longest time since programming, drawn evenly in its logarithm; the chip's own when left out."""

    @model_validator(mode="after")
    def _end_belongs_to_changing_shapes(self) -> "NoiseSchedule":
        if (self.shape == "constant") != (self.sigma_end is None):
            wanted = "not allowed" if self.shape == "constant" else "required"
            raise ValueError(f"sigma_end is {wanted} for shape '{self.shape}'")
        if self.time_s and self.time_s[0] > self.time_s[1]:
            raise ValueError(f"time_s goes from short to long, not from {self.time_s[0]:g} to {self.time_s[1]:g} s")
        return self

    def problems(self, chip: Chip) -> list[str]:
        """Why this schedule and the trial's chip cannot go together; empty when they can."""
        problems = []
        if self.layers.order == "sensitivity" and chip.mapping.ranking == "depth":
            problems.append("layers.order: 'sensitivity' needs chip.mapping.ranking, see halora noise sensitivity")
        if self.others and chip.noise.level == 0:
            problems.append("others: the trial's chip has no noise level that theirs could be relative to")
        if self.time_s is not None:
            chips = {"time_s": chip, **{f"others[{i}].chip": other.chip for i, other in enumerate(self.others)}}
            for where, described in chips.items():
                problems += [f"{where}: {problem}" for problem in _ageing_problems(described, self.time_s)]
        return problems

    def sigma(self, progress: float, chance: Random) -> float:
        """The shape's value.

        Args:
            progress: Share of the steps taken, in [0, 1].
            chance: Read by `random` only.
        """
        start, end = self.sigma_start, self.sigma_start if self.sigma_end is None else self.sigma_end
        match self.shape:
            case "constant" | "linear":
                share = progress
            case "cosine":
                share = (1 - cos(pi * progress)) / 2
            case "step":
                share = min(floor(progress * self.stages), self.stages - 1) / (self.stages - 1)
            case "cyclic":
                share = 1 - abs(1 - 2 * (progress * self.cycles % 1))
            case "random":
                share = chance.random()
        return start + (end - start) * share


@dataclass(frozen=True)
class Draw:
    """The noise in force from one redraw to the next.

    Attributes:
        index: Number of the draw; equal for the steps that share it.
        sigma: Level of the trial's chip's noise model that it stands for; 0 for a clean draw.
        instance: The chip instance; none for a clean draw.
    """

    index: int
    sigma: float
    instance: ChipInstance | None


class TrainingNoise:
    """The chip instances that one training meets.

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
        self._schedule, self._chip, self._seed, self._steps = schedule, chip, seed, steps
        self._redraw_steps = ceil(epoch_steps) if schedule.redraw_steps == "epoch" else schedule.redraw_steps
        self._multipliers = schedule.layers.multipliers(layers, chip)

    def at(self, step: int) -> Draw:
        """The draw in force at a step."""
        schedule, index = self._schedule, step // self._redraw_steps
        drawn_at = index * self._redraw_steps
        chance = Random(derive_seed("draw", self._seed, index))
        sigma = schedule.sigma(drawn_at / max(self._steps - 1, 1), chance)
        sigma *= min(1.0, (drawn_at + 1) / (schedule.warmup_steps + 1))
        if chance.random() < schedule.clean_probability:
            return Draw(index, 0.0, None)
        chip, level = self._choose(chance, sigma)
        if schedule.time_s is not None:
            shortest, longest = schedule.time_s
            chip = _at_time(chip, shortest * (longest / shortest) ** chance.random())
        number = index if schedule.chips is None else index % schedule.chips
        key = NoiseKey(role=Role.TRAIN, chip_seed=derive_seed(self._seed, number))
        return Draw(index, sigma, ChipInstance(chip, key, level, self._multipliers))

    def _choose(self, chance: Random, sigma: float) -> tuple[Chip, float]:
        """The chip of a draw and the level of its noise."""
        others = self._schedule.others
        chosen = chance.choices([None, *others], [1.0, *(other.weight for other in others)])[0]
        if chosen is None:
            return self._chip, sigma
        return chosen.chip, chosen.chip.noise.level * sigma / self._chip.noise.level


def _at_time(chip: Chip, time_s: float) -> Chip:
    """The chip, its cells that old when they are read."""
    described = chip.model_dump()
    described["retention"]["refresh_interval_s"] = time_s
    return Chip.model_validate(described)


def _ageing_problems(chip: Chip, times_s: tuple[float, float]) -> list[str]:
    if not chip.ages:
        return [f"nothing on chip '{chip.name}' changes with time; give it retention.ageing or leave time_s out"]
    problems: list[str] = []
    for time_s in times_s:
        try:
            _at_time(chip, time_s)
        except ValidationError as error:
            for item in error.errors():
                cause = item.get("ctx", {}).get("error")
                problems += cause.problems if isinstance(cause, UserError) else [item["msg"]]
    return problems


def _ranks(layers: Sequence[str], chip: Chip) -> dict[str, int]:
    """Place of every layer in the chip's ranking; those it leaves out share the last."""
    ranked = list(dict.fromkeys(chip.mapping.ranked(layers)))
    return dict.fromkeys(layers, len(ranked)) | {name: rank for rank, name in enumerate(ranked)}


def _block_numbers(layers: Sequence[str]) -> dict[str, int]:
    """Number of the decoder block of every layer, e.g. 3 of `model.layers.3.mlp.up_proj`."""
    blocks = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in layers}
    behind = max((block for block in blocks.values() if block is not None), default=-1) + 1  # the output projection
    return {name: behind if block is None else block for name, block in blocks.items()}
