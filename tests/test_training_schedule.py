"""Oracles: the closed form of each shape; counting draws; the realised noise of every layer."""

from math import cos, log, pi

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from halora.errors import UserError
from halora.hardware.chip import load_chip
from halora.hardware.noise import programmed_weight
from halora.hardware.noise_settings import noise_kinds
from halora.settings.schedule import NoiseSchedule
from halora.settings.training import LoraSettings, TrainingSettings
from halora.settings.trial import TrialConfig
from halora.spaces.mistakes import describe
from halora.spaces.sweep import load_trial
from halora.training.rram import install
from halora.training.training_noise import MOST_MOVED, TrainingNoise
from halora.trial_runner import TrialRunner

LAYERS = [f"model.layers.{block}.mlp.{name}" for block in range(5) for name in ("up_proj", "down_proj")]
AGEING = {"preset": "cmo-hfox", "retention": {"ageing": {"kind": "cmo-relaxation"}, "refresh_interval_s": 3600}}


def _noise(steps=13, seed=0, chip="halora-2026", epoch_steps=100.0, **schedule) -> TrainingNoise:
    settings = NoiseSchedule.model_validate({"redraw_steps": 1, **schedule})
    return TrainingNoise(settings, load_chip(chip), seed, steps, epoch_steps, LAYERS)


def _sigmas(steps=13, **schedule) -> list[float]:
    noise = _noise(steps, **schedule)
    return [noise.at(step).strength for step in range(steps)]


SHAPES = {
    "linear": lambda p: p,
    "cosine": lambda p: (1 - cos(pi * p)) / 2,
    "step": lambda p: [0, 1 / 3, 2 / 3, 1][min(int(p * 4), 3)],
    "cyclic": lambda p: 1 - abs(1 - 2 * (4 * p % 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.3, 0.05)])
def test_every_shape_is_its_closed_form(shape, start, end):
    expected = [start + (end - start) * SHAPES[shape](step / 24) for step in range(25)]
    found = _sigmas(25, shape=shape, strength_start=start, strength_end=end)
    assert found == pytest.approx(expected)
    assert (found[0], max(found), min(found)) == (start, max(start, end), min(start, end))  # the ends exactly


@pytest.mark.parametrize(("steps", "cycles"), [(7, 3), (8, 3), (13, 4), (100, 7), (121, 60)])
def test_every_cycle_turns_at_both_ends(steps, cycles):
    sigmas = _sigmas(steps, shape="cyclic", cycles=cycles, strength_start=0.25, strength_end=0.75)
    assert (sigmas.count(0.75), sigmas.count(0.25)) == (cycles, cycles + 1)
    assert max(sigmas) == 0.75


@pytest.mark.parametrize(("steps", "stages"), [(4, 4), (5, 4), (50, 49), (100, 7)])
def test_every_stage_is_met_once_for_as_long_as_any(steps, stages):
    sigmas = _sigmas(steps, shape="step", stages=stages, strength_start=0.0, strength_end=1.0)
    lengths = [sigmas.count(value) for value in sorted(set(sigmas))]
    assert sigmas == sorted(sigmas)
    assert len(lengths) == stages
    assert max(lengths) - min(lengths) <= 1


def test_constant_holds_sigma_start():
    assert set(_sigmas(1000, strength_start=0.02)) == {0.02}


def test_random_sigmas_are_uniform_between_start_and_end_and_depend_on_the_seed():
    sigmas = torch.tensor(_sigmas(4000, shape="random", strength_start=0.2, strength_end=0.1), dtype=torch.float64)
    assert 0.1 <= sigmas.min() < 0.1005
    assert 0.1995 < sigmas.max() <= 0.2
    assert sigmas.mean().item() == pytest.approx(0.15, abs=0.0015)
    assert sigmas.std().item() == pytest.approx(0.1 / 12**0.5, rel=0.03)
    assert len(set(sigmas.tolist())) == 4000
    assert len(set(_sigmas(40, shape="random", strength_end=0.1, redraw_steps=10))) == 4  # one strength per draw
    assert _sigmas(3, shape="random", strength_end=0.1, seed=1) != _sigmas(3, shape="random", strength_end=0.1, seed=2)


