"""The Ray Tune trainable: trains one trial, evaluates it, and keeps the base model for the next.

An actor lives across trials (`reuse_actors`), so imports, the base model and the rows are loaded once. Durable state is
the trial's own folder, not Ray's: `trial.json`, `step-NNNNNN/` checkpoints and `reports.json` while training,
`result.json` at the end. With a storage the folder is a scratch one, and what is in the storage lasts.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ray import tune

from halora.errors import StorageError, UserError
from halora.evaluation.chips import ChipScores, evaluate
from halora.evaluation.generation import check_scorable
from halora.files import no_room, write_json
from halora.hardware.addressing import Role
from halora.heartbeat import Heart
from halora.peers import Peers, WorkerLostError, WorkerOutOfMemoryError
from halora.storage import WorkFolder
from halora.training.adapter import attach_saved, detach
from halora.training.checkpoint import Checkpoint
from halora.training.engine import Finetuner, save_latest
from halora.training.memory import ran_out_of_memory
from halora.training.models import BaseModel, load_base
from halora.training.prompts import prepared_rows
from halora.training.rram import RramArray, install
from halora.training.tasks import Row, Split, load_rows
from halora.training.workers import Place, free_port, leaving_on_failure
from halora.trial import (
    REPORTS_FILE,
    RESULT_FILE,
    TRIAL_FILE,
    Goal,
    TrialConfig,
    adapter_folder,
    latest_checkpoint,
    past_reports,
)

_LOADING_S = 1800.0
"""Longest wait for another worker to start and to load the base model."""


class Workbench:
    """What one process keeps between trials: the base model with its RRAM layers, the rows, and its peers."""

    def __init__(self) -> None:
        self._loaded: tuple[tuple[str, str], BaseModel, RramArray] | None = None
        self._peers = Peers(Peer, 0)

    def base(self, config: TrialConfig) -> tuple[BaseModel, RramArray]:
        """The trial's base model, loaded when the last trial had another."""
        name = (config.model, config.training.dtype)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # free the old one first
            base = load_base(*name)
            self._loaded = (name, base, install(base.causal_lm))
        return self._loaded[1], self._loaded[2]

    def train(self, config: TrialConfig, folder: Path, until: int | None = None) -> "Training":
        """Begin the trial's training, or go on from its latest checkpoint in `folder`; up to a step, or to its end.

        Raises:
            UserError: The checkpoint is damaged or another adapter's, or the model lacks the adapter's targets.
            WorkerLostError: Another worker of the trial could not begin.
        """
        return Training(self, config, folder, until)

    def peers(self, config: TrialConfig) -> Peers:
        """The trial's other workers, running; those of the last trial where it had as many."""
        count = config.training.workers - 1
        if self._peers.count != count:
            self._peers.kill()
            self._peers = Peers(Peer, count)
        self._peers.start()
        return self._peers

    def finetuner(self, config: TrialConfig, place: Place, checkpoint: Checkpoint | None) -> Finetuner:
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
        base, array = self.base(config)
        peft_model = attach_saved(base, adapter, config.chip.lora.weight_bits) if adapter else None
        try:
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

    def __init__(self, workbench: Workbench, config: TrialConfig, folder: Path, until: int | None) -> None:
        self._workbench, self._config, self._folder = workbench, config, folder
        self._until = config.training.steps if until is None else until
        self._patience = {"timeout_s": config.training.worker_timeout_s}
        self._peers = workbench.peers(config)
        with self._peers.in_step("load", config, timeout_s=_LOADING_S):
            workbench.base(config)
            workbench.scored_rows(config)  # what could not be scored in the end is told before anything is trained
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TRIAL_FILE, config.model_dump(mode="json"))
        latest = latest_checkpoint(folder)
        checkpoint = Checkpoint.read(latest) if latest else None  # peers may be where the folder is not
        place = Place(0, config.training.workers, self._peers.host, free_port(), config.training.worker_timeout_s)
        with self._peers.in_step("begin", config, place, checkpoint, **self._patience):
            self._finetuner = workbench.finetuner(config, place, checkpoint)
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
            self._workbench.close(self._finetuner)


class Peer:
    """A worker of rank 1 or above: does what rank 0 does, at its word, and reports nothing."""

    def __init__(self, rank: int) -> None:
        _use_own_threads()
        self._rank = rank
        self._workbench = Workbench()
        self._finetuner: Finetuner | None = None

    def load(self, config: TrialConfig) -> None:
        """Load the base, before the group gathers."""
        self._workbench.base(config)

    def begin(self, config: TrialConfig, place: Place, checkpoint: Checkpoint | None) -> None:
        """Join the training; `place` is that of rank 0."""
        self.close()  # what rank 0 may have given up
        with leaving_on_failure():
            self._finetuner = self._workbench.finetuner(config, replace(place, rank=self._rank), checkpoint)

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
            self._workbench.close(self._finetuner)
            self._finetuner = None


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
        """Score on this process's workbench.

        Args:
            adapter_files: Files of the adapter, where its folder may not be.
        """
        with TemporaryDirectory() as scratch:
            for name, content in (adapter_files or {}).items():
                (Path(scratch) / name).write_bytes(content)
            return _workbench().evaluate(
                self.config,
                Path(scratch) if adapter_files else self.adapter,
                first_row=self.first_row,
                first_chip=self.first_chip,
                split=self.split,
                role=self.role,
                series=self.series,
            )


