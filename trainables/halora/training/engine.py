"""HaLoRA finetuning through a DeepSpeed engine: L = L_task + mu L_reg under noise on the frozen weights.

Everything random is a function of (seed, step), so a restored run continues exactly as an uninterrupted one. Rows of a
step are shared by its workers and their micro-batches, each weighted by its share of the step's option tokens: the
gradient is that of one batch, however it is shared.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.hardware.chip import Chip, Retention
from halora.settings.names import task_weights
from halora.settings.training import TrainingSettings
from halora.settings.trial import TrialConfig
from halora.training.adapter import attach, detach, lora_pairs, regulariser
from halora.training.batches import Batch, lay_out, mixture_of, pack_answer, rows_at_step
from halora.training.calibration import at_age, calibrate
from halora.training.checkpoint import Checkpoint, TrainedState
from halora.training.gradients import GradientShares, gradient_shares, watching_gradients
from halora.training.models import BaseModel
from halora.training.rram import Reads, RramArray
from halora.training.tasks import Row
from halora.training.training_noise import TrainingNoise
from halora.training.workers import WorkerRank, bound_waits, join_process_group, leave_process_group, mean_over_workers


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step saw.

    Attributes:
        loss: L_task + mu L_reg.
        task_loss: Mean cross-entropy of the option tokens, in nats.
        reg_loss: L_reg before its weight.
        strength: Training noise in force, in units of the chip's noise reference.
        gradients: What each term of the loss pulls at the adapter with, where that was asked for.
    """

    loss: float
    task_loss: float
    reg_loss: float
    strength: float
    gradients: GradientShares | None = None