def test_sigma_follows_the_step_whenever_the_noise_is_redrawn():
    """Within a share of the closed form; its ends exactly, in one draw or in many."""
    for redraw_steps in (400, 50, 7):
        noise = _noise(120, redraw_steps=redraw_steps, shape="linear", strength_start=0.002, strength_end=0.015)
        draws = [noise.at(step) for step in range(120)]
        wanted = [0.002 + 0.013 * step / 119 for step in range(120)]
        assert [draw.strength for draw in draws] == pytest.approx(wanted, rel=MOST_MOVED / (1 - MOST_MOVED))
        assert (draws[0].strength, draws[-1].strength) == (0.002, 0.015)
        assert [draw.instance.level for draw in draws] == [draw.strength for draw in draws]
        assert len({(draw.index, draw.instance.key) for draw in draws}) == -(-120 // redraw_steps)


def test_a_warm_up_is_over_when_it_says():
    sigmas = _sigmas(400, strength_start=0.01, warmup_steps=100, redraw_steps=400)
    wanted = [0.01 * (step + 1) / 101 for step in range(101)]
    assert sigmas[:101] == pytest.approx(wanted, rel=MOST_MOVED / (1 - MOST_MOVED))
    assert set(sigmas[100:]) == {0.01}


def test_the_demo_meets_the_end_of_its_shape():
    config = load_trial("quickstart", {f"training.schedule.{key}": v for key, v in DEMO.items()})
    noise = TrainingNoise(config.training.schedule, config.chip, 0, config.training.steps, 100.0, LAYERS)
    assert noise.at(config.training.steps - 1).strength == 0.015


DEMO = {"shape": "linear", "strength_start": 0.002, "strength_end": 0.015}
WALKS = {
    "linear": {"shape": "linear", "warmup_steps": 20},
    "cosine": {"shape": "cosine"},
    "cyclic": {"shape": "cyclic", "cycles": 2},
    "warm-up": {"warmup_steps": 100},
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("redraw_steps", [400, 50])
def test_noise_is_made_again_when_its_strength_has_moved_by_a_share(walk, redraw_steps):
    """Oracle: the same schedule redrawn, hence exact, at every step."""
    settings = {"steps": 300, "strength_start": 0.1, **({"strength_end": 1.0} if "shape" in walk else {}), **walk}
    wanted, noise = _sigmas(**settings), _noise(redraw_steps=redraw_steps, **settings)
    held = [noise.at(step).strength for step in range(300)]
    assert all(abs(a - b) <= MOST_MOVED * a for a, b in zip(held, wanted, strict=True))
    assert len(set(held)) < 0.75 * len(set(wanted))
    assert [held[step] for step in range(0, 300, redraw_steps)] == wanted[::redraw_steps]
    assert (max(held), held[-1]) == (max(wanted), wanted[-1])  # turns, rests and the end as they are written
    fresh = [_noise(redraw_steps=redraw_steps, **settings).at(step).strength for step in (299, 0, 57, 180)]
    assert fresh == [held[step] for step in (299, 0, 57, 180)]  # whichever steps came before
    assert [noise.at(step).strength for step in (57, 56, 58)] == [held[step] for step in (57, 56, 58)]


def test_a_strength_of_nothing_is_left_and_met_exactly():
    sigmas = _sigmas(101, shape="cyclic", cycles=1, strength_start=0.0, strength_end=1.0, redraw_steps=400)
    assert (sigmas[0], sigmas[1], sigmas[50], sigmas[100]) == (0.0, 0.02, 1.0, 0.0)


def test_a_constant_schedule_makes_noise_once_per_draw():
    noise = _noise(chip="neurram-2022", strength_start=0.3, redraw_steps=10, steps=40)
    assert len({(draw.index, draw.strength) for draw in map(noise.at, range(40))}) == 4


@pytest.mark.parametrize("reference", ["absolute", "tensor_max", "channel_max", "tile_max", "std"])
def test_the_same_draw_at_another_strength_is_scaled(reference):
    """Noise of whole weights within float32's rounding: the error at twice sigma is twice the error."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    noise = _noise(40, chip={"preset": "ideal", "noise": {"sigma": 0.01, "reference": reference}}, redraw_steps=40,
                   shape="linear", strength_start=0.01, strength_end=0.02)  # fmt: skip
    first, last = (noise.at(step).instance for step in (0, 39))
    errors = [
        programmed_weight(weight, each.chip, each.key.at(module="m", purpose="programming"), each.level) - weight
        for each in (first, last)
    ]
    torch.testing.assert_close(errors[1], 2 * errors[0], rtol=1e-4, atol=1e-6)


def test_redrawn_every_epoch():
    noise = _noise(redraw_steps="epoch", epoch_steps=4.5)
    assert [noise.at(step).index for step in range(11)] == [0] * 5 + [1] * 5 + [2]


def test_a_single_step_takes_the_start():
    assert _sigmas(1, shape="linear", strength_start=0.2, strength_end=0.4) == [0.2]


def test_warm_up_rises_to_the_shape():
    assert _sigmas(5, strength_start=0.4, warmup_steps=3) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    rising = _sigmas(5, shape="linear", strength_start=0.4, strength_end=0.8, warmup_steps=3)
    assert rising == pytest.approx([0.1, 0.25, 0.45, 0.7, 0.8])


def test_a_draw_depends_on_seed_and_step_alone():
    settings = {"shape": "random", "strength_end": 0.5, "clean_probability": 0.3, "others": [{"chip": "neurram-2022"}]}
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
    assert {draw.strength for draw in clean} == {0.0}


def test_other_chips_take_their_share_at_their_own_level():
    others = [{"chip": {"preset": "neurram-2022", "noise": {"strength": 0.8}}, "weight": 3}]
    chip = {"preset": "halora-2026", "noise": {"sigma": 0.02}}
    noise = _noise(chip=chip, strength_start=0.01, others=others)
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
        schedule = NoiseSchedule.model_validate({"strength_start": 0.01, "layers": law})
        array.program(TrainingNoise(schedule, chip, 0, 1, 1, names).at(0).instance)
        realised.append(array.noise_db())
    gained = [realised[1][name] - realised[0][name] for name in names]
    assert gained == pytest.approx([20 * log(m) / log(10) for m in (4, 4, 0.5, 0.5)], abs=1e-3)


CHIPS = {
    "gaussian": "halora-2026",
    "wan-2022": "neurram-2022",
    "milo": {"preset": "halora-2026", "noise": {"kind": "milo"}, "cells": {"g_min_us": 50, "g_max_us": 225}},
    "cmo": AGEING,
    "pcm": "pcm-like",
    "stuck-at": {"preset": "ideal", "faults": {"stuck_low_rate": 0.05, "stuck_high_rate": 0.01}},
}


@pytest.mark.parametrize("shape", ["constant", *SHAPES, "random"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_any_shape_trains_over_any_noise(tiny_trial, tmp_path, runner, chip, shape):
    schedule = {
        "shape": shape,
        "strength_start": 0.5,
        "redraw_steps": 1,
        "clean_probability": 0.3,
        "stages": 3,
        "cycles": 1,
    }
    schedule |= {} if shape == "constant" else {"strength_end": 1.0}
    config = tiny_trial(chip=chip, steps=3, schedule=schedule)
    training = runner.train(config, tmp_path)
    try:
        losses = [training.advance()["train_task_loss"] for _ in range(3)]
    finally:
        training.close()
    assert torch.tensor(losses).isfinite().all()


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    """One process's runner."""
    return TrialRunner()


def test_the_shipped_noise_kinds_are_all_trained_over():
    assert set(noise_kinds()) <= {*CHIPS, "measured"}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"shape": "linear"}, "strength_end is required for shape 'linear'"),
        ({"shape": "constant", "strength_end": 0.1}, "strength_end is not allowed for shape 'constant'"),
        ({"shape": "cosine"}, "strength_end is required for shape 'cosine'"),
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
        ("ideal", {"others": [{"chip": "halora-2026"}]}, "others: the trial's chip has no noise strength"),
    ],
)
def test_a_schedule_that_does_not_suit_the_chip_is_refused(tiny_trial, chip, schedule, told):
    with pytest.raises(ValidationError) as error:
        tiny_trial(chip=chip, schedule={"redraw_steps": 1, **schedule})
    (sentence,) = describe(error.value, TrialConfig, "trial.")
    assert sentence.startswith(f"trial.training.schedule.{told}")


