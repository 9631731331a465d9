"""What a model takes on a chip, from its dimensions alone, and the ratio to a named baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halora.analysis.layers import GroupFigures, by_group
from halora.errors import UserError, attempt, nearest
from halora.hardware.baselines import (
    baseline_energy_uj_per_token,
    check_baseline,
    default_baseline,
    named_baseline,
)
from halora.hardware.chip import Chip
from halora.hardware.energy import ENERGY, EnergyBreakdown, energy_per_token
from halora.hardware.latency import Phase
from halora.hardware.shapes import ModelShape, known_shape, named_shapes
from halora.settings.training import LoraSettings


@dataclass(frozen=True)
class ModelEnergy:
    """Energy, time and area of a model on a chip.

    Attributes:
        model: The model as it was named.
        chip: The chip.
        rank: LoRA rank on q, k, v, up and down; 0 for no adapter.
        tokens: Tokens that totals are for.
        per_token: Energy of one token by component, area, and what is counted.
        baseline: Name of the baseline compared with.
        baseline_uj_per_token: Its energy per token, in microjoule.
        groups: Of the chip's groups of layers; empty where it has none.
    """

    model: str
    chip: Chip
    rank: int
    tokens: int
    per_token: EnergyBreakdown
    baseline: str
    baseline_uj_per_token: float
    groups: Sequence[GroupFigures] = ()

    @property
    def uj_per_token(self) -> float:
        """Microjoule per token."""
        return self.per_token.total_uj_per_token

    @property
    def total_mj(self) -> float:
        """Millijoule of all tokens."""
        return self.uj_per_token * self.tokens / 1000

    @property
    def components_mj(self) -> dict[str, float]:
        """Millijoule of all tokens by component."""
        return {name: value * self.tokens / 1000 for name, value in self.per_token.components_uj.items()}

    @property
    def ratio(self) -> float:
        """Energy over the baseline's."""
        return self.uj_per_token / self.baseline_uj_per_token

    @property
    def remark(self) -> str:
        """Where the baseline stands for another phase; else empty."""
        stands_for, phase = named_baseline(self.baseline).phase, self.per_token.latency.phase
        return "" if stands_for is phase else f"{self.baseline} stands for {stands_for}, not for {phase}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `halora energy --format json` prints them."""
        about = {"model": self.model, "chip": self.chip.name, "chip_hash": self.chip.content_hash, "rank": self.rank}
        return about | self._figures() | self._comparison()

    def _figures(self) -> dict[str, Any]:
        found, latency = self.per_token, self.per_token.latency
        return {
            "phase": latency.phase.value,
            "tokens": self.tokens,
            "context": latency.phase.context(latency.context_tokens),
            "sequences": latency.sequences,
            "boundary": found.boundary,
            "fill": found.fill,
            **{name: value for name, value in found.metrics.items() if name != ENERGY},
            "dies": latency.dies,
            "path_us": latency.path_us,
            "path_components_us": dict(latency.components_us),
            "interval_us": latency.interval_us,
            "bottleneck": latency.bottleneck,
            "total_mj": self.total_mj,
            "components_mj": self.components_mj,
            "lora_share": found.lora_share,
            **({"groups": [self._of_group(group) for group in self.groups]} if self.groups else {}),
        }

    def _of_group(self, group: GroupFigures) -> dict[str, Any]:
        return {
            "layers": group.name,
            "number": group.layers,
            "weights_share": group.weights_share,
            "energy_mj": group.energy_uj * self.tokens / 1000,
            "values": dict(group.values),
        }

    def _comparison(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "baseline_description": named_baseline(self.baseline).description,
            "baseline_mj": self.baseline_uj_per_token * self.tokens / 1000,
            "ratio": self.ratio,
        }


def model_energy(
    model: Any,
    chip: Callable[[], Chip],
    *,
    rank: int = 4,
    tokens: int = 512,
    sequences: int = 1,
    phase: str = "prefill",
    baseline: str | None = None,
) -> ModelEnergy:
    """Energy of a model on a chip, every mistake told at once.

    Args:
        model: A known model, a folder, a `config.json`, a hub id, or a loaded model of `transformers`.
        chip: Gives the chip, or refuses it.
        rank: LoRA rank on q, k, v, up and down; 0 for no adapter.
        tokens: Tokens the totals are for, and that each attends to.
        sequences: Sequences that the chip works on at once, for time and power.
        phase: `prefill` or `decode`.
        baseline: What to compare with; the paper's figure where it has one, else one of the phase.

    Raises:
        UserError: With every mistake.
    """
    problems = [
        f"{argument}: must be {least} or more, got {given}"
        for argument, given, least in (("tokens", tokens, 1), ("rank", rank, 0), ("sequences", sequences, 1))
        if given < least
    ]
    shape = attempt(problems, lambda: _shape(model))
    described = attempt(problems, chip)
    known_phase = attempt(problems, lambda: _phase(phase))
    against = attempt(problems, lambda: _baseline(baseline, shape))
    found: EnergyBreakdown | None = None
    if shape is not None and described is not None:
        found = attempt(
            problems,
            lambda: energy_per_token(
                shape,
                described,
                rank=max(rank, 0),
                targets=LoraSettings().targets,
                context_tokens=max(tokens, 1),
                sequences=max(sequences, 1),
                **({"phase": known_phase} if known_phase else {}),
            ),
        )
    if problems:
        raise UserError(problems)
    assert shape is not None
    assert described is not None
    assert found is not None
    against = against or default_baseline(shape, found.latency.phase)
    baseline_uj = baseline_energy_uj_per_token(against, shape, described, found.latency.context_tokens)
    groups = by_group(described, shape.sizes, found.layers_uj)
    return ModelEnergy(named(model), described, rank, tokens, found, against, baseline_uj, groups)


def named(model: Any) -> str:
    """What a model is called: as it was named, or as a loaded one calls itself."""
    return model if isinstance(model, str) else str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def _shape(model: Any) -> ModelShape:
    if not isinstance(model, str):
        from halora.training.on_chip import shape_of

        return shape_of(model)
    if (shape := known_shape(model)) is not None:
        return shape
    hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".json")
    if Path(model).is_dir() or hub_id:
        from halora.training.models import model_shape

        return model_shape(model)
    known = ", ".join(named_shapes())
    raise UserError(
        f"no model '{model}': not known ({known}), no folder or config.json, no hub id (owner/name)"
        + nearest(model.lower(), named_shapes())
    )


def _phase(name: str) -> Phase:
    if name not in list(Phase):
        raise UserError(f"phase: no phase '{name}' ({', '.join(Phase)}){nearest(name, Phase)}")
    return Phase(name)


def _baseline(name: str | None, shape: ModelShape | None) -> str | None:
    """The name, if it is a baseline's and that has a figure for the model."""
    if name is not None:
        named_baseline(name)
        if shape is not None:
            check_baseline(name, shape)
    return name
