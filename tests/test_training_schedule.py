"""Oracle: the closed form of each schedule."""

import pytest
from pydantic import ValidationError

from halora.training.config import LoraSettings, NoiseSchedule, TrainingSettings


def test_constant_holds_sigma_start():
    schedule = NoiseSchedule(sigma_start=0.02)
    assert {schedule.sigma(step, 1000) for step in range(1000)} == {0.02}


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.3, 0.05)])
def test_linear_is_a_straight_line_from_start_to_end(start, end):
    schedule = NoiseSchedule(shape="linear", sigma_start=start, sigma_end=end, redraw_steps=1)
    for step in range(11):
        assert schedule.sigma(step, 11) == pytest.approx(start + (end - start) * step / 10)


def test_sigma_changes_only_when_the_noise_is_redrawn():
    schedule = NoiseSchedule(shape="linear", sigma_start=0.0, sigma_end=1.0, redraw_steps=4)
    sigmas = [schedule.sigma(step, 13) for step in range(13)]
    assert sigmas == pytest.approx([0] * 4 + [4 / 12] * 4 + [8 / 12] * 4 + [1.0])


def test_a_single_step_takes_the_start():
    assert NoiseSchedule(shape="linear", sigma_start=0.2, sigma_end=0.4).sigma(0, 1) == 0.2


@pytest.mark.parametrize("bad", [{"shape": "linear"}, {"shape": "constant", "sigma_end": 0.1}, {"sigma_end": 0.0}])
def test_sigma_end_belongs_to_linear_only(bad):
    with pytest.raises(ValidationError, match="sigma_end is required for shape 'linear'"):
        NoiseSchedule.model_validate(bad)


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
