"""Gates: named checks of a candidate, each with its measured value, its threshold and its verdict. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from typing import Any, Literal

from halora.analysis.trials import TrialPoint
from halora.spaces.gates import Gates


@dataclass(frozen=True)
class Gate:
    """One check.

    Attributes:
        name: As in the sweep file.
        value: What was measured.
        comparison: How it has to compare with the threshold.
        threshold: The bound.
        unit: Of both; empty for shares and counts.
    """

    name: str
    value: float
    comparison: Literal["<=", ">="]
    threshold: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        """The verdict; a value that is not a number fails."""
        return self.value <= self.threshold if self.comparison == "<=" else self.value >= self.threshold

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        sign = self.comparison if self.passed else {"<=": ">", ">=": "<"}[self.comparison]
        return f"{self.name} {self.value:.4g} {sign} {self.threshold:g}{unit}"

    def to_json(self) -> dict[str, Any]:
        """Plain values and the verdict."""
        return {**asdict(self), "value": self.value if isfinite(self.value) else None, "passed": self.passed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Gate":
        """What `to_json` gave."""
        fields = {name: content[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"value": nan if fields["value"] is None else fields["value"]})


def search_gates(point: TrialPoint, gates: Gates) -> list[Gate]:
    """What can be said of a finished trial by what the search recorded of it."""
    strange = [name for name, value in point.metrics.items() if not isfinite(value)]
    return [Gate("no_nan", float(len(strange)), "<=", 0, "metrics"), *_measured(point.metrics, gates)]


def certified_gates(
    scores: Mapping[str, float],
    gates: Gates,
    *,
    energy_uj_per_token: float,
    adapter_bytes: int,
    chips: int,
    yield_bound: float,
    accuracy_at: Mapping[float, float],
    reload_share: float,
) -> list[Gate]:
    """All gates of a candidate, measured on test rows and on chips that no search saw.

    Args:
        scores: `ChipScores.summary()` of them.
        gates: The bounds.
        energy_uj_per_token: Energy per token in microjoule.
        adapter_bytes: Size of the adapter's weights as stored.
        chips: Chip instances tried.
        yield_bound: The certificate's lower bound.
        accuracy_at: Mean accuracy by strength of the noise, for those of `gates.min_accuracy_at`.
        reload_share: How far margins that the sweep recorded are from those of the adapter as read back from the
            records, as a share of what is allowed, see `halora.evaluation.agreement`.
    """
    measured = {**scores, "energy_uj_per_token": energy_uj_per_token}
    strange = [name for name, value in measured.items() if not isfinite(value)]
    found = [Gate("no_nan", float(len(strange)), "<=", 0, "metrics"), *_measured(measured, gates)]
    if gates.max_ci_halfwidth is not None:
        halfwidth = (scores["accuracy_high"] - scores["accuracy_low"]) / 2
        found.append(Gate("max_ci_halfwidth", halfwidth, "<=", gates.max_ci_halfwidth))
    if gates.max_adapter_kb is not None:
        found.append(Gate("max_adapter_kb", adapter_bytes / 1000, "<=", gates.max_adapter_kb, "kB"))
    found += [
        Gate(f"min_accuracy_at_{level:g}", accuracy_at[level], ">=", least)
        for level, least in gates.min_accuracy_at.items()
    ]
    return [
        *found,
        Gate("min_chips", float(chips), ">=", gates.min_chips),
        Gate("min_yield", yield_bound, ">=", gates.min_yield),
        Gate("reload_reproduces", reload_share, "<=", 1, "of the difference allowed"),
    ]


def _measured(metrics: Mapping[str, float], gates: Gates) -> Iterator[Gate]:
    """The gates on scores and energy; a metric that is missing counts as no number."""
    accuracy = metrics.get("accuracy", nan)
    yield Gate("min_accuracy", accuracy, ">=", gates.min_accuracy)
    if gates.max_drop is not None:
        yield Gate("max_drop", metrics.get("clean_accuracy", nan) - accuracy, "<=", gates.max_drop)
    if gates.max_energy_uj_per_token is not None:
        energy = metrics.get("energy_uj_per_token", nan)
        yield Gate("max_energy_uj_per_token", energy, "<=", gates.max_energy_uj_per_token, "uJ/token")