NEVER_MET = {
    "a warm-up as long as the training": (
        {"strength_start": 0.01, "warmup_steps": 40},
        "warmup_steps: 40, but the training has 40 steps and would never meet the strength; 39 at most",
    ),
    "more stages than steps": (
        {"shape": "step", "strength_end": 0.1, "stages": 41},
        "shape: 'step' with 41 stages takes 41 steps to be met, the training has 40",
    ),
    "more cycles than steps can show": (
        {"shape": "cyclic", "strength_end": 0.1, "cycles": 20},
        "shape: 'cyclic' with 20 cycles takes 41 steps to be met, the training has 40",
    ),
    "a pool larger than the draws": (
        {"chips": 5, "redraw_steps": 10},
        "chips: takes 5 draws to be met, but 40 steps with a draw every 10 have 4; redraw every 9 steps or less",
    ),
    "a pool larger than the steps": (
        {"chips": 41, "redraw_steps": 1},
        "chips: takes 41 draws to be met, but 40 steps with a draw every 1 have 40; train longer",
    ),
    "chances of one draw": (
        {"clean_probability": 0.5},
        "clean_probability: takes 2 draws to be met, but 40 steps with a draw every 400 have 1; redraw every 39 steps "
        "or less",
    ),
    "one random strength": (
        {"shape": "random", "strength_end": 0.1},
        "shape: takes 2 draws to be met, but 40 steps with a draw every 400 have 1; redraw every 39 steps or less",
    ),
    "a mixture of one draw": (
        {"others": [{"chip": "halora-2026"}, {"chip": "ideal"}], "redraw_steps": 20},
        "others: takes 3 draws to be met, but 40 steps with a draw every 20 have 2; redraw every 19 steps or less",
    ),
}


