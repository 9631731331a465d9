"""Weight outliers: a base rescaled so that it computes the same from weights with heavier tails.

Noise that is relative to a largest weight depends on how far that weight stands out, and real Qwen2.5 weights have it
stand out two to four times as far as SmolLM2's. Their tails are put on another model by scaling channels up where they
are read and down by as much where they are made:

| made by | read by |
|---|---|
| gain of the norm before attention | columns of q_proj, k_proj, v_proj |
| gain of the norm before the MLP | columns of gate_proj, up_proj |
| rows of up_proj | columns of down_proj, and the other way round |
| rows of v_proj, of a head that its group shares | columns of o_proj, and the other way round |

Every scale is a power of two, so that no rounding changes: outputs are the same to the last bit, in bfloat16 as well.
What noise does to the products is not the same, which is the point. The residual stream and the head are left alone,
q_proj and k_proj as well where they are made: Qwen3 has a norm between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_DOUBLINGS = 12
_MOST_CHANNELS = 24  # raised of one layer, at most
_WITHIN = 0.2  # share of a target that is near enough
_BULK_KEPT = 0.9  # of the mean absolute weight over the standard deviation: outliers do not take over the matrix


@dataclass(frozen=True)
class Tails:
    """How far the largest weights of a matrix stand out.

    Attributes:
        peak: Largest absolute weight, in standard deviations of the matrix.
        block: Root mean square over blocks of 64 x 64 of the largest absolute weight in each, likewise.
        fill: Mean absolute weight over the largest one.
    """

    peak: float
    block: float
    fill: float

    @classmethod
    def of(cls, weight: Tensor, block: int = 64) -> "Tails":
        """Measure a matrix `(out_features, in_features)`; blocks at its edges may be smaller."""
        size = weight.detach().float().abs()
        rows, columns = (-count % block for count in size.shape)
        largest = F.max_pool2d(F.pad(size, (0, columns, 0, rows))[None], block)
        std, peak = float(weight.float().std()), float(size.max())
        return cls(peak / std, float(largest.square().mean().sqrt()) / std, float(size.mean()) / peak)


@dataclass(frozen=True)
class Spread:
    """Tails of one kind of layer over a model, taken as log-normal.

    Attributes:
        peak: Median and 90 % quantile of `Tails.peak`.
        block: The same of `Tails.block`.
    """

    peak: tuple[float, float]
    block: tuple[float, float]

    def at(self, quantile: float) -> tuple[float, float]:
        """Peak and block of the layer at a quantile."""
        deviations = NormalDist().inv_cdf(quantile) / NormalDist().inv_cdf(0.9)
        peak, block = (median * (ninetieth / median) ** deviations for median, ninetieth in (self.peak, self.block))
        return peak, block


_ATTENDED = Spread(peak=(15, 27), block=(7.5, 11))
QWEN_TAILS: Mapping[str, Spread] = {
    "q_proj": Spread(peak=(22, 69), block=(8.4, 15.0)),
    "k_proj": _ATTENDED,
    "v_proj": _ATTENDED,
    "o_proj": _ATTENDED,
    "gate_proj": Spread(peak=(26, 34), block=(7.8, 9.2)),
    "up_proj": Spread(peak=(21, 30), block=(5.5, 7.0)),
    "down_proj": Spread(peak=(54, 186), block=(8.7, 15.9)),
}
"""Measured on de-quantised weights of a Qwen2.5-0.5B class model. Of k, v and o together: medians 12 to 19 and 5 to 12,
largest 42 and 18."""


@dataclass(frozen=True)
class _Reader:
    """A matrix that channels are read by, in its columns.

    Attributes:
        weight: `(out, in)`; transposed where the channels are rows.
        channels: Channel of each column.
        target: Peak and block that are aimed at.
    """

    weight: Tensor
    channels: Tensor
    target: tuple[float, float]

    def tails(self, scales: Tensor) -> Tails:
        return Tails.of(self.weight * scales[self.channels])

    def prominence(self, channel_count: int) -> Tensor:
        """Largest absolute weight of each channel over the channel's root mean square."""
        zeros = torch.zeros(channel_count)
        largest = zeros.scatter_reduce(0, self.channels, self.weight.abs().amax(0), "amax")
        square = zeros.scatter_reduce(0, self.channels, self.weight.square().mean(0), "mean", include_self=False)
        return largest / square.sqrt()


