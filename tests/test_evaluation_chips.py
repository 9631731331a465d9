"""Oracles: the clean model for an ideal chip, chance for a huge sigma, determinism, and plain averages of margins."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from halora.evaluation.chips import ChipScores
from halora.evaluation.intervals import share
from halora.hardware.addressing import Role
from halora.records.names import BESIDE_METRICS
from halora.trial_folder import adapter_folder
from halora.trial_runner import TrialRunner, task_rows


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    """One process's runner, used by all tests here."""
    return TrialRunner()


@pytest.fixture
def adapter(runner, tiny_trial, tmp_path) -> Path:
    """An adapter after a few steps of training."""
    training = runner.train(tiny_trial(steps=4, report_every=4), tmp_path)
    training.advance()
    training.close()
    folder = adapter_folder(tmp_path)
    assert folder is not None
    return folder


EVALUATION = {"chip_instances": 3, "batch_size": 8}


def test_an_ideal_chip_without_noise_scores_exactly_as_clean(runner, tiny_trial, adapter):
    scores = runner.evaluate(tiny_trial(chip="ideal", evaluation=EVALUATION), adapter)
    assert scores.noisy == (scores.clean,) * 3
    summary = scores.summary()
    assert summary["accuracy"] == pytest.approx(summary["clean_accuracy"])
    assert summary["noise_db"] == pytest.approx(-300)


def test_chips_are_the_same_in_every_call_and_process_state(runner, tiny_trial, adapter):
    config = tiny_trial(evaluation=EVALUATION)
    first = runner.evaluate(config, adapter)
    bare = runner.evaluate(config, None)
    assert runner.evaluate(config, adapter) == first
    assert TrialRunner().evaluate(config, adapter) == first
    assert bare.clean != first.clean  # the adapter takes part, and is taken away again
    assert bare.noise_db == first.noise_db  # other adapters meet the same chips
    assert len(set(first.noisy)) == 3
    assert set(first.row_ids) == {row.row_id for row in task_rows(config.task, "validation", None)}


def test_the_noise_of_each_layer_in_rram_is_told_on_every_chip(runner, tiny_trial):
    chip = {"preset": "halora-2026", "mapping": {"sram": ["*.v_proj"]}}
    first = runner.evaluate(tiny_trial(chip=chip, evaluation=EVALUATION), None)
    in_rram = {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in first.layers} == in_rram
    assert np.shape(first.layer_noise_db) == (3, len(first.layers))
    for by_layer, mean in zip(first.layer_noise_db, first.noise_db, strict=True):
        assert 10 * np.log10(np.mean(10 ** (np.array(by_layer) / 10))) == pytest.approx(mean)
    assert first.first_chips(1).with_chips_after(1, first).layer_noise_db == (
        first.layer_noise_db[0],
        *first.layer_noise_db,
    )
    assert ChipScores.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_chips_are_numbered(runner, tiny_trial, adapter):
    config = tiny_trial(evaluation=EVALUATION)
    first, later = runner.evaluate(config, adapter), runner.evaluate(config, adapter, first_chip=1)
    assert (first.chip_seeds, later.chip_seeds) == ((0, 1, 2), (1, 2, 3))
    assert later.noisy[:2] == first.noisy[1:]
    assert later.noisy[2] not in first.noisy


def test_every_series_of_certified_chips_is_its_own(runner, tiny_trial):
    """Oracle: the noise that each chip's weights show, which depends on no adapter."""
    config = tiny_trial(evaluation=EVALUATION)
    series = [("", Role.SEARCH), ("one/1", Role.CERTIFY), ("one/2", Role.CERTIFY), ("two/1", Role.CERTIFY)]
    found = [runner.evaluate(config, None, role=role, series=name) for name, role in series]
    assert len({noise_db for scores in found for noise_db in scores.noise_db}) == 4 * 3
    assert runner.evaluate(config, None, role=Role.CERTIFY, series="one/2", first_chip=1).noisy[0] == found[2].noisy[1]


