"""Oracle: the split done by hand. Layers whose largest weights sit in SRAM, against the rest programmed alone and the
rest's and the side's products added up."""

import pytest
import torch
from torch import nn

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip, load_chip
from halora.hardware.converters import ExactReads
from halora.hardware.instance import ChipInstance
from halora.hardware.noise import Programming
from halora.hardware.outliers import in_rram
from halora.hardware.rounding import rounded
from halora.training.rram import install

KINDS = ["weight", "tile", "column", "singular"]
PRESETS = ["halora-2026", "halora-2026-tensor-max", "neurram-2022", "cmo-hfox"]
KEY = NoiseKey(role=Role.SEARCH, chip_seed=1)
LAYER = "model.layers.0.self_attn.q_proj"


def _chip(preset: str = "halora-2026", share: float = 0.02, **outliers) -> Chip:
    return load_chip({"preset": preset, "mapping": {"outliers": {"share": share, **outliers}}})


@pytest.fixture
def layer():
    """A model of one layer with heavy tails, and its array."""
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(96, 80, bias=False)
    tails = 1 + 15 * (torch.rand(80, 96, generator=generator) < 0.01)
    linear.weight.data = 0.05 * torch.randn(80, 96, generator=generator) * tails
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([_Attention(linear)])})})
    array = install(model)
    return model.get_submodule(LAYER), array


class _Attention(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": linear})


def _program(array, chip: Chip, **settings) -> ChipInstance:
    instance = ChipInstance(chip, KEY, chip.noise.level)
    array.program(instance, **settings)
    return instance


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_a_share_of_0_is_the_chip_without_outliers(layer, preset):
    linear, array = layer
    _program(array, load_chip(preset))
    without = linear.effective_weight().clone()
    _program(array, _chip(preset, share=0.0))
    assert torch.equal(linear.effective_weight(), without)


@torch.no_grad()
def test_a_share_of_1_is_the_clean_weight_at_the_precision_of_sram(layer):
    linear, array = layer
    _program(array, _chip("neurram-2022", share=1.0), digital=True)
    assert torch.equal(linear.effective_weight(), rounded(linear.weight, 8, dim=1))
    assert array.noise_db() == {}


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("by", KINDS)
def test_the_rest_is_programmed_alone_and_the_side_added(layer, preset, by):
    linear, array = layer
    chip = _chip(preset, by=by)
    _program(array, chip)
    rest, side = in_rram(linear.weight, chip)
    expected = Programming.of(rest, chip, chip.noise.level).held(rest, KEY.at(module=LAYER, purpose="programming"))
    expected = expected.clone()
    side.add_to(expected)
    torch.testing.assert_close(linear.effective_weight(), expected)


@torch.no_grad()
def test_the_same_cells_err_whatever_the_share(layer):
    """Common random numbers: the error over the full scale of the rest is the same draw."""
    linear, array = layer
    units = []
    for share in (0.0, 0.005, 0.05):
        chip = load_chip({"preset": "halora-2026-tensor-max", "wires": {"resistance_ohm": 0.0}})
        chip = load_chip(chip.model_dump(mode="json") | {"mapping": {"outliers": {"share": share}}})
        _program(array, chip)
        rest, _ = in_rram(linear.weight, chip)
        units.append((linear.effective_weight() - linear.weight) / rest.abs().max())
    torch.testing.assert_close(units[1], units[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(units[2], units[0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("copies", [{}, {"slices": 2, "replicas": 2}])
def test_converters_see_the_rest_and_sram_multiplies_the_side(layer, by, copies):
    linear, array = layer
    chip = load_chip({**_chip(by=by).model_dump(mode="json"), "coding": {"scale": "tile_max", **copies}})
    calibration, x = torch.randn(64, 96), torch.randn(1, 12, 96)
    rest, side = in_rram(linear.weight, chip)
    reads = ExactReads.calibrated(calibration, rest, chip)
    with array.reading([("a", 12)]):
        _program(array, chip, reads={LAYER: reads}, digital=True)
        read = linear(x)
        held = Programming.of(rest, chip, chip.noise.level).copies(rest, KEY.at(module=LAYER, purpose="programming"))
        expected = reads.product(x, held, linear._read_noise) + side.product(rounded(x, 8, dim=-1))
    torch.testing.assert_close(read, expected)


@pytest.mark.parametrize("regenerate", [False, True])
def test_gradients_pass_the_side(layer, regenerate):
    linear, array = layer
    _program(array, _chip(by="weight"), regenerate=regenerate)
    x = torch.randn(1, 5, 96, requires_grad=True)
    linear(x).square().sum().backward()
    weight = linear.effective_weight()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T) @ weight)


@torch.no_grad()
def test_noise_to_signal_counts_rram_and_sram_together(layer):
    _, array = layer
    ratios = []
    for share in (0.0, 0.01):
        _program(array, _chip("halora-2026-tensor-max", share=share), digital=True)
        ratios.append(array.noise_db()[LAYER])
    assert ratios[1] < ratios[0] - 10


@torch.no_grad()
def test_bf16_weights_split_as_those_of_float32(layer):
    linear, array = layer
    chip = _chip("halora-2026-tensor-max", by="weight")
    _program(array, chip)
    wide = linear.effective_weight().clone()
    linear.weight.data = linear.weight.data.bfloat16()
    linear._known_side = None
    _program(array, chip)
    narrow = linear.effective_weight()
    assert (narrow.float() - wide).abs().max() < 0.02 * wide.abs().max()


@torch.no_grad()
def test_a_chip_is_read_with_its_own_side_whatever_was_split_before(layer):
    """Calibration for another chip leaves nothing behind: products as of a layer that has met one chip only."""
    linear, array = layer
    calibration, x = torch.randn(64, 96), torch.randn(1, 12, 96)
    outputs = []
    for before in (None, _chip(share=0.05)):
        for share in (0.0, 0.01):
            chip = _chip(share=share)
            reads = ExactReads.calibrated(calibration, linear.split(chip)[0], chip)
            if before is not None:
                linear.split(before)
            with array.reading([("a", 12)]):
                _program(array, chip, reads={LAYER: reads})
                outputs.append(linear(x))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
