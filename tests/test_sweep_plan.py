"""Oracles: proportions (twice the steps, twice the time), arithmetic on the goals, the model's number of weights."""

import pytest

from halora.spaces.sweep import load_sweep
from halora.sweep.run import plan as planning
from halora.training.models import model_shape

_QUIET = {"trial.chip.adc.lossless": True, "trial.chip.dac.lossless": True, "trial.chip.preset": "halora-2026"}


@pytest.fixture
def plan(monkeypatch):
    """A function that plans the quickstart on a machine of 10 GFLOP/s with 16 GiB free and two cores."""
    monkeypatch.setattr(planning, "_flops_per_s", lambda threads: 1e10 * threads)
    monkeypatch.setattr(planning.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 16 * 2**30}))
    return lambda **changes: planning.plan(
        load_sweep("quickstart", {"trials": 8, "trial.training.steps": 16} | changes)
    )


def test_time_grows_with_what_is_asked(plan):
    def whole(**changes):
        return plan(**changes).goals[-1].seconds

    base = whole()
    longer, more_chips = whole(**{"trial.training.steps": 32}), whole(**{"trial.evaluation.chip_instances": 6})
    assert whole(**{"trial.training.steps": 32, "trial.evaluation.chip_instances": 6}) == pytest.approx(
        longer + more_chips - base
    )
    training = longer - base
    assert whole(**{"trial.training.steps": 48}) == pytest.approx(base + 2 * training)
    # clean and 3 chips at three times a plain product, beside clean and 3 chips without converters
    assert base - training == pytest.approx((1 + 3 * 3) / (1 + 3) * (whole(**_QUIET) - training))


def test_memory_holds_the_base_and_a_noisy_copy(plan):
    shape = model_shape("smollm2-135m-instruct")
    weights = shape.layers * sum(linear.weights for linear in shape.linears)
    least = 4 * (2 * weights + shape.vocabulary * shape.hidden)
    planned = plan()
    assert least < planned.memory_bytes < least + 2 * 2**30
    assert plan(**{"trial.lora.rank": 8}).memory_bytes > planned.memory_bytes
    assert planned.fit == min(int(16 * 2**30 // planned.memory_bytes), 2)
    assert plan(**{"concurrent": 1, "trial.training.workers": 2}).fit == 1
    assert planned.hours == pytest.approx(8 * planned.goals[-1].seconds / 3600 / 2)


def test_adapters_that_a_comparison_trains_anew_take_as_long_as_trials(plan):
    comparison = {"rows": 48, "chip_instances": 3, "seeds": 3}
    planned, by_method = (
        plan(comparison=comparison),
        plan(comparison=comparison | {"by": "training.method", "chips": ["halora-2026"]}),
    )
    assert (planned.trained_anew, by_method.trained_anew, plan().trained_anew) == (3, 9, 0)
    assert planned.hours == pytest.approx((8 + 3) * planned.goals[-1].seconds / 3600 / 2)


def test_rungs_thin_the_trials_out(plan):
    rungs = [{"steps": 2, "rows": 4, "chip_instances": 1}, {"steps": 6}]
    changes = {"trials": 30, "early_stopping": {"rungs": rungs, "reduction_factor": 10 / 3}}
    planned = plan(**changes)
    assert [each.trials for each in planned.goals] == [30, 9, 2]
    assert [each.goal.steps for each in planned.goals] == [2, 6, 16]
    assert planned.hours < 0.5 * plan(trials=30).hours
    assert planned.hours == pytest.approx(sum(e.trials * e.seconds for e in planned.goals) / 3600 / 2)


def test_a_dry_run_prints_the_plan_and_launches_nothing(halora, tmp_path):
    code, out, err = halora(f"sweep launch quickstart --dry-run --set trials=7 --store {tmp_path / 'store'}")
    assert code == 0
    assert "trials: 7" in out
    assert "time each" in out
    assert "4 of 7 trials are points tried first" in err
    assert "memory of a trial: about" in err
    assert not (tmp_path / "store").exists()
