"""Oracles: aihwkit-lightning 2.1.0 itself, in the environment that its benchmark makes, against this library's layers;
the closed form of the noise; and that no setting of a chip is lost without a word.
"""

import json
import os
import subprocess
from math import sqrt

import numpy as np
import pytest
import torch
from services import required

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import write_verify_factor
from halora.hardware.chip import load_chip
from halora.hardware.chip_files import preset_names
from halora.hardware.converters import full_scale, tilewise_product
from halora.hardware.noise import programmed_weight
from halora.hardware.variation import Variation
from halora.selection.lightning import PACKAGE, lightning_settings

ROWS, OUTPUTS = 64, 48
KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="layer", purpose="lightning")
EXACT = {"preset": "ideal"}
CONVERTED = {"preset": "ideal", "dac": {"lossless": False}}


def _normal(*shape, name):
    return torch.from_numpy(KEY.part(name).standard_normal(shape)).float()


WEIGHT = _normal(OUTPUTS, ROWS, name="weight") * torch.logspace(-1, 0, OUTPUTS)[:, None]
TALL = _normal(OUTPUTS, 3 * ROWS // 2, name="tall")
INPUTS, TALL_INPUTS = _normal(32, ROWS, name="x"), _normal(32, 3 * ROWS // 2, name="tall x")
LARGEST = {"tensor_max": WEIGHT.abs().amax(), "channel_max": WEIGHT.abs().amax(dim=1, keepdim=True)}

# Runs in the other environment: builds a layer by the snippet and says what it makes of its inputs.
LAYER = """
import json, sys
import numpy as np
import torch
from aihwkit_lightning.nn import AnalogLinear

torch.manual_seed(0)
folder, answers = sys.argv[1], {}
for case in json.load(open(f"{folder}/cases.json")):
    names = {}
    exec(case["python"], names)
    given = np.load(f"{folder}/{case['name']}.npz")
    weight, x = torch.from_numpy(given["weight"]), torch.from_numpy(given["x"])
    digital = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    digital.weight.data = weight.clone()
    layer = AnalogLinear.from_digital(digital, names["rpu_config"](*case["arguments"])).train(case["draws"] > 0)
    if case["input_range"] is not None:
        layer.input_range.data.fill_(case["input_range"])
    layer.clip_weights()
    with torch.no_grad():
        answers[case["name"]] = torch.stack([layer(x.clone()) for _ in range(max(case["draws"], 1))]).numpy()
np.savez(f"{folder}/answers.npz", **answers)
"""


class Layer:
    """A chip, a weight and inputs."""

    def __init__(self, chip, weight=WEIGHT, x=INPUTS, draws=0):
        self.chip, self.weight, self.x, self.draws = load_chip(chip), weight, x, draws
        self.converters = full_scale(x, weight, self.chip)
        self.settings = lightning_settings(self.chip)

    @property
    def product(self):
        """Its converters' word on the inputs."""
        return tilewise_product(self.x, self.weight, self.chip, self.converters)

    @property
    def out_bound(self):
        """The ADC's full scale in the package's terms."""
        (adc_range,) = self.converters.adc_range.flatten().tolist()  # one tile, in units of the largest weight
        return adc_range

    def case(self, name, folder):
        """What the package is told; the tensors go to a file."""
        np.savez(folder / f"{name}.npz", weight=self.weight.numpy(), x=self.x.numpy())
        limit = self.converters.input_range
        return {
            "name": name,
            "python": self.settings.to_python(),
            "arguments": [] if self.chip.adc.lossless else [self.out_bound],
            "input_range": None if limit is None else limit.item(),
            "draws": self.draws,
        }


EYE = torch.eye(ROWS)  # its products are the weights
FACTOR = write_verify_factor(10.0) / 2 / 4  # ten pulses for one, four replicas, two slices
NOISY = {
    reference: {
        **EXACT,
        "noise": {"sigma": 0.05, "reference": reference},
        "write_verify": {"pulses": 10.0},
        "coding": {"replicas": 4, "slices": 2, "slice_ratio": 4.0},
    }
    for reference in LARGEST
}
CLIPPED = {scale: {**EXACT, "coding": {"scale": scale, "clip_std": 1.5}, "cells": {"levels": 8}} for scale in LARGEST}
LAYERS = {
    **{f"noise {reference}": Layer(chip, x=EYE, draws=400) for reference, chip in NOISY.items()},
    "noise at rest": Layer(NOISY["tensor_max"], x=EYE),
    "through the inputs": Layer({**CONVERTED, "noise": {"sigma": 0.05}}, x=EYE, draws=400),
    **{f"clipped {scale}": Layer(chip, x=EYE) for scale, chip in CLIPPED.items()},
    **{
        f"{bits} bits in": Layer(CONVERTED | {"dac": {"lossless": False, "input_bits": bits}}, TALL, TALL_INPUTS)
        for bits in (1, 2, 5, 8)
    },
    "calibrated": Layer(CONVERTED | {"dac": {"lossless": False, "input_bits": 6, "range": "calibrated"}}),
    **{
        f"{bits} bits out": Layer(CONVERTED | {"adc": {"lossless": False, "bits": bits, "costs": "linear"}})
        for bits in (2, 5, 8)
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the package's layers answer: by case, (draws, tokens, outputs)."""
    from benchmarks.lightning import environment

    try:
        python = str(environment() / "bin" / "python")
    except subprocess.CalledProcessError:  # no package registry answers
        python = required(PACKAGE, None)
    folder = tmp_path_factory.mktemp("lightning")
    (folder / "cases.json").write_text(json.dumps([layer.case(name, folder) for name, layer in LAYERS.items()]))
    command = [python, "-c", LAYER, str(folder)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {name: torch.from_numpy(answer) for name, answer in np.load(folder / "answers.npz").items()}


@pytest.mark.parametrize("reference", LARGEST)
def test_the_package_s_noise_has_this_chip_s_standard_deviation(answers, reference):
    errors = (answers[f"noise {reference}"].mT - WEIGHT) / (0.05 * FACTOR * LARGEST[reference])
    per_output = errors.square().mean(dim=(0, 2)).sqrt()
    assert per_output.numpy() == pytest.approx(1, rel=4 / sqrt(2 * 400 * ROWS))  # four standard errors
    assert errors.mean().item() == pytest.approx(0, abs=4 / sqrt(errors.numel()))
    held = [
        programmed_weight(WEIGHT, load_chip(NOISY[reference]), KEY.part(str(draw)), 0.05) - WEIGHT for draw in range(50)
    ]
    ours = torch.stack(held) / (0.05 * FACTOR * LARGEST[reference])
    assert ours.square().mean().sqrt().item() == pytest.approx(1, rel=4 / sqrt(2 * ours.numel()))


def test_its_noise_passes_its_input_converters(answers):
    errors = (answers["through the inputs"].mT - WEIGHT) / (0.05 * LARGEST["tensor_max"])
    assert errors.std().item() == pytest.approx(1, rel=4 / sqrt(2 * errors.numel()))


def test_the_package_has_no_noise_at_rest_and_that_is_told(answers):
    torch.testing.assert_close(answers["noise at rest"][0].T, WEIGHT)
    assert any("no noise in evaluation mode" in sentence for sentence in LAYERS["noise at rest"].settings.left_out)


@pytest.mark.parametrize("scale", LARGEST)
def test_clipped_weights_on_finite_levels_are_the_same(answers, scale):
    held = programmed_weight(WEIGHT, LAYERS[f"clipped {scale}"].chip, KEY, 0.0)
    torch.testing.assert_close(answers[f"clipped {scale}"][0].T, held, rtol=1e-5, atol=1e-6)
    assert len(held[0].unique()) > 3
    assert (held != WEIGHT).float().mean() > 0.9


@pytest.mark.parametrize("name", [name for name in LAYERS if "bits" in name or name == "calibrated"])
def test_converters_of_its_resolution_give_the_same_products(answers, name):
    layer = LAYERS[name]
    ours, theirs = layer.product, answers[name][0]
    plain = layer.x @ layer.weight.T
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()  # the converters do something
    agree = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    assert agree.float().mean() > 0.999  # the rest is rounded to the other side by float32's last bit


# Without the package.


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_said_in_plain_values_and_its_source_compiles(preset):
    said = lightning_settings(load_chip(preset)).to_json()
    assert json.loads(json.dumps(said)) == said
    compile(said["python"], preset, "exec")
    assert said["chip_hash"] == load_chip(preset).content_hash
    sentences = said["carried"] + said["left_out"]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") for sentence in sentences)


def test_the_paper_s_chip_is_said_like_this():
    said = lightning_settings(load_chip("halora-2026-tensor-max"))
    assert said.configuration == {
        "modifier": {"noise_type": "ADD_NORMAL", "std_dev": 0.01},
        "pre_post": {"input_range": {"enable": True, "dynamic": True}},
        "forward": {"inp_res": 254, "out_res": 254},
        "mapping": {"max_input_size": -1},
    }
    topics = [sentence.partition(":")[0] for sentence in said.left_out]
    assert topics == [
        "Lifetime of the noise",
        "Full scale of the ADC",
        "Tiles of 64 rows",
        "Read noise",
        "IR drop",
        "LoRA branch",
        "Attention",
        "Energy and area",
    ]


LOUD = {  # a chip on which every change below can show
    "preset": "neurram-2022",
    "faults": {"stuck_low_rate": 0.01},
    "retention": {"ageing": {"kind": "power-law", "nu_mean": 0.05, "nu_std": 0.01, "t0_s": 1.0}},
    "temperature": {"kelvin": 350.0},
}
CHANGES = [
    *({"variation": {spread: 0.1}} for spread in Variation.model_fields),
    {"faults": {"clustering": 1.0}},
    {"temperature": {"kelvin": 360.0}},
    {"temperature": {"low_per_k": 0.001}},
    {"temperature": {"high_per_k": -0.001}},
    {"adc": {"calibration_reads": 4}},
    {"noise": {"kind": "gaussian", "sigma": 0.01, "reference": "tensor_max"}},
    {"noise": {"kind": "gaussian", "sigma": 0.01, "reference": "channel_max"}},
    {"noise": {"kind": "gaussian", "sigma": 0.01, "reference": "tile_max"}},
    {"noise": {"kind": "gaussian", "sigma": 0.01, "reference": "std"}},
    {"noise": {"kind": "gaussian", "sigma": 0.0, "reference": "std"}},
    {"coding": {"clip_std": 2.5}},
    {"coding": {"clip_std": 2.5, "scale": "channel_max"}},
    {"coding": {"clip_std": 2.5, "scale": "tile_max"}},
    {"coding": {"scale": "tile_max"}, "cells": {"levels": 16}},
    {"cells": {"levels": 16}},
    {"cells": {"levels": 16}, "coding": {"slices": 2}},
    {"faults": {"stuck_low_rate": 0.0}},
    {"faults": {"stuck_high_rate": 0.02}},
    {"retention": {"ageing": None}, "noise": {"kind": "milo", "extrapolate": True}},
    {"retention": {"refresh_interval_s": 3600.0}},
    {"retention": {"compensation": "global"}},
    {"read": {"white_us": 0.0, "thermal": False}},
    {"lora": {"input_bits": 6}},
    {"attention": {"bits": 16}},
    {"mapping": {"lm_head": True}},
    {"dac": {"input_bits": 6}},
    {"dac": {"bits": 8}},
    {"dac": {"range": "calibrated"}},
    {"dac": {"lossless": True}},
    {"adc": {"bits": 6}},
    {"adc": {"lossless": True}},
    {"adc": {"noise_steps": 0.5}},
    {"tile": {"rows": 64}},
    {"wires": {"resistance_ohm": 0.0}},
    {"lora": {"weight_bits": 16}},
    {"mapping": {"sram_fraction": 0.1}},
    {"mapping": {"digital": ["*.v_proj"]}},
    {"layers": {"values": {"match": "*.v_proj", "adc": {"bits": 6}}}},
    {"layers": {"values": {"match": "*.v_proj", "mapping": {"outliers": {"share": 0.01}}}}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_no_setting_that_moves_a_product_changes_without_a_word(change):
    quiet, loud = (lightning_settings(load_chip(chip)) for chip in (LOUD, {**LOUD, **_merged(change)}))
    assert (quiet.configuration, quiet.carried, quiet.left_out) != (loud.configuration, loud.carried, loud.left_out)


def _merged(change):
    return {name: {**LOUD.get(name, {}), **section} for name, section in change.items() if name != "preset"}