class HaloraLoss(nn.Module):
    """The loss as one module, so that DeepSpeed's hooks see every parameter it reads."""

    def __init__(self, peft_model: Any, training: TrainingSettings) -> None:
        super().__init__()
        self.peft_model = peft_model
        self._reg_weight = training.reg_weight
        self._regulariser = partial(regulariser, norm=training.reg_norm, reduction=training.reg_reduction)

    def forward(self, batch: Batch, target_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch, its task loss and L_reg.

        Args:
            batch: The rows.
            target_weight: What an option token's cross-entropy counts in the task loss; 1 / targets for their mean.
        """
        task_loss = -target_weight * batch.log_likelihoods(self.peft_model.get_base_model()).sum()
        reg_loss = self._regulariser(lora_pairs(self.peft_model))
        return task_loss + self._reg_weight * reg_loss, task_loss.detach(), reg_loss.detach()


class Finetuner:
    """One training run on a base model that outlives it, or one worker's part in it.

    Args:
        base: The frozen base, its linear layers mapped to `array`.
        array: Its RRAM layers.
        rows: Training rows.
        config: The trial.
        place: This worker's place among the workers of the trial; alone where none is given.

    Raises:
        UserError: The adapter's targets are not all in the model, or an epoch is too long for the noise schedule.
    """

    def __init__(
        self, base: BaseModel, array: RramArray, rows: list[Row], config: TrialConfig, place: WorkerRank | None = None
    ) -> None:
        self.step = 0
        self._base, self._array, self._rows, self._config = base, array, rows, config
        self._place = place or WorkerRank()
        self._mixture = mixture_of(rows, task_weights(config.task))
        self._programmed = (-1, 0.0)  # number of the draw under the model, and its strength
        self._calibrated: dict[str, dict[str, Reads]] = {}
        training = config.training
        self._noise = TrainingNoise(
            training.schedule,
            config.chip,
            seed=config.seed,
            steps=training.steps,
            epoch_steps=len(rows) / training.batch_size,
            layers=[layer.name for layer in array.mapped(config.chip)],
        )
        if training.noisy and (unmet := training.schedule.unmet(training.steps, self._noise.redraw_steps)):
            raise UserError([f"training.schedule.{problem}" for problem in unmet])
        self._regenerate = _regenerates(array, config)
        self._peft_model = attach(base, config.lora, config.seed)
        if config.training.activation_checkpointing:
            _checkpoint_activations(base.causal_lm)
        trainable = {n: p for n, p in self._peft_model.named_parameters() if p.requires_grad}
        self._pairs = lora_pairs(self._peft_model)
        join_process_group(self._place)
        loss = HaloraLoss(self._peft_model, config.training)
        self._engine = _deepspeed_engine(loss, list(trainable.values()), config.training)
        bound_waits(self._place)
        self._state = TrainedState(self._engine, trainable)

    @property
    def spends_base(self) -> bool:
        """Whether the base is of no use afterwards: ZeRO-3 leaves it in shards."""
        return self._config.training.zero_stage == 3

    @property
    def writes(self) -> bool:
        """Whether this worker writes the checkpoints."""
        return self._place.rank == 0

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self._config.training.steps

    def train_steps(self, count: int) -> dict[str, float]:
        """Take steps: the means of what they saw, and the gradients of the last. Every worker must ask for as many.

        Raises:
            FloatingPointError: See `train_step`.
        """
        reports = [self.train_step(measure_gradients=i + 1 == count) for i in range(count)]
        gradients = reports[-1].gradients
        assert gradients is not None
        means = {
            name: fmean(getattr(each, name) for each in reports)
            for name in ("loss", "task_loss", "reg_loss", "strength")
        }
        return means | gradients.known()

    def train_step(self, *, measure_gradients: bool = False) -> StepReport:
        """One optimiser step.

        Args:
            measure_gradients: Tell the gradients of the loss's terms apart; every worker must ask for it.

        Raises:
            FloatingPointError: The loss is not finite; the adapter is not changed by this step. Every worker raises it.
        """
        training = self._config.training
        strength = self._program()
        torch.manual_seed(derive_seed("step", self._config.seed, self.step))
        indices = rows_at_step(self._mixture, training.batch_size, self._config.seed, self.step)
        watched: AbstractContextManager[list[Tensor] | None] = nullcontext()
        if measure_gradients:
            watched = watching_gradients(self._pairs)
        with watched as total:
            loss, task_loss, reg_loss = mean_over_workers(self._accumulate(self._micro_batches(indices))).tolist()
        if not isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {self.step}")
        gradients = gradient_shares(total, self._pairs, training) if total else None
        self._update(training.learning_rate * min(1.0, (self.step + 1) / (training.warmup_steps + 1)))
        self.step += 1
        return StepReport(loss, task_loss, reg_loss, strength, gradients)

    def _program(self) -> float:
        """Put this step's noise under the model, where it is not the last step's."""
        if not self._config.training.noisy:
            return 0.0
        draw = self._noise.at(self.step)
        if (draw.index, draw.strength) != self._programmed:
            if draw.instance is None:
                self._array.clear()
            else:
                self._array.program(draw.instance, self._reads(draw.instance.chip), regenerate=self._regenerate)
            self._programmed = (draw.index, draw.strength)
        return draw.strength

    def _reads(self, chip: Chip) -> dict[str, Reads]:
        """How a chip is read while training, calibrated when it is met first."""
        if self._config.training.converters == "none":
            return {}
        converters = chip.model_copy(update={"retention": Retention()}).content_hash  # set when the chip is new
        found = self._calibrated.get(converters)
        if found is None:
            tokens = self._config.evaluation.calibration_tokens
            self._array.clear()
            with self._peft_model.disable_adapter():
                found = calibrate(self._base, self._array, chip, self._rows, tokens, "statistical")
            self._calibrated[converters] = found
        return at_age(found, self._array, chip)

    def _micro_batches(self, indices: list[int]) -> Iterator[tuple[Batch, float]]:
        """This worker's share of a step's rows, with what an option token counts in it.

        DeepSpeed takes the mean over micro-batches and workers, so a token counts micro-batches x workers / tokens.
        """
        rows = [pack_answer(self._rows[i], self._base.tokenizer) for i in indices]
        num_own = self._config.training.gradient_accumulation
        num_all = num_own * self._place.workers
        target_weight = num_all / sum(len(row.sources) for row in rows)
        for i in range(num_own):
            yield lay_out(rows[self._place.rank * num_own + i :: num_all]), target_weight

    def _accumulate(self, micro_batches: Iterable[tuple[Batch, float]], scale: float = 1.0) -> Tensor:
        """Accumulate the gradient of `scale` x loss; the means of loss, task loss and L_reg, `(3,)`."""
        losses: list[Tensor] = []
        for batch, target_weight in micro_batches:
            if losses:
                self._engine.step()  # counts the micro-batch before; DeepSpeed updates after the last one only
            with self._array.reading(batch.rows, batch.predicting):  # a checkpointed block reads again in the backward
                loss, task_loss, reg_loss = self._engine(batch, target_weight)
                self._engine.backward(scale * loss)
            losses.append(torch.stack([loss.detach(), task_loss, reg_loss]))
        return torch.stack(losses).mean(dim=0)

    def _update(self, learning_rate: float) -> None:
        """Update the adapter with the accumulated gradient."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def save(self, folder: Path) -> None:
        """Write a checkpoint, which appears under its name whole; rank 0 writes, but every worker must ask."""
        checkpoint = self._state.read(self.step)
        if self.writes:
            checkpoint.write(folder, self._peft_model.peft_config["default"])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, whatever the number of workers and the ZeRO stage it was written with.

        Raises:
            UserError: The checkpoint belongs to an adapter of another shape.
        """
        self._state.check_fits(checkpoint)
        # DeepSpeed makes its optimiser state, and ZeRO-3 whole weights, at the first step: an empty one.
        batch = lay_out([pack_answer(self._rows[0], self._base.tokenizer)])
        self._accumulate([(batch, 0.0)] * self._config.training.gradient_accumulation, scale=0.0)
        self._update(learning_rate=0.0)
        self._state.write(checkpoint)
        self.step = checkpoint.step

    def close(self) -> None:
        """Tear engine and group down and give the base model back, unless it is spent."""
        self._array.clear()
        self._engine.destroy()
        if self._place.workers > 1:
            leave_process_group()
        if self._config.training.activation_checkpointing:
            self._base.causal_lm.activation_checkpointing_disable()
            self._base.causal_lm.eval()
        detach(self._peft_model)


def save_latest(finetuner: Finetuner, folder: Path) -> Path:
    """Checkpoint as `step-NNNNNN` below `folder`; only then are those of earlier steps deleted. Every worker must ask.

    A worker that was thought lost may be behind the one that took its trial over, whose checkpoint stays.
    """
    newest = folder / f"step-{finetuner.step:06d}"
    finetuner.save(newest)
    if finetuner.writes:
        for old in (*folder.glob("step-*"), *folder.glob(".step-*.partial")):
            if old.name.lstrip(".") < newest.name:
                shutil.rmtree(old, ignore_errors=True)  # another worker may be at it
    return newest


def _regenerates(array: RramArray, config: TrialConfig) -> bool:
    """Whether noisy weights are made in every pass: at ZeRO-3, or where a copy would take half the free memory."""
    training = config.training
    if training.noisy_weights != "auto":
        return training.noisy_weights == "regenerate"
    if training.zero_stage == 3:
        return True
    weight = array.layers[0].weight
    mapped = array.mapped(config.chip)
    copy = sum(layer.in_features * layer.out_features for layer in mapped) * weight.element_size()
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else psutil.virtual_memory().available
    return bool(copy > free / 2)


def _checkpoint_activations(causal_lm: Any) -> None:
    """Have `transformers` compute each decoder block again in the backward, which it does in training mode only.

    The noise of a block is addressed, not drawn in turn, so the block computed again is the same.
    """
    causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    causal_lm.train()


def _number_from_zero() -> None:
    """Have ZeRO-3 number the next model's parameters and modules from 0.

    It goes on counting from engine to engine, and refuses workers whose numbers differ, as they do when one of them
    had a ZeRO-3 trial more.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = 0


def _deepspeed_engine(loss: HaloraLoss, parameters: list[nn.Parameter], training: TrainingSettings) -> Any:
    import deepspeed

    _number_from_zero()
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    parts = training.workers * training.gradient_accumulation
    engine, *_ = deepspeed.initialize(
        model=loss,
        optimizer=optimizer,
        model_parameters=parameters,
        config={
            "train_micro_batch_size_per_gpu": ceil(training.batch_size / parts),
            "gradient_accumulation_steps": training.gradient_accumulation,
            "gradient_clipping": training.gradient_clip,
            "bf16": {"enabled": training.dtype == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                # Stage 1 is where DeepSpeed keeps float32 masters of bf16 weights; for one process it equals stage 0.
                "stage": max(training.zero_stage, 1) if training.dtype == "bf16" else training.zero_stage,
                # Adapter weights stay whole at stage 3: L_reg reads them outside their layer's forward.
                "stage3_param_persistence_threshold": max(p.numel() for p in parameters) + 1,
            },
        },
    )
    return engine
