"""Rounding: codes of converters, and what exact, digital products multiply."""

import torch
from torch import Tensor

AS_IT_IS = 16
"""Bits at which nothing is rounded."""


def rounded(values: Tensor, bits: int, dim: int) -> Tensor:
    """Values rounded to 2^bits - 1 symmetric levels, with one scale per group (its largest magnitude along `dim`).

    Args:
        values: Any shape.
        bits: Sign included; at 16 the values are returned as they are.
        dim: Axis that shares a scale.

    Returns:
        In the dtype of the values. The scales are exact.
    """
    if bits >= AS_IT_IS:
        return values
    wide = values.float()
    step = wide.abs().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny) / (2 ** (bits - 1) - 1)
    nearest: Tensor = ((wide / step).round_() * step).to(values.dtype)
    return nearest


def top_code(bits: int) -> int:
    """Largest code of a signed mid-tread converter with 2^bits - 1 codes; one bit tells the sign alone."""
    return max((1 << (bits - 1)) - 1, 1)
