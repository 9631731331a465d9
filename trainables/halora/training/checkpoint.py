"""Checkpoints of a training: a standard PEFT folder, the optimiser's moments and the step.

There is no state of a random generator in them: everything random is a function of (seed, step). They hold whole
tensors in float32, so a run resumes at another ZeRO stage or with another number of workers.
"""

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halora.errors import UserError
from halora.files import sync_folder
from halora.trial_folder import ADAPTER_WEIGHTS, OPTIMIZER_FILE

_MOMENTS = ("exp_avg", "exp_avg_sq")
_START_OVER = "delete it; the trial starts over"


@dataclass(frozen=True)
class Checkpoint:
    """What a training resumes from, on the CPU.

    Attributes:
        step: Optimiser steps taken.
        weights: Adapter weights by their name in a PEFT file.
        moments: AdamW's moments by `<name>.<moment>`; empty before the first step.
        source: The folder it was read from, for messages; empty for one that was not.
    """

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    source: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read what `write` wrote.

        Raises:
            UserError: A file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            step = int(json.loads((folder / "progress.json").read_text(encoding="utf-8"))["step"])
            weights = load_file(folder / "adapter" / ADAPTER_WEIGHTS)
            moments = load_file(folder / OPTIMIZER_FILE) if step else {}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"checkpoint '{folder}' is damaged: {error}", _START_OVER) from None
        return cls(step, weights, moments, str(folder))

    def write(self, folder: Path, peft_config: Any) -> None:
        """Write the files into a folder that appears under its name whole; one that is there already stays.

        It is of the same step, written before the training was resumed from it, or by a worker that was thought lost.
        Nor is one written where another worker, ahead by then, took what is there of it for that of a killed one.
        """
        if folder.exists():
            return
        scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        (scratch / "adapter").mkdir(parents=True)
        try:
            self._write_files(scratch, peft_config)
            sync_folder(scratch)
            scratch.rename(folder)
        except Exception:
            overtaken = folder.exists() or not scratch.exists()
            shutil.rmtree(scratch, ignore_errors=True)
            if not overtaken:
                raise

    def _write_files(self, scratch: Path, peft_config: Any) -> None:
        from safetensors.torch import save_file

        peft_config.save_pretrained(scratch / "adapter")
        save_file(self.weights, scratch / "adapter" / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        if self.moments:
            save_file(self.moments, scratch / OPTIMIZER_FILE)
        (scratch / "progress.json").write_text(json.dumps({"step": self.step}), encoding="utf-8")


class TrainedState:
    """The trainable parameters of a DeepSpeed engine and their moments, whole, whichever workers hold them.

    At ZeRO 1 to 3 each worker holds a part, and reading is a collective operation: every worker must ask.

    Args:
        engine: The DeepSpeed engine.
        trainable: Its trainable parameters by name.
    """

    def __init__(self, engine: Any, trainable: dict[str, nn.Parameter]) -> None:
        self._trainable = trainable
        # The torch optimiser, inside DeepSpeed's wrapper where there is one.
        self._optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def read(self, step: int) -> Checkpoint:
        """The state after `step` steps."""
        weights = {stored_name(name): _master(parameter) for name, parameter in self._trainable.items()}
        moments = {
            f"{name}.{moment}": self._moment(parameter, moment)
            for name, parameter in (self._trainable.items() if step else ())
            for moment in _MOMENTS
        }
        return Checkpoint(step, weights, moments)

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Refuse the checkpoint of another adapter.

        Raises:
            UserError: Names or shapes differ.
        """
        expected = {stored_name(name): _shape(parameter) for name, parameter in self._trainable.items()}
        names = {f"{name}.{moment}" for name in self._trainable for moment in _MOMENTS} if checkpoint.step else set()
        if {n: w.shape for n, w in checkpoint.weights.items()} != expected or checkpoint.moments.keys() != names:
            raise UserError(f"checkpoint '{checkpoint.source}' belongs to another adapter", _START_OVER)

    def write(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into an engine that has taken a step, which makes its optimiser state."""
        for name, parameter in self._trainable.items():
            _write_master(parameter, checkpoint.weights[stored_name(name)])
            for moment in _MOMENTS if checkpoint.step else ():
                self._write_moment(parameter, moment, checkpoint.moments[f"{name}.{moment}"])
        for state in self._optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), checkpoint.step)

    def _moment(self, parameter: Tensor, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if _has_master(parameter):
            value = safe_get_full_optimizer_state(parameter, moment)
        else:
            value = self._optimizer.state[parameter][moment]
        return value.detach().float().cpu().clone().reshape(_shape(parameter))

    def _write_moment(self, parameter: Tensor, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if hasattr(parameter, "ds_id"):
            safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)
        elif _has_master(parameter):
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            self._optimizer.state[parameter][moment].copy_(value)


def stored_name(name: str) -> str:
    """A parameter's name in a PEFT file, without the adapter's own name."""
    if "lora_magnitude_vector" in name:
        return name.removesuffix(".default.weight")
    return name.replace(".default.", ".")


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _has_master(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps the float32 value elsewhere; so on every worker, whichever part of it each one holds."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _master(parameter: Tensor) -> Tensor:
    """The float32 value of a trainable parameter, wherever DeepSpeed keeps it."""
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter) if _has_master(parameter) else parameter
    return value.detach().float().cpu().clone()


def _write_master(parameter: Tensor, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    elif _has_master(parameter):
        safe_set_full_fp32_param(parameter, value)
    parameter.data.copy_(value)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This worker's part of a value that ZeRO-3 cuts into equal ones, the last filled up."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    filled = F.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
    return filled[rank * size : (rank + 1) * size]
