"""Oracles: the fit of a race by hand, and the event log's own entries."""

import json

import numpy as np
import pytest
from recorded_sweeps import SCORES, begin, made_up_sweep

from halora.analysis.candidates import standings
from halora.analysis.summary import view_front
from halora.events import Scored
from halora.records.event_log import read
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.records.sweep_state import SweepState
from halora.spaces.gates import Gates


@pytest.fixture
def sweep(tmp_path, tiny_models, tiny_task):
    store = Store(tmp_path / "store")
    return store, made_up_sweep(store, "raced", str(tiny_models["llama"]), str(tiny_task))


def _finish(recorder, folder, number, right_by_chip):
    """Scores of a trial with so many of 50 rows right on each chip."""
    correct = np.array([[row < right for row in range(50)] for right in right_by_chip])
    file = folder / "trials" / f"{number:05d}" / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"noisy_correct": correct.tolist(), "row_ids": list(range(50))}))
    mean = float(correct.mean())
    scores = SCORES | {"accuracy": mean, "accuracy_low": mean - 0.1, "accuracy_high": mean + 0.1}
    metrics, kept = scores | {"drop_low": 0.0, "drop_high": 0.2}, str(file.relative_to(folder))
    by_chip = correct.mean(axis=1).tolist()
    recorder.record(Scored(trial=number, step=4, metrics=metrics, accuracy_by_chip=by_chip, scores_file=kept))


def test_records_front_and_candidates_take_the_accuracies_of_the_race(sweep):
    """Trial 0 raced on two chips more, easier by 0.16 for all: 0.50 as measured, 0.42 by the race, below trial 1."""
    store, config = sweep
    folder = store.sweep("raced")
    recorder = SweepRecorder(folder, config)
    for number, rank in ((0, 8), (1, 4)):
        begin(recorder, config, number, lora__rank=rank)
    _finish(recorder, folder.root, 0, (21, 21, 29, 29))
    _finish(recorder, folder.root, 1, (22, 22))
    assert [point.number for point in view_front(recorder.points).members] == [1, 0]
    recorder.record_estimates({0: 0.42, 1: 0.44})
    recorder.finish(interrupted=False)
    points = SweepState()
    points.take(read(folder.event_log_file)[0])
    raced, other = points.points()
    assert (raced.accuracy, other.accuracy) == pytest.approx((0.42, 0.44))
    assert (raced.metrics["accuracy_low"], raced.metrics["drop_high"]) == pytest.approx((0.32, 0.28))
    view = view_front(points.points())
    assert [point.number for point in view.members] == [1]
    assert view.probability[0] < 0.5
    chosen = standings(points.points(), Gates(min_accuracy=0.43))
    assert [each.point.number for each in chosen if each.qualifies] == [1]
    before = folder.event_log_file.read_text().count('"estimated"')
    _finish(recorder, folder.root, 0, (21, 21, 29, 29))  # the same again, as after a resume
    recorder.record_estimates({0: 0.42, 1: 0.44})
    assert folder.event_log_file.read_text().count('"estimated"') == before == 1
    recorder.close()
