"""Oracle: brute force over generated sweeps. The trial by comparing every pair, ties by the normal distribution."""

from math import hypot

import numpy as np
import pytest

from halora.analysis.candidates import standings
from halora.analysis.recommendation import Progress, recommend
from halora.analysis.summary import view_front
from halora.analysis.trials import RecordedTrial
from halora.events import Answers
from halora.spaces.sweep import SweepConfig

SWEEP = {
    "name": "s",
    "family": "f",
    "trials": 40,
    "trial": {"model": "m", "task": "t", "chip": "halora-2026", "training": {"steps": 4}},
    "space": {"lora.rank": {"choices": [2, 4, 8]}},
    "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 10.0},
}
BASELINES = {"m": {"a100_int8_peak": 200.0, "a100_bf16_peak": 400.0}}


def _sweep(**gates):
    return SweepConfig.model_validate({**SWEEP, "gates": gates})


def _trial(number, accuracy, energy, half=0.02, **more):
    metrics = {"accuracy": accuracy, "energy_uj_per_token": energy, "margin": 0.0, "clean_accuracy": 0.6}
    metrics |= {"accuracy_low": accuracy - half, "accuracy_high": accuracy + half} if half else {}
    given = {"labels": {"method": "halora", "model": "m"}, "params": {"lora.rank": 4}}
    return RecordedTrial(number=number, metrics=metrics | more.pop("metrics", {}), **(given | more))


def _of(points, progress=None, **gates):
    return recommend(_sweep(**gates), view_front(points), progress or Progress(), BASELINES)


def _generated(seed):
    """Trials with equal energies, equal accuracies and constraints broken among them, and a gate that some miss."""
    rng = np.random.default_rng(seed)
    points = []
    for number in range(int(rng.integers(1, 25))):
        accuracy, energy = round(float(rng.uniform(0.3, 0.7)), 2), round(float(rng.uniform(1, 4)), 1)
        broken = {"constraint_violation.area_mm2": float(rng.random() < 0.2)}
        state = "failed" if rng.random() < 0.1 else "finished"
        half = float(rng.uniform(0.01, 0.08))
        points.append(_trial(number, accuracy, energy, half, metrics=broken, state=state))
    return points, float(rng.choice([0.0, 0.45]))


@pytest.mark.parametrize("seed", range(100))
def test_brute_force_finds_the_same_trial_and_the_same_ties(seed):
    points, least = _generated(seed)
    found = _of(points, min_accuracy=least)
    able = [p for p in points if p.state == "finished" and not p.violated and p.accuracy >= least]
    if not able:
        assert found.trial is None
        return

    def beats(one, other):
        no_worse = one.accuracy >= other.accuracy and one.energy_uj_per_token <= other.energy_uj_per_token
        return no_worse and (one.accuracy, one.energy_uj_per_token) != (other.accuracy, other.energy_uj_per_token)

    members = [p for p in able if not any(beats(q, p) for q in able)]
    span = [max(v) - min(v) or 1 for v in zip(*((p.accuracy, p.energy_uj_per_token) for p in members), strict=True)]
    worst, dearest = min(p.accuracy for p in members), max(p.energy_uj_per_token for p in members)
    gains = {p.number: (p.accuracy - worst) / span[0] + (dearest - p.energy_uj_per_token) / span[1] for p in members}
    assert found.trial is not None
    assert gains[found.trial.number] == pytest.approx(max(gains.values()))
    best = found.trial
    tied = {
        p.number
        for p in able
        if p is not best
        and p.energy_uj_per_token <= 1.01 * best.energy_uj_per_token
        and abs(p.accuracy - best.accuracy) <= hypot(_half(p), _half(best))
    }
    assert set(found.tied) == tied
    assert f"Take trial {best.number} (halora, rank 4)" in found.text
    assert standings(points, _sweep(min_accuracy=least).gates)[0].point is best


def _half(point):
    return (point.metrics["accuracy_high"] - point.metrics["accuracy_low"]) / 2


def test_trials_on_the_same_rows_and_chips_are_compared_answer_by_answer():
    """Two trials that differ in one answer of 300 are tied; 30 answers apart, all one way, they are not."""
    right = np.random.default_rng(0).random((3, 100)) < 0.5
    wrong_once, wrong_often = right.copy(), right.copy()
    wrong_once[tuple(np.argwhere(right)[0])] = False
    often = np.argwhere(right.all(axis=0))[:10]
    wrong_often[:, often] = False
    trials = [
        _trial(n, float(each.mean()), energy, 0.1, correct=Answers.of("rows", each))
        for n, (each, energy) in enumerate(((right, 2.0), (wrong_once, 2.0), (wrong_often, 2.0)))
    ]
    found = _of(trials)
    assert found.trial is trials[0]
    assert found.tied == (1,)
    apart = [_trial(p.number, p.accuracy, p.energy_uj_per_token, 0.1) for p in trials]  # the intervals alone
    assert _of(apart).tied == (1, 2)


