"""What a certification says, and how all of it follows from scores, settings and a few facts. Pure.

`concluded` is the one place where that is computed, for whoever certifies and for whoever checks what somebody else
certified.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from pydantic import ConfigDict

from halora.analysis.gates import Gate, branch_gates, certified_gates
from halora.hardware.energy import COSTS
from halora.pricing import baseline_energies, trial_energy
from halora.selection.certificate import Certificate, yield_lower_bound
from halora.selection.robustness import Scenario, scenarios, strength_name
from halora.settings.trial import TrialConfig
from halora.spaces.gates import Gates

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores

RELOAD = "reload_reproduces"
"""The gate whose value does not follow from certified scores: it compares others."""
_LINE_ERROR = 0.05


@dataclass(frozen=True)
class RobustnessLine:
    """One line of the robustness table.

    Attributes:
        group: `noise`, `time` or `kind`.
        name: What is asked.
        chips: Chip instances tried.
        meeting_spec: Those of them that reach the certificate's accuracy.
        accuracy: Mean over chips and test rows.
        accuracy_low: Lower end of its 95 % interval over chips and rows; over rows alone for one chip.
        accuracy_worst: Of the worst chip.
        bound: Lower bound of the yield at an error level of 5 %, for this line alone.
        reason: Why it cannot be said, and then nothing else is; empty otherwise.
    """

    group: str
    name: str
    chips: int = 0
    meeting_spec: int = 0
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_worst: float | None = None
    bound: float | None = None
    reason: str = ""


class EnergyClaim(TypedDict):
    """What a token takes: energy in microjoule, in total, by component and of named baselines; time in microseconds, of
    one token's path by component; power in watt, area in square millimetre; and what is counted."""

    energy_uj_per_token: float
    latency_us_per_token: float
    tokens_per_s: float
    power_w: float
    area_mm2: float
    components_uj: dict[str, float]
    path_components_us: dict[str, float]
    phase: str
    context_tokens: int
    sequences: int
    dies: int
    boundary: str
    fill: str
    baselines_uj_per_token: dict[str, float]


