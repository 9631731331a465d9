"""Oracles: the exact tile-wise path, a loop over tiles in plain Python, and the limits of Bussgang's decomposition."""

from itertools import pairwise

import pytest
import torch

from halora.hardware.chip import load_chip
from halora.hardware.converters import _response_table, fit_converters, full_scale, tilewise_product


def _chip(bits: int, rows: int = 64):
    return load_chip({"preset": "halora-2026", "adc": {"bits": bits}, "tile": {"rows": rows}})


@pytest.fixture(scope="module")
def layer() -> dict[str, torch.Tensor]:
    """A layer whose inputs differ in size and whose last tile is not full, with calibration and fresh tokens."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-0.5, 0.5, 300)
    return {
        "weight": torch.randn(256, 300, generator=generator) * 0.05,
        "calibration": torch.randn(128, 300, generator=generator) * sizes,
        "fresh": torch.randn(400, 300, generator=generator) * sizes,
    }


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rows", [32, 128])
def test_statistical_model_has_the_error_of_the_exact_path(layer, bits, rows):
    chip, x, weight = _chip(bits, rows), layer["fresh"], layer["weight"]
    exact = tilewise_product(x, weight, chip, full_scale(layer["calibration"], weight, chip))
    scaled, error = fit_converters(layer["calibration"], weight, chip).split(x)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    modelled = scaled @ weight.T + error * noise
    product = x @ weight.T
    assert (modelled - product).std().item() == pytest.approx((exact - product).std().item(), rel=0.1)
    # The unexplained part is uncorrelated with the signal, as in the decomposition.
    residual = exact - scaled @ weight.T
    correlation = torch.corrcoef(torch.stack([residual.flatten(), product.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


def test_statistical_model_predicts_the_error_of_each_token(layer):
    chip, weight = _chip(6), layer["weight"]
    x = layer["fresh"] * torch.logspace(-2, 2, 400)[:, None]
    exact = tilewise_product(x, weight, chip, full_scale(layer["calibration"], weight, chip))
    scaled, error = fit_converters(layer["calibration"], weight, chip).split(x)
    observed = (exact - scaled @ weight.T).square().mean(dim=1).sqrt()
    ratio = observed / error[:, 0]
    assert ratio.median().item() == pytest.approx(1, abs=0.05)
    assert ratio.quantile(0.05) > 0.65  # rare clipped sums make single tokens vary
    assert ratio.quantile(0.95) < 1.5


def test_exact_path_equals_a_loop_over_tiles(layer):
    chip = _chip(5, rows=128)
    x, weight = layer["fresh"][:3], layer["weight"][:4]
    ranges = full_scale(layer["calibration"], weight, chip)
    product = tilewise_product(x, weight, chip, ranges)
    for token in range(3):
        scale = max(abs(value) for value in x[token].tolist())
        for output in range(4):
            total = 0.0
            for tile, start in enumerate(range(0, 300, 128)):
                inputs = x[token, start : start + 128] / scale
                partial = float(inputs @ weight[output, start : start + 128])
                step = float(ranges[tile, 0, 0]) / 15  # codes -15 .. 15
                total += max(-15, min(15, round(partial / step))) * step
            assert product[token, output].item() == pytest.approx(total * scale, rel=1e-4, abs=1e-5)


def test_ten_bits_are_nearly_exact_and_each_bit_about_halves_the_error(layer):
    errors = []
    for bits in (6, 7, 8, 9, 10):
        chip = _chip(bits)
        ranges = full_scale(layer["calibration"], layer["weight"], chip)
        product = layer["fresh"] @ layer["weight"].T
        exact = tilewise_product(layer["fresh"], layer["weight"], chip, ranges)
        errors.append(((exact - product).std() / product.std()).item())
    assert errors[-1] < 0.006
    assert all(0.4 < b / a < 0.65 for a, b in pairwise(errors))


def test_one_tile_taller_than_the_layer(layer):
    chip = _chip(8, rows=1024)
    ranges = full_scale(layer["calibration"], layer["weight"], chip)
    assert ranges.shape == (1, 1, 1)
    product = layer["fresh"] @ layer["weight"].T
    error = tilewise_product(layer["fresh"], layer["weight"], chip, ranges) - product
    scaled, modelled = fit_converters(layer["calibration"], layer["weight"], chip).split(layer["fresh"])
    assert scaled.shape == layer["fresh"].shape
    assert modelled.square().mean().sqrt().item() == pytest.approx(error.square().mean().sqrt().item(), rel=0.1)


def test_tokens_are_converted_independently_of_their_batch_and_size(layer):
    chip = _chip(6)
    model = fit_converters(layer["calibration"], layer["weight"], chip)
    scaled, error = model.split(layer["fresh"][None])
    one_scaled, one_error = model.split(layer["fresh"][7] * 1000)
    torch.testing.assert_close(one_scaled / 1000, scaled[0, 7])
    torch.testing.assert_close(one_error / 1000, error[0, 7])


def test_a_token_of_zeros_stays_finite(layer):
    chip = _chip(8)
    zeros = torch.zeros(1, 300)
    model = fit_converters(layer["calibration"], layer["weight"], chip)
    scaled, error = model.split(zeros)
    assert torch.isfinite(scaled).all()
    assert error.item() == pytest.approx(0, abs=1e-20)
    ranges = full_scale(layer["calibration"], layer["weight"], chip)
    assert torch.equal(tilewise_product(zeros, layer["weight"], chip, ranges), torch.zeros(1, 256))


@pytest.mark.parametrize("bits", [6, 8, 10])
def test_response_tends_to_its_limits(bits):
    gain, error = _response_table(bits)
    spread = torch.logspace(-8, 10, 4096, base=2, dtype=torch.float64)
    codes = 2 ** (bits - 1) - 1
    fine = (spread > 1) & (spread < codes / 6)  # neither dead zone nor clipping
    torch.testing.assert_close(gain[fine], torch.ones_like(gain[fine]), rtol=1e-4, atol=0)
    torch.testing.assert_close(error[fine], torch.full_like(error[fine], 1 / 12), rtol=2e-3, atol=0)
    dead = spread < 0.05  # every sum rounds to zero
    assert gain[dead].max() < 1e-10
    assert error[dead].max() < 1e-10


def test_response_agrees_with_simulated_gaussian_sums():
    gain, error = _response_table(4)
    spread = torch.logspace(-8, 10, 4096, base=2, dtype=torch.float64)
    for wanted in (0.3, 1.0, 4.0, 20.0):  # dead zone, fine, edge of the range, deep clipping
        index = int((spread - wanted).abs().argmin())
        sums = torch.randn(400_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * spread[index]
        codes = sums.round().clamp(-7, 7)
        expected_gain = (codes * sums).mean() / sums.square().mean()
        assert gain[index].item() == pytest.approx(expected_gain.item(), rel=0.01)
        expected_error = (codes - expected_gain * sums).var()
        assert error[index].item() == pytest.approx(expected_error.item(), rel=0.02)
