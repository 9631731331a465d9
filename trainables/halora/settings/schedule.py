"""The noise schedule of a training: how strong, how often redrawn, on which chips and where it is stronger."""

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil, cos, pi
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from halora.errors import UserError
from halora.hardware.chip import Chip, ChipSetting
from halora.strict_model import StrictModel

Shape = Literal["constant", "linear", "cosine", "step", "cyclic", "random"]


class LayerLaw(StrictModel):
    """Multiplier of the strength per layer, from `first` to `last` by equal factors along an order of the layers."""

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


class OtherChip(StrictModel):
    """A chip that some draws are made on instead of the trial's own, so that training meets a mixture of noise."""

    chip: ChipSetting
    weight: float = Field(default=1.0, gt=0)
    """Share of the draws, relative to 1 for the trial's own chip."""


class NoiseSchedule(StrictModel):
    """The training noise over the steps."""

    shape: Shape = "constant"
    """How the strength goes from `strength_start` to `strength_end`: at once, straight, along half a cosine, in
    `stages` equal steps, to and fro `cycles` times (turning at whole steps), or anywhere between them at random for
    every draw."""
    strength_start: float = Field(default=0.01, ge=0, le=100)
    """Of the chip's noise model, in its own measure: sigma of Gaussian noise, a factor for a model of cells."""
    strength_end: float | None = Field(default=None, ge=0, le=100)
    """Required by every shape but `constant`, which must not have it."""
    stages: int = Field(default=4, ge=2)
    """Read by `step` only."""
    cycles: int = Field(default=4, ge=1)
    """Read by `cyclic` only."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the strength rises from 0 to what the shape says."""
    redraw_steps: Annotated[int, Field(ge=1)] | Literal["epoch"] = 400
    """Optimiser steps between two draws; the paper redraws every 400."""
    chips: int | None = Field(default=None, ge=1)
    """Train on this many chip instances, in turn; every draw is a new one when left out."""
    clean_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of the draws that are no noise at all."""
    layers: LayerLaw = LayerLaw()
    others: tuple[OtherChip, ...] = ()
    """Further chips to draw from; each is at its own strength where the strength is that of the trial's chip."""
    time_s: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Shortest and longest time since programming, drawn evenly in its logarithm; the chip's own when left out."""

    @model_validator(mode="after")
    def _end_belongs_to_changing_shapes(self) -> "NoiseSchedule":
        if (self.shape == "constant") != (self.strength_end is None):
            wanted = "not allowed" if self.shape == "constant" else "required"
            raise ValueError(f"strength_end is {wanted} for shape '{self.shape}'")
        if self.time_s and self.time_s[0] > self.time_s[1]:
            raise ValueError(f"time_s goes from short to long, not from {self.time_s[0]:g} to {self.time_s[1]:g} s")
        return self

    def problems(self, chip: Chip) -> list[str]:
        """Why this schedule and the trial's chip cannot go together; empty when they can."""
        problems = []
        if self.layers.order == "sensitivity" and chip.mapping.ranking == "depth":
            problems.append("layers.order: 'sensitivity' needs chip.mapping.ranking, see halora noise sensitivity")
        if self.others and chip.noise.level == 0:
            problems.append("others: the trial's chip has no noise strength that theirs could be relative to")
        if self.time_s is not None:
            chips = {"time_s": chip, **{f"others[{i}].chip": other.chip for i, other in enumerate(self.others)}}
            for where, described in chips.items():
                problems += [f"{where}: {problem}" for problem in _ageing_problems(described, self.time_s)]
        return problems

    def unmet(self, steps: int, redraw_steps: int) -> list[str]:
        """What of this schedule a training never meets, each with its field; empty when it meets all of it.

        Args:
            steps: Optimiser steps of the training; none are told of a training without steps.
            redraw_steps: Optimiser steps between two draws.
        """
        if steps == 0:
            return []
        problems = []
        if self.warmup_steps >= steps:
            never = f"but the training has {steps} steps and would never meet the strength; {steps - 1} at most"
            problems.append(f"warmup_steps: {self.warmup_steps}, {never}")
        needed = {"linear": 2, "cosine": 2, "step": self.stages, "cyclic": 2 * self.cycles + 1}.get(self.shape, 1)
        if steps < needed:
            count = {"step": f" with {self.stages} stages", "cyclic": f" with {self.cycles} cycles"}.get(self.shape, "")
            problems.append(f"shape: '{self.shape}'{count} takes {needed} steps to be met, the training has {steps}")
        draws = ceil(steps / redraw_steps)
        for field, needed in self._draws_needed().items():
            if draws < needed:
                often = (steps - 1) // (needed - 1)
                fix = f"redraw every {often} steps or less" if often else "train longer"
                have = f"{steps} steps with a draw every {redraw_steps} have {draws}"
                problems.append(f"{field}: takes {needed} draws to be met, but {have}; {fix}")
        return problems

    def _draws_needed(self) -> dict[str, int]:
        """Fewest draws that can meet each field that is one choice per draw."""
        needed = {
            "shape": 2 if self.shape == "random" else 1,
            "chips": self.chips or 1,
            "clean_probability": 2 if 0 < self.clean_probability < 1 else 1,
            "others": 1 + len(self.others),
            "time_s": 2 if self.time_s and self.time_s[0] < self.time_s[1] else 1,
        }
        return {field: count for field, count in needed.items() if count > 1}

    def strength(self, step: int, steps: int, chance: float) -> float:
        """The strength at a step, warm-up included, in the measure of the chip's noise model.

        Args:
            step: Optimiser steps taken before.
            steps: Of the whole training; the first and the last meet the ends of the shape.
            chance: In [0, 1); read by `random` only.
        """
        share = self._share(step, max(steps - 1, 1), chance)
        end = self.strength_start if self.strength_end is None else self.strength_end
        return ((1 - share) * self.strength_start + share * end) * min(1.0, (step + 1) / (self.warmup_steps + 1))

    def _share(self, step: int, last: int, chance: float) -> float:
        """How far from `strength_start` to `strength_end`."""
        match self.shape:
            case "constant":
                return 0.0
            case "linear":
                return step / last
            case "cosine":
                return (1 - cos(pi * step / last)) / 2
            case "step":
                return min(step * self.stages // last, self.stages - 1) / (self.stages - 1)
            case "cyclic":
                legs = 2 * self.cycles
                turns = [(2 * leg * last + legs) // (2 * legs) for leg in range(legs + 1)]
                leg = bisect_right(turns, step) - 1
                if leg == legs:
                    return 0.0
                share = (step - turns[leg]) / (turns[leg + 1] - turns[leg])
                return 1 - share if leg % 2 else share
            case "random":
                return chance


def at_time(chip: Chip, time_s: float) -> Chip:
    """The chip, its cells that old when they are read, in seconds since programming."""
    described = chip.model_dump()
    described["retention"]["refresh_interval_s"] = time_s
    return Chip.model_validate(described)


def _ageing_problems(chip: Chip, times_s: tuple[float, float]) -> list[str]:
    if not chip.ages:
        return [f"nothing on chip '{chip.name}' changes with time; give it retention.ageing or leave time_s out"]
    problems: list[str] = []
    for time_s in times_s:
        try:
            at_time(chip, time_s)
        except ValidationError as error:
            for item in error.errors():
                cause = item.get("ctx", {}).get("error")
                problems += cause.problems if isinstance(cause, UserError) else [item["msg"]]
    return problems


def _ranks(layers: Sequence[str], chip: Chip) -> dict[str, int]:
    """Place of every layer in the chip's ranking; those it leaves out share the last."""
    ranked = chip.mapping.ranked(layers)
    return dict.fromkeys(layers, len(ranked)) | {name: rank for rank, name in enumerate(ranked)}


def _block_numbers(layers: Sequence[str]) -> dict[str, int]:
    """Number of the decoder block of every layer, e.g. 3 of `model.layers.3.mlp.up_proj`."""
    blocks = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in layers}
    behind = max((block for block in blocks.values() if block is not None), default=-1) + 1  # the output projection
    return {name: behind if block is None else block for name, block in blocks.items()}