@pytest.mark.parametrize(("schedule", "told"), NEVER_MET.values(), ids=NEVER_MET)
def test_what_a_training_never_meets_is_refused(tiny_trial, schedule, told):
    with pytest.raises(ValidationError) as error:
        tiny_trial(steps=40, schedule=schedule)
    assert describe(error.value, TrialConfig, "trial.") == [f"trial.training.schedule.{told}"]
    tiny_trial(steps=40, schedule=schedule, method="lora")  # which reads no schedule
    tiny_trial(steps=0, schedule=schedule)
    tiny_trial(steps=41, schedule={**schedule, "redraw_steps": min(schedule.get("redraw_steps", 8), 8)})


def test_all_that_is_never_met_is_told_at_once(tiny_trial):
    schedule = {"shape": "cyclic", "strength_end": 0.1, "warmup_steps": 9, "chips": 2, "clean_probability": 0.1}
    with pytest.raises(ValidationError) as error:
        tiny_trial(steps=8, warmup_steps=8, schedule=schedule)
    told = describe(error.value, TrialConfig)
    assert [text.partition(":")[0].removeprefix("training.") for text in told] == [
        "schedule.warmup_steps",
        "schedule.shape",
        "schedule.chips",
        "schedule.clean_probability",
        "warmup_steps",
    ]


def test_draws_of_an_epoch_that_are_too_few_are_told_when_the_rows_are_known(tiny_trial, tmp_path, runner):
    """64 rows in batches of 4: an epoch is 16 steps."""
    schedule = {"redraw_steps": "epoch", "chips": 3}
    told = "training.schedule.chips: takes 3 draws to be met, but 32 steps with a draw every 16 have 2"
    with pytest.raises(UserError, match=told):
        runner.train(tiny_trial(steps=32, schedule=schedule), tmp_path)
    runner.train(tiny_trial(steps=33, schedule=schedule), tmp_path).close()


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
