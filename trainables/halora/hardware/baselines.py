"""What the same work takes on other hardware: energies that carry their assumptions in their name and description."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

import yaml
from pydantic import Field, TypeAdapter

from halora.errors import UserError, nearest
from halora.hardware.chip import Chip
from halora.hardware.energy import Phase
from halora.hardware.shapes import ModelShape, named_shapes
from halora.strict_model import StrictModel


class Baseline(StrictModel, ABC):
    """An energy per token to compare with; it counts the same boundary as the chip, the adapter merged."""

    phase: Phase
    """The phase it stands for."""
    description: str
    """Its assumptions."""

    def covers(self, shape: ModelShape) -> bool:
        """Whether the source gives a figure for a model."""
        return True

    @abstractmethod
    def energy_uj_per_token(self, shape: ModelShape, chip: Chip, context_tokens: int) -> float | None:
        """Microjoule per token of a model; none where the source gives no figure for it."""


class PublishedBaseline(Baseline):
    """Totals that someone published for some models."""

    kind: Literal["published"]
    tokens: int
    """Tokens of the published totals."""
    energy_mj: dict[str, float]
    """Millijoule for that many tokens, by known model name."""

    def energy_uj_per_token(self, shape: ModelShape, chip: Chip, context_tokens: int) -> float | None:
        """The published total over its tokens; the boundary is the publication's."""
        energy_mj = self._energy_mj(shape)
        return None if energy_mj is None else energy_mj * 1000 / self.tokens

    def covers(self, shape: ModelShape) -> bool:
        """Whether the publication has the model."""
        return self._energy_mj(shape) is not None

    def _energy_mj(self, shape: ModelShape) -> float | None:
        return next((mj for name, mj in self.energy_mj.items() if named_shapes()[name] == shape), None)


class PeakBaseline(Baseline):
    """A processor busy at its peak rate: two operations per multiply-accumulate."""

    kind: Literal["peak"]
    power_w: float = Field(gt=0)
    tera_operations_per_s: float = Field(gt=0)

    def energy_uj_per_token(self, shape: ModelShape, chip: Chip, context_tokens: int) -> float:
        """Operations at the energy of one, power over rate."""
        macs = _weights(shape, chip)
        if chip.boundary.attention:
            macs += shape.attention_macs(context_tokens)
        return 2 * macs * self.power_w / self.tera_operations_per_s * 1e-6


class BandwidthBaseline(Baseline):
    """A processor that reads every weight, and the cache, once per token."""

    kind: Literal["bandwidth"]
    power_w: float = Field(gt=0)
    giga_bytes_per_s: float = Field(gt=0)
    bytes_per_value: int = Field(gt=0)

    def energy_uj_per_token(self, shape: ModelShape, chip: Chip, context_tokens: int) -> float:
        """Power for as long as reading takes."""
        values = _weights(shape, chip)
        if chip.boundary.attention:
            values += shape.cache_values(context_tokens)
        return values * self.bytes_per_value * self.power_w / self.giga_bytes_per_s * 1e-3


_AnyBaseline = Annotated[PublishedBaseline | PeakBaseline | BandwidthBaseline, Field(discriminator="kind")]


def _weights(shape: ModelShape, chip: Chip) -> int:
    head = shape.lm_head.weights if chip.mapping.lm_head else 0
    return head + sum(layer.weights for layer in shape.linear_layers.values())


@cache
def baselines() -> Mapping[str, Baseline]:
    """Every baseline by name."""
    raw = yaml.safe_load((files("halora.hardware") / "baselines.yaml").read_text(encoding="utf-8"))
    return TypeAdapter(dict[str, _AnyBaseline]).validate_python(raw)


def named_baseline(name: str) -> Baseline:
    """The baseline of that name.

    Raises:
        UserError: There is none.
    """
    if name not in baselines():
        raise UserError(f"no baseline '{name}' ({', '.join(baselines())}){nearest(name, baselines())}")
    return baselines()[name]


def default_baseline(shape: ModelShape, phase: Phase) -> str:
    """Name of the baseline to use where none is named: the paper's where it has a figure, else one of the phase."""
    match phase:
        case Phase.DECODE:
            return "a100_decode_bw"
        case Phase.PREFILL:
            paper = "a100_halora_paper"
            return paper if baselines()[paper].covers(shape) else "a100_int8_peak"


def baseline_energy_uj_per_token(name: str, shape: ModelShape, chip: Chip, context_tokens: int) -> float:
    """Microjoule per token by a named baseline.

    Raises:
        UserError: There is no such baseline, or it has no figure for this model.
    """
    check_baseline(name, shape)
    energy = named_baseline(name).energy_uj_per_token(shape, chip, context_tokens)
    assert energy is not None
    return energy


def check_baseline(name: str, shape: ModelShape) -> None:
    """Refuse a baseline that is not there or has no figure for a model.

    Raises:
        UserError: So it is.
    """
    if not named_baseline(name).covers(shape):
        others = ", ".join(other for other, it in baselines().items() if it.covers(shape))
        raise UserError(f"baseline '{name}' has no figure for this model; these have: {others}")
