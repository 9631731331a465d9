"""HaLoRA finetuning through a DeepSpeed engine: L = L_task + mu L_reg under noise on the frozen weights.

Everything random is a function of (seed, step), so a restored run goes on exactly as an uninterrupted one.
"""

import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.hardware.chip import Chip, Retention
from halora.training.adapter import attach, detach, lora_pairs, regulariser
from halora.training.batches import Batch, lay_out, mixture_of, pack_answer, rows_at_step
from halora.training.config import TrainingSettings
from halora.training.models import BaseModel, extensions_dir
from halora.training.reads import calibrate
from halora.training.rram import Reads, RramArray
from halora.training.schedule import TrainingNoise
from halora.training.tasks import Row, task_weights
from halora.trial import TrialConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step saw.

    Attributes:
        loss: L_task + mu L_reg.
        task_loss: Mean cross-entropy of the option tokens, in nats.
        reg_loss: L_reg before its weight.
        sigma: Training noise in force, in units of the chip's noise reference.
    """

    loss: float
    task_loss: float
    reg_loss: float
    sigma: float


class HaloraLoss(nn.Module):
    """The loss as one module, so that DeepSpeed's hooks see every parameter it reads."""

    def __init__(self, peft_model: Any, training: TrainingSettings) -> None:
        super().__init__()
        self.peft_model = peft_model
        self._reg_weight, self._reg_norm = training.reg_weight, training.reg_norm

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch, its task loss and L_reg."""
        task_loss = -batch.log_likelihoods(self.peft_model.get_base_model()).mean()
        reg_loss = regulariser(lora_pairs(self.peft_model), self._reg_norm)
        return task_loss + self._reg_weight * reg_loss, task_loss.detach(), reg_loss.detach()


class Finetuner:
    """One training run on a base model that outlives it.

    Args:
        base: The frozen base, its linear layers mapped to `array`.
        array: Its RRAM layers.
        rows: Training rows.
        config: The trial.
    """

    def __init__(self, base: BaseModel, array: RramArray, rows: list[Row], config: TrialConfig) -> None:
        self.step = 0
        self._base, self._array, self._rows, self._config = base, array, rows, config
        self._mixture = mixture_of(rows, task_weights(config.task))
        self._draw_index = -1
        self._calibrated: dict[str, dict[str, Reads]] = {}
        training = config.training
        self._noise = TrainingNoise(
            training.schedule,
            config.chip,
            seed=config.seed,
            steps=training.steps,
            epoch_steps=len(rows) / training.batch_size,
            layers=[layer.name for layer in array.layers],
        )
        self._regenerate = _regenerates(array, config.training)
        self._peft_model = attach(base, config.lora, config.seed)
        self._trainable = {n: p for n, p in self._peft_model.named_parameters() if p.requires_grad}
        self._engine = _deepspeed_engine(HaloraLoss(self._peft_model, config.training), self._trainable, config)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self._config.training.steps

    def train_step(self) -> StepReport:
        """One optimiser step.

        Raises:
            FloatingPointError: The loss is not finite; the adapter is not changed by this step.
        """
        training = self._config.training
        sigma = self._program()
        torch.manual_seed(derive_seed("step", self._config.seed, self.step))
        indices = rows_at_step(self._mixture, training.batch_size, self._config.seed, self.step)
        batch = lay_out([pack_answer(self._rows[i], self._base.tokenizer) for i in indices])
        with self._array.reading(batch.sequences):
            loss, task_loss, reg_loss = self._engine(batch)
        report = StepReport(loss.item(), task_loss.item(), reg_loss.item(), sigma)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {report.loss} at step {self.step}")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (self.step + 1) / (training.warmup_steps + 1))
        self._engine.backward(loss)
        self._engine.step()
        self.step += 1
        return report

    def _program(self) -> float:
        """Put this step's noise under the model, where it is not the last step's."""
        if not self._config.training.noisy:
            return 0.0
        draw = self._noise.at(self.step)
        if draw.index != self._draw_index:
            if draw.instance is None:
                self._array.clear()
            else:
                self._array.program(draw.instance, self._reads(draw.instance.chip), regenerate=self._regenerate)
            self._draw_index = draw.index
        return draw.sigma

    def _reads(self, chip: Chip) -> dict[str, Reads]:
        """How a chip is read while training, calibrated when it is met first."""
        if self._config.training.converters == "none":
            return {}
        converters = chip.model_copy(update={"retention": Retention()}).content_hash  # ageing does not touch them
        found = self._calibrated.get(converters)
        if found is None:
            tokens = self._config.evaluation.calibration_tokens
            self._array.clear()
            with self._peft_model.disable_adapter():
                found = calibrate(self._base, self._array, chip, self._rows, tokens, "statistical")
            self._calibrated[converters] = found
        return found

    def save(self, folder: Path) -> None:
        """Write adapter (a standard PEFT folder), optimiser moments and progress; appears under its name whole."""
        from safetensors.torch import save_file

        scratch = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        weights = {name: _master(parameter) for name, parameter in self._trainable.items()}
        (scratch / "adapter").mkdir(parents=True)
        self._peft_model.peft_config["default"].save_pretrained(scratch / "adapter")
        save_file(
            {name.replace(".default.", "."): weight for name, weight in weights.items()},
            scratch / "adapter" / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        if self.step:
            save_file(self._moments(), scratch / "optimizer.safetensors")
        (scratch / "progress.json").write_text(json.dumps({"step": self.step}))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)

    def restore(self, folder: Path) -> None:
        """Go on from `save`.

        Raises:
            UserError: The checkpoint belongs to an adapter of another shape or is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            step = int(json.loads((folder / "progress.json").read_text())["step"])
            weights = load_file(folder / "adapter" / "adapter_model.safetensors")
            moments = load_file(folder / "optimizer.safetensors") if step else {}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"checkpoint '{folder}' is damaged: {error}", "delete it; the trial starts over") from None
        expected = {name.replace(".default.", "."): parameter for name, parameter in self._trainable.items()}
        same_adapter = {n: w.shape for n, w in weights.items()} == {n: _shape(p) for n, p in expected.items()}
        expected_moments = {f"{name}.{moment}" for name in self._trainable for moment in _MOMENTS} if step else set()
        if not same_adapter or moments.keys() != expected_moments:
            raise UserError(f"checkpoint '{folder}' belongs to another adapter", "delete it; the trial starts over")
        self._take_empty_step()  # DeepSpeed makes its optimiser state, and ZeRO-3 whole weights, at the first step
        for name, parameter in expected.items():
            _write_master(parameter, weights[name])
        for name, parameter in self._trainable.items() if step else ():
            for moment in _MOMENTS:
                _write_moment(self._optimizer(), parameter, moment, moments[f"{name}.{moment}"])
        for state in self._optimizer().state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), step)
        self.step = step

    def close(self) -> None:
        """Tear the engine down and give the base model back. At ZeRO-3 the base is spent: load it anew."""
        self._array.clear()
        self._engine.destroy()
        detach(self._peft_model)

    def _take_empty_step(self) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        loss, *_ = self._engine(lay_out([pack_answer(self._rows[0], self._base.tokenizer)]))
        self._engine.backward(loss * 0.0)
        self._engine.step()

    def _optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser, inside DeepSpeed's wrapper where there is one."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _moments(self) -> dict[str, Tensor]:
        optimizer = self._optimizer()
        return {
            f"{name}.{moment}": _moment(optimizer, parameter, moment)
            for name, parameter in self._trainable.items()
            for moment in _MOMENTS
        }


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below a trial's folder."""
    found = sorted(folder.glob("step-*/progress.json"))
    return found[-1].parent if found else None