def add_outliers(causal_lm: Any, spreads: Mapping[str, Spread] = QWEN_TAILS) -> None:
    """Give a `transformers` model of the LLaMA or Qwen family heavier tails, in place; it computes the same.

    Of each kind of layer, the one with the n-th longest tail gets the n-th longest of the spread. Channels are raised
    one by one, the most prominent first, each by the most doublings that keep all who read it within a fifth of their
    targets, and the bulk of their weights the bulk of their power, until the first reader has reached its own. Tails
    that are longer already stay.

    Args:
        causal_lm: The model.
        spreads: Tails to reach, by the layer's name.
    """
    config, blocks = causal_lm.config, [_linears(block) for block in causal_lm.model.layers]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    ranks = {name: _ranks([Tails.of(linears[name].weight).peak for linears in blocks]) for name in spreads}

    def target(name: str, i: int, by: str = "") -> tuple[float, float]:
        return spreads[name].at((ranks[by or name][i] + 0.5) / len(blocks))

    with torch.no_grad():
        for i, (block, linears) in enumerate(zip(causal_lm.model.layers, blocks, strict=True)):
            for norm, names in (
                (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (block.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                own = torch.arange(norm.weight.numel())
                targets = {name: target(name, i, by=names[0]) for name in names}
                scales = _scales([_Reader(linears[name].weight.float(), own, targets[name]) for name in names])
                norm.weight.div_(scales)
                for name in names:
                    linears[name].weight.mul_(scales)
            for maker, reader, heads in (("up_proj", "down_proj", 1), ("v_proj", "o_proj", group)):
                making, reading = linears[maker], linears[reader]
                own = torch.arange(making.out_features)
                channels = own.view(-1, 1, head_dim).expand(-1, heads, -1).flatten() if heads > 1 else own
                read = _scales([_Reader(reading.weight.float(), channels, target(reader, i))])
                _scale_rows(making, 1 / read)
                made = _scales([_Reader(making.weight.float().T, own, target(maker, i))])
                _scale_rows(making, made)
                reading.weight.mul_((read / made)[channels])


def _linears(block: Any) -> dict[str, nn.Linear]:
    """The linear layers of a decoder block by name."""
    parts = (*block.self_attn.named_children(), *block.mlp.named_children())
    return {name: part for name, part in parts if isinstance(part, nn.Linear)}


def _ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0] * len(values)
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


def _scales(readers: Sequence[_Reader]) -> Tensor:
    """Powers of two by channel that bring the first reader to its target and none above its own."""
    scales = torch.ones(int(readers[0].channels.max()) + 1)
    unraised = now = [reader.tails(scales) for reader in readers]
    peak, block = (aim * (1 - _WITHIN) for aim in readers[0].target)
    prominence = readers[0].prominence(len(scales))
    for channel in prominence.argsort(descending=True, stable=True)[:_MOST_CHANNELS]:
        if now[0].peak >= peak and now[0].block >= block:
            break
        for _ in range(_MOST_DOUBLINGS):
            raised = scales.clone()
            raised[channel] *= 2
            then = []
            for reader, before, own in zip(readers, now, unraised, strict=True):
                tails = reader.tails(raised)
                if _takes_over(tails, own) or _exceeds(tails, before, reader.target):
                    break
                then.append(tails)
            if len(then) < len(readers):
                break
            scales, now = raised, then
    return scales


def _exceeds(raised: Tails, before: Tails, target: tuple[float, float]) -> bool:
    peak, block = (aim * (1 + _WITHIN) for aim in target)
    return raised.peak > max(peak, before.peak) or raised.block > max(block, before.block)


def _takes_over(raised: Tails, unraised: Tails) -> bool:
    """Whether raised channels hold so much of a matrix that its standard deviation is no more that of the others."""
    return raised.fill * raised.peak < _BULK_KEPT * unraised.fill * unraised.peak


def _scale_rows(linear: nn.Linear, scales: Tensor) -> None:
    linear.weight.mul_(scales[:, None])
    if linear.bias is not None:
        linear.bias.mul_(scales)
