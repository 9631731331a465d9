"""Certifies a trial's adapter on chips that no search saw and on the test split, which nothing touches before.

Scores are kept as they come, in the attempt's folder, so a crash costs only those under way; the same question again is
answered from what is kept.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from halora.analysis.trials import RecordedTrial
from halora.errors import UserError
from halora.files import sha256_of, write_json
from halora.hardware.addressing import Role
from halora.pricing import trial_energy
from halora.records import names
from halora.records.publishing import baseline_energies
from halora.records.store import Store, SweepFolder
from halora.selection.attempts import Attempt, attempts_of, open_attempt
from halora.selection.certificate import Certificate, yield_lower_bound
from halora.selection.gates import Gate, certified_gates
from halora.selection.robustness import Scenario, level_name, scenarios
from halora.settings.names import model_id, task_id, task_weights
from halora.settings.trial import TrialConfig
from halora.spaces.gates import Gates
from halora.spaces.sweep import SweepConfig
from halora.training.models import plain_base, weights_digest
from halora.training.tasks import load_rows
from halora.trial_folder import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.records.registry import RegisteredAdapter
    from halora.records.tracking import MlflowClient
    from halora.trial_runner import ScoringJob

_CHIPS_PER_JOB = 4


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


@dataclass(frozen=True)
class Certification:
    """Everything shown of one adapter.

    Attributes:
        certificate: The yield certificate.
        gates: All gates.
        robustness: The robustness table.
        scores: Accuracy and margin over certified chips and test rows, see `ChipScores.summary`.
        energy: Energy per token in microjoule by component, what it counts, and named baselines.
        base: The base model, by its id.
        base_sha256: Digest of its weights, see `weights_digest`.
        dtype: Their dtype.
        adapter_sha256: Digest of the adapter's file.
    """

    certificate: Certificate
    gates: tuple[Gate, ...]
    robustness: tuple[RobustnessLine, ...]
    scores: Mapping[str, float]
    energy: Mapping[str, Any]
    base: str
    base_sha256: str
    dtype: str
    adapter_sha256: str

    @property
    def passed(self) -> bool:
        """Whether the adapter passed every gate."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | {
            "passed": self.passed,
            "certificate": self.certificate.to_json(),
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
                "gates": tuple(Gate.from_json(gate) for gate in content["gates"]),
                "robustness": tuple(RobustnessLine(**line) for line in content["robustness"]),
            }
        )


def certifications_of(folder: SweepFolder) -> dict[int, Certification]:
    """Certifications of a sweep that are finished, by attempt."""
    files = {a.number: a.folder(folder) / names.CERTIFICATION_FILE for a in attempts_of(folder)}
    return {
        number: Certification.from_json(json.loads(file.read_text(encoding="utf-8")))
        for number, file in files.items()
        if file.exists()
    }


def logged_certification(client: "MlflowClient", adapter: "RegisteredAdapter") -> Certification:
    """The certification that a registered adapter passed, as MLflow has it."""
    from halora.records.queries import logged_json

    file = f"{names.CERTIFICATION_FOLDER.format(attempt=adapter.attempt)}/{names.CERTIFICATION_FILE}"
    return Certification.from_json(logged_json(client, adapter.run_id, file))


def certify(
    client: "MlflowClient",
    sweep: SweepConfig,
    store: Store,
    point: RecordedTrial,
    gates: Gates,
    say: Callable[[str], None] = lambda text: None,
) -> Certification:
    """Certify a trial's adapter as MLflow has it, or continue that, or look up how it ended.

    Args:
        client: Where the adapter is recorded.
        sweep: The sweep.
        store: Its store; `only_selection` is held.
        point: The trial.
        gates: What is asked.
        say: Told of the progress.

    Raises:
        UserError: Nothing is left of the error level, the task has no test split or too few rows in it, the adapter
            is not in MLflow.
    """
    from halora.records.queries import download_adapter, logged_config, logged_scores, trial_run
    from halora.records.registry import log_certification

    folder = store.sweep(sweep.name)
    run = trial_run(client, sweep.name, point.number)
    config = logged_config(client, run.info.run_id)
    with TemporaryDirectory() as scratch:
        adapter = download_adapter(client, run, Path(scratch))
        if adapter is None:
            raise UserError(f"trial '{sweep.name}/{point.number}' has no adapter in MLflow: it was simulated")
        weights = adapter / ADAPTER_WEIGHTS
        adapter_bytes = weights.stat().st_size
        rows = test_rows(config, gates)
        splits = splits_of(config.task)
        attempt = open_attempt(store, folder, sweep.launch, point.number, sha256_of(weights), gates, splits)
        work = _Work(sweep, config, adapter, attempt, attempt.folder(folder), int(rows["rows"]), say)
        work.carry_out(logged_scores(client, run.info.run_id), gates)
    found = work.result(gates, rows, adapter_bytes)
    file = attempt.folder(folder) / names.CERTIFICATION_FILE
    if not file.exists() or json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(found.to_json())):
        with TemporaryDirectory() as scratch:
            write_json(Path(scratch) / names.CERTIFICATION_FILE, found.to_json())
            write_json(Path(scratch) / names.SCORES_FILE, work.certified.to_json())
            log_certification(client, run.info.run_id, attempt.number, Path(scratch))
        write_json(file, found.to_json())  # last: what is in the file is in MLflow
    return found


