"""The LoRA branch: attached with PEFT, regularised by HaLoRA's L_reg, stored as a standard PEFT folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.hardware.rounding import AS_IT_IS, rounded
from halora.reading import read_tensors
from halora.settings.training import LoraSettings
from halora.training.adapter_config import read_lora_config
from halora.training.fused import Branch, FrozenLinear
from halora.training.models import BaseModel
from halora.trial_folder import ADAPTER_WEIGHTS


def attach(base: BaseModel, lora: LoraSettings, seed: int) -> Any:
    """A trainable PEFT model around `base`, its A drawn from `seed`, its B zero.

    DoRA scales each output of the layer, noisy product included, by magnitude / ||W0 + B A||. That norm is taken from
    the clean W0: the scale is computed once, off the chip, where the noise is not known.

    Raises:
        UserError: A target is not a layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    if unknown := [target for target in lora.targets if not base.shape.adapted([target])]:
        raise UserError(f"model '{base.name}' has no layers named {', '.join(unknown)}", "fix lora.targets")
    torch.manual_seed(derive_seed("adapter", seed))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank * lora.alpha_over_rank,
        target_modules=list(base.shape.adapted(lora.targets)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
    )
    config._register_custom_module({FrozenLinear: _fused_lora()})
    return get_peft_model(base.causal_lm, config)


@cache
def _fused_lora() -> type[nn.Module]:
    """PEFT's LoRA layer, its branch computed together with the frozen layer; imports PEFT, which takes a second."""
    from peft.tuners.lora import Linear

    class FusedLora(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            (adapter,) = self.active_adapters
            if self.disable_adapters or self.lora_variant:
                parts = (self.lora_A[adapter], self.lora_B[adapter])
                with _rounding_inputs(parts, cast(FrozenLinear, self.base_layer).branch_bits, x.ndim):
                    return cast(Tensor, super().forward(x, *args, **kwargs))
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return cast(Tensor, self.base_layer(x, Branch(a, b, self.scaling[adapter])))

    return FusedLora


@contextmanager
def _rounding_inputs(modules: Sequence[nn.Module], bits: int, ndim: int) -> Iterator[None]:
    """Round what these modules are given of so many axes; PEFT also asks them for their weights, with matrices."""

    def seen(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(rounded(each, bits, dim=-1) if each.ndim == ndim else each for each in given)

    handles = [module.register_forward_pre_hook(seen) for module in modules] if bits < AS_IT_IS else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attach_saved(base: BaseModel, folder: Path, weight_bits: int = AS_IT_IS) -> Any:
    """A PEFT model around `base` with the adapter stored in `folder`, for evaluation.

    Args:
        base: The base model.
        folder: A PEFT folder.
        weight_bits: Precision of A and B in the chip's SRAM, with a scale per rank; 16 leaves them as stored.

    Raises:
        UserError: The folder holds no LoRA adapter in safetensors, see `read_lora_config`, or one whose tensors are not
            those of this base with this configuration; all of them are told.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    read_lora_config(folder)
    saved = folder / ADAPTER_WEIGHTS
    try:
        config: Any = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        config._register_custom_module({FrozenLinear: _fused_lora()})
        peft_model = get_peft_model(base.causal_lm, config)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:  # what PEFT makes of odd settings
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"PEFT cannot attach the adapter in '{folder}' to '{base.name}': {said}") from None
    tensors = read_tensors(saved, f"'{saved}'")
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    if problems := _misfits(tensors, wanted):
        detach(peft_model)
        raise UserError([f"{saved}: {problem}" for problem in problems], "is it another base's adapter?")
    set_peft_model_state_dict(peft_model, tensors)
    peft_model.eval()
    with torch.no_grad():
        for a, b in lora_pairs(peft_model):
            a.copy_(rounded(a, weight_bits, dim=1))
            b.copy_(rounded(b, weight_bits, dim=0))
    return peft_model


def _misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Tensors of an adapter that the model has no place for, or that it lacks: PEFT would go on without them."""
    problems = [f"tensor '{name}' does not belong to the base model" for name in sorted(found.keys() - wanted.keys())]
    problems += [f"tensor '{name}' is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [
        f"tensor '{name}' has the shape {list(found[name].shape)}, its layer wants {list(wanted[name].shape)}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name].shape != wanted[name].shape
    ]
    return problems


def detach(peft_model: Any) -> None:
    """Give the base model back as it was."""
    peft_model.unload()


def lora_pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of every adapted module, A (r, d_in), B (d_out, r)."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]


def regulariser(
    pairs: Sequence[tuple[Tensor, Tensor]],
    norm: Literal["frobenius", "spectral"],
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """HaLoRA's L_reg = ||A A^T|| + ||B^T B|| over the modules.

    The paper writes a norm with subscript 2, which is ambiguous: both readings are offered (arXiv 2502.19747). Nor does
    it say whether the modules are summed or averaged; of a mean each module gets 1 / modules of the gradient.

    Args:
        pairs: A (r, d_in) and B (d_out, r) per adapted module.
        norm: Frobenius, or spectral (the largest squared singular value).
        reduction: Mean over the modules, or their sum.

    Returns:
        A scalar in float32; its gradient is finite at B = 0.
    """
    order = {"frobenius": "fro", "spectral": 2}[norm]
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in (each for a, b in pairs for each in (a, b.T)):
        by_shape.setdefault(matrix.shape, []).append(matrix)
    stacks = [torch.stack(matrices).float() for matrices in by_shape.values()]  # (modules, r, d) each
    norms = torch.cat([torch.linalg.matrix_norm(stack @ stack.mT, ord=order) for stack in stacks])
    return norms.sum() / (len(pairs) if reduction == "mean" else 1)
