"""Oracles: the model with one weight matrix overwritten by hand, exactness of an ideal chip, and on SmolLM2 what
protecting layers by the ranking saves on rows and chips it has not seen.
"""

from statistics import fmean

import pytest
import torch

from halora.evaluation.scoring import option_scores
from halora.evaluation.sensitivity import layer_sensitivity, mean_change
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.hardware.noise import noise_to_signal_db, programmed_weight
from halora.settings.evaluation import EvaluationSettings
from halora.training.batches import pack
from halora.training.calibration import calibrate
from halora.training.models import load_base
from halora.training.rram import install
from halora.training.tasks import load_rows

SETTINGS = EvaluationSettings(batch_size=4)


@pytest.fixture
def loaded(tiny_models):
    """The tiny LLaMA model with its RRAM layers."""
    base = load_base(tiny_models["llama"], "fp32")
    return base, install(base.causal_lm)


@pytest.fixture
def measure(loaded, tiny_task):
    """Sensitivities on three rows of the tiny task."""
    rows, training_rows = load_rows(tiny_task, "validation", 3), load_rows(tiny_task, "train")

    def run(chip, **arguments):
        return layer_sensitivity(*loaded, load_chip(chip), rows, training_rows, SETTINGS, **arguments)

    return run


@pytest.mark.parametrize("chip_seed", [0, 3])
def test_each_layer_is_noisy_alone(measure, tiny_models, tiny_task, chip_seed):
    setting = {"preset": "ideal", "noise": {"sigma": 0.05}}
    found = measure(setting, chip_seed=chip_seed)
    chip, plain = load_chip(setting), load_base(tiny_models["llama"], "fp32")
    array = install(plain.causal_lm)  # never programmed
    packed = [pack(row, plain.tokenizer) for row in load_rows(tiny_task, "validation", 3)]
    clean = option_scores(plain.causal_lm, array, packed, 4)
    assert {layer.name for layer in found} == {layer.name for layer in array.mapped(chip)}
    for layer in array.mapped(chip):
        frozen = layer.weight.detach().clone()
        key = NoiseKey(role=Role.SEARCH, chip_seed=chip_seed, module=layer.name, purpose="programming")
        noisy = programmed_weight(frozen, chip, key, 0.05)
        with torch.no_grad():
            layer.weight.copy_(noisy)
        expected = mean_change(clean, option_scores(plain.causal_lm, array, packed, 4))
        with torch.no_grad():
            layer.weight.copy_(frozen)
        (it,) = (it for it in found if it.name == layer.name)
        assert it.change_nats == pytest.approx(expected, rel=1e-5)
        assert it.change_nats > 0
        assert it.noise_db == pytest.approx(noise_to_signal_db(frozen, noisy))
        assert it.weights == frozen.numel()
        assert it.change_per_million_weights == pytest.approx(expected / frozen.numel() * 1e6, rel=1e-5)


def test_the_most_sensitive_per_weight_comes_first(measure):
    found = measure({"preset": "ideal", "noise": {"sigma": 0.05}})
    densities = [layer.change_nats / layer.weights for layer in found]
    assert densities == sorted(densities, reverse=True)
    assert [layer.name for layer in found] != [layer.name for layer in sorted(found, key=lambda it: -it.change_nats)]


def test_converters_take_part(measure):
    noise = {"sigma": 0.0}
    found = measure({"preset": "halora-2026", "noise": noise, "adc": {"bits": 4}, "wires": {"resistance_ohm": 0.0}})
    assert all(layer.change_nats > 0 and layer.noise_db == float("-inf") for layer in found)


def test_an_ideal_chip_moves_nothing(measure):
    assert {(layer.change_nats, layer.noise_db) for layer in measure("ideal")} == {(0.0, float("-inf"))}


def test_patterns_keep_layers_out_and_a_fraction_does_not(measure):
    mapping = {"sram": ["*.v_proj"], "digital": ["model.layers.1.mlp.*"], "sram_fraction": 0.9}
    names = {layer.name for layer in measure({"preset": "halora-2026", "mapping": mapping})}
    assert len(names) == 14 - 2 - 3
    assert not [name for name in names if name.endswith("v_proj") or ".1.mlp." in name]


def test_the_model_is_left_as_it_was_and_progress_is_told(measure, loaded):
    _, array = loaded
    before = [layer.weight.clone() for layer in array.layers]
    told = []
    first = measure("halora-2026", progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 14) for i in range(1, 15)]
    assert not any(layer.noisy for layer in array.layers)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(array.layers, before, strict=True))
    assert measure("halora-2026") == first


def test_mean_change_is_over_all_options():
    assert mean_change([[1.0, 2.0], [3.0]], [[2.0, 0.0], [3.0]]) == pytest.approx(1.0)


@pytest.mark.slow
def test_protecting_what_the_ranking_puts_first_saves_more_than_what_it_puts_last():
    base = load_base("smollm2-135m-instruct", "fp32")
    array = install(base.causal_lm)
    chip, settings = load_chip("halora-2026"), EvaluationSettings(batch_size=8)
    training_rows, rows = load_rows("arc-easy", "train", 128), load_rows("arc-easy", "validation", 14)
    names = tuple(layer.name for layer in layer_sensitivity(base, array, chip, rows[:2], training_rows, settings))
    converters = calibrate(base, array, chip, training_rows, settings.calibration_tokens, settings.converters)
    packed = [pack(row, base.tokenizer) for row in rows[2:]]
    array.clear()
    clean = option_scores(base.causal_lm, array, packed, 8)

    def change(ranking):
        mapping = {"sram_fraction": 0.1 if ranking else 0.0, "ranking": ranking or "depth"}
        protected = load_chip({"preset": "halora-2026", "mapping": mapping})
        changes = []
        for chip_seed in (1, 2, 3):  # chips the ranking has not seen
            instance = ChipInstance(protected, NoiseKey(role=Role.SEARCH, chip_seed=chip_seed), chip.noise.level)
            array.program(instance, converters)
            changes.append(mean_change(clean, option_scores(base.causal_lm, array, packed, 8)))
        return fmean(changes)

    whole, first, last = change(None), change(names), change(names[::-1])
    assert first < whole
    assert first < last
