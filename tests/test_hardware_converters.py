"""Oracles: the exact tile-wise path, loops over tiles and bits in plain Python, limits of Bussgang's decomposition."""

from itertools import pairwise

import pytest
import torch

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.converter_model import ConverterModel, _response_table, fit_converters
from halora.hardware.converters import ExactReads, drive, full_scale, noise_power, reads_are_exact, tilewise_product
from halora.hardware.noise import Programming

KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="programming")


def _chip(bits: int, rows: int = 64, **sections):
    """Converters alone: no noise of programming or reading."""
    return load_chip({"preset": "ideal", "adc": {"bits": bits, "lossless": False}, "tile": {"rows": rows}, **sections})


def _read(model: ConverterModel, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    driven = model.drive(x)
    product = driven.inputs @ weight.T
    return model.read(product, driven, torch.randn(product.shape, generator=torch.Generator().manual_seed(0)))


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
    model = fit_converters(layer["calibration"], weight, chip)
    product = x @ weight.T
    modelled_error = (_read(model, x, weight) - product).std().item()
    assert modelled_error == pytest.approx((exact - product).std().item(), rel=0.05)
    # The unexplained part is uncorrelated with the signal, as in the decomposition.
    residual = exact - (model.drive(x).inputs @ weight.T) * model.output_gain
    correlation = torch.corrcoef(torch.stack([residual.flatten(), product.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


def test_statistical_model_predicts_the_error_of_each_token(layer):
    chip, weight = _chip(6), layer["weight"]
    x = layer["fresh"] * torch.logspace(-2, 2, 400)[:, None]
    exact = tilewise_product(x, weight, chip, full_scale(layer["calibration"], weight, chip))
    model = fit_converters(layer["calibration"], weight, chip)
    driven = model.drive(x)
    observed = (exact - (driven.inputs @ weight.T) * model.output_gain).square().mean(dim=1).sqrt()
    predicted = (driven.converter_power * model.error_factor.square()).mean(dim=1).sqrt()
    ratio = observed / predicted
    assert ratio.median().item() == pytest.approx(1, abs=0.05)
    assert ratio.quantile(0.05) > 0.65  # rare clipped sums make single tokens vary
    assert ratio.quantile(0.95) < 1.5


def test_an_output_unlike_the_others_is_fitted_on_its_own(layer):
    """One output with weights eight times as large: the mean square of the weights says little about any output."""
    weight = layer["weight"].clone()
    weight[3] *= 8
    chip = _chip(5)
    sizes = torch.logspace(-0.5, 0.5, 300)  # many tokens, as one output's clipped sums are rare
    calibration = torch.randn(2048, 300, generator=torch.Generator().manual_seed(4)) * sizes
    exact = tilewise_product(layer["fresh"], weight, chip, full_scale(calibration, weight, chip))
    read = _read(fit_converters(calibration, weight, chip), layer["fresh"], weight)
    product = layer["fresh"] @ weight.T
    ratio = (read - product).std(dim=0) / (exact - product).std(dim=0)
    assert ratio.median().item() == pytest.approx(1, abs=0.05)
    assert ratio[3].item() == pytest.approx(1, abs=0.2)


def test_driving_in_cycles_is_a_loop_over_bits(layer):
    """Sign and magnitude: three bits at once, seven in all, each cycle converted on its own."""
    chip = _chip(6, rows=128, dac={"input_bits": 8, "bits": 3, "lossless": False})
    assert chip.dac.cycles == 3
    x, weight = layer["fresh"][:2], layer["weight"][:3]
    converters = full_scale(layer["calibration"], layer["weight"], chip)
    product = tilewise_product(x, weight, chip, converters)
    for token in range(2):
        scale = x[token].abs().max()
        codes = (x[token] / scale * 127).round().to(torch.long)
        for output in range(3):
            total = 0.0
            for cycle in range(3):
                digits = codes.sign() * (codes.abs() >> (3 * cycle)).remainder(8)
                for tile, start in enumerate(range(0, 300, 128)):
                    step = float(converters.adc_range[cycle, 0, tile, 0] * converters.scale) / 31
                    partial = float((digits[start : start + 128] / 7) @ weight[output, start : start + 128])
                    total += 7 / 127 * 8**cycle * max(-31, min(31, round(partial / step))) * step
            assert product[token, output].item() == pytest.approx(total * float(scale), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bits", [1, 3])
def test_statistical_model_follows_the_cycles(layer, bits):
    chip = _chip(6, dac={"input_bits": 8, "bits": bits, "lossless": False})
    exact = tilewise_product(
        layer["fresh"], layer["weight"], chip, full_scale(layer["calibration"], layer["weight"], chip)
    )
    read = _read(fit_converters(layer["calibration"], layer["weight"], chip), layer["fresh"], layer["weight"])
    product = layer["fresh"] @ layer["weight"].T
    assert (read - product).std().item() == pytest.approx((exact - product).std().item(), rel=0.05)


@pytest.mark.parametrize("bits", [4, 6])
def test_input_codes_are_those_of_the_digital_scale(layer, bits):
    chip = load_chip({"preset": "ideal", "dac": {"input_bits": bits, "lossless": False}})
    x, weight = layer["fresh"], layer["weight"]
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim=1, keepdim=True)
    driven = fit_converters(layer["calibration"], weight, chip).drive(x)
    torch.testing.assert_close(driven.inputs, (x / scale * top).round() / top * scale)
    assert driven.converter_power.abs().max() == 0


def test_a_calibrated_input_range_clips_where_that_costs_least(layer):
    chip = load_chip({"preset": "ideal", "dac": {"input_bits": 4, "lossless": False, "range": "calibrated"}})
    x = layer["calibration"].clone()
    x[0, 0] = 40.0  # a lone outlier must not stretch the range over everything else
    model = fit_converters(x, layer["weight"], chip)
    limit = model.converters.input_range
    assert limit is not None
    assert limit < 20
    assert model.drive(torch.full((1, 300), 1000.0)).inputs.max().item() == pytest.approx(float(limit))


def test_noise_of_the_adc_is_added_per_tile_and_averaged_over_reads(layer):
    chip = _chip(8)
    quiet = fit_converters(layer["calibration"], layer["weight"], chip)
    for averaged in (1, 4):
        loud_chip = _chip(8, read={"averaged": averaged}).model_copy(
            update={"adc": chip.adc.model_copy(update={"noise_steps": 2.0})}
        )
        loud = fit_converters(layer["calibration"], layer["weight"], loud_chip).drive(layer["fresh"])
        power = quiet.converters.steps(chip, 256)[0, 0].square().sum(dim=0)  # of the conversions of each output
        scale = layer["fresh"].abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(loud.noise_power, 4.0 / averaged * power * scale.square())


def test_gradients_pass_straight_through(layer):
    x = layer["fresh"].clone().requires_grad_()
    chip = _chip(4, dac={"input_bits": 4, "lossless": False})
    fit_converters(layer["calibration"], layer["weight"], chip).drive(x).inputs.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_only_an_ideal_read_is_exact():
    assert reads_are_exact(load_chip("ideal"))
    for change in ({"adc": {"lossless": False}}, {"dac": {"lossless": False}}, {"read": {"thermal": True}}):
        assert not reads_are_exact(load_chip({"preset": "ideal", **change}))


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
                step = float(ranges.adc_range[0, 0, tile, 0] * ranges.scale) / 15  # codes -15 .. 15
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
    assert ranges.adc_range.shape == (1, 1, 1, 4)
    product = layer["fresh"] @ layer["weight"].T
    error = tilewise_product(layer["fresh"], layer["weight"], chip, ranges) - product
    read = _read(fit_converters(layer["calibration"], layer["weight"], chip), layer["fresh"], layer["weight"])
    assert (read - product).std().item() == pytest.approx(error.std().item(), rel=0.1)


def test_tokens_are_converted_independently_of_their_batch_and_size(layer):
    chip = _chip(6)
    model = fit_converters(layer["calibration"], layer["weight"], chip)
    batch, one = model.drive(layer["fresh"][None]), model.drive(layer["fresh"][7] * 1000)
    torch.testing.assert_close(one.inputs / 1000, batch.inputs[0, 7])
    torch.testing.assert_close(one.converter_power / 1e6, batch.converter_power[0, 7], rtol=1e-4, atol=0)


def test_a_token_of_zeros_stays_finite(layer):
    chip = _chip(8)
    zeros = torch.zeros(1, 300)
    model = fit_converters(layer["calibration"], layer["weight"], chip)
    driven = model.drive(zeros)
    assert torch.isfinite(driven.inputs).all()
    assert driven.converter_power.max().item() == pytest.approx(0, abs=1e-20)
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


# What is averaged by slices, reads, replicas and cycles.

CODINGS = {
    "plain": {},
    "reads": {"read": {"averaged": 4}},
    "replicas": {"coding": {"replicas": 4}},
    "slices": {"coding": {"slices": 3, "slice_ratio": 2.0}},
    "cycles": {"dac": {"lossless": False, "input_bits": 8, "bits": 1}},
    "all": {
        "read": {"averaged": 2},
        "coding": {"slices": 2, "replicas": 3},
        "dac": {"lossless": False, "input_bits": 8, "bits": 3},
    },
}


def _noisy_adc(**sections):
    """Sixteen steps of noise before each conversion of a 14-bit ADC, so that what it rounds is nothing beside it."""
    adc = {"bits": 14, "lossless": False, "noise_steps": 16.0, "costs": "survey"}
    return load_chip({"preset": "ideal", "adc": adc, **sections})


@pytest.mark.parametrize("name", CODINGS)
def test_adc_noise_is_that_of_every_conversion_drawn_on_its_own(layer, name):
    """A loop over reads, replicas, slices, cycles and tiles."""
    chip = _noisy_adc(**CODINGS[name])
    x, weight = layer["fresh"][:3], layer["weight"][:80]
    reads = ExactReads.calibrated(layer["calibration"], weight, chip)
    scale, cycles = drive(x, chip.dac, None)
    power = noise_power(scale, cycles, 80, chip, reads.converters, None)
    steps, generator = reads.converters.steps(chip, 80), torch.Generator().manual_seed(1)
    total = torch.zeros(4000, 3, 80)
    for _replica in range(chip.coding.replicas):
        for index in range(chip.coding.slices):
            for cycle, (significance, _) in enumerate(cycles):
                share = significance * chip.coding.slice_ratio**-index / chip.coding.replicas / chip.read.averaged
                for of_tile in steps[cycle, index]:
                    for _read_again in range(chip.read.averaged):
                        unit = torch.randn(total.shape, generator=generator)
                        total += unit * (16 * of_tile * share * scale)
    ratio = total.square().mean(dim=0) / power
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert (ratio - 1).abs().max() < 0.15  # 4,000 draws of each output


def test_four_replicas_halve_the_noise_of_their_adcs(layer):
    """The deviation was the same with one and with four replicas, which energy charges."""
    deviations = []
    for replicas in (1, 4):
        chip = _chip(8, coding={"replicas": replicas})
        chip = chip.model_copy(update={"adc": chip.adc.model_copy(update={"noise_steps": 2.0})})
        reads = ExactReads.calibrated(layer["calibration"], layer["weight"], chip)
        copies = Programming.of(layer["weight"], chip, 0.0).copies(layer["weight"], KEY)
        draws = torch.Generator().manual_seed(2)
        read = reads.product(layer["fresh"], copies, lambda like, draws=draws: torch.randn(like.shape, generator=draws))
        deviations.append((read - tilewise_product(layer["fresh"], copies, chip, reads.converters)).std().item())
    assert deviations[0] / deviations[1] == pytest.approx(2, rel=0.01)


def _errors(chip, layer, level: float) -> tuple[float, float]:
    """Deviation of the converters' error in products of one chip instance: carried out, and by the model."""
    x, weight = layer["fresh"], layer["weight"]
    programming, model = Programming.of(weight, chip, level), fit_converters(layer["calibration"], weight, chip)
    held, copies = programming.held(weight, KEY), programming.copies(weight, KEY)
    exact = tilewise_product(x, copies, chip, model.converters) - x @ held.T
    return exact.std().item(), (_read(model, x, held) - x @ held.T).std().item()


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(("slices", "ratio"), [(2, 4.0), (4, 2.0), (2, 2.0)])
def test_slices_are_converted_one_by_one_in_both_paths(layer, slices, ratio, noise):
    """Two-bit cells, or cells whose errors the next slice is to undo. They were converted as one by the exact path."""
    sections = {"noise": {"sigma": noise}} if noise else {"cells": {"levels": 4}}
    chip = _chip(8, coding={"slices": slices, "slice_ratio": ratio}, **sections)
    exact, modelled = _errors(chip, layer, noise)
    assert modelled == pytest.approx(exact, rel=0.05)
    as_one, _ = _errors(_chip(8), layer, 0.0)
    assert exact > 1.001 * as_one  # conversions of later slices are not free of error


def test_a_slice_s_sums_are_those_of_what_its_own_cells_hold(layer):
    """A loop over slices, tiles of 128 x 100 with a scale each, and outputs."""
    chip = _chip(
        6,
        coding={"slices": 2, "slice_ratio": 4.0, "scale": "tile_max"},
        cells={"levels": 4},
        tile={"rows": 128, "columns": 100},
    )
    x, weight = layer["fresh"][:2], layer["weight"]
    converters = full_scale(layer["calibration"], weight, chip)
    assert converters.adc_range.shape == (1, 2, 3, 3)
    copies = Programming.of(weight, chip, 0.0).copies(weight, KEY)
    product = tilewise_product(x, copies, chip, converters)
    for token in range(2):
        inputs = x[token] / x[token].abs().max()
        for output in (0, 99, 100, 255):
            total = 0.0
            for tile, start in enumerate(range(0, 300, 128)):
                column = output // 100
                own = weight[100 * column : 100 * column + 100, start : start + 128]
                largest = own.abs().max()
                stored = weight[output, start : start + 128] / largest
                first = (stored.abs() * 3).round() / 3 * stored.sign()  # two-bit cells: thirds
                left = ((stored - first) * 4).clamp(-1, 1)
                second = (left.abs() * 3).round() / 3 * left.sign()
                for index, held in enumerate((first, second)):
                    step = float(converters.adc_range[0, index, tile, column]) / 31
                    partial = float(inputs[start : start + 128] @ held)
                    total += max(-31, min(31, round(partial / step))) * step * float(largest) / 4**index
            assert product[token, output].item() == pytest.approx(
                total * float(x[token].abs().max()), rel=1e-3, abs=1e-4
            )


def test_replicas_average_the_rounding_of_their_own_conversions_only_where_their_cells_differ(layer):
    alike, _ = _errors(_chip(6, coding={"replicas": 4}), layer, 0.0)
    one, _ = _errors(_chip(6), layer, 0.0)
    assert alike == pytest.approx(one, rel=1e-4)
    noise = {"noise": {"sigma": 0.05}}
    apart, modelled = _errors(_chip(6, coding={"replicas": 4}, **noise), layer, 0.05)
    one, _ = _errors(_chip(6, **noise), layer, 0.05)
    assert apart < 0.6 * one
    assert modelled == pytest.approx(apart, rel=0.05)


def test_reads_averaged_do_not_average_the_rounding(layer):
    """The same sum gives the same code; noise that would dither it is added after the conversion."""
    once, again = (_errors(_chip(6, read={"averaged": averaged}), layer, 0.0) for averaged in (1, 4))
    assert once == again


@pytest.mark.parametrize("scale", ["tensor_max", "channel_max", "tile_max"])
def test_statistical_model_follows_the_digital_scale(layer, scale):
    """Outputs of very different size: with a scale each, the steps of small ones are small."""
    weight = layer["weight"] * torch.logspace(-2, 0, 256)[:, None]
    chip = _chip(6, coding={"scale": scale})
    x, model = layer["fresh"], fit_converters(layer["calibration"], weight, chip)
    exact = tilewise_product(x, weight, chip, model.converters) - x @ weight.T
    modelled = _read(model, x, weight) - x @ weight.T
    ratio = modelled.std(dim=0) / exact.std(dim=0)
    assert ratio.median().item() == pytest.approx(1, abs=0.05)
    assert ((ratio - 1).abs() < 0.25).float().mean() > 0.9  # the rest have clipped sums that the calibration lacked


def test_a_scale_for_each_output_helps_the_small_ones(layer):
    weight = (
        layer["weight"]
        * torch.logspace(-2, 0, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))][:, None]
    )
    x, relative = layer["fresh"], {}
    for scale in ("tensor_max", "channel_max"):
        chip = _chip(6, coding={"scale": scale})
        error = tilewise_product(x, weight, chip, full_scale(layer["calibration"], weight, chip)) - x @ weight.T
        relative[scale] = (error.std(dim=0) / (x @ weight.T).std(dim=0)).mean().item()
    assert relative["channel_max"] < 0.5 * relative["tensor_max"]


@pytest.mark.parametrize("scale", ["tensor_max", "channel_max", "tile_max"])
@pytest.mark.parametrize("zero", ["weights", "outputs", "tile", "inputs", "tile of inputs"])
def test_zeros_anywhere_leave_everything_finite(layer, scale, zero):
    weight, calibration = layer["weight"].clone(), layer["calibration"].clone()
    if zero == "weights":
        weight.zero_()
    elif zero == "outputs":
        weight[:64] = 0
    elif zero == "tile":
        weight[:64, :64] = 0
    elif zero == "inputs":
        calibration.zero_()
    else:
        calibration[:, :64] = 0
    noise, dac = {"sigma": 0.01, "reference": "absolute"}, {"lossless": False, "bits": 3}
    chip = _chip(8, coding={"scale": scale, "replicas": 2}, noise=noise, dac=dac, read={"white_us": 0.1})
    copies = Programming.of(weight, chip, 0.01).copies(weight, KEY)
    reads, model = ExactReads.calibrated(calibration, weight, chip), fit_converters(calibration, weight, chip)
    for x in (layer["fresh"], torch.zeros(2, 300)):
        assert torch.isfinite(reads.product(x, copies, torch.randn_like)).all()
        assert torch.isfinite(_read(model, x, copies[0, 0])).all()
    if zero in ("outputs", "tile", "tile of inputs"):
        product = layer["fresh"] @ copies.mean(dim=0)[0].T
        error = tilewise_product(layer["fresh"], copies, chip, reads.converters) - product
        assert error.norm() < 0.3 * product.norm()  # a tile that saw nothing at calibration still converts
