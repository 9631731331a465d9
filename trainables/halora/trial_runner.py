"""Trains and scores trials in one process, which keeps the base model and the rows from one trial to the next.

Durable state is the trial's own folder: `trial.json`, `step-NNNNNN/` checkpoints and `reports.json` while training,
`result.json` at the end. Needs no Ray, but for a trial of several workers.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from halora.evaluation.chips import ChipScores, evaluate
from halora.evaluation.generation import check_scorable
from halora.files import write_json
from halora.hardware.addressing import Role
from halora.rank_workers import RankWorkers, WorkerLostError
from halora.settings.trial import TrialConfig
from halora.training.adapter import attach_saved, detach
from halora.training.checkpoint import Checkpoint
from halora.training.engine import Finetuner, save_latest
from halora.training.models import BaseModel, load_base
from halora.training.prompts import prepared_rows
from halora.training.rram import RramArray, install
from halora.training.tasks import Row, Split, load_rows
from halora.training.workers import WorkerRank, free_port, leaving_on_failure
from halora.trial_folder import REPORTS_FILE, TRIAL_FILE, latest_checkpoint, past_reports

_LOADING_S = 1800.0
"""Longest wait for another worker to start and to load the base model."""


class TrialRunner:
    """What one process keeps between trials: the base model with its RRAM layers, the rows, and its peers."""

    def __init__(self) -> None:
        self._loaded: tuple[tuple[str, str], BaseModel, RramArray] | None = None
        self._peers = RankWorkers(RankWorker, 0)

    def base(self, config: TrialConfig) -> tuple[BaseModel, RramArray]:
        """The trial's base model, loaded when the last trial had another."""
        name = (config.model, config.training.dtype)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # free the old one first
            base = load_base(*name)
            self._loaded = (name, base, install(base.causal_lm))
        return self._loaded[1], self._loaded[2]

    def train(self, config: TrialConfig, folder: Path, until: int | None = None) -> "Training":
        """Begin the trial's training, or resume from its latest checkpoint in `folder`; up to a step, or to its end.

        Raises:
            UserError: The checkpoint is damaged or another adapter's, or the model lacks the adapter's targets.
            WorkerLostError: Another worker of the trial could not begin.
        """
        return Training(self, config, folder, until)

    def peers(self, config: TrialConfig) -> RankWorkers:
        """The trial's other workers, running; those of the last trial where it had as many."""
        count = config.training.workers - 1
        if self._peers.count != count:
            self._peers.kill()
            self._peers = RankWorkers(RankWorker, count)
        self._peers.start()
        return self._peers

    def finetuner(self, config: TrialConfig, place: WorkerRank, checkpoint: Checkpoint | None) -> Finetuner:
        """One worker's part in the training, from the checkpoint where there is one."""
        base, array = self.base(config)
        rows = self.training_rows(config, config.training.train_rows)
        try:
            finetuner = Finetuner(base, array, rows, config, place)
        except Exception:
            self.forget_base()  # an adapter may be attached to it
            raise
        try:
            if checkpoint:
                finetuner.restore(checkpoint)
        except Exception:
            self.close(finetuner)
            raise
        return finetuner

    def close(self, finetuner: Finetuner) -> None:
        """Tear a finetuner down; the base is kept where it can be."""
        finetuner.close()
        if finetuner.spends_base:
            self.forget_base()

    def end_peers(self) -> None:
        """End the other workers; the next trial that wants some starts new ones."""
        self._peers.kill()

    def forget_base(self) -> None:
        """Drop the base model; ZeRO-3 leaves its shards unusable."""
        self._loaded = None

    def evaluate(
        self,
        config: TrialConfig,
        adapter: Path | None,
        *,
        first_row: int = 0,
        first_chip: int = 0,
        split: Split = "validation",
        role: Role = Role.SEARCH,
        series: str = "",
    ) -> ChipScores:
        """Score a stored adapter on chip instances.

        Args:
            config: The trial.
            adapter: Folder of the adapter; none for the bare base.
            first_row: Rows to leave out before `config.evaluation.rows` are taken.
            first_chip: Number of the first chip instance.
            split: Where the rows come from.
            role: Pool of the chip instances.
            series: Series within the pool of certification, see `NoiseKey`.
        """
        settings = config.evaluation
        rows = self.scored_rows(config, first_row, split)
        calibration_rows = self.training_rows(config, settings.calibration_tokens)
        with self.adapted(config, adapter) as (base, array):
            return evaluate(
                base,
                array,
                config.chip,
                rows,
                calibration_rows,
                settings,
                role=role,
                series=series,
                first_chip=first_chip,
            )

    @contextmanager
    def adapted(self, config: TrialConfig, adapter: Path | None) -> Iterator[tuple[BaseModel, RramArray]]:
        """The trial's base with a stored adapter attached, at the chip's precision, while the block runs."""
        base, array = self.base(config)
        peft_model = attach_saved(base, adapter, config.chip.lora.weight_bits) if adapter else None
        try:
            yield base, array
        finally:
            array.clear()
            if peft_model is not None:
                detach(peft_model)

    def training_rows(self, config: TrialConfig, limit: int | None) -> list[Row]:
        """Training rows, ready for the trial's model."""
        return prepared_rows(task_rows(config.task, "train", limit), self.base(config)[0], config.prompt_format)

    def scored_rows(self, config: TrialConfig, first_row: int = 0, split: Split = "validation") -> list[Row]:
        """Rows that the trial is scored on, ready for its model.

        Raises:
            UserError: They do not fit the model or cannot be scored the asked way.
        """
        settings = config.evaluation
        until = None if settings.rows is None else first_row + settings.rows
        rows = task_rows(config.task, split, until)[first_row:]
        check_scorable(rows, settings.scoring, settings.answer_pattern)
        new_tokens = settings.max_new_tokens if settings.scoring == "generation" else 0
        return prepared_rows(rows, self.base(config)[0], config.prompt_format, new_tokens)


