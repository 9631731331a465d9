"""Oracles: counts by hand; what is forged or no number never agrees."""

from dataclasses import replace
from math import nan

import pytest

from halora.evaluation.agreement import agreement
from halora.evaluation.chips import ChipScores

NOISY = ((0.5, -0.4, 2.0, -3.0), (1.5, 0.05, -2.0, -1.0))


def _scores(noisy=NOISY, clean=(1.0, -1.0, 3.0, -2.0)) -> ChipScores:
    return ChipScores(
        row_ids=("a", "b", "c", "d"),
        tasks=("t",) * 4,
        chip_seeds=(0, 1),
        clean=clean,
        clean_correct=tuple(value > 0 for value in clean),
        noisy=noisy,
        noisy_correct=tuple(tuple(value > 0 for value in row) for row in noisy),
        noise_db=(-20.0, -21.0),
    )


def _moved(by: float) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(value + by for value in row) for row in NOISY)


@pytest.fixture(params=["exact", "converted"])
def config(request, tiny_trial):
    lossless = {"adc": {"lossless": True}, "dac": {"lossless": True}}
    return tiny_trial(chip={"preset": "halora-2026", **(lossless if request.param == "exact" else {})})


def test_the_same_scores_agree(config):
    found = agreement(config, _scores(), _scores())
    assert found.agrees
    assert found.share == 0


def test_a_small_difference_agrees_on_chips_with_conversions_alone(config):
    found = agreement(config, _scores(), _scores(noisy=_moved(0.01)))
    assert found.agrees == (not config.chip.adc.lossless)


@pytest.mark.parametrize("part", ["clean", "noisy", "both"])
def test_what_is_no_number_disagrees(config, part):
    clean = (nan,) * 4 if part != "noisy" else (1.0, -1.0, 3.0, -2.0)
    noisy = ((nan,) * 4,) * 2 if part != "clean" else NOISY
    assert not agreement(config, _scores(), _scores(noisy, clean)).agrees
    assert not agreement(config, _scores(noisy, clean), _scores()).agrees
    assert not agreement(config, _scores(noisy, clean), _scores(noisy, clean)).agrees


def test_an_accuracy_that_no_margin_near_0_explains_disagrees(config):
    forged = replace(_scores(), noisy_correct=((True,) * 4,) * 2)
    assert not forged.answers_follow_margins
    assert _scores().answers_follow_margins
    found = agreement(config, forged, _scores())
    assert (found.recorded_accuracy, found.accuracy) == (1.0, 0.5)
    # of the converted chip's margins half are within what is allowed; on the exact one none is
    assert found.accuracy_allowed == (0.0 if config.chip.adc.lossless else 0.375)
    assert not found.agrees
