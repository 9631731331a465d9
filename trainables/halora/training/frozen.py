"""Linear layers of the frozen base.

A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than float32 ones. There the
weights stay in bfloat16 in memory, and each is widened when it is used, in the forward and again in the backward.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def effective_weight(self) -> Tensor:
        """The weight that inputs meet, in `product_dtype`."""
        return self.weight.to(self.product_dtype)

    @property
    def weight_stays(self) -> bool:
        """Whether the effective weight is in memory until the backward; otherwise it is made again there."""
        return self.weight.dtype == self.product_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Input (batch, tokens, in_features) -> (batch, tokens, out_features)."""
        product = self.product(input.to(self.product_dtype))
        return (product if self.bias is None else product + self.bias).to(input.dtype)

    def product(self, input: Tensor) -> Tensor:
        """x W^T, without the bias."""
        if self.weight_stays:
            return F.linear(input, self.effective_weight())
        return cast(Tensor, _PassingWeightProduct.apply(input, self))


class _PassingWeightProduct(torch.autograd.Function):
    """x W^T, with the effective weight made in the forward and made again in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.effective_weight())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.effective_weight(), None


@cache
def _cpu_has_bf16() -> bool:
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