def test_rows(config: TrialConfig, gates: Gates) -> dict[str, str]:
    """The test rows as a data set, see `halora.records.recorder.dataset`.

    Raises:
        UserError: There are none, or too few.
    """
    from halora.records.recorder import dataset

    rows = dataset(config.task, "test", gates.test_rows)
    if gates.test_rows is not None and int(rows["rows"]) < gates.test_rows:
        raise UserError(
            f"gates.test_rows: {gates.test_rows}, but '{config.task}' has {rows['rows']} rows in its test split",
            "lower it: --set test_rows=N",
        )
    return rows


def splits_of(task: str) -> tuple[str, ...]:
    """What tells the test splits of a task's parts: the name of each, and a digest of its texts in any order.

    Certifications that share one of these look at the same rows, or at rows of the same name: a copy of a data set
    under another name counts, and so does one of the same name with a row fixed.

    Raises:
        UserError: A part has no test split.
    """
    found: list[str] = []
    for part in task_weights(task):
        texts = sorted(repr((row.prompt, row.options, row.answer)) for row in load_rows(part, "test"))
        digest = hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        found += [task_id(part), digest[:32]]
    return tuple(found)


class _Work:
    """Scores that a certification rests on, each in a file of its own."""

    def __init__(
        self,
        sweep: SweepConfig,
        config: TrialConfig,
        adapter: Path,
        attempt: Attempt,
        folder: Path,
        rows: int,
        say: Callable[[str], None],
    ) -> None:
        self._sweep, self._config, self._adapter, self._attempt = sweep, config, adapter, attempt
        self._folder, self._rows, self._say = folder, rows, say

    def carry_out(self, recorded: "ChipScores", gates: Gates) -> None:
        """Take all scores that are not there yet, on the sweep's workers."""
        jobs = {name: job for name, job in self._jobs(recorded, gates) if not self._file(name).exists()}
        if not self._file("base").exists():
            self._say("reading the base model's weights")
            base = plain_base(self._config.model, self._config.training.dtype)
            write_json(self._file("base"), {"sha256": weights_digest(base.causal_lm)})
        if not self._file("recorded").exists():
            write_json(self._file("recorded"), recorded.to_json())
        if not jobs:
            return
        from halora.sweep.cluster.session import ray_session
        from halora.sweep.run.executor import score_on_workers

        evaluations = sum(job.config.evaluation.chip_instances for job in jobs.values())
        chips = f"{self._attempt.chips} chips of series {self._attempt.series}, {self._rows} test rows"
        self._say(f"attempt {self._attempt.number}: trial {self._attempt.trial} on {chips}")
        wanted = list(jobs.items())
        left = evaluations

        def scored(place: int, scores: "ChipScores") -> None:
            nonlocal left
            name, _ = wanted[place]
            write_json(self._file(name), scores.to_json())
            left -= len(scores.chip_seeds)
            self._say(f"{name}: {evaluations - left} of {evaluations} chip evaluations")

        with ray_session(self._sweep.concurrent * self._sweep.workers, cpus=self._sweep.resources.cpus):
            score_on_workers(self._sweep, [job for _, job in wanted], scored)

    def result(self, gates: Gates, rows: Mapping[str, str], adapter_bytes: int) -> Certification:
        """What the scores add up to."""
        from halora.evaluation.agreement import agreement

        attempt, chip = self._attempt, self._config.chip
        scores, energy = self.certified.summary(), _priced(self._config)
        reached = [accuracy >= gates.min_accuracy for accuracy in self.certified.accuracy_by_chip]
        certificate = Certificate(
            sweep=self._sweep.name,
            trial=attempt.trial,
            launch=attempt.launch,
            attempt=attempt.number,
            earlier=attempt.spent.earlier,
            spent=attempt.spent.error,
            confidence=gates.confidence,
            min_accuracy=gates.min_accuracy,
            scoring=self._config.evaluation.scoring,
            min_yield=gates.min_yield,
            chips=attempt.chips,
            failures=reached.count(False),
            task=task_id(self._config.task),
            rows=int(rows["rows"]),
            rows_digest=rows["digest"],
            chip=chip.name,
            chip_hash=chip.content_hash,
            noise=noise_words(self._config),
        )
        lines = [self._line(scenario, gates) for scenario in self._scenarios(gates)]
        by_name = {
            line.name: (line.accuracy, line.accuracy_low)
            for line in lines
            if line.accuracy is not None and line.accuracy_low is not None
        }
        reload = agreement(self._config, self._read("recorded"), self._read("reload"))
        found = certified_gates(
            scores,
            gates,
            energy_uj_per_token=energy["energy_uj_per_token"],
            adapter_bytes=adapter_bytes,
            chips=attempt.chips,
            yield_bound=certificate.bound,
            accuracy_at={level: by_name[level_name(chip, level)] for level in gates.min_accuracy_at},
            reload_share=reload.share,
        )
        return Certification(
            certificate=certificate,
            gates=tuple(found),
            robustness=tuple(lines),
            scores=scores,
            energy=energy,
            base=model_id(self._config.model),
            base_sha256=json.loads(self._file("base").read_text(encoding="utf-8"))["sha256"],
            dtype=self._config.training.dtype,
            adapter_sha256=attempt.adapter_sha256,
        )

    @cached_property
    def certified(self) -> "ChipScores":
        """Scores on all certified chips."""
        parts = [self._read(name) for name, _, _ in self._chip_parts()]
        return reduce(lambda one, other: one.with_chips_after(len(one.chip_seeds), other), parts)

    def _jobs(self, recorded: "ChipScores", gates: Gates) -> Iterator[tuple[str, "ScoringJob"]]:
        from halora.evaluation.agreement import as_scored
        from halora.trial_runner import ScoringJob

        for name, first_chip, chips in self._chip_parts():
            yield name, self._held_out(self._config, first_chip, chips)
        yield "reload", ScoringJob(as_scored(self._config, recorded), self._adapter)
        for scenario in self._scenarios(gates):
            if scenario.chip is not None:
                config = self._config.model_copy(update={"chip": scenario.chip})
                chips = min(gates.robustness_chips, self._attempt.chips)
                yield self._part_of(scenario, chips), self._held_out(config, 0, chips)

    def _held_out(self, config: TrialConfig, first_chip: int, chips: int) -> "ScoringJob":
        from halora.trial_runner import ScoringJob

        asked = config.evaluation.at_own_strength().model_copy(update={"rows": self._rows, "chip_instances": chips})
        config = config.model_copy(update={"evaluation": asked})
        return ScoringJob(
            config,
            self._adapter,
            first_chip=first_chip,
            split="test",
            role=Role.CERTIFY,
            series=self._attempt.series,
        )

    def _chip_parts(self) -> Iterator[tuple[str, int, int]]:
        """Name, first chip and number of chips of every part of the certificate."""
        for first_chip in range(0, self._attempt.chips, _CHIPS_PER_JOB):
            yield f"chips-{first_chip:05d}", first_chip, min(_CHIPS_PER_JOB, self._attempt.chips - first_chip)

    def _scenarios(self, gates: Gates) -> list[Scenario]:
        return scenarios(self._config.chip, gates.min_accuracy_at) if gates.robustness_chips else []

    def _part_of(self, scenario: Scenario, chips: int) -> str:
        assert scenario.chip is not None
        return f"robustness-{scenario.chip.content_hash}-{chips}"

    def _line(self, scenario: Scenario, gates: Gates) -> RobustnessLine:
        if scenario.chip is None:
            return RobustnessLine(scenario.group, scenario.name, reason=scenario.reason)
        chips = min(gates.robustness_chips, self._attempt.chips)
        scores = self._read(self._part_of(scenario, chips))
        by_chip, found = scores.accuracy_by_chip, scores.summary()
        meeting = sum(accuracy >= gates.min_accuracy for accuracy in by_chip)
        return RobustnessLine(
            scenario.group,
            scenario.name,
            chips=len(by_chip),
            meeting_spec=meeting,
            accuracy=found["accuracy"],
            accuracy_low=found["accuracy_low"],
            accuracy_worst=min(by_chip),
            bound=yield_lower_bound(len(by_chip), len(by_chip) - meeting, 0.05),
        )

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> "ChipScores":
        from halora.evaluation.chips import ChipScores

        return ChipScores.from_json(json.loads(self._file(name).read_text(encoding="utf-8")))


def _priced(config: TrialConfig) -> dict[str, Any]:
    energy = trial_energy(config)
    return {
        "energy_uj_per_token": energy.total_uj_per_token,
        "components_uj": dict(energy.components_uj),
        "phase": str(energy.phase),
        "context_tokens": energy.context_tokens,
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
