"""Attention within the rows of a batch that holds its rows end to end.

The linear layers work on all tokens at once, whatever row they are of; only attention has to know the rows. It lays
them out as a padded block, which is small, and puts its results end to end again. `transformers` models take it by
name, see `use_row_attention`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NAME = "halora_rows"


@dataclass(frozen=True)
class RowLayout:
    """Where the tokens of a batch stand when its rows are padded to the longest.

    Attributes:
        places: Per token, `row * longest + position in the row`, `(tokens,)`.
        visible: Whether a token (third axis) sees another (last), `(rows, 1, longest, longest)`.
    """

    places: Tensor
    visible: Tensor

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """What a model with row attention is to be called with, next to tokens and positions."""
        return {"attention_mask": self.visible.to(device), "row_places": self.places.to(device)}


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
    row_places: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What `transformers` asks of an attention: query (1, heads, tokens, dim) -> (1, tokens, heads, dim)."""
    if row_places is None or attention_mask is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    rows, _, longest, _ = attention_mask.shape
    query, key, value = (_padded(states, row_places, rows, longest) for states in (query, key, value))
    attend = attend_on_cpu if query.device.type == "cpu" else _attend
    found = attend(query, key, value, attention_mask, scaling)
    return found.flatten(0, 1).index_select(0, row_places)[None], None


def _padded(states: Tensor, places: Tensor, rows: int, longest: int) -> Tensor:
    """`(1, heads, tokens, dim)` -> `(rows, longest, heads, dim)`, zero where there is no token."""
    by_token = states[0].transpose(0, 1)
    block = by_token.new_zeros(rows * longest, *by_token.shape[1:]).index_copy(0, places, by_token)
    return block.view(rows, longest, *by_token.shape[1:])


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Torch's own; every block is `(rows, longest, heads, dim)`."""
    query, key, value = (block.transpose(1, 2) for block in (query, key, value))
    found = F.scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2)


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """The same by plain products in float32: the backward of torch's own takes ten times as long in bfloat16.

    Args:
        query: `(rows, longest, heads, dim)`.
        key: `(rows, longest, groups, dim)`; the heads of a group share it.
        value: As `key`.
        visible: See `RowLayout`.
        scaling: Of the scores.

    Returns:
        `(rows, longest, heads, dim)` in the query's dtype.
    """
    (rows, longest, heads, dim), dtype = query.shape, query.dtype
    groups = key.shape[2]  # heads of one group share a key and a value
    query = query.view(rows, longest, groups, -1, dim).permute(0, 2, 3, 1, 4).reshape(rows * groups, -1, dim).float()
    key, value = (block.transpose(1, 2).reshape(rows * groups, longest, dim).float() for block in (key, value))
    scores = torch.bmm(query * scaling, key.transpose(1, 2)).view(rows, heads, longest, longest)
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    weights = torch.softmax(scores + hidden, dim=-1).view(rows * groups, -1, longest)
    found = torch.bmm(weights, value).view(rows, groups, -1, longest, dim)
    return found.permute(0, 3, 1, 2, 4).reshape(rows, longest, heads, dim).to(dtype)
