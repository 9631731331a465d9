"""Oracles: closed forms of the shares, the binomial distribution, 1,000 simulated selections and 1,000 simulated users
whose chips are drawn by their addresses, processes that begin at once.
"""

import json
import multiprocessing
import shutil

import numpy as np
import pytest

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role
from halora.records.store import Store
from halora.selection.attempts import Spent, attempts_of, chips_by_failures, open_attempt, spent_on
from halora.selection.certificate import Certificate, chips_needed, error_share
from halora.selection.certification import certifications_of, splits_of
from halora.spaces.gates import Gates

GATES = Gates(min_accuracy=0.4, min_yield=0.5, confidence=0.9, test_rows=8)
ROWS = ("tiny", "digest of its rows")


def begin(store, sweep="s", launch="one", trial=3, adapter="a", gates=GATES, splits=ROWS):
    return open_attempt(store, store.sweep(sweep), launch, trial, adapter, gates, splits)


def certificate_of(attempt, failures, gates):
    return Certificate(
        sweep=attempt.sweep, trial=attempt.trial, launch=attempt.launch, attempt=attempt.number,
        earlier=attempt.spent.earlier, spent=attempt.spent.error, confidence=gates.confidence,
        min_accuracy=gates.min_accuracy, scoring="options", min_yield=gates.min_yield, chips=attempt.chips,
        failures=failures, task="tiny", rows=8, rows_digest="d", chip="c", chip_hash="h", noise="gaussian",
        variation=(),
    )  # fmt: skip


def shares(level, count):
    """Shares of the first so many certifications at one confidence."""
    taken = []
    for earlier in range(count):
        taken.append(error_share(1 - level, earlier, sum(taken)))
    return taken


def test_the_kth_share_is_that_of_the_closed_form_and_any_number_stays_within_the_level():
    taken = shares(0.05, 200)
    assert taken == pytest.approx([0.05 / (k * (k + 1)) for k in range(1, 201)])
    assert sum(taken) == pytest.approx(0.05 * 200 / 201)
    assert all(share > 0 for share in taken)
    assert [chips_needed(0.95, share) for share in taken[:6]] == [72, 94, 107, 117, 125, 132]


def test_other_confidences_take_from_what_is_left():
    assert error_share(0.9, 1, 0.02) == pytest.approx(0.08 / 3)
    assert error_share(0.99, 1, 0.02) == 0.0
    with pytest.raises(UserError, match=r"0\.99 leaves nothing .* the 1 begun in this store took .* 0\.02 of 0\.01"):
        chips_by_failures(Gates(confidence=0.99), Spent(1, 0.02))


def test_attempts_of_all_sweeps_on_the_same_rows_share_the_error_level(tmp_path):
    store = Store(tmp_path)
    first = begin(store)
    assert (first.number, first.spent, first.error) == (1, Spent(0, 0), pytest.approx(0.05))
    assert first.chips == chips_needed(0.5, 0.05)
    second = begin(store, "t", "two", trial=1)
    assert (second.number, second.spent.earlier, second.error) == (1, 1, pytest.approx(0.1 / 6))
    third = begin(store, trial=4)
    assert (third.number, third.spent.earlier, third.error) == (2, 2, pytest.approx(0.1 / 12))
    assert begin(store) == first  # asked again, or gone on with after a crash: nothing more is spent
    other_gate = GATES.model_copy(update={"max_drop": 0.1})
    assert begin(store, gates=other_gate) == first  # the same chips and rows answer that
    assert spent_on(store, ROWS, GATES.confidence) == Spent(3, first.error + second.error + third.error)
    others = [
        {"adapter": "b"},
        {"gates": GATES.model_copy(update={"test_rows": 9})},
        {"gates": GATES.model_copy(update={"confidence": 0.8})},
    ]
    for count, change in enumerate(others):
        assert begin(store, **change).spent.earlier == 3 + count
    assert attempts_of(store.sweep("s"))[:2] == [first, third]
    assert attempts_of(store.sweep("t")) == [second]
    assert certifications_of(store.sweep("s")) == {}


def test_certifications_share_a_level_where_they_share_a_part_of_their_rows(tmp_path):
    store, level = Store(tmp_path), 1 - GATES.confidence
    of_arc = begin(store, trial=0, splits=("arc", "1"))
    of_book = begin(store, trial=1, splits=("book", "2"))
    assert (of_arc.error, of_book.error) == (level / 2, level / 2)
    assert spent_on(store, ("piqa", "3"), GATES.confidence) == Spent(0, 0)
    mixture = begin(store, trial=2, splits=("arc", "1", "book", "2"))
    assert mixture.error == pytest.approx(level / 6)
    assert begin(store, trial=3, splits=("a copy of arc", "1")).error == pytest.approx(level / 12)
    assert begin(store, trial=4, splits=("book", "with a row fixed")).error == pytest.approx(level / 12)
    again = begin(store, trial=5, splits=("arc", "1", "book", "2"))
    assert again.spent == Spent(3, pytest.approx(level * 3 / 4))  # that of ARC's rows, and of the name of the other
    for split in ("arc", "1", "book", "2"):
        assert spent_on(store, (split,), GATES.confidence).error < level


