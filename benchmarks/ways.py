"""The two ways to train that benchmarks compare, on the same rows in one order; ours by the project's own seams."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain
from benchmarks.harness import Work
from halora.settings.names import task_weights
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import load_trial
from halora.training.batches import mixture_of, pack_answer, rows_at_step
from halora.training.models import find_model
from halora.training.tasks import Row
from halora.training.workers import WorkerRank
from halora.trial_runner import TrialRunner

SIGMA = 0.01
"""Of the training noise, over the largest weight of each matrix: the paper's."""
CHIP = {"preset": "ideal", "noise": {"kind": "gaussian", "sigma": SIGMA, "reference": "tensor_max"}}
"""A chip with that noise and no other flaw, as the other ways know no other."""
CLEAN = {"training.schedule": {"strength_start": 0.0, "clean_probability": 1.0}}
"""Settings of a trial that trains with L_reg on clean weights."""


def trial(settings: Mapping[str, Any]) -> TrialConfig:
    """HaLoRA of SmolLM2-135M on ARC-Easy, its noise redrawn at every step, with settings by dotted path."""
    fixed = {
        "chip": CHIP,
        "training.method": "halora",
        "training.reg_reduction": "mean",  # as the other ways have it
        "training.schedule": {"shape": "constant", "strength_start": SIGMA, "redraw_steps": 1},
    }
    return load_trial("quickstart", fixed | dict(settings))


def row_order(config: TrialConfig, rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of the rows of each step of a trial, step after step."""
    mixture, training = mixture_of(rows, task_weights(config.task)), config.training
    return (rows_at_step(mixture, training.batch_size, config.seed, step) for step in count())


class OurSteps:
    """A trial's optimiser steps, taken as its process takes them.

    Args:
        config: The trial.
        runner: Holds the base model; a new one when left out.
    """

    def __init__(self, config: TrialConfig, runner: TrialRunner | None = None) -> None:
        self.losses: list[float] = []
        self._runner = runner or TrialRunner()
        self._causal_lm = self._runner.base(config)[0].causal_lm
        self._finetuner = self._runner.finetuner(config, WorkerRank(), None)
        rows = self._runner.training_rows(config, config.training.train_rows)
        tokenizer = self._runner.base(config)[0].tokenizer
        self._option_tokens = [len(pack_answer(row, tokenizer).sources) for row in rows]
        self._order = row_order(config, rows)

    def __call__(self) -> Work:
        """One step."""
        self.losses.append(self._finetuner.train_step().loss)
        indices = next(self._order)
        tokens = sum(self._option_tokens[i] for i in indices)
        return Work(len(indices), plain.dtype_name(self._causal_lm), torch.get_num_threads(), tokens)

    def close(self) -> None:
        """End the training."""
        self._runner.close(self._finetuner)


class PlainSteps:
    """The steps of the same trial in the user's script: LoRA, or HaLoRA where noise or mu is given.

    Args:
        config: The trial.
        attention: The attention to use, as `transformers` names it.
        sigma: Of the noise redrawn at every step; clean weights when left out.
        mu: Weight of L_reg.
        seed: Of the adapter.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        attention: str = "sdpa",
        sigma: float | None = None,
        mu: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.losses: list[float] = []
        training, lora = config.training, config.lora
        rows = TrialRunner().training_rows(config, training.train_rows)
        model, tokenizer = plain.load(find_model(config.model, training.dtype), training.dtype, attention)
        noise = None if sigma is None else plain.NoisyWeights(model, sigma)
        model = plain.with_adapter(model, lora.rank, lora.rank * lora.alpha_over_rank, seed)
        batches = plain.training_batches(rows, tokenizer, row_order(config, rows))
        self._training = plain.Training(model, batches, training.learning_rate, noise, mu)

    def __call__(self) -> Work:
        """One step."""
        loss, labels = self._training.step()
        self.losses.append(loss)
        tokens = int((labels != -100).sum())
        return Work(len(labels), plain.dtype_name(self._training.model), torch.get_num_threads(), tokens)

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does."""
        self._training.model.save_pretrained(folder)