@dataclass(frozen=True)
class Certification:
    """Everything shown of one adapter.

    Attributes:
        certificate: The yield certificate.
        asked: The gates as asked for.
        gates: All gates.
        robustness: The robustness table.
        scores: Accuracy and margin over certified chips and test rows, see `ChipScores.summary`.
        energy: Energy per token, see `priced`.
        base: The base model, by its id.
        base_sha256: Digest of its weights, see `weights_digest`.
        dtype: Their dtype.
        adapter_sha256: Digest of the adapter's file.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    certificate: Certificate
    asked: Gates
    gates: tuple[Gate, ...]
    robustness: tuple[RobustnessLine, ...]
    scores: Mapping[str, float]
    energy: EnergyClaim
    base: str
    base_sha256: str
    dtype: str
    adapter_sha256: str

    @property
    def passed(self) -> bool:
        """Whether the adapter passed every gate."""
        return all(gate.passed for gate in self.gates)

    @property
    def reload_share(self) -> float:
        """See `certified_gates`."""
        return next(gate.value for gate in self.gates if gate.name == RELOAD)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | {
            "passed": self.passed,
            "certificate": self.certificate.to_json(),
            "asked": self.asked.model_dump(mode="json"),
            "gates": [gate.to_json() for gate in self.gates],
            "robustness": [asdict(line) for line in self.robustness],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Certification":
        """What `to_json` gave."""
        own = {name: content[name] for name in cls.__dataclass_fields__}
        return cls(
            **own
            | {
                "certificate": Certificate.from_json(content["certificate"]),
                "asked": Gates.model_validate(content["asked"]),
                "gates": tuple(Gate.from_json(gate) for gate in content["gates"]),
                "robustness": tuple(RobustnessLine(**line) for line in content["robustness"]),
            }
        )


@dataclass(frozen=True)
class Origin:
    """Where a certification comes from, see the fields of `Certificate`: nothing of it can be computed again."""

    sweep: str
    trial: int
    launch: str
    attempt: int
    earlier: int
    spent: float

    @classmethod
    def of(cls, certificate: Certificate) -> "Origin":
        """That of a certificate."""
        return cls(**{name: getattr(certificate, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Evidence:
    """What a certification follows from.

    Attributes:
        origin: Where it comes from.
        config: The trial, its chip and its way of scoring.
        asked: The gates.
        scores: On all certified chips.
        robustness: By name of the line that rests on them, see `scenarios`.
        task: The task's id.
        rows_digest: Digest of the test rows' text.
        base: The base model's id.
        base_sha256: Digest of its weights.
        energy: See `priced`.
        adapter_sha256: Digest of the adapter's file.
        adapter_bytes: Its size.
        reload_share: See `certified_gates`.
    """

    origin: Origin
    config: TrialConfig
    asked: Gates
    scores: "ChipScores"
    robustness: Mapping[str, "ChipScores"]
    task: str
    rows_digest: str
    base: str
    base_sha256: str
    energy: EnergyClaim
    adapter_sha256: str
    adapter_bytes: int
    reload_share: float

    @property
    def scenarios(self) -> list[Scenario]:
        """Lines of the robustness table that are asked for."""
        return asked_scenarios(self.config, self.asked)


def asked_scenarios(config: TrialConfig, asked: Gates) -> list[Scenario]:
    """Lines of the robustness table that are asked for."""
    return scenarios(config.chip, asked.min_accuracy_at) if asked.robustness_chips else []


def concluded(evidence: Evidence) -> Certification:
    """The certification that follows from the evidence."""
    config, asked, scores = evidence.config, evidence.asked, evidence.scores
    summary, chips = scores.summary(), len(scores.chip_seeds)
    certificate = Certificate(
        **asdict(evidence.origin),
        confidence=asked.confidence,
        min_accuracy=asked.min_accuracy,
        scoring=config.evaluation.scoring,
        min_yield=asked.min_yield,
        chips=chips,
        failures=sum(accuracy < asked.min_accuracy for accuracy in scores.accuracy_by_chip),
        task=evidence.task,
        rows=len(scores.row_ids),
        rows_digest=evidence.rows_digest,
        chip=config.chip.name,
        chip_hash=config.chip.content_hash,
        noise=noise_words(config),
    )
    lines = [_line(scenario, evidence) for scenario in evidence.scenarios]
    by_name = {
        line.name: (line.accuracy, line.accuracy_low)
        for line in lines
        if line.accuracy is not None and line.accuracy_low is not None
    }
    gates = certified_gates(
        summary,
        asked,
        costs={name: dict[str, Any](evidence.energy)[name] for name in COSTS},
        adapter_bytes=evidence.adapter_bytes,
        chips=chips,
        yield_bound=certificate.bound,
        accuracy_at={strength: by_name[strength_name(config.chip, strength)] for strength in asked.min_accuracy_at},
        reload_share=evidence.reload_share,
    )
    return Certification(
        certificate=certificate,
        asked=asked,
        gates=(*gates, *branch_gates(asked, config.lora.rank, config.lora.variant)),
        robustness=tuple(lines),
        scores=summary,
        energy=evidence.energy,
        base=evidence.base,
        base_sha256=evidence.base_sha256,
        dtype=config.training.dtype,
        adapter_sha256=evidence.adapter_sha256,
    )


def _line(scenario: Scenario, evidence: Evidence) -> RobustnessLine:
    if scenario.chip is None:
        return RobustnessLine(scenario.group, scenario.name, reason=scenario.reason)
    scores = evidence.robustness[scenario.name]
    by_chip, found = scores.accuracy_by_chip, scores.summary()
    meeting = sum(accuracy >= evidence.asked.min_accuracy for accuracy in by_chip)
    return RobustnessLine(
        scenario.group,
        scenario.name,
        chips=len(by_chip),
        meeting_spec=meeting,
        accuracy=found["accuracy"],
        accuracy_low=found["accuracy_low"],
        accuracy_worst=min(by_chip),
        bound=yield_lower_bound(len(by_chip), len(by_chip) - meeting, _LINE_ERROR),
    )


def priced(config: TrialConfig, *, estimated: bool = False) -> EnergyClaim:
    """What a certification says of a trial's energy.

    Args:
        config: The trial.
        estimated: Take the fill of the cells by shipped statistics, though the model's weights are at hand.

    Raises:
        UserError: The model's dimensions are not available.
    """
    energy = trial_energy(config, estimated=estimated)
    latency, costs = energy.latency, energy.metrics
    return {
        "energy_uj_per_token": costs["energy_uj_per_token"],
        "latency_us_per_token": costs["latency_us_per_token"],
        "tokens_per_s": costs["tokens_per_s"],
        "power_w": costs["power_w"],
        "area_mm2": costs["area_mm2"],
        "components_uj": dict(energy.components_uj),
        "path_components_us": dict(latency.components_us),
        "phase": str(latency.phase),
        "context_tokens": latency.context_tokens,
        "sequences": latency.sequences,
        "dies": latency.dies,
        "boundary": energy.boundary,
        "fill": energy.fill,
        "baselines_uj_per_token": baseline_energies(config),
    }


def noise_words(config: TrialConfig) -> str:
    """A trial's noise model in a few words."""
    noise = config.chip.noise.model_dump(mode="json", exclude={"kind", "states"}, exclude_defaults=True)
    ageing = config.chip.retention.ageing
    words = [config.chip.noise.kind, *(f"{name} {value}" for name, value in noise.items())]
    if ageing is not None:
        words.append(f"aged by {ageing.kind} for {config.chip.retention.refresh_interval_s:g} s")
    return ", ".join(words)
