"""Oracles: each row alone through the stock attention of `transformers`; torch's own attention on the padded block; the
norm of `transformers`; and plain products in float32 or float64 for linear layers in bfloat16.
"""

from math import prod

import pytest
import torch
from tiny_families import FAMILIES, FEWER
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from halora.training import attention, fused
from halora.training.attention import RowLayout, attend_on_cpu
from halora.training.batches import PackedRow, lay_out
from halora.training.fused import FrozenLinear, FrozenNorm
from halora.training.models import load_base


def _row(name: str, tokens: int) -> PackedRow:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(5, 40000, (tokens,), generator=generator).tolist()
    return PackedRow(name, ids, [0] * (tokens - 1) + [1], list(range(tokens)), [tokens - 2], 0)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_row_in_a_batch_gives_what_it_gives_alone(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    stock = AutoModelForCausalLM.from_pretrained(tiny_models[architecture])
    rows = [_row("a", 19), _row("b", 3), _row("c", 8)]
    with torch.no_grad():
        together = lay_out(rows).hidden(base.causal_lm)[0].split([19, 3, 8])
        for row, hidden in zip(rows, together, strict=True):
            alone = stock.get_decoder()(torch.tensor([row.tokens])).last_hidden_state[0]
            torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", FEWER)
def test_called_without_rows_the_model_attends_as_any_other(tiny_models, architecture):
    base = load_base(tiny_models[architecture], "fp32")
    stock = AutoModelForCausalLM.from_pretrained(tiny_models[architecture])
    ids = torch.tensor([_row("a", 9).tokens, [*_row("b", 5).tokens, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    ours, theirs = (model(ids, attention_mask=mask).logits for model in (base.causal_lm, stock))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1, :5], theirs[1, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_products_are_torchs_attention_and_gradient(dtype):
    lengths, heads, groups, dim = [7, 11, 4], 6, 2, 8
    generator = torch.Generator().manual_seed(0)
    taken = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    seen = torch.rand(3, 1, max(lengths), max(lengths), generator=generator) < 0.5
    visible = (seen & taken[:, None, None]) | torch.eye(11, dtype=torch.bool)
    positions = torch.cat([torch.arange(length) for length in lengths])
    layout = RowLayout(taken.flatten().nonzero()[:, 0], visible, positions)
    shapes = [(1, count, sum(lengths), dim) for count in (heads, groups, groups)]
    states = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(1, sum(lengths), heads, dim, generator=generator).to(dtype)
    found = []
    for attend in (attend_on_cpu, attention._attend):
        output = attend(*states, layout, 0.3)
        assert output.dtype == dtype
        found.append([output, *torch.autograd.grad(output, states, upstream)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_frozen_bf16_layer_computes_in_the_dtype_the_cpu_is_fast_at(monkeypatch, has_bf16):
    monkeypatch.setattr(fused, "_cpu_has_bf16", lambda: has_bf16)
    linear = nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    layer = FrozenLinear(linear)
    assert layer.product_dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    x = torch.randn(1, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(1, 7, 48, dtype=torch.bfloat16)
    output = layer(x)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    assert output.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradient.double(), upstream.double() @ linear.weight.double(), rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "stock"), [("rounded", LlamaRMSNorm), ("wide", Olmo2RMSNorm), ("offset", Gemma3RMSNorm)]
)
def test_a_norm_and_its_gradient_are_those_of_transformers(dtype, kind, stock):
    stock = stock(96, eps=1e-3).to(dtype).requires_grad_(False)
    stock.weight.uniform_(0.2, 2)
    x, upstream = (0.1 * torch.randn(2, 5, 96)).to(dtype).requires_grad_(), torch.randn(2, 5, 96).to(dtype)
    found = []
    for norm in (FrozenNorm(stock, kind), stock):
        output = norm(x)
        found.append([output, *torch.autograd.grad(output, x, upstream)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if dtype is torch.bfloat16:  # where a norm rounds tells the kinds apart
        differ = (found[0][0] != found[1][0]).float().mean()
        assert differ < 0.02


def test_a_widened_weight_is_not_kept_for_the_backward(monkeypatch):
    monkeypatch.setattr(fused, "_cpu_has_bf16", lambda: False)
    layer = FrozenLinear(nn.Linear(256, 512, bias=False).to(torch.bfloat16).requires_grad_(False))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(prod(tensor.shape)), lambda none: none):
        layer(torch.randn(1, 4, 256, dtype=torch.bfloat16, requires_grad=True))
    assert all(size < 256 * 512 for size in kept)