def test_other_strengths_of_noise_are_those_of_a_chip_that_has_them(runner, tiny_trial, adapter):
    def chip(sigma):
        return {"preset": "halora-2026", "noise": {"sigma": sigma}}

    both = runner.evaluate(
        tiny_trial(chip=chip(0.01), evaluation=EVALUATION | {"noise_strengths": [0.2, 0.4]}), adapter
    )
    alone = runner.evaluate(tiny_trial(chip=chip(0.01), evaluation=EVALUATION), adapter)
    assert replace(both, strengths=(), strength_correct=()) == alone
    for sigma, correct in zip((0.2, 0.4), both.strength_correct, strict=True):
        there = runner.evaluate(tiny_trial(chip=chip(sigma), evaluation=EVALUATION), adapter)
        assert correct == there.noisy_correct
        assert both.summary()[f"accuracy_at.{sigma:g}"] == pytest.approx(there.summary()["accuracy"])
    raced = both.with_chips_after(2, runner.evaluate(tiny_trial(evaluation=EVALUATION), adapter, first_chip=2))
    assert raced.chip_seeds == (0, 1, 2, 3, 4)
    assert [len(by_chip) for by_chip in raced.strength_correct] == [2, 2]
    assert ChipScores.from_json(json.loads(json.dumps(both.to_json()))) == both


def test_a_row_scores_the_same_whatever_else_is_asked(runner, tiny_trial, adapter):
    config = tiny_trial(evaluation=EVALUATION)
    few = tiny_trial(evaluation={**EVALUATION, "rows": 4})
    whole = runner.evaluate(config, adapter)
    part = runner.evaluate(few, adapter, first_row=5)
    for some_rows, all_rows in zip(part.noisy, whole.noisy, strict=True):
        assert some_rows == pytest.approx(all_rows[5:9], abs=1e-4)


def test_coarser_converters_and_more_noise_move_the_margins_further(runner, tiny_trial, adapter):
    def distance(chip: dict) -> float:
        scores = runner.evaluate(tiny_trial(chip={"preset": "ideal", **chip}, evaluation=EVALUATION), adapter)
        return float(np.abs(np.array(scores.noisy) - np.array(scores.clean)).mean())

    by_bits = [distance({"adc": {"bits": bits, "lossless": False}}) for bits in (8, 6, 4)]
    by_sigma = [distance({"noise": {"sigma": sigma}}) for sigma in (0.001, 0.01, 0.1)]
    by_wire = [distance({"wires": {"resistance_ohm": ohm}}) for ohm in (1.0, 10.0)]
    for distances in (by_bits, by_sigma, by_wire):
        assert all(later > 2 * earlier > 0 for earlier, later in pairwise(distances))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_huge_sigma_leaves_chance(runner, tiny_trial, architecture):
    chips = 40
    chip = {"preset": "halora-2026", "noise": {"sigma": 10.0}}
    config = tiny_trial(architecture, chip=chip, evaluation={"chip_instances": chips, "batch_size": 24})
    scores = runner.evaluate(config, None)
    rows = task_rows(config.task, "validation", None)
    chance = np.mean([1 / len(row.options) for row in rows])
    correct = np.array(scores.noisy) > 0
    assert np.isfinite(scores.noisy).all()
    interval = share(correct)  # of rows and chips: about two standard errors
    assert interval.low < chance < interval.high
    assert 10 < np.mean(scores.noise_db) < 40


def test_summary_averages_rows_and_chips():
    scores = ChipScores(
        row_ids=("a", "b", "c", "d"),
        tasks=("colours",) * 4,
        chip_seeds=(0, 1),
        clean=(1.0, 2.0, -1.0, 4.0),
        clean_correct=(True, True, False, True),
        noisy=((1.0, -2.0, -1.0, 4.0), (0.0, 2.0, 1.0, 3.0)),
        noisy_correct=((True, False, False, True), (False, True, True, True)),
        noise_db=(-30.0, -20.0),
    )
    summary = scores.summary()
    low_high = {key for key in summary if key.endswith(("_low", "_high"))}
    names = ("clean_accuracy", "accuracy", "drop", "margin")
    assert low_high == {f"{name}_{end}" for name in names for end in ("low", "high")}
    assert summary["drop_low"] <= 0.75 - 0.625 <= summary["drop_high"]
    assert summary["clean_accuracy_low"] <= 0.75 <= summary["clean_accuracy_high"] <= 1
    assert {key: value for key, value in summary.items() if key not in low_high} == pytest.approx(
        {
            "clean_accuracy": 0.75,
            "clean_margin": 1.5,
            "accuracy": 0.625,
            "accuracy_std_chips": np.std([0.5, 0.75], ddof=1),
            "accuracy_worst": 0.5,
            "margin": 1.0,
            "noise_db": -25.0,
        }
    )
    assert summary["accuracy_low"] <= 0.625 <= summary["accuracy_high"]
    assert summary["margin_low"] <= 1.0 <= summary["margin_high"]
    assert json.loads(json.dumps(scores.to_json()))["noisy"][1] == [0.0, 2.0, 1.0, 3.0]


