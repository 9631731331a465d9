"""Oracles: the closed form of each shape; counting draws; the realised noise of every layer."""

from math import cos, log, pi

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from halora.hardware.chip import load_chip
from halora.hardware.noise_settings import noise_kinds
from halora.spaces.mistakes import describe
from halora.trainable import Workbench
from halora.training.config import LoraSettings, TrainingSettings
from halora.training.rram import install
from halora.training.schedule import NoiseSchedule, TrainingNoise
from halora.trial import TrialConfig

LAYERS = [f"model.layers.{block}.mlp.{name}" for block in range(5) for name in ("up_proj", "down_proj")]
AGEING = {"preset": "cmo-hfox", "retention": {"ageing": {"kind": "cmo-relaxation"}, "refresh_interval_s": 3600}}


def _noise(steps=13, seed=0, chip="halora-2026", epoch_steps=100.0, **schedule) -> TrainingNoise:
    settings = NoiseSchedule.model_validate({"redraw_steps": 1, **schedule})
    return TrainingNoise(settings, load_chip(chip), seed, steps, epoch_steps, LAYERS)


def _sigmas(steps=13, **schedule) -> list[float]:
    noise = _noise(steps, **schedule)
    return [noise.at(step).sigma for step in range(steps)]


SHAPES = {
    "linear": lambda p: p,
    "cosine": lambda p: (1 - cos(pi * p)) / 2,
    "step": lambda p: [0, 1 / 3, 2 / 3, 1][min(int(p * 4), 3)],
    "cyclic": lambda p: 1 - abs(1 - 2 * (4 * p % 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.3, 0.05)])
def test_every_shape_is_its_closed_form(shape, start, end):
    expected = [start + (end - start) * SHAPES[shape](step / 12) for step in range(13)]
    assert _sigmas(shape=shape, sigma_start=start, sigma_end=end) == pytest.approx(expected)


def test_constant_holds_sigma_start():
    assert set(_sigmas(1000, sigma_start=0.02)) == {0.02}


def test_random_sigmas_are_uniform_between_start_and_end_and_depend_on_the_seed():
    sigmas = torch.tensor(_sigmas(4000, shape="random", sigma_start=0.2, sigma_end=0.1), dtype=torch.float64)
    assert 0.1 <= sigmas.min() < 0.1005
    assert 0.1995 < sigmas.max() <= 0.2
    assert sigmas.mean().item() == pytest.approx(0.15, abs=0.0015)
    assert sigmas.std().item() == pytest.approx(0.1 / 12**0.5, rel=0.03)
    assert len(set(sigmas.tolist())) == 4000
    assert _sigmas(3, shape="random", sigma_end=0.1, seed=1) != _sigmas(3, shape="random", sigma_end=0.1, seed=2)


def test_sigma_changes_only_when_the_noise_is_redrawn():
    sigmas = _sigmas(shape="linear", sigma_start=0.0, sigma_end=1.0, redraw_steps=4)
    assert sigmas == pytest.approx([0] * 4 + [4 / 12] * 4 + [8 / 12] * 4 + [1.0])


def test_redrawn_every_epoch():
    noise = _noise(redraw_steps="epoch", epoch_steps=4.5)
    assert [noise.at(step).index for step in range(11)] == [0] * 5 + [1] * 5 + [2]


def test_a_single_step_takes_the_start():
    assert _sigmas(1, shape="linear", sigma_start=0.2, sigma_end=0.4) == [0.2]


def test_warm_up_rises_to_the_shape():
    assert _sigmas(5, sigma_start=0.4, warmup_steps=3) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_a_draw_depends_on_seed_and_step_alone():
    settings = {"shape": "random", "sigma_end": 0.5, "clean_probability": 0.3, "others": [{"chip": "neurram-2022"}]}
    noise, late_first = _noise(**settings), [12, 3, 7]
    found = {step: noise.at(step) for step in late_first}
    assert all(_noise(**settings).at(step) == found[step] for step in range(13) if step in found)
    assert _noise(seed=1, **settings).at(3) != found[3]


