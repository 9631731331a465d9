"""Oracles: the order of the jobs by hand, files on disk, and means and differences by numpy."""

import json

import numpy as np
import pytest

from halora.analysis.trials import RecordedTrial
from halora.evaluation.chips import ChipScores, summary_over_seeds
from halora.events import Failed, OutOfMemory, Reported, Scored, WorkerLost
from halora.hardware.energy import ENERGY
from halora.records.store import SweepFolder
from halora.settings.trial import Goal
from halora.spaces.sweep import Comparison
from halora.sweep.run.comparison import _cells
from halora.sweep.run.seeds import _claim, _SeedWork
from halora.sweep.search.jobs import Decision, Job


def _jobs(count, values=None):
    return [
        Job(n, values or {}, {ENERGY: 1.0}, Goal(4, chip_instances=0), True, f"{n:05d}-seed-{n}") for n in range(count)
    ]


def test_trainings_are_handed_out_until_each_is_done_or_has_failed():
    stop = [False]
    work = _SeedWork(_jobs(3), {1}, lambda: stop[0])
    first, second = work.suggest(), work.suggest()
    assert (first.number, second.number, work.suggest()) == (0, 2, None)
    assert (work.waiting, work.over) == (True, False)
    report, lost = Reported(trial=0, step=2, metrics={}), [WorkerLost(trial=n, cause="gone") for n in range(3)]
    assert work.take(report) is Decision.CONTINUE
    assert work.judged(lost[0]) == lost[0]
    work.take(lost[0])  # its worker ended: it goes on elsewhere
    assert work.suggest().number == 0
    work.take(OutOfMemory(trial=0, cause="too many rows"))
    assert work.suggest().halvings == 1
    work.take(Scored(trial=0, step=4, metrics={}, accuracy_by_chip=[]))
    for _ in range(2):
        assert work.judged(lost[2]) == lost[2]
        work.take(lost[2])
        work.suggest()
    assert work.judged(lost[2]) == Failed(trial=2, cause="gone")  # the third without a report between
    work.take(Failed(trial=2, cause="gone"))
    assert (work.suggest(), work.waiting, work.over, work.failed) == (None, False, True, {2})
    stopped = _SeedWork(_jobs(2), set(), lambda: stop[0])
    stopped.suggest()
    stop[0] = True
    assert stopped.take(report) is Decision.PAUSE
    assert (stopped.suggest(), stopped.waiting, stopped.over) == (None, False, False)


class _Sweep:
    """Resolves values to a configuration that says them."""

    def resolve(self, values):
        return type("Config", (), {"model_dump": lambda self, mode: dict(values)})()


def test_a_folder_is_kept_for_the_same_training_and_emptied_for_another(tmp_path):
    own = SweepFolder(tmp_path / "sweep").comparison
    checkpoint = own.trial(0) / "step-000002" / "progress.json"
    _claim(_Sweep(), own, _jobs(1, {"seed": 8})[0])
    checkpoint.parent.mkdir()
    checkpoint.write_text(json.dumps({"step": 2}))
    _claim(_Sweep(), own, _jobs(1, {"seed": 8})[0])
    assert checkpoint.exists()
    _claim(_Sweep(), own, _jobs(1, {"seed": 8, "lora.rank": 4})[0])
    assert not checkpoint.exists()
    assert "ray*/00003*" in own.logs_command(3)
    assert SweepFolder(tmp_path / "comparison").logs_command(3) == "halora trial logs comparison/3"


def _scores(margins):
    """Scores with these margins (chips, rows), clean as on the first chip."""
    noisy = tuple(tuple(map(float, own)) for own in margins)
    right = tuple(tuple(value > 0 for value in own) for own in noisy)
    chips, rows = np.shape(margins)
    ids = tuple(map(str, range(rows)))
    decibels = (-30.0,) * chips
    return ChipScores(ids, ("t",) * rows, tuple(range(chips)), noisy[0], right[0], noisy, right, decibels)


def _contestants(rng, methods, seeds, gain=0.0, spread=0.2):
    shared = rng.normal(size=(4, 40))
    by_place = {}
    for i, name in enumerate(("untrained", *methods)):
        effects = rng.normal(0, spread, seeds) if i else [0.0]
        by_place[name, "chip"] = [
            _scores(shared + gain * i + effect + rng.normal(0, 0.3, (4, 40))) for effect in effects
        ]
    points = {name: RecordedTrial(number=n) for n, name in enumerate(methods)}
    return by_place, points


@pytest.mark.parametrize("seeds", [1, 3])
def test_cells_hold_means_over_seeds_and_paired_differences(seeds):
    by_place, points = _contestants(np.random.default_rng(0), ("lora", "halora"), seeds, gain=1.0)
    comparison = Comparison(rows=40, chip_instances=4, by="m", against="lora", equivalence_margin={"margin": 0.1})
    cells = {cell.contestant: cell for cell in _cells(by_place, "lora", points, comparison)}
    assert {name: cell.seeds for name, cell in cells.items()} == {"untrained": 0, "lora": seeds, "halora": seeds}
    assert {name: cell.number for name, cell in cells.items()} == {"untrained": None, "lora": 0, "halora": 1}
    assert cells["lora"].accuracy_gain is None
    means = {name: np.mean([one.noisy for one in found]) for (name, _), found in by_place.items()}
    for name in ("untrained", "halora"):
        assert cells[name].margin_gain.mean == pytest.approx(means[name] - means["lora"])
        assert cells[name].summary["margin"] == pytest.approx(means[name])
        assert cells[name].margin_gain.p_equivalent > 0.5
        assert cells[name].accuracy_gain.p_equivalent is None
    assert (cells["untrained"].margin_gain.verdict, cells["halora"].margin_gain.verdict) == ("worse", "better")
    spreads = [np.std([np.mean(one.noisy) for one in by_place["halora", "chip"]], ddof=1)] if seeds > 1 else []
    assert [cells["halora"].summary[name] for name in ("margin_std_seeds",) if seeds > 1] == pytest.approx(spreads)


def test_equal_methods_with_a_spread_of_seeds_are_seldom_called_different():
    """The whole table: three methods, 4 tests and more, 150 comparisons; 6 % and three standard errors are 12 %."""
    rng = np.random.default_rng(1)
    comparison = Comparison(rows=40, chip_instances=4, by="m", against="a")
    called = 0
    for _ in range(150):
        by_place, points = _contestants(rng, ("a", "b", "c"), 3)
        del by_place["untrained", "chip"]
        cells = _cells(by_place, "a", points, comparison)
        found = [g.verdict for cell in cells if cell.accuracy_gain for g in (cell.accuracy_gain, cell.margin_gain)]
        assert len(found) == 4
        called += any(verdict != "undecided" for verdict in found)
    assert called / 150 <= 0.12


def test_the_summary_of_one_seed_is_its_own():
    rng = np.random.default_rng(2)
    one, other = (_scores(rng.normal(0.3, 1, (3, 20))) for _ in range(2))
    assert summary_over_seeds([one]) == one.summary()
    both = summary_over_seeds([one, other])
    assert both["accuracy"] == pytest.approx((one.summary()["accuracy"] + other.summary()["accuracy"]) / 2)
    assert both["accuracy_low"] < both["accuracy"] < both["accuracy_high"]
    assert "drop_low" not in both