@cache
def _workbench() -> Workbench:
    return Workbench()


@lru_cache(maxsize=8)
def task_rows(task: str, split: Split, limit: int | None) -> tuple[Row, ...]:
    """Rows of a split, read once per process."""
    return tuple(load_rows(task, split, limit))


class HaloraTrainable(tune.Trainable):
    """Ray Tune's view of a job: bringing a trial to a goal.

    The `config` given by the executor holds the `job`'s name, `number`, `folder`, `trial` (a resolved `TrialConfig`),
    `goal`, the trial's place in the `storage` (a URL, or nothing), and `heartbeats` with the name of that actor and the
    longest silence in seconds. Reports carry `number`, `stage` (`training`, `evaluated`, `lost`, `out_of_memory` or
    `failed`) and metrics; the last three say a `cause`. Without a goal the bare base's `scores` are reported, as JSON:
    Ray Tune takes nested reports apart.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial of this actor."""
        _use_own_threads()
        self._heart = Heart(*config["heartbeats"])
        self._workbench = Workbench()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial in the same actor."""
        self._end_training()
        self._files.close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next report, or evaluate once training is done."""
        try:
            return {"number": self._number, **self._step()}
        except Exception as error:
            stage, cause = self._judge(error)
            if not stage:
                raise
            self._end_training()
            return {"number": self._number, "stage": stage, "cause": cause, "done": True}

    def _judge(self, error: Exception) -> tuple[str, str]:
        """What an error makes of the trial, and its cause; nothing where the actor is not to be trusted any more."""
        if isinstance(error, WorkerOutOfMemoryError) or ran_out_of_memory(error):
            training = self._config.training
            if self._trained:
                return "failed", "out of memory while it was scored; lower evaluation.batch_size"
            cause = f"out of memory with {training.micro_batch} rows at a time"
            return ("out_of_memory" if training.micro_batch_divisible else "failed"), cause
        if isinstance(error, WorkerLostError | StorageError):
            return "lost", str(error)
        if isinstance(error, UserError | FloatingPointError):  # this trial's own fault
            return "failed", str(error)
        if no_room(error):
            return "lost", f"no space is left in '{self._folder}'"
        return "", ""

    def cleanup(self) -> None:
        """Release the engine, the other workers and the scratch folder when the actor ends."""
        self._end_training()
        self._files.close()
        self._workbench.end_peers()
        self._heart.stop()

    def _begin(self, config: dict[str, Any]) -> None:
        self._heart.job = config["job"]
        self._number, self._folder = int(config["number"]), Path(config["folder"])
        self._files = WorkFolder(self._folder, config.get("storage", ""))
        self._config = TrialConfig.model_validate(config["trial"])
        self._goal = Goal(**config["goal"]) if config["goal"] else None
        self._training: Training | None = None
        self._trained = self._goal is None or self._goal.first_chip > 0

    def _step(self) -> dict[str, Any]:
        goal = self._goal
        if goal is None:
            scores = self._workbench.evaluate(self._config, None)
            return {"stage": "evaluated", "scores": json.dumps(scores.to_json()), "done": True}
        self._folder = self._files.fetch(goal)
        if not self._trained:
            if self._training is None:
                self._training = self._workbench.train(self._config, self._folder, goal.steps)
            report = self._training.advance()
            self._files.put_checkpoint()
            self._trained = self._training.done
            return {"stage": "training", **report, "done": False}
        self._end_training()
        result = self._folder / RESULT_FILE
        if not goal.chip_instances:
            return {"stage": "evaluated", "step": goal.steps, "done": True}
        config = goal.config(self._config)
        scores = self._workbench.evaluate(config, adapter_folder(self._folder), first_chip=goal.first_chip)
        if goal.first_chip:
            scores = ChipScores.from_json(json.loads(result.read_text())).with_chips_after(goal.first_chip, scores)
        write_json(result, scores.to_json())
        self._files.put_result(goal)
        taken_at = {"step": goal.steps, "rows": len(scores.row_ids), "accuracy_by_chip": scores.accuracy_by_chip}
        return {"stage": "evaluated", **taken_at, **scores.summary(), "done": True}

    def _end_training(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None


def _use_own_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
