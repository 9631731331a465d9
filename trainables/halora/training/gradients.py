"""What each term of the loss pulls at the adapter with: gradient norms of L_task and of mu L_reg at a single step.

The gradient of the whole loss is taken where autograd hands it to the adapter's weights: before clipping, summed over
micro-batches and averaged over workers, whatever the ZeRO stage does with it afterwards. That of mu L_reg follows from
the weights alone; the rest is the task's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from halora.settings.training import TrainingSettings
from halora.training.adapter import regulariser
from halora.training.workers import mean_over_workers

Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GradientShares:
    """Euclidean norms of the gradients over all A and B, before clipping.

    Attributes:
        task_grad_norm: Of the task loss.
        reg_grad_norm: Of mu L_reg; none for a method without it.
        reg_share: The latter over the former; likewise none, and none where the task's is lost in the rounding of both:
            from 1e5 up in fp32, from 128 up in bf16.
        reg_share_a: The same over all A alone, whose task gradient is 0 until the first step has moved B.
        reg_share_b: Over all B alone.
    """

    task_grad_norm: float
    reg_grad_norm: float | None = None
    reg_share: float | None = None
    reg_share_a: float | None = None
    reg_share_b: float | None = None

    def known(self) -> dict[str, float]:
        """The figures there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@contextmanager
def watching_gradients(pairs: Pairs) -> Iterator[list[Tensor]]:
    """Sum in float32 what the backwards inside the block hand to every A and B, in their order.

    Args:
        pairs: A (r, d_in) and B (d_out, r) per adapted module.
    """
    weights = [weight for pair in pairs for weight in pair]
    sums = [torch.zeros((), device=weight.device) for weight in weights]  # weights are empty at ZeRO-3 until used

    def adder(place: int) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums[place] = sums[place] + gradient.float()

        return add

    handles = [weight.register_hook(adder(place)) for place, weight in enumerate(weights)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def gradient_shares(total: Sequence[Tensor], pairs: Pairs, training: TrainingSettings) -> GradientShares:
    """The gradients of the two terms; every worker must ask.

    Args:
        total: This worker's gradient of the whole loss by every A and B, in the order of `pairs`.
        pairs: The weights it was taken at.
        training: The regulariser and its weight.
    """
    whole = mean_over_workers(torch.cat([gradient.flatten() for gradient in total])).split([g.numel() for g in total])
    if training.reg_weight == 0:
        return GradientShares(_norm(whole))
    leaves: list[tuple[Tensor, Tensor]] = [(_leaf(a), _leaf(b)) for a, b in pairs]
    flat = [leaf for pair in leaves for leaf in pair]
    value = training.reg_weight * regulariser(leaves, training.reg_norm, training.reg_reduction)
    reg = [gradient.flatten() for gradient in torch.autograd.grad(value, flat)]
    task = [both - own for both, own in zip(whole, reg, strict=True)]
    most = 1 / max(torch.finfo(pairs[0][0].dtype).eps, 1e-5)
    shares = [_share(reg[part], task[part], most) for part in (slice(None), slice(0, None, 2), slice(1, None, 2))]
    return GradientShares(_norm(task), _norm(reg), *shares)


def _leaf(weight: Tensor) -> Tensor:
    return weight.detach().float().requires_grad_()


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients])))


def _share(part: Sequence[Tensor], other: Sequence[Tensor], most: float) -> float | None:
    length, beside = _norm(part), _norm(other)
    return length / beside if length < most * beside else None