def test_splits_are_told_by_name_and_by_their_texts(tiny_task, tmp_path):
    copy = tmp_path / "copied"
    shutil.copytree(tiny_task, copy)
    lines = (copy / "test.jsonl").read_text().splitlines()
    (copy / "test.jsonl").write_text("\n".join(reversed(lines)))
    name, digest = splits_of(tiny_task)
    assert splits_of(str(copy)) == ("copied", digest)
    assert splits_of(f"{copy}+arc-easy") == ("copied", digest, *splits_of("arc-easy"))
    (copy / "test.jsonl").write_text("\n".join(lines[1:]))
    other = tmp_path / "elsewhere" / name
    shutil.copytree(copy, other)
    assert splits_of(str(other))[0] == name
    assert splits_of(str(other))[1] != digest


def test_more_chips_than_the_yield_takes_can_be_asked_for(tmp_path):
    assert begin(Store(tmp_path), gates=Gates(min_yield=0.5, confidence=0.9, min_chips=30)).chips == 30


def test_a_store_that_lost_its_file_is_refused(tmp_path):
    store = Store(tmp_path)
    begin(store)
    store.certifications_file.write_text("[{")
    with pytest.raises(UserError, match=r"certifications\.json' cannot be read"):
        begin(store, trial=4)
    store.certifications_file.unlink()
    with pytest.raises(UserError, match="lacks certification 1 of sweep 's'"):
        begin(store, trial=4)


def test_an_attempt_that_was_cut_off_after_it_was_written_down_goes_on(tmp_path):
    store = Store(tmp_path)
    first = begin(store)
    shutil.rmtree(first.folder(store.sweep("s")))
    assert begin(store) == first
    assert attempts_of(store.sweep("s")) == [first]


def _begin_many(root, launch, count):
    for trial in range(count):
        begin(Store(root), launch, launch, trial=trial)


def test_processes_that_begin_at_once_count_each_other(tmp_path):
    launches = ("one", "two", "three")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_begin_many, args=(tmp_path, launch, 10)) for launch in launches]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    kept = json.loads(Store(tmp_path).certifications_file.read_text())
    assert [each["spent"]["earlier"] for each in kept] == list(range(30))
    assert spent_on(Store(tmp_path), ROWS, GATES.confidence).error == pytest.approx(0.1 * 30 / 31)
    assert len({(each["launch"], each["number"]) for each in kept}) == 30


def _chip(series, number, role=Role.CERTIFY):
    return NoiseKey(role=role, series=series, chip_seed=number, module="layers.0.q_proj", purpose="programming")


def test_two_sweeps_that_certify_in_one_store_share_no_chip(tmp_path):
    store = Store(tmp_path)
    attempts = [begin(store, "s", "one"), begin(store, "s", "one", trial=4), begin(store, "t", "two")]
    seeds = [_chip(attempt.series, number).seed() for attempt in attempts for number in range(attempt.chips)]
    seeds += [_chip("", number, role).seed() for role in (Role.SEARCH, Role.TRAIN) for number in range(100)]
    assert len(set(seeds)) == len(seeds) == sum(attempt.chips for attempt in attempts) + 200


YIELD, JUST_MISSED, USERS = 0.8, 0.799, 1000
LEVEL = 0.05
SPREAD = 3 * np.sqrt(LEVEL * (1 - LEVEL) / USERS)


def _relaunches(root, user):
    """A user with adapters that just miss the yield, who relaunches after a failure: up to five sweeps in one store."""
    gates = Gates(min_accuracy=0.4, min_yield=YIELD, confidence=1 - LEVEL)
    store = Store(root / str(user))
    for again in range(5):
        attempt = begin(store, f"sweep-{again}", f"{user}-{again}", gates=gates)
        failing = _chip(attempt.series, 0).uniform((attempt.chips,)) >= JUST_MISSED
        yield certificate_of(attempt, int(failing.sum()), gates)


def test_a_thousand_users_who_fail_and_relaunch_up_to_five_times_keep_the_confidence(tmp_path):
    passed_at = []
    for user in range(USERS):
        passed_at.append(next((i for i, made in enumerate(_relaunches(tmp_path, user)) if made.passed), None))
    wrong = USERS - passed_at.count(None)
    assert wrong / USERS < LEVEL + SPREAD
    assert wrong / USERS > LEVEL / 3  # the level is used, not avoided
    assert any(passed_at)  # some only after a failure


def test_relaunches_on_a_fresh_level_each_would_not_keep_it():
    """What this replaces: every launch had all of the level."""
    rng = np.random.default_rng(0)
    chips = chips_needed(YIELD, LEVEL)
    wrong = (rng.binomial(chips, 1 - JUST_MISSED, size=(USERS, 5)) == 0).any(axis=1)
    assert wrong.mean() > LEVEL + 3 * SPREAD


def test_a_thousand_selections_keep_the_confidence(tmp_path):
    """Three candidates of a sweep that just miss the yield are tried in turn until one passes."""
    rng = np.random.default_rng(0)
    share, gates = 0.9499, Gates(min_accuracy=0.4, min_yield=0.95, confidence=1 - LEVEL)
    store = Store(tmp_path)
    attempts = [begin(store, trial=trial, gates=gates) for trial in range(3)]
    wrong = bounds_above = failed_first = 0
    for _ in range(USERS):
        made = [certificate_of(each, int(rng.binomial(each.chips, 1 - share)), gates) for each in attempts]
        passed = [each.passed for each in made]
        wrong += any(passed)
        failed_first += any(passed) and not passed[0]
        bounds_above += any(each.bound > share for each in made)
    assert failed_first > 0
    assert LEVEL / 3 < wrong / USERS < LEVEL + SPREAD
    assert bounds_above / USERS < LEVEL + SPREAD
