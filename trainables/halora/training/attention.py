"""Attention within the rows of a batch that holds its rows end to end.

The linear layers work on all tokens at once, whatever row they are of; only attention has to know the rows. It lays
them out as a padded block, which is small, and puts its results end to end again. `transformers` models take it by
name, see `use_row_attention`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halora.hardware.families import parts_of
from halora.hardware.rounding import AS_IT_IS, rounded

_NAME = "halora_rows"
_BITS = "operand_bits"  # of a model's attention modules


@dataclass(frozen=True)
class RowLayout:
    """Where the tokens of a batch stand when its rows are padded to the longest.

    Attributes:
        places: Per token, `row * longest + position in the row`, `(tokens,)`.
        visible: Whether a token (third axis) sees another (last), `(rows, 1, longest, longest)`.
        positions: Per token, its position in the sequence it stands for, `(tokens,)`.
    """

    places: Tensor
    visible: Tensor
    positions: Tensor

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What a model with row attention is to be called with, next to tokens and positions."""
        layout = RowLayout(self.places.to(device), self.visible.to(device), self.positions.to(device))
        return {"attention_mask": layout.visible, "row_layout": layout}

    @property
    def num_places(self) -> int:
        """Places of all rows, taken or not."""
        return self.visible.shape[0] * self.visible.shape[2]

    @cached_property
    def hidden(self) -> Tensor:
        """What is added to the scores so that they see what is visible, `(rows, 1, longest, longest)`, float32."""
        return torch.zeros(self.visible.shape).masked_fill_(~self.visible, torch.finfo(torch.float32).min)

    def within(self, window: int | None) -> "RowLayout":
        """The same rows, where a token sees none that is `window` positions or more before it; made once."""
        if window is None or window > self._last_position:
            return self
        if window not in self._windowed:
            rows, _, longest, _ = self.visible.shape
            block = self.positions.new_zeros(self.num_places).index_copy(0, self.places, self.positions)
            block = block.view(rows, 1, longest)
            near = block[..., :, None] - block[..., None, :] < window
            self._windowed[window] = RowLayout(self.places, self.visible & near, self.positions)
        return self._windowed[window]

    @cached_property
    def _last_position(self) -> int:
        return int(self.positions.max())

    @cached_property
    def _windowed(self) -> dict[int, "RowLayout"]:
        return {}

    def by_head(self, heads: int) -> "HeadOrder":
        """The order in which the states of so many heads are in a block; made once."""
        if heads not in self._orders:
            self._orders[heads] = HeadOrder.of(self, heads)
        return self._orders[heads]

    @cached_property
    def _orders(self) -> dict[int, "HeadOrder"]:
        return {}


@dataclass(frozen=True)
class HeadOrder:
    """Between states token by token, and a block of them row by row, in it head by head, in it place by place.

    Attributes:
        into: For each place of the block, the state it takes, `token * heads + head`; any where no token stands.
        back: For each state, its place in the block.
        empty: Places where no token stands.
    """

    into: Tensor
    back: Tensor
    empty: Tensor

    @classmethod
    def of(cls, layout: RowLayout, heads: int) -> "HeadOrder":
        """The order for a batch."""
        rows, _, longest, _ = layout.visible.shape
        row, position = layout.places.div(longest, rounding_mode="floor")[:, None], layout.places[:, None] % longest
        back = ((row * heads + torch.arange(heads)) * longest + position).flatten()
        into = torch.full((rows * heads * longest,), -1).index_copy_(0, back, torch.arange(len(back)))
        return cls(into.clamp_min(0), back, (into < 0).nonzero()[:, 0])


def use_row_attention(causal_lm: Any) -> None:
    """Have a `transformers` model attend within rows where it is called with `RowLayout.arguments`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _row_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    causal_lm.set_attn_implementation(_NAME)


def _row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    row_layout: RowLayout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What `transformers` asks of an attention: query (1, heads, tokens, dim) -> (1, tokens, heads, dim)."""
    bits = getattr(module, _BITS, AS_IT_IS)
    if row_layout is None:
        if bits < AS_IT_IS:
            return attend_rounded_alone(query, key, value, attention_mask, scaling, bits), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    row_layout = row_layout.within(sliding_window)
    if bits < AS_IT_IS:
        return attend_rounded(query, key, value, row_layout, scaling, bits), None
    attend = attend_on_cpu if query.device.type == "cpu" else _attend
    return attend(query, key, value, row_layout, scaling), None


def is_attention(module: nn.Module) -> bool:
    """Whether it is the attention of a decoder block."""
    return any("q_proj" in parts_of(name) for name, _ in module.named_children())


def set_attention_bits(modules: Iterable[nn.Module], bits: int) -> None:
    """Have these attentions compute with so many bits where rows are packed, see `attend_rounded`; 16: as they are."""
    for module in modules:
        setattr(module, _BITS, bits)


def forget_attention_bits(module: nn.Module) -> None:
    """Leave nothing of `set_attention_bits` behind."""
    vars(module).pop(_BITS, None)


def attend_rounded(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float, bits: int) -> Tensor:
    """Attention as digital macros compute it, without a gradient: what is multiplied has `bits` bits.

    Queries, keys and values are symmetric with a scale per token and head, which the macros are taken to apply; so no
    token's rounding depends on another. Softmax weights are exp(score - largest score) on the 2^bits - 1 steps from 0
    to 1, divided by their sum behind the product; scores are exact.

    Shapes are those of `attend_on_cpu`; `bits` is below 16.
    """
    q, k, v = (_padded(rounded(states, bits, dim=-1), layout).float() for states in (query, key, value))
    return _end_to_end(_rounded_softmax(q, k, v, layout.visible, scaling, bits), layout).to(query.dtype)