def test_it_says_what_it_takes_beside_which_baseline_and_what_to_run():
    points = [_trial(0, 0.4, 1.0), _trial(3, 0.52, 1.5), _trial(5, 0.55, 4.0)]
    found = _of(points, min_accuracy=0.3)
    assert found.sentences == (
        "Take trial 3 (halora, rank 4): accuracy under noise 0.52 [0.5, 0.54] at 1.5 µJ per token; "
        "a100_int8_peak takes 133 times the energy.",
        "No other candidate that costs as little comes within the 95 % interval of its accuracy under noise.",
    )
    assert found.command == "halora adapter select s --trial 3"
    assert _of(points).command == "halora adapter select s --trial 3 --min-accuracy 0.5"


def test_what_the_comparison_and_the_certification_say_follows():
    gain = {"mean": 0.15, "low": -0.043, "high": 0.343, "p_different": 0.1, "verdict": "undecided"}
    cells = [
        {"number": None, "chip": "halora-2026", "accuracy_gain": None},
        {"number": 3, "chip": "halora-2026", "accuracy_gain": gain},
    ]
    comparison = {"cells": cells, "reference": "untrained", "chip_instances": 3, "rows": 20}
    points = [_trial(3, 0.52, 1.5), _trial(4, 0.3, 1.2)]
    said = _of(points, Progress(comparison=comparison, certified={3: True}), min_accuracy=0.4)
    assert said.sentences[-2:] == (
        "In the closing comparison, on 3 fresh chips and 20 fresh rows, it cannot be told apart from 'untrained' in "
        "accuracy: +0.150 [-0.043, +0.343] on halora-2026.",
        "Certified.",
    )
    assert said.command == "halora adapter register s/3"
    other = {**comparison, "cells": [cells[0], {**cells[1], "number": 4}]}
    said = _of(points, Progress(comparison=other, certified={3: False}), min_accuracy=0.4)
    assert said.sentences[-2:] == ("The closing comparison was of trial 4.", "It failed its certification.")
    assert said.command == "halora adapter select s --trial 3"


@pytest.mark.parametrize(
    ("points", "progress", "gates", "said"),
    [
        ([], Progress(), {}, "Nothing to recommend yet: no trial has finished."),
        ([], Progress(running=True), {}, "So far nothing to recommend yet: no trial has finished."),
        (
            [RecordedTrial(number=n, state="failed", cause=f"cause {n}", ended_ms=9 - n) for n in range(3)],
            Progress(),
            {},
            "Nothing to recommend: all 3 trials failed, the last of them with: cause 0.",
        ),
        (
            [_trial(0, 0.5, 3.0, metrics={"constraint_violation.energy_uj_per_token": 1.5})],
            Progress(),
            {},
            "No trial qualifies. Trial 0 comes nearest: violates energy_uj_per_token by 1.5.",
        ),
        (
            [_trial(0, 0.4, 3.0), _trial(1, 0.45, 3.0)],
            Progress(),
            {"min_accuracy": 0.5},
            "No trial qualifies. Trial 1 comes nearest: min_accuracy 0.45 < 0.5.",
        ),
        (
            [_trial(0, float("nan"), 3.0, half=0)],
            Progress(),
            {},
            "Nothing to recommend: no finished trial has a score that is a number.",
        ),
    ],
)
def test_where_there_is_nothing_to_take_it_says_why(points, progress, gates, said):
    found = _of(points, progress, **gates)
    assert (found.trial, found.text, found.command) == (None, said, "")


def test_a_running_and_a_simulated_sweep_say_that_they_are():
    points = [_trial(0, 0.5, 2.0), RecordedTrial(number=1, state="running")]
    running = _of(points, Progress(running=True))
    assert running.text.startswith("So far, with 1 of 40 trials: take trial 0")
    assert running.command == ""
    simulated = _of(points, Progress(simulated=True, certified={}))
    assert simulated.sentences[-1] == "Simulated from recorded curves: there is no adapter to deploy."
    assert simulated.command == ""
