"""What a sweep will take, before it is launched: goals, time, memory, and how many trials fit at once.

Estimates for CPUs, from the model's dimensions, the task's rows and a product timed on this machine; good to about a
factor of two. Counted: products with frozen weights (twice in training, as they get no gradient of their own), the
conversions of every tile (see docs/decisions/003), the base, one noisy copy, optimiser and activations. Not counted:
loading, attention, a machine that is busy with other work.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import psutil

from halora.hardware.shapes import ModelShape
from halora.settings.trial import Goal, TrialConfig
from halora.spaces.language import Categorical
from halora.spaces.sweep import SweepConfig
from halora.sweep.search.problem import problem_of
from halora.training.models import model_shape
from halora.training.tasks import load_rows

_PROCESS_BYTES = 1.2 * 2**30  # Python with torch, transformers and DeepSpeed loaded, measured
_ACTIVATION_BYTES = 40  # per token, layer and hidden feature: what the backward keeps in float32
_CHARACTERS_PER_TOKEN = 4.0
_CONVERSION_FACTOR = 3.0  # exact converters to a plain product
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class GoalPlan:
    """One goal of a trial.

    Attributes:
        goal: Steps, rows and chips.
        trials: How many trials reach it.
        seconds: From the goal before it, training and scoring.
    """

    goal: Goal
    trials: int
    seconds: float


@dataclass(frozen=True)
class SweepPlan:
    """The whole sweep.

    Attributes:
        goals: What each goal takes a trial of the sweep's largest model.
        first: Points tried first.
        memory_bytes: Of one process of a trial.
        workers: Processes of a trial.
        concurrent: Trials that the sweep asks to run at once.
        fit: Trials that fit at once into the free memory and the cores of this machine.
        trained_anew: Adapters that the closing comparison trains.
        hours: The whole sweep, with as many trials at once as it asks for.
    """

    goals: tuple[GoalPlan, ...]
    first: tuple[Mapping[str, Any], ...]
    memory_bytes: float
    workers: int
    concurrent: int
    fit: int
    trained_anew: int
    hours: float


def plan(sweep: SweepConfig) -> SweepPlan:
    """Estimate a sweep from its fixed values and the largest of its models."""
    problem = problem_of(sweep)
    config = max((sweep.resolve({"model": model}) for model in sweep.values_of("model")), key=_size)
    threads = max((os.cpu_count() or 1) // (sweep.concurrent * sweep.workers), 1)
    flops_per_s = _flops_per_s(threads) * sweep.workers
    goals, reaching, before = [], sweep.trials, 0
    for i, goal in enumerate(problem.goals({})):
        reaching = sweep.trials if i == 0 else max(int(reaching / problem.reduction_factor), 1)
        work = _training_flops(config, goal.steps - before) + _scoring_flops(config, goal)
        goals.append(GoalPlan(goal, reaching, work / flops_per_s))
        before = goal.steps
    memory = _memory_bytes(config)
    available = psutil.virtual_memory().available
    fit = min(int(available // (memory * sweep.workers)), (os.cpu_count() or 1) // sweep.workers)
    anew = _trained_anew(sweep)
    seconds = sum((each.trials + anew) * each.seconds for each in goals)
    return SweepPlan(
        goals=tuple(goals),
        first=tuple(problem.first[: sweep.trials]),
        memory_bytes=memory,
        workers=sweep.workers,
        concurrent=sweep.concurrent,
        fit=fit,
        trained_anew=anew,
        hours=seconds / 3600 / sweep.concurrent,
    )


def _trained_anew(sweep: SweepConfig) -> int:
    if sweep.comparison is None or sweep.comparison.seeds == 1:
        return 0
    by = sweep.space.get(sweep.comparison.by) if sweep.comparison.by else None
    return sweep.comparison.seeds * (len(by.choices) if isinstance(by, Categorical) else 1)


def _size(config: TrialConfig) -> int:
    return _weights(model_shape(config.model))


def _weights(shape: ModelShape) -> int:
    return shape.layers * sum(linear.weights for linear in shape.linears)


def _tokens_per_row(config: TrialConfig, split: str) -> float:
    """Of the prompt and all options, which share it, from the characters of some rows."""
    rows = load_rows(config.task, "train" if split == "train" else "validation", _SAMPLED_ROWS)
    options = (lambda row: [row.options[row.answer]]) if split == "train" else (lambda row: row.options)
    return fmean((len(row.prompt) + sum(map(len, options(row)))) / _CHARACTERS_PER_TOKEN for row in rows)


def _training_flops(config: TrialConfig, steps: int) -> float:
    tokens = _tokens_per_row(config, "train") * config.training.batch_size
    passes = 3 if config.training.activation_checkpointing else 2
    return steps * tokens * 2 * passes * _weights(model_shape(config.model))


def _scoring_flops(config: TrialConfig, goal: Goal) -> float:
    rows = goal.rows or len(load_rows(config.task, "validation"))
    ideal = config.chip.adc.lossless and config.chip.dac.lossless
    strengths = 1 + len(goal.config(config).evaluation.noise_strengths)
    passes = 1 + strengths * goal.chip_instances * (1 if ideal else _CONVERSION_FACTOR)
    return rows * _tokens_per_row(config, "validation") * passes * 2 * _weights(model_shape(config.model))


def _memory_bytes(config: TrialConfig) -> float:
    shape, training = model_shape(config.model), config.training
    weights, width = _weights(shape), 2 if training.dtype == "bf16" else 4
    names = shape.adapted(config.lora.targets)
    adapted = [linear for linear in shape.linears if linear.name in names]
    adapter = shape.layers * sum(config.lora.rank * (linear.in_features + linear.out_features) for linear in adapted)
    micro_batch = training.batch_size / (training.gradient_accumulation * training.workers)
    tokens = max(micro_batch, 1) * _tokens_per_row(config, "train")
    kept = shape.hidden if training.activation_checkpointing else shape.hidden * shape.layers
    frozen = (weights + shape.vocabulary * shape.hidden) * width + weights * width  # the base, and a noisy copy
    return _PROCESS_BYTES + frozen + 16 * adapter + tokens * kept * _ACTIVATION_BYTES


def _flops_per_s(threads: int) -> float:
    """Of a float32 product of a usual size, the best of a few."""
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    left, right = rng.random((256, 1024), dtype=np.float32), rng.random((1024, 1024), dtype=np.float32)
    took = []
    with threadpool_limits(threads):
        for _ in range(5):
            began = time.perf_counter()
            left @ right
            took.append(time.perf_counter() - began)
    return 2 * 256 * 1024 * 1024 / min(took)