def test_a_single_chip_has_no_spread():
    correct = (True, False)
    scores = ChipScores(("a", "b"), ("t", "t"), (0,), (1.0, -2.0), correct, ((1.0, -2.0),), (correct,), (-30.0,))
    assert scores.summary()["accuracy_std_chips"] == 0.0


def test_a_mixture_tells_the_accuracy_of_each_task():
    clean, noisy = (True, True, False), ((True, False, False), (True, True, True))
    margins = (1.0, 1.0, -1.0)
    scores = ChipScores(("a", "b", "c"), ("x", "y", "x"), (0, 1), margins, clean, (margins,) * 2, noisy, (-30.0,) * 2)
    told = {key: value for key, value in scores.summary().items() if "." in key}
    assert told == pytest.approx(
        {"accuracy.x": 3 / 4, "clean_accuracy.x": 1 / 2, "accuracy.y": 1 / 2, "clean_accuracy.y": 1}
    )


def test_right_answers_by_options_are_the_positive_margins(runner, tiny_trial):
    scores = runner.evaluate(tiny_trial(evaluation=EVALUATION), None)
    assert scores.clean_correct == tuple(value > 0 for value in scores.clean)
    assert scores.noisy_correct == tuple(tuple(value > 0 for value in margins) for margins in scores.noisy)


def test_both_ways_of_scoring_options_come_from_one_pass(runner, tiny_trial, adapter):
    """Oracle: the same trial scored by the other way."""
    summed, lengths = (
        runner.evaluate(tiny_trial(evaluation=EVALUATION | {"scoring": scoring}), adapter)
        for scoring in ("options", "options_per_byte")
    )
    assert (summed.beside, lengths.beside) == ("per_byte", "summed")
    assert (lengths.clean, lengths.noisy) == (summed.clean_beside, summed.noisy_beside)
    assert (lengths.clean_beside, lengths.noisy_beside) == (summed.clean, summed.noisy)
    assert lengths.clean_correct == tuple(value > 0 for value in summed.clean_beside)
    assert lengths.clean != summed.clean
    one, other = summed.summary(), lengths.summary()
    for name in ("accuracy", "clean_accuracy", "margin", "clean_margin"):
        assert one[f"{name}_per_byte"] == pytest.approx(other[name])
        assert other[f"{name}_summed"] == pytest.approx(one[name])
    assert {name for name in {*one, *other} if "_per_byte" in name or "_summed" in name} == set(BESIDE_METRICS)
    for scores in (summed, lengths):
        np.testing.assert_array_equal(scores.nats[1], summed.noisy)
        assert ChipScores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
        assert scores.first_chips(1).with_chips_after(1, scores).noisy_beside == (
            scores.noisy_beside[0],
            *scores.noisy_beside,
        )


def test_a_mixture_is_trained_and_scored_by_task(runner, tiny_trial, tiny_task, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_task, other)
    trial = tiny_trial(steps=2, report_every=2, evaluation={**EVALUATION, "rows": 10})
    config = trial.model_copy(update={"task": f"{tiny_task}+3*{other}"})
    training = runner.train(config, tmp_path / "trial")
    training.advance()
    training.close()
    scores = runner.evaluate(config, adapter_folder(tmp_path / "trial"))
    assert scores.tasks == (tiny_task, str(other)) * 5
    assert scores.clean[::2] == pytest.approx(scores.clean[1::2], abs=1e-4)  # the same rows
    summary = scores.summary()
    for way in ("", "_per_byte"):
        per_task = [summary[f"accuracy{way}.{task}"] for task in (tiny_task, other)]
        assert summary[f"accuracy{way}"] == pytest.approx(np.mean(per_task))
