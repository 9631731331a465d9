"""Layers of the frozen base in few passes over memory: linear ones, with their trained low-rank branch, and norms.

A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than float32 ones. There the
weights stay in bfloat16 in memory, and each is widened when it is used, in the forward and again in the backward.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halora.hardware.families import FAMILIES, NormKind
from halora.hardware.rounding import AS_IT_IS, rounded


@dataclass(frozen=True)
class Branch:
    """A trained low-rank branch beside a frozen layer: its output is scale x A^T B^T.

    Attributes:
        a: `(r, in_features)`.
        b: `(out_features, r)`.
        scale: Of the output.
    """

    a: Tensor
    b: Tensor
    scale: float

    def output(self, input: Tensor, bits: int = AS_IT_IS) -> Tensor:
        """What it adds to the layer's output, what A and B are multiplied with rounded to so many bits per token."""
        reduced = F.linear(rounded(input, bits, dim=-1), self.a.to(input.dtype))
        return F.linear(rounded(reduced, bits, dim=-1), self.b.to(input.dtype)) * self.scale


class FrozenLinear(nn.Linear):
    """A frozen linear layer whose product is computed in the dtype that the processor is fast at."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the product: float32 on a CPU without bfloat16 instructions, else the weight's."""
        return torch.float32 if self.weight.device.type == "cpu" and not _cpu_has_bf16() else self.weight.dtype

    @property
    def branch_bits(self) -> int:
        """Precision of what a low-rank branch multiplies its weights with; 16 for none lost."""
        return AS_IT_IS

    def effective_weight(self) -> Tensor:
        """The weight that inputs meet, in `product_dtype`."""
        return self.weight.to(self.product_dtype)

    def forward(self, input: Tensor, branch: Branch | None = None) -> Tensor:
        """Input (batch, tokens, in_features) -> (batch, tokens, out_features), with the branch's output where given."""
        product = self.product(input.to(self.product_dtype), branch)
        return (product if self.bias is None else product + self.bias).to(input.dtype)

    def product(self, input: Tensor, branch: Branch | None = None) -> Tensor:
        """x W^T, and the branch's output, without the bias."""
        a, b, scale = (branch.a, branch.b, branch.scale) if branch else (None, None, 0.0)
        return cast(Tensor, _Product.apply(input, self, a, b, scale))


class _Product(torch.autograd.Function):
    """x W^T + scale x A^T B^T, every thin product added in place to the thick one.

    The weight is asked for again in the backward, where the layer has kept it or makes it anew.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, layer: FrozenLinear, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:
        ctx.layer, ctx.scale, ctx.adapted = layer, scale, a is not None
        x = input.flatten(0, -2)
        output = x @ layer.effective_weight().T
        if a is not None and b is not None:
            reduced = (x @ a.to(x.dtype).T).mul_(scale)
            output.addmm_(reduced, b.to(x.dtype).T)
            ctx.save_for_backward(x, reduced, a, b)
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        g = gradient.flatten(0, -2)
        input_gradient = g @ ctx.layer.effective_weight() if ctx.needs_input_grad[0] else None
        a_gradient = b_gradient = None
        if ctx.adapted:
            x, reduced, a, b = ctx.saved_tensors
            reduced_gradient = (g @ b.to(x.dtype)).mul_(ctx.scale)
            a_gradient, b_gradient = (reduced_gradient.T @ x).to(a.dtype), (g.T @ reduced).to(b.dtype)
            if input_gradient is not None:
                input_gradient.addmm_(reduced_gradient, a.to(x.dtype))
        if input_gradient is not None:
            input_gradient = input_gradient.view(*gradient.shape[:-1], -1)
        return input_gradient, None, a_gradient, b_gradient, None


class FrozenNorm(nn.Module):
    """A frozen root-mean-square norm: that of `transformers`, with its backward written out."""

    def __init__(self, norm: Any, kind: NormKind) -> None:
        super().__init__()
        self.weight, self.kind = norm.weight, kind
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """w x / rms(x) over the last axis, see `NormKind`."""
        return cast(Tensor, _Norm.apply(hidden_states, self.weight, self.eps, self.kind))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        factor = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        ctx.kind = kind
        if kind == "rounded":
            return (wide * factor).to(x.dtype) * weight
        return (wide * factor).mul_(_gain(weight, kind)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, factor = ctx.saved_tensors
        scaled = (gradient * weight).float() if ctx.kind == "rounded" else gradient.float() * _gain(weight, ctx.kind)
        wide = x.float()
        along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1).mul_(factor.pow(3)).div_(-x.shape[-1])
        return (scaled * factor).addcmul_(wide, along).to(x.dtype), None, None, None


def _gain(weight: Tensor, kind: NormKind) -> Tensor:
    return weight.float() + 1 if kind == "offset" else weight.float()


def install_norms(causal_lm: Any) -> None:
    """Replace the norms of a `transformers` model that its family declares, in place."""
    family = FAMILIES[causal_lm.config.model_type]
    norms = {name: module for name, module in causal_lm.named_modules() if name.rpartition(".")[2] in family.norms}
    for name, norm in norms.items():
        causal_lm.set_submodule(name, FrozenNorm(norm, family.norm_kind))


@cache
def _cpu_has_bf16() -> bool:
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
