"""Oracles: the object itself after a way through JSON; the bits of its numbers; the classes of the module."""

import inspect
import json
import pickle
import struct

import numpy as np
import pytest

from halora import events
from halora.events import Answers, Reported, Scored, event_of

KINDS = {
    name: each
    for name, each in vars(events).items()
    if inspect.isclass(each) and issubclass(each, events.TrialEvent | events.SweepEvent) and each.__subclasses__() == []
}
EXAMPLE = {
    "step": 3,
    "cause": "loss nan \ud800",
    "metrics": {"accuracy": 0.1 + 0.2},
    "accuracy_by_chip": [0.3],
    "scores": {"clean": [1.5]},
    "params": {"lora.rank": 4},
    "labels": {"method": "lora"},
    "chip_hash": "ab",
    "config": {"seed": 1},
    "datasets": [{"name": "t"}],
    "program": {"version": "1"},
    "comparison": {"rows": 3},
    "outcomes": [{"base": "b"}],
}


def _example(kind):
    wanted = {field: value for field, value in EXAMPLE.items() if field in kind.__dataclass_fields__}
    return kind(**wanted, **({"trial": 7} if issubclass(kind, events.TrialEvent) else {}), time_ms=12)


def test_every_thing_that_happens_has_a_kind_of_its_own():
    assert len(KINDS) >= 18
    kinds = {each.kind for each in KINDS.values()}
    assert len(kinds) == len(KINDS)
    assert {"began", "reported", "scored", "worker_lost", "out_of_memory", "failed", "sweep_started"} < kinds


@pytest.mark.parametrize("name", KINDS)
def test_an_event_is_the_same_after_its_way_through_json_and_through_ray(name):
    event = _example(KINDS[name])
    line = json.dumps(event.to_json(), ensure_ascii=False)
    assert event_of(json.loads(line)) == event
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(AttributeError):
        event.time_ms = 3


def test_numbers_are_read_back_bit_for_bit():
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2**64, 2000, dtype=np.uint64).view(np.float64)  # all exponents, denormals, infinities, nans
    values = [*drawn.tolist(), 5e-324, -0.0, float("inf"), 1e-3, 0.1 + 0.2]
    event = Reported(trial=0, step=1, metrics={str(i): value for i, value in enumerate(values)})
    again = event_of(json.loads(json.dumps(event.to_json())))
    told = [struct.pack("<d", value) for value in values if value == value]
    assert [struct.pack("<d", value) for value in again.metrics.values() if value == value] == told
    assert [value != value for value in again.metrics.values()] == [value != value for value in values]


def test_right_answers_are_kept_in_few_bytes():
    correct = np.random.default_rng(1).random((3, 16)) < 0.5
    event = Scored(trial=0, step=1, metrics={}, accuracy_by_chip=[], answers=Answers.of("g", correct))
    kept = event_of(json.loads(json.dumps(event.to_json()))).answers
    assert (kept.shape, kept.group) == ((3, 16), "g")
    bits = np.unpackbits(np.frombuffer(kept.packed, dtype=np.uint8), count=48)
    assert (bits.reshape(3, 16) == correct).all()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"kind": "unheard_of", "trial": 0}, KeyError),
        ({"trial": 0}, KeyError),
        ({"kind": "failed", "trial": 0}, TypeError),
        ({"kind": "finished", "trial": 0, "why": ""}, TypeError),
        ({"kind": "finished"}, TypeError),
    ],
)
def test_what_is_no_event_is_refused(content, error):
    with pytest.raises(error):
        event_of(content)
