"""Gates: named checks of a candidate, each with its measured value, its threshold and its result. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from typing import Any, Literal

from halora.analysis.trials import RecordedTrial
from halora.spaces.gates import Gates

_VLLM_MOST_RANK = 512  # the largest of the values that its `max_lora_rank` takes; it knows no DoRA


@dataclass(frozen=True)
class Gate:
    """One check.

    Attributes:
        name: As in the sweep file.
        value: What is compared: for accuracies and drops the worse end of the 95 % interval of what was measured.
        comparison: How it has to compare with the threshold.
        threshold: The bound.
        unit: Of both; empty for shares and counts.
        mean: What was measured, where `value` is an end of its interval.
        over: What that interval is over.
    """

    name: str
    value: float
    comparison: Literal["<=", ">="]
    threshold: float
    unit: str = ""
    mean: float | None = None
    over: str = ""

    @property
    def passed(self) -> bool:
        """The result; a value that is not a number fails."""
        return self.value <= self.threshold if self.comparison == "<=" else self.value >= self.threshold

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        sign = self.comparison if self.passed else {"<=": ">", ">=": "<"}[self.comparison]
        return f"{self.name} {self.measured} {sign} {self.threshold:g}{unit}"

    @property
    def measured(self) -> str:
        """The value, and the mean that it is an end of."""
        if self.mean is None:
            return f"{self.value:.4g}"
        end = "lower" if self.comparison == ">=" else "upper"
        return f"{self.value:.4g} ({end} end over {self.over}; mean {self.mean:.4g})"

    def to_json(self) -> dict[str, Any]:
        """Plain values and the result."""
        numbers = {"value": self.value, "mean": self.mean}
        said = {name: value if value is not None and isfinite(value) else None for name, value in numbers.items()}
        return {**asdict(self), **said, "passed": self.passed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Gate":
        """What `to_json` gave."""
        fields = {name: content[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"value": nan if fields["value"] is None else fields["value"]})


def search_gates(point: RecordedTrial, gates: Gates) -> list[Gate]:
    """What can be said of a finished trial by what the search recorded of it.

    It says which trials are worth certifying, so it goes by their means: on the few rows and chips of a search the
    lower end of an interval would turn good ones away. What is claimed of an adapter goes by `certified_gates`.
    """
    non_finite = [name for name, value in point.metrics.items() if not isfinite(value)]
    accuracy, clean = (point.metrics.get(name, nan) for name in ("accuracy", "clean_accuracy"))
    return [
        Gate("no_nan", float(len(non_finite)), "<=", 0, "metrics"),
        Gate("min_accuracy", accuracy, ">=", gates.min_accuracy),
        *([] if gates.max_drop is None else [Gate("max_drop", clean - accuracy, "<=", gates.max_drop)]),
        *_costs(point.metrics, gates),
        *branch_gates(gates, point.params.get("lora.rank"), point.params.get("lora.variant")),
    ]


def branch_gates(gates: Gates, rank: int | None, variant: str | None) -> list[Gate]:
    """What serving asks of a LoRA branch; of what is not known (a search records what it searches) nothing.

    Args:
        gates: The bounds.
        rank: Its rank.
        variant: `plain`, `rslora` or `dora`.
    """
    found = []
    if gates.max_rank is not None and rank is not None:
        found.append(Gate("max_rank", float(rank), "<=", gates.max_rank))
    if gates.servable:
        obstacles = (variant == "dora") + (rank is not None and rank > _VLLM_MOST_RANK)
        found.append(Gate("servable", float(obstacles), "<=", 0, "obstacles to vLLM"))
    return found


def certified_gates(
    scores: Mapping[str, float],
    gates: Gates,
    *,
    costs: Mapping[str, float],
    adapter_bytes: int,
    chips: int,
    yield_bound: float,
    accuracy_at: Mapping[float, tuple[float, float]],
    reload_share: float,
) -> list[Gate]:
    """All gates of a candidate, measured on test rows and on chips that no search saw.

    An accuracy is compared by the lower end of its 95 % interval over rows and chips, a drop by the upper end; on one
    chip the interval is over rows alone, and speaks of that chip. The yield is a bound already.

    Args:
        scores: `ChipScores.summary()` of them.
        gates: The bounds.
        costs: Energy, time, power and area, by the names of `COSTS`.
        adapter_bytes: Size of the adapter's weights as stored.
        chips: Chip instances tried.
        yield_bound: The certificate's lower bound.
        accuracy_at: Mean accuracy and the lower end of its interval by strength of the noise, for those of
            `gates.min_accuracy_at`.
        reload_share: How far margins that the sweep recorded are from those of the adapter as read back from the
            records, as a share of what is allowed, see `halora.evaluation.agreement`.
    """
    measured = {**scores, **costs}
    non_finite = [name for name, value in measured.items() if not isfinite(value)]
    found = [Gate("no_nan", float(len(non_finite)), "<=", 0, "metrics"), *_accuracies(scores, gates, _over(chips))]
    found += _costs(costs, gates)
    if gates.max_ci_halfwidth is not None:
        halfwidth = (scores["accuracy_high"] - scores["accuracy_low"]) / 2
        found.append(Gate("max_ci_halfwidth", halfwidth, "<=", gates.max_ci_halfwidth))
    if gates.max_adapter_kb is not None:
        found.append(Gate("max_adapter_kb", adapter_bytes / 1000, "<=", gates.max_adapter_kb, "kB"))
    over = _over(min(gates.robustness_chips, chips))
    found += [
        Gate(f"min_accuracy_at_{at:g}", accuracy_at[at][1], ">=", least, mean=accuracy_at[at][0], over=over)
        for at, least in gates.min_accuracy_at.items()
    ]
    return [
        *found,
        Gate("min_chips", float(chips), ">=", gates.min_chips),
        Gate("min_yield", yield_bound, ">=", gates.min_yield),
        Gate("reload_reproduces", reload_share, "<=", 1, "of the difference allowed"),
    ]


def _over(chips: int) -> str:
    return "rows and chips" if chips > 1 else "rows of one chip"


def _accuracies(scores: Mapping[str, float], gates: Gates, over: str) -> Iterator[Gate]:
    accuracy, drop = scores["accuracy"], scores["clean_accuracy"] - scores["accuracy"]
    yield Gate("min_accuracy", scores["accuracy_low"], ">=", gates.min_accuracy, mean=accuracy, over=over)
    if gates.max_drop is not None:
        yield Gate("max_drop", scores["drop_high"], "<=", gates.max_drop, mean=drop, over=over)


def _costs(metrics: Mapping[str, float], gates: Gates) -> Iterator[Gate]:
    bounds: tuple[tuple[str, Literal["<=", ">="], float | None, str], ...] = (
        ("max_energy_uj_per_token", "<=", gates.max_energy_uj_per_token, "uJ/token"),
        ("max_latency_us_per_token", "<=", gates.max_latency_us_per_token, "us/token"),
        ("min_tokens_per_s", ">=", gates.min_tokens_per_s, "tokens/s"),
        ("max_power_w", "<=", gates.max_power_w, "W"),
        ("max_area_mm2", "<=", gates.max_area_mm2, "mm2"),
    )
    for name, comparison, bound, unit in bounds:
        if bound is not None:
            yield Gate(name, metrics.get(name[4:], nan), comparison, bound, unit)