class Training:
    """A trial's training: segments of steps, each ending in a report and a checkpoint.

    Its process is rank 0 of the trial's workers, and speaks for all of them.
    """

    def __init__(self, runner: TrialRunner, config: TrialConfig, folder: Path, until: int | None) -> None:
        self._runner, self._config, self._folder = runner, config, folder
        self._until = config.training.steps if until is None else until
        self._patience = {"timeout_s": config.training.worker_timeout_s}
        self._peers = runner.peers(config)
        with self._peers.in_step("load", config, timeout_s=_LOADING_S):
            runner.base(config)
            runner.scored_rows(config)  # what could not be scored in the end is told before anything is trained
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TRIAL_FILE, config.model_dump(mode="json"))
        latest = latest_checkpoint(folder)
        checkpoint = Checkpoint.read(latest) if latest else None  # peers may be where the folder is not
        place = WorkerRank(0, config.training.workers, self._peers.host, free_port(), config.training.worker_timeout_s)
        with self._peers.in_step("begin", config, place, checkpoint, **self._patience):
            self._finetuner = runner.finetuner(config, place, checkpoint)
        self._reports = past_reports(folder)

    @property
    def done(self) -> bool:
        """Whether all steps asked for are taken."""
        return self._finetuner.step >= self._until

    def advance(self) -> dict[str, float]:
        """Train up to the next report and checkpoint; means over the steps taken, and gradients of the last."""
        count = min(self._config.training.report_every, self._until - self._finetuner.step)
        with self._peers.in_step("advance", count, self._folder, **self._patience):
            seen = self._finetuner.train_steps(count) if count else {}
            report: dict[str, float] = {"step": self._finetuner.step}
            report |= {f"train_{name}": value for name, value in seen.items()}
            if seen:
                self._reports.append(report)
            write_json(self._folder / REPORTS_FILE, self._reports)  # first, so that no checkpoint lacks its report
            save_latest(self._finetuner, self._folder)
        return report

    def close(self) -> None:
        """Tear the engine down, here and on the peers."""
        with suppress(WorkerLostError), self._peers.in_step("close", **self._patience):
            self._runner.close(self._finetuner)


class RankWorker:
    """A worker of rank 1 or above: does what rank 0 does, at its word, and reports nothing."""

    def __init__(self, rank: int) -> None:
        use_own_threads()
        self._rank = rank
        self._runner = TrialRunner()
        self._finetuner: Finetuner | None = None

    def load(self, config: TrialConfig) -> None:
        """Load the base, before the group gathers."""
        self._runner.base(config)

    def begin(self, config: TrialConfig, place: WorkerRank, checkpoint: Checkpoint | None) -> None:
        """Join the training; `place` is that of rank 0."""
        self.close()  # what rank 0 may have given up
        with leaving_on_failure():
            self._finetuner = self._runner.finetuner(config, replace(place, rank=self._rank), checkpoint)

    def advance(self, count: int, folder: Path) -> None:
        """Take this worker's part in `count` steps and in the checkpoint."""
        assert self._finetuner is not None
        with leaving_on_failure():
            if count:
                self._finetuner.train_steps(count)
            save_latest(self._finetuner, folder)

    def close(self) -> None:
        """Leave the training."""
        if self._finetuner is not None:
            self._runner.close(self._finetuner)
            self._finetuner = None


def use_own_threads() -> None:
    """Take as many threads as this process was given, `OMP_NUM_THREADS`, or one."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@dataclass(frozen=True)
class ScoringJob:
    """An evaluation that any process can carry out.

    Attributes:
        config: The trial, with the evaluation settings to use.
        adapter: Folder of the adapter; none for the bare base.
        first_row: Rows to leave out before `config.evaluation.rows` are taken.
        first_chip: Number of the first chip instance.
        split: Where the rows come from.
        role: Pool of the chip instances.
        series: Series within the pool of certification, see `NoiseKey`.
    """

    config: TrialConfig
    adapter: Path | None
    first_row: int = 0
    first_chip: int = 0
    split: Split = "validation"
    role: Role = Role.SEARCH
    series: str = ""

    def run(self, adapter_files: Mapping[str, bytes] | None = None) -> ChipScores:
        """Score on this process's runner.

        Args:
            adapter_files: Files of the adapter, where its folder may not be.
        """
        with TemporaryDirectory() as scratch:
            for name, content in (adapter_files or {}).items():
                (Path(scratch) / name).write_bytes(content)
            return _runner().evaluate(
                self.config,
                Path(scratch) if adapter_files else self.adapter,
                first_row=self.first_row,
                first_chip=self.first_chip,
                split=self.split,
                role=self.role,
                series=self.series,
            )


@cache
def _runner() -> TrialRunner:
    return TrialRunner()


@lru_cache(maxsize=8)
def task_rows(task: str, split: Split, limit: int | None) -> tuple[Row, ...]:
    """Rows of a split, read once per process."""
    return tuple(load_rows(task, split, limit))
