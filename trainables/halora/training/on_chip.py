"""A chip instance under a model of somebody's own, which is given back as it was.

The model keeps its modules, weights and hooks: while a chip lies under it, layers that share its weights stand in the
places of its linear layers, and of the LoRA branches that PEFT put beside them. Nothing of it is written.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halora.errors import UserError
from halora.hardware.addressing import canonical_name
from halora.hardware.chip import Products
from halora.hardware.converters import reads_are_exact
from halora.hardware.instance import ChipInstance
from halora.hardware.rounding import AS_IT_IS, rounded
from halora.hardware.shapes import ModelShape
from halora.settings.evaluation import EvaluationSettings
from halora.training.attention import use_row_attention
from halora.training.calibration import ConverterMode, setting_converters
from halora.training.rram import Reads, RramArray, RramLinear, install


@contextmanager
def on_chip(
    model: Any,
    instance: ChipInstance,
    calibration: Tensor | None = None,
    converters: ConverterMode = "exact",
) -> Iterator[RramArray]:
    """Have a model compute as it would on a chip instance while the block runs, whatever calls its forward.

    Layers in RRAM have the instance's weights, read through its converters; what is in SRAM or digital, a LoRA branch
    of PEFT and attention are computed at the chip's precision. No gradient reaches the frozen weights. The noise of
    reads is drawn anew in every forward pass, the same whenever the same passes are made.

    Args:
        model: A causal language model of `transformers`, or a `PeftModel` with LoRA around one.
        instance: The chip instance.
        calibration: Token ids `(batch, tokens)`, without padding, that the converters are set on, by the clean model;
            without them each layer's are set on what it is given first.
        converters: Carry out every conversion, or draw their errors from the model.

    Yields:
        Its layers on the chip.

    Raises:
        UserError: The model's family is not modelled, its weights are quantised or not in memory, it has an adapter of
            another kind than LoRA, or a chip lies under it already.
    """
    causal_lm, chip = _causal_lm(model), instance.chip
    chip.on_layers(shape_of(model).sizes)
    with ExitStack() as undo:
        array = undo.enter_context(layers_of(model))
        if chip.attention.bits < AS_IT_IS:
            undo.callback(causal_lm.set_attn_implementation, causal_lm.config._attn_implementation)
            use_row_attention(causal_lm)
        parts = {name: _SramLinear(part, chip.lora, name) for name, part in _lora_parts(causal_lm).items()}
        for name, part in parts.items():
            undo.callback(causal_lm.set_submodule, name, causal_lm.get_submodule(name))
            causal_lm.set_submodule(name, part)
        reads: dict[str, Reads] = {}
        if not reads_are_exact(chip):
            most = EvaluationSettings.model_fields["calibration_tokens"].default
            with setting_converters(array, chip, converters, reads, _TOKENS if calibration is not None else most):
                if calibration is not None:
                    with torch.no_grad():
                        model(input_ids=calibration.to(next(causal_lm.parameters()).device), use_cache=False)
            if calibration is None:
                undo.enter_context(setting_converters(array, chip, converters, reads, most))
        array.program(instance, reads, digital=True)
        array.materialise()
        for part in parts.values():
            part.input_bits = chip.lora.input_bits
        passes, decoder = count(), causal_lm.get_decoder()
        naming = decoder.register_forward_pre_hook(lambda *_: array.name_forward(f"forward {next(passes)}"))
        undo.callback(naming.remove)
        yield array


_TOKENS = 2**31
"""All tokens."""


def _causal_lm(model: Any) -> Any:
    """The model of `transformers`, within PEFT's where it is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shape_of(model: Any) -> ModelShape:
    """Dimensions of a loaded model.

    Raises:
        UserError: Its family is not modelled, or its weights are quantised.
    """
    config = getattr(_causal_lm(model), "config", None)
    if config is None or not hasattr(_causal_lm(model), "set_attn_implementation"):
        raise UserError(f"a {type(model).__name__} is no causal language model of transformers")
    described = config.to_dict()
    if described.get("quantization_config"):
        raise UserError("the model is quantised; a chip programs plain weights", "load it without quantisation")
    try:
        return ModelShape.from_config(described)
    except KeyError as error:
        raise UserError(f"the model's configuration has no {error}") from None
    except UserError as error:
        raise UserError([f"the model cannot be put on a chip: {problem}" for problem in error.problems]) from None


@contextmanager
def layers_of(model: Any) -> Iterator[RramArray]:
    """The linear layers of a loaded model as a chip can hold them, while the block runs; no chip lies under it yet.

    Raises:
        UserError: See `on_chip`.
    """
    shape, causal_lm = shape_of(model), _causal_lm(model)
    modules = dict(causal_lm.named_modules())
    if any(isinstance(module, RramLinear) for module in modules.values()):
        raise UserError("a chip instance lies under the model already", "leave the block around it first")
    if any(parameter.is_meta for parameter in causal_lm.parameters()):
        raise UserError("some of the model's weights are not in memory", "load it whole, without offloading")
    kinds = {str(getattr(each.peft_type, "value", each.peft_type)) for each in _peft_configs(model).values()}
    if unknown := kinds - {"LORA"}:
        raise UserError(f"the model has an adapter of the kind {', '.join(sorted(unknown))}; a chip's branch is LoRA")
    linears = {canonical_name(name) for name, module in modules.items() if isinstance(module, nn.Linear)}
    if missing := [name for name in shape.linear_layers if name not in linears]:
        raise UserError(f"the model has no plain linear layer '{missing[0]}', and {len(missing)} of them in all")
    array = install(causal_lm)
    try:
        yield array
    finally:
        array.remove_from(causal_lm)


def _peft_configs(model: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], getattr(model, "peft_config", {}))


def _lora_parts(causal_lm: Any) -> dict[str, nn.Linear]:
    """A and B of PEFT's LoRA branches, by name."""
    return {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and {"lora_A", "lora_B"} & set(name.split(".")[-2:-1])
    }


class _SramLinear(nn.Module):
    """A or B of a LoRA branch as SRAM macros multiply it: weights with a scale per rank, inputs with one per token.

    Args:
        linear: The matrix.
        products: Precision of the weights; that of the inputs is set later, by `input_bits`.
        name: Its name in the model.
    """

    def __init__(self, linear: nn.Linear, products: Products, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = rounded(linear.weight.detach(), products.weight_bits, dim=1 if "lora_A" in name.split(".") else 0)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.input_bits = AS_IT_IS

    def forward(self, x: Tensor) -> Tensor:
        """x W^T; matrices, with which PEFT asks for the weight, are not rounded."""
        seen = rounded(x, self.input_bits, dim=-1) if x.ndim > 2 else x
        return F.linear(seen, self.weight, self.bias)
