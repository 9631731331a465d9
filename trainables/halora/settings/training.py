"""Everything a training run can be told, validated before any heavy import."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from halora.hardware.families import LINEAR_NAMES
from halora.settings.schedule import NoiseSchedule
from halora.strict_model import StrictModel

Method = Literal["lora", "noise_lora", "halora"]
"""`lora`: no noise, no regulariser. `noise_lora`: noise only. `halora`: noise and L_reg."""

Dtype = Literal["fp32", "bf16"]
"""Of the base's weights."""

LoraVariant = Literal["plain", "rslora", "dora"]
"""`rslora`: scale alpha / sqrt(r) (arXiv 2312.03732). `dora`: a trained magnitude per output (arXiv 2402.09353)."""


class LoraSettings(StrictModel):
    """Shape of the adapter; the paper adapts q, k, v, up and down at rank 4."""

    rank: int = Field(default=4, ge=1, le=256)
    alpha_over_rank: float = Field(default=2.0, gt=0, le=64)
    """LoRA's alpha over its rank. Its scale is alpha / r, and alpha / sqrt(r) for `rslora`."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Linear layers by their names in any family, see `halora.hardware.families.adapted`."""
    variant: LoraVariant = "plain"

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in targets if name not in LINEAR_NAMES]
        if unknown or not targets:
            raise ValueError(f"targets must be some of {', '.join(LINEAR_NAMES)}; got {', '.join(unknown) or 'none'}")
        return targets


class TrainingSettings(StrictModel):
    """Method, loss, optimiser and engine of one trial."""

    method: Method = "halora"
    mu: float = Field(default=0.1, ge=0)
    """Weight of L_reg; read by `halora` only. What it is worth beside the task is `train_reg_share` of a report."""
    reg_norm: Literal["frobenius", "spectral"] = "frobenius"
    """Norm of A A^T and B^T B in L_reg."""
    reg_reduction: Literal["mean", "sum"] = "mean"
    """L_reg over the adapted layers: their mean, or their sum, which is that many times as large (150 in SmolLM2-135M).
    The paper does not say which."""
    schedule: NoiseSchedule = NoiseSchedule()
    """Read by `noise_lora` and `halora`."""
    steps: int = Field(ge=0)
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimiser step, whatever number of micro-batches and workers share them."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro-batches per worker and optimiser step."""
    workers: int = Field(default=1, ge=1)
    """Processes that share each step's rows, as one DeepSpeed group."""
    worker_timeout_s: int = Field(default=300, ge=1)
    """Longest wait of one worker for another before the trial fails."""
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    dtype: Dtype = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    converters: Literal["none", "statistical"] = "none"
    """Train under the converters' errors and the noise of reads too, by their statistical model; the paper does not."""
    activation_checkpointing: bool = False
    """Keep the input of each decoder block only, and compute the block again in the backward: less memory, slower."""
    noisy_weights: Literal["auto", "materialise", "regenerate"] = "auto"
    """Keep one noisy copy of the mapped weights, or make it again in every pass; `auto` keeps it where it fits."""
    report_every: int = Field(default=5, ge=1)
    """Optimiser steps between two reports, each with a checkpoint."""
    train_rows: int | None = Field(default=None, ge=1)
    """Use only the first rows of the training split, in a fixed shuffled order; all of them when left out."""

    @model_validator(mode="after")
    def _converters_need_whole_weights(self) -> "TrainingSettings":
        if self.converters != "none" and self.zero_stage == 3:
            raise ValueError(
                "converters are calibrated on whole weights, which zero_stage 3 shards; use stage 0, 1 or 2"
            )
        return self

    @model_validator(mode="after")
    def _every_micro_batch_has_a_row(self) -> "TrainingSettings":
        if self.workers * self.gradient_accumulation > self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is less than a row for each of workers {self.workers} x "
                f"gradient_accumulation {self.gradient_accumulation}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Rows of a worker's largest micro-batch."""
        return -(-self.batch_size // (self.workers * self.gradient_accumulation))

    @property
    def micro_batch_divisible(self) -> bool:
        """Whether micro-batches of fewer rows are left."""
        return self.gradient_accumulation < self.batch_size // self.workers

    def with_micro_batch_halved(self, times: int) -> "TrainingSettings":
        """The same steps in smaller parts; one row at a time is the least."""
        most = self.batch_size // self.workers
        return self.model_copy(update={"gradient_accumulation": min(self.gradient_accumulation << times, most)})

    @property
    def noisy(self) -> bool:
        """Whether the method trains under noise."""
        return self.method != "lora"

    @property
    def reg_weight(self) -> float:
        """Weight of L_reg in the loss: mu for `halora`, 0 otherwise."""
        return self.mu if self.method == "halora" else 0.0