def attend_rounded_alone(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, bits: int
) -> Tensor:
    """The same for sequences that are not packed, as `transformers` lays them out, with or without a cache.

    Args:
        query: `(batch, heads, tokens, dim)`.
        key: `(batch, groups, seen, dim)`: what a cache holds, and these tokens last.
        value: As `key`.
        mask: True, or 0 to add to a score, where a token sees another, `(batch, 1, tokens, seen)`; causal for none.
        scaling: Of the scores.
        bits: Below 16.

    Returns:
        `(batch, tokens, heads, dim)` in the query's dtype.
    """
    if mask is None:
        tokens, seen = query.shape[2], key.shape[2]
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)[None, None]
    visible = mask if mask.dtype == torch.bool else mask == 0
    q, k, v = (rounded(states, bits, dim=-1).float() for states in (query, key, value))
    return _rounded_softmax(q, k, v, visible, scaling, bits).transpose(1, 2).contiguous().to(query.dtype)


def _rounded_softmax(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float, bits: int) -> Tensor:
    """Attention (rows, heads, tokens, dim) of float32 states, by softmax weights of so many bits."""
    (rows, heads, tokens, dim), groups = q.shape, k.shape[1]
    q = q.reshape(rows, groups, heads // groups, tokens, dim) * scaling
    scores = (q @ k[:, :, None].transpose(-1, -2)).masked_fill_(~visible[:, None], -torch.inf)
    scores.sub_(scores.amax(dim=-1, keepdim=True).nan_to_num_(neginf=0.0))
    weights = scores.exp_().mul_(2**bits - 1).round_()
    total = weights.sum(dim=-1, keepdim=True).clamp_min_(1.0)  # 0 where no token stands
    return (weights @ v[:, :, None]).div_(total).view(rows, heads, tokens, dim)


def _padded(states: Tensor, layout: RowLayout) -> Tensor:
    """States (1, heads, tokens, dim) as (rows, heads, longest, dim), zero where there is no token."""
    rows, _, longest, _ = layout.visible.shape
    by_token = states[0].transpose(0, 1)
    block = by_token.new_zeros(layout.num_places, *by_token.shape[1:]).index_copy(0, layout.places, by_token)
    return block.view(rows, longest, *by_token.shape[1:]).transpose(1, 2)


def _end_to_end(found: Tensor, layout: RowLayout) -> Tensor:
    """What `_padded` laid out, (rows, heads, longest, dim), as (1, tokens, heads, dim) again."""
    return found.transpose(1, 2).flatten(0, 1).index_select(0, layout.places)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float) -> Tensor:
    """Torch's own, see `attend_on_cpu`."""
    q, k, v = (_padded(states, layout) for states in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, layout.visible, scale=scaling, enable_gqa=True)
    return _end_to_end(found, layout)


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float) -> Tensor:
    """The same by plain products in float32: the backward of torch's own takes ten times as long in bfloat16.

    Args:
        query: `(1, heads, tokens, dim)`.
        key: `(1, groups, tokens, dim)`; the heads of a group share it.
        value: As `key`.
        layout: Which token is of which row and sees which.
        scaling: Of the scores.

    Returns:
        `(1, tokens, heads, dim)` in the query's dtype.
    """
    return cast(Tensor, _Attention.apply(query, key, value, layout, scaling))


class _Attention(torch.autograd.Function):
    """Softmax attention, every tensor copied once on its way into and out of the block of its heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float) -> Tensor:
        (_, heads, tokens, dim), groups = query.shape, key.shape[1]
        rows, _, longest, _ = layout.visible.shape
        of_heads, of_groups = layout.by_head(heads), layout.by_head(groups)

        def block(states: Tensor, order: HeadOrder) -> Tensor:
            by_token = states[0].transpose(0, 1).reshape(-1, dim)
            return by_token.index_select(0, order.into).float().view(rows * groups, -1, dim)

        q, k, v = block(query, of_heads).mul_(scaling), block(key, of_groups), block(value, of_groups)
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, longest, longest).add_(layout.hidden)
        weights = torch.softmax(scores, dim=-1).view(rows * groups, -1, longest)
        found = torch.bmm(weights, v).view(-1, dim).index_select(0, of_heads.back)
        ctx.save_for_backward(q, k, v, weights)
        ctx.orders, ctx.scaling = (of_heads, of_groups), scaling
        return found.to(query.dtype).view(1, tokens, heads, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        (of_heads, of_groups), dim = ctx.orders, q.shape[-1]
        g = gradient.reshape(-1, dim).index_select(0, of_heads.into).float().index_fill_(0, of_heads.empty, 0)
        g = g.view_as(q)
        v_gradient = torch.bmm(weights.transpose(1, 2), g)
        weight_gradient = torch.bmm(g, v.transpose(1, 2))
        score_gradient = torch._softmax_backward_data(weight_gradient, weights, -1, torch.float32)
        q_gradient = torch.bmm(score_gradient, k).mul_(ctx.scaling)
        k_gradient = torch.bmm(score_gradient.transpose(1, 2), q)

        def by_token(block: Tensor, order: HeadOrder) -> Tensor:
            states = block.view(-1, dim).index_select(0, order.back).to(gradient.dtype)
            return states.view(gradient.shape[1], -1, dim).transpose(0, 1)[None]

        return (
            by_token(q_gradient, of_heads),
            by_token(k_gradient, of_groups),
            by_token(v_gradient, of_groups),
            None,
            None,
        )