def save_latest(finetuner: Finetuner, folder: Path) -> Path:
    """Checkpoint as `step-NNNNNN` below `folder`; only then is the one before it deleted."""
    newest = folder / f"step-{finetuner.step:06d}"
    finetuner.save(newest)
    for old in folder.glob("step-*"):
        if old != newest:
            shutil.rmtree(old)
    return newest


def _regenerates(array: RramArray, training: TrainingSettings) -> bool:
    """Whether noisy weights are made in every pass: at ZeRO-3, or where a copy would take half the free memory."""
    if training.noisy_weights != "auto":
        return training.noisy_weights == "regenerate"
    if training.zero_stage == 3:
        return True
    weight = array.layers[0].weight
    copy = sum(layer.in_features * layer.out_features for layer in array.layers) * weight.element_size()
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else psutil.virtual_memory().available
    return bool(copy > free / 2)


def _deepspeed_engine(loss: HaloraLoss, trainable: dict[str, nn.Parameter], config: TrialConfig) -> Any:
    import deepspeed

    join_process_group()
    training = config.training
    parameters = list(trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=loss,
        optimizer=optimizer,
        model_parameters=parameters,
        config={
            "train_micro_batch_size_per_gpu": training.batch_size,
            "gradient_accumulation_steps": 1,
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


def join_process_group() -> None:
    """Make this process a DeepSpeed world of one, once."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    import deepspeed

    if torch.distributed.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _has_master(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") or getattr(parameter, "_hp_mapping", None) is not None


def _master(parameter: Tensor) -> Tensor:
    """The float32 value of a trainable parameter, wherever DeepSpeed keeps it."""
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter) if _has_master(parameter) else None
    return (parameter if value is None else value).detach().float().cpu().clone()


def _write_master(parameter: Tensor, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    if _has_master(parameter):
        safe_set_full_fp32_param(parameter, value)
    parameter.data.copy_(value)


def _moment(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if _has_master(parameter):
        value = safe_get_full_optimizer_state(parameter, moment)
    else:
        value = optimizer.state[parameter][moment]
    return value.detach().float().cpu().clone().reshape(_shape(parameter))


def _write_moment(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    if _has_master(parameter):
        safe_set_full_optimizer_state(parameter, value, moment)
    else:
        optimizer.state[parameter][moment].copy_(value)