def test_every_draw_is_a_chip_of_its_own_unless_the_pool_is_bounded():
    keys = [_noise().at(step).instance.key for step in range(6)]
    assert len({key.chip_seed for key in keys}) == 6
    assert {key.role for key in keys} == {"train"}
    pool = [_noise(chips=2).at(step).instance.key for step in range(6)]
    assert pool == keys[:2] * 3
    assert _noise(seed=1).at(0).instance.key != keys[0]


def test_clean_draws_take_their_share():
    noise = _noise(clean_probability=0.3)
    draws = [noise.at(step) for step in range(4000)]
    clean = [draw for draw in draws if draw.instance is None]
    assert len(clean) / 4000 == pytest.approx(0.3, abs=0.022)  # three standard errors
    assert {draw.sigma for draw in clean} == {0.0}


def test_other_chips_take_their_share_at_their_own_level():
    others = [{"chip": {"preset": "neurram-2022", "noise": {"strength": 0.8}}, "weight": 3}]
    chip = {"preset": "halora-2026", "noise": {"sigma": 0.02}}
    noise = _noise(chip=chip, sigma_start=0.01, others=others)
    instances = [noise.at(step).instance for step in range(4000)]
    own = [i for i in instances if i.chip.name == "halora-2026"]
    assert len(own) / 4000 == pytest.approx(0.25, abs=0.021)
    assert {i.level for i in own} == {0.01}
    assert {i.level for i in instances if i.chip.name != "halora-2026"} == {0.4}  # half of the strength, as of sigma


def test_times_are_even_in_their_logarithm_and_reach_the_chip():
    noise = _noise(chip=AGEING, time_s=[10.0, 1e5])
    times = torch.tensor([noise.at(step).instance.chip.retention.refresh_interval_s for step in range(300)])
    exponents = (times / 10).log10() / 4
    assert exponents.min() >= 0
    assert exponents.max() <= 1
    assert exponents.mean().item() == pytest.approx(0.5, abs=0.05)
    assert exponents.std().item() == pytest.approx(12**-0.5, abs=0.03)


def test_multipliers_rise_by_equal_factors_along_the_blocks():
    multipliers = _noise(layers={"first": 4.0, "last": 0.25}).at(0).instance.multipliers
    assert [multipliers[name] for name in LAYERS[::2]] == pytest.approx([4, 2, 1, 0.5, 0.25])
    assert [multipliers[name] for name in LAYERS[1::2]] == pytest.approx([4, 2, 1, 0.5, 0.25])
    assert _noise().at(0).instance.multipliers == {}


def test_multipliers_follow_the_measured_sensitivity():
    ranking = [LAYERS[7], LAYERS[2], LAYERS[5]]
    chip = {"preset": "halora-2026", "mapping": {"ranking": ranking}}
    multipliers = (
        _noise(chip=chip, layers={"order": "sensitivity", "first": 0.125, "last": 1.0}).at(0).instance.multipliers
    )
    assert [multipliers[name] for name in ranking] == pytest.approx([0.125, 0.25, 0.5])
    assert all(multipliers[name] == pytest.approx(1) for name in LAYERS if name not in ranking)


def test_the_realised_noise_of_a_layer_is_multiplied():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(64, 96), "down_proj": nn.Linear(96, 64)}) for _ in "ab")
    array = install(nn.ModuleDict({"layers": blocks}).requires_grad_(False))
    chip = load_chip({"preset": "halora-2026", "wires": {"resistance_ohm": 0.0}})  # noise alone
    names = [layer.name for layer in array.layers]
    realised = []
    for law in ({}, {"first": 4.0, "last": 0.5}):
        schedule = NoiseSchedule.model_validate({"sigma_start": 0.01, "layers": law})
        array.program(TrainingNoise(schedule, chip, 0, 1, 1, names).at(0).instance)
        realised.append(array.noise_db())
    gained = [realised[1][name] - realised[0][name] for name in names]
    assert gained == pytest.approx([20 * log(m) / log(10) for m in (4, 4, 0.5, 0.5)], abs=1e-3)


