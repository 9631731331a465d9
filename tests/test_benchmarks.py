"""Oracles: arithmetic by hand on a fake clock, and on a tiny model the other way itself, which must do the same work.

At sigma 0 the user's script and ours have the same losses step by step, on one chip instance the same scores.
"""

import json
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness, plain
from benchmarks.eval import OurScores, PlainScores, check_equal_margins, make_adapter
from benchmarks.harness import Work, interleave, record, save
from benchmarks.memory import peak_gib
from benchmarks.recycled_noise import true_draws
from benchmarks.step import PADDED_ATTENTION, check_equal_losses, register_padded_attention
from benchmarks.turnaround import OurSweep, PlainSweep, short_sweep
from benchmarks.ways import CHIP, CLEAN, OurSteps, PlainSteps
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.draws import standard_normal
from halora.training.models import find_model

WORK = Work(rows=8, dtype="fp32", threads=1, loss_tokens=40)


class _Clock:
    """A clock that stands still but while a way runs."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def way(self, name, seconds, work=WORK):
        durations = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(durations)
            return work

        return run


def test_ways_take_turns_and_the_warm_up_does_not_count():
    clock = _Clock()
    ways = {"a": clock.way("a", [100, 1, 2, 3]), "b": clock.way("b", [100, 4, 4, 5])}
    seconds = interleave(ways, rounds=3, warm_up=1, clock=lambda: clock.now)
    assert seconds == {"a": [1, 2, 3], "b": [4, 4, 5]}
    assert "".join(clock.order) == "abbaabba"


def test_ways_that_do_not_do_the_same_are_not_compared():
    clock = _Clock()
    other = Work(rows=8, dtype="fp32", threads=1, loss_tokens=41)
    ways = {"ours": clock.way("ours", count()), "plain": clock.way("plain", count(), other)}
    with pytest.raises(AssertionError, match=r"loss_tokens=40.*loss_tokens=41"):
        interleave(ways, rounds=1)


def test_a_record_has_the_median_of_the_rounds_ratios():
    found = record("step/case", [1.0, 3.0, 2.0], [4.0, 6.0, 2.0])
    assert (found.ours, found.other, found.ratio, found.spread) == (2.0, 4.0, 0.5, (0.25, 1.0))
    assert found.machine


def test_a_benchmark_replaces_its_own_records_only(tmp_path):
    (tmp_path / "README.md").write_text(Path(harness.FOLDER, "README.md").read_text())
    save([record("step/one", [1.0], [2.0]), record("step/two", [1.0], [4.0])], tmp_path)
    save([record("noise/one", [3.0], [2.0])], tmp_path)
    save([record("step/two", [1.0], [10.0])], tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {each["name"]: each["ratio"] for each in results} == {"noise/one": 1.5, "step/two": 0.1}
    readme = (tmp_path / "README.md").read_text()
    assert "| step/two | **0.10** | 0.10 to 0.10 | 1 | 10 | s |" in readme
    assert "step/one" not in readme
    assert readme.count("| benchmark | ratio |") == 1


def test_both_ways_have_the_same_losses_on_clean_weights(tiny_trial):
    settings = {"method": "halora", "mu": 0.3, "schedule": CLEAN["training.schedule"]}
    check_equal_losses(tiny_trial(chip=CHIP, **settings), steps=4)


def test_our_attention_in_a_padded_batch_has_torch_s_losses(tiny_trial):
    register_padded_attention()
    config = tiny_trial()
    ours, torchs = PlainSteps(config, attention=PADDED_ATTENTION), PlainSteps(config)
    for _ in range(3):
        assert ours() == torchs()
    assert ours.losses == pytest.approx(torchs.losses, rel=1e-4)
    assert ours.losses != torchs.losses  # it is another one


def test_unequal_losses_are_found(tiny_trial):
    config = tiny_trial(chip=CHIP, method="halora", mu=0.3, schedule={"strength_start": 0.05, "redraw_steps": 1})
    with pytest.raises(AssertionError, match="losses at step 0"):
        check_equal_losses(config, steps=1)


def test_the_user_s_noise_has_the_asked_deviation_and_is_taken_away(tiny_trial):
    model, _ = plain.load(find_model(tiny_trial().model), "fp32")
    clean = {name: weight.clone() for name, weight in model.state_dict().items()}
    noise = plain.NoisyWeights(model, sigma=0.05)
    noise.redraw()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, clean[name])}
    assert moved == {f"{name}.weight" for name in noise.linears}
    assert len(moved) == 2 * len(plain.CHIP_LAYERS)
    for name in moved:
        error = model.state_dict()[name] - clean[name]
        assert float(error.std() / clean[name].abs().max()) == pytest.approx(0.05, rel=0.1)
    noise.restore()
    assert all(torch.equal(weight, clean[name]) for name, weight in model.state_dict().items())


def test_a_noisy_step_of_either_way_does_the_same_work(tiny_trial):
    config = tiny_trial(chip=CHIP, method="halora", schedule={"strength_start": 0.01, "redraw_steps": 1})
    ours, other = OurSteps(config), PlainSteps(config, sigma=0.01, mu=0.1)
    for work, its_work in islice(zip(iter(ours, None), iter(other, None), strict=True), 3):
        assert work == its_work
        assert work.rows == config.training.batch_size
    ours.close()


def test_a_training_chip_draws_as_a_scored_one_while_true_draws_are_asked_for():
    key, like = NoiseKey(role=Role.TRAIN, chip_seed=1, module="layer", purpose="programming"), torch.empty(40, 30)
    with true_draws():
        np.testing.assert_array_equal(standard_normal(key, like).numpy(), key.standard_normal((40, 30)))
    assert not np.array_equal(standard_normal(key, like).numpy(), key.standard_normal((40, 30)))


@pytest.mark.slow
def test_two_processes_of_either_way_do_the_same_work_while_their_memory_is_watched(tiny_models):
    model = Path(tiny_models["llama"])
    ours, work = peak_gib("ours", 2, model, threads=1)
    other, its_work = peak_gib("other", 2, model, threads=1)
    assert work == its_work
    assert work.dtype == "bf16"
    assert min(ours, other) > 0.1


@pytest.mark.slow
def test_both_sweeps_do_the_same_work(tiny_models, tiny_task):
    sweep = short_sweep(3, "fp32", tiny_models["llama"], tiny_task)
    work, its_work = OurSweep(sweep)(), PlainSweep(sweep)()
    assert work == its_work
    assert work.rows == 3 * (10 * 8 + 24)  # the tiny task has 24 rows to score


def test_both_ways_have_the_same_scores_on_one_chip_instance(tiny_trial, tmp_path):
    config = tiny_trial(chip=CHIP, evaluation={"rows": 16, "chip_instances": 1})
    make_adapter(tmp_path, config)
    assert 0 < check_equal_margins(config, tmp_path) < 1e-3
    noisier = config.model_copy(update={"chip": load_chip({**CHIP, "noise": {**CHIP["noise"], "sigma": 0.2}})})
    ours, other = OurScores(noisier, tmp_path), PlainScores(config, tmp_path, batch_size=16, by_length=False)
    assert ours() == other()
    assert ours.margins[0] == pytest.approx(other.margins[0], abs=1e-3)
    assert max(map(abs, np.subtract(ours.margins[1], other.margins[1]))) > 0.1  # other noise, other scores
