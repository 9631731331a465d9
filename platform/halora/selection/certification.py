"""Certifies a trial's adapter on chips that no search saw and on the test split, which nothing touches before.

Scores are kept as they come, in the attempt's folder, so a crash costs only those under way; the same question again is
answered from what is kept.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from halora.analysis.trials import RecordedTrial
from halora.errors import UserError
from halora.files import sha256_of, write_json
from halora.hardware.addressing import Role
from halora.records import names
from halora.records.store import Store, SweepFolder
from halora.selection.attempts import Attempt, attempts_of, open_attempt
from halora.selection.claims import Certification, Evidence, Origin, asked_scenarios, concluded, priced
from halora.selection.robustness import Scenario
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


def certifications_of(folder: SweepFolder) -> dict[int, Certification]:
    """Certifications of a sweep that are finished, by attempt.

    Raises:
        UserError: One of their files is damaged.
    """
    try:
        files = {a.number: a.folder(folder) / names.CERTIFICATION_FILE for a in attempts_of(folder)}
        return {
            number: Certification.from_json(json.loads(file.read_text(encoding="utf-8")))
            for number, file in files.items()
            if file.exists()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"certifications in '{folder.selection}' cannot be read: {type(error).__name__}: {error}"
        ) from None


def certified_trials(folder: SweepFolder) -> dict[int, bool]:
    """Whether the last finished certification of a trial of the sweep was passed, by the trial's number.

    Raises:
        UserError: A file of its certifications is damaged.
    """
    finished = certifications_of(folder)
    return {finished[attempt].certificate.trial: finished[attempt].passed for attempt in sorted(finished)}


def logged_certification(client: "MlflowClient", adapter: "RegisteredAdapter") -> Certification:
    """The certification that a registered adapter passed, as MLflow has it."""
    return Certification.from_json(_logged(client, adapter, names.CERTIFICATION_FILE))


def logged_certified(client: "MlflowClient", adapter: "RegisteredAdapter") -> "ChipScores":
    """The scores behind its certificate."""
    from halora.evaluation.chips import ChipScores

    return ChipScores.from_json(_logged(client, adapter, names.SCORES_FILE))


def logged_robustness(client: "MlflowClient", adapter: "RegisteredAdapter") -> "dict[str, ChipScores]":
    """The scores behind its robustness table, by name of the line."""
    from halora.evaluation.chips import ChipScores

    found = _logged(client, adapter, names.ROBUSTNESS_FILE)
    return {name: ChipScores.from_json(scores) for name, scores in found.items()}


def _logged(client: "MlflowClient", adapter: "RegisteredAdapter", name: str) -> Any:
    from halora.records.queries import logged_json

    return logged_json(client, adapter.run_id, f"{names.CERTIFICATION_FOLDER.format(attempt=adapter.attempt)}/{name}")


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
    from halora.records.delivery import refused
    from halora.records.queries import download_adapter, logged_config, logged_scores, trial_run
    from halora.records.registry import log_certification

    folder = store.sweep(sweep.name)
    run = trial_run(client, sweep.name, sweep.launch, point.number)
    config = logged_config(client, run.info.run_id)
    with TemporaryDirectory() as scratch:
        adapter = download_adapter(client, run, Path(scratch))
        if adapter is None:
            cause = refused(folder).get(point.number)
            why = f"its record was refused: {cause} (kept in {folder.refused_file})" if cause else "it was simulated"
            raise UserError(f"trial '{sweep.name}/{point.number}' has no adapter in MLflow: {why}")
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
            by_line = {name: scores.to_json() for name, scores in work.robustness(gates).items()}
            write_json(Path(scratch) / names.ROBUSTNESS_FILE, by_line)
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

        attempt, config = self._attempt, self._config
        return concluded(
            Evidence(
                origin=Origin(
                    sweep=self._sweep.name,
                    trial=attempt.trial,
                    launch=attempt.launch,
                    attempt=attempt.number,
                    earlier=attempt.spent.earlier,
                    spent=attempt.spent.error,
                ),
                config=config,
                asked=gates,
                scores=self.certified,
                robustness=self.robustness(gates),
                task=task_id(config.task),
                rows_digest=rows["digest"],
                base=model_id(config.model),
                base_sha256=json.loads(self._file("base").read_text(encoding="utf-8"))["sha256"],
                energy=priced(config),
                adapter_sha256=attempt.adapter_sha256,
                adapter_bytes=adapter_bytes,
                reload_share=agreement(config, self._read("recorded"), self._read("reload")).share,
            )
        )

    def robustness(self, gates: Gates) -> dict[str, "ChipScores"]:
        """Scores that the robustness table rests on, by name of the line."""
        chips = min(gates.robustness_chips, self._attempt.chips)
        lines = asked_scenarios(self._config, gates)
        return {line.name: self._read(self._part_of(line, chips)) for line in lines if line.chip is not None}

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
        for scenario in asked_scenarios(self._config, gates):
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

    def _part_of(self, scenario: Scenario, chips: int) -> str:
        assert scenario.chip is not None
        return f"robustness-{scenario.chip.content_hash}-{chips}"

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> "ChipScores":
        from halora.evaluation.chips import ChipScores

        return ChipScores.from_json(json.loads(self._file(name).read_text(encoding="utf-8")))
