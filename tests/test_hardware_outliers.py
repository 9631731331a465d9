"""Oracle: definitions. Splits by sorting and by `torch.linalg.svd`, on matrices with heavy tails."""

import pytest
import torch

from halora.hardware.chip import Tile, load_chip
from halora.hardware.mapping import Outliers, Placement, outlier_count
from halora.hardware.outliers import SparseSide, side_matrix

TILE = Tile(rows=32, columns=16)
SIZE = (32, 16)


def _heavy_tails(d_out: int = 70, d_in: int = 90, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(d_out, d_in, generator=generator)
    return normal * (1 + 20 * (torch.rand(d_out, d_in, generator=generator) < 0.005))


def _side(weight, share, by, bits):
    return side_matrix(weight, Outliers(share=share, by=by, weight_bits=bits), TILE)


@pytest.mark.parametrize("by", ["weight", "tile", "column", "singular"])
@pytest.mark.parametrize("bits", [6, 8, 16])
def test_rest_and_side_add_up_to_the_weight_at_any_precision(by, bits):
    weight = _heavy_tails()
    side = _side(weight, 0.02, by, bits)
    total = side.rest_of(weight)
    side.add_to(total)
    torch.testing.assert_close(total, weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("by", ["weight", "tile", "column", "singular"])
def test_the_product_of_the_side_is_that_of_its_matrix(by):
    weight, x = _heavy_tails(), torch.randn(3, 5, 90, generator=torch.Generator().manual_seed(1))
    side = _side(weight, 0.02, by, 8)
    matrix = torch.zeros_like(weight)
    side.add_to(matrix)
    torch.testing.assert_close(side.product(x), x @ matrix.T, rtol=1e-4, atol=1e-4)


def test_the_largest_weights_leave_their_threshold_behind():
    weight = _heavy_tails()
    side = _side(weight, 0.01, "weight", 16)
    ranked = weight.abs().flatten().sort(descending=True).values
    count = round(0.01 * weight.numel())
    torch.testing.assert_close(side.rest_of(weight).abs().max(), ranked[count])
    assert isinstance(side, SparseSide)
    assert len(side.values) == count == outlier_count(90, 70, 0.01, "weight", SIZE)


def test_rounding_the_side_leaves_the_full_scale_of_the_rest():
    weight = _heavy_tails()
    exact, coarse = (_side(weight, 0.01, "weight", bits).rest_of(weight).abs().max() for bits in (16, 8))
    assert coarse <= exact * 1.0001


def test_every_tile_gives_its_own_share():
    weight = _heavy_tails()
    side = _side(weight, 0.02, "tile", 16)
    assert isinstance(side, SparseSide)
    matrix = torch.zeros_like(weight)
    side.add_to(matrix)
    counts = []
    for out in range(0, 70, 16):
        for first in range(0, 90, 32):
            block = (slice(out, out + 16), slice(first, first + 32))
            count = round(0.02 * weight[block].numel())
            assert int((matrix[block] != 0).sum()) == count
            counts.append(count)
    assert sum(counts) == outlier_count(90, 70, 0.02, "tile", SIZE)


def test_columns_are_those_with_the_largest_weights():
    weight = _heavy_tails()
    rest = _side(weight, 0.05, "column", 16).rest_of(weight)
    gone = {int(i) for i in (rest == 0).all(dim=0).nonzero()}
    largest = sorted(range(90), key=lambda i: -float(weight[:, i].abs().max()))
    assert gone == set(largest[: round(0.05 * 90)])


@pytest.mark.parametrize(("d_out", "d_in"), [(70, 90), (90, 70)])
def test_the_singular_part_is_that_of_a_decomposition(d_out, d_in):
    weight = _heavy_tails(d_out, d_in)
    rank = outlier_count(d_in, d_out, 0.1, "singular", SIZE)
    u, s, v = torch.linalg.svd(weight.double())
    rest = _side(weight, 0.1, "singular", 16).rest_of(weight)
    torch.testing.assert_close(rest.double(), weight - (u[:, :rank] * s[:rank]) @ v[:rank], rtol=0, atol=1e-4)


@pytest.mark.parametrize("by", ["weight", "tile", "column", "singular"])
def test_no_share_is_no_side(by):
    assert _side(_heavy_tails(), 0.0, by, 8) is None


def test_the_whole_share_puts_a_layer_in_sram():
    sizes = {"model.layers.0.mlp.up_proj": 10, "model.layers.0.mlp.down_proj": 10}
    down = {"match": "*.down_proj", "mapping": {"outliers": {"share": 1}}}
    chip = load_chip({"preset": "ideal", "mapping": {"outliers": {"share": 0.1}}, "layers": {"down": down}})
    assert [layer.place for layer in chip.on_layers(sizes).values()] == [Placement.RRAM, Placement.SRAM]