CHIPS = {
    "gaussian": "halora-2026",
    "wan-2022": "neurram-2022",
    "milo": {"preset": "halora-2026", "noise": {"kind": "milo"}, "cells": {"g_min_us": 50, "g_max_us": 225}},
    "cmo": AGEING,
    "stuck-at": {"preset": "ideal", "faults": {"stuck_low_rate": 0.05, "stuck_high_rate": 0.01}},
}


@pytest.mark.parametrize("shape", ["constant", *SHAPES, "random"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_any_shape_trains_over_any_noise(tiny_trial, tmp_path, workbench, chip, shape):
    schedule = {"shape": shape, "sigma_start": 0.5, "redraw_steps": 1, "clean_probability": 0.3}
    schedule |= {} if shape == "constant" else {"sigma_end": 1.0}
    config = tiny_trial(chip=chip, steps=3, schedule=schedule)
    training = workbench.train(config, tmp_path)
    try:
        losses = [training.advance()["train_task_loss"] for _ in range(3)]
    finally:
        training.close()
    assert torch.tensor(losses).isfinite().all()


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    """One process's workbench."""
    return Workbench()


def test_the_shipped_noise_kinds_are_all_trained_over():
    assert set(noise_kinds()) <= {*CHIPS, "measured"}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"shape": "linear"}, "sigma_end is required for shape 'linear'"),
        ({"shape": "constant", "sigma_end": 0.1}, "sigma_end is not allowed for shape 'constant'"),
        ({"shape": "cosine"}, "sigma_end is required for shape 'cosine'"),
        ({"time_s": [100.0, 1.0]}, "time_s goes from short to long"),
        ({"redraw_steps": 0}, "greater than or equal to 1"),
        ({"clean_probability": 1.5}, "less than or equal to 1"),
        ({"layers": {"first": 0}}, "greater than 0"),
        ({"others": [{"chip": "halora-2062"}]}, "no chip 'halora-2062'"),
    ],
)
def test_a_bad_schedule_is_refused(bad, told):
    with pytest.raises(ValidationError, match=told):
        NoiseSchedule.model_validate(bad)


@pytest.mark.parametrize(
    ("chip", "schedule", "told"),
    [
        ("halora-2026", {"time_s": [1.0, 10.0]}, "time_s: nothing on chip 'halora-2026' changes with time"),
        (AGEING, {"time_s": [1e-9, 10.0]}, "time_s: "),
        ("halora-2026", {"layers": {"order": "sensitivity"}}, "layers.order: 'sensitivity' needs chip.mapping.ranking"),
        ("ideal", {"others": [{"chip": "halora-2026"}]}, "others: the trial's chip has no noise level"),
    ],
)
def test_a_schedule_that_does_not_suit_the_chip_is_refused(tiny_trial, chip, schedule, told):
    with pytest.raises(ValidationError) as error:
        tiny_trial(chip=chip, schedule=schedule)
    (sentence,) = describe(error.value, TrialConfig, "trial.")
    assert sentence.startswith(f"trial.training.schedule.{told}")


def test_only_the_method_decides_on_noise_and_regulariser():
    made = {method: TrainingSettings(method=method, steps=1, mu=0.7) for method in ("lora", "noise_lora", "halora")}
    assert {method: (t.noisy, t.reg_weight) for method, t in made.items()} == {
        "lora": (False, 0.0),
        "noise_lora": (True, 0.0),
        "halora": (True, 0.7),
    }


@pytest.mark.parametrize("targets", [(), ("q_proj", "lm_head")])
def test_targets_must_be_linear_layers_of_a_block(targets):
    with pytest.raises(ValidationError, match="targets must be some of q_proj"):
        LoraSettings(targets=targets)
