"""Work in a bounded process. Oracle: what each piece of work does is in its name."""

import os

import pytest
from bounded_work import behave

from halora.errors import UserError
from halora.selection.bounded import in_child


def _asked(how, timeout_s=3600):
    said = []
    try:
        return in_child(behave, {"how": how}, said.append, timeout_s=timeout_s, reading_s=1)
    finally:
        assert said == [f"told to {how}"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("spin", "reading it took more than 1 s of processor time and was ended"),
        ("exhaust", "it takes too much memory"),
        ("die", r"reading it ended its process \(SIGKILL\)"),
        ("refuse", r"first; second \(do this\)"),
        ("break", "the check broke: KeyError: 'xxx"),
        ("sleep", "the check took too long and was ended"),
    ],
)
def test_what_does_not_end_well_is_told_in_a_sentence(how, told):
    with pytest.raises(UserError, match=told) as refused:
        _asked(how, timeout_s=0.1 if how == "sleep" else 3600)
    assert len(str(refused.value)) < 2000


def test_what_ends_well_gives_its_result_from_another_process_and_may_grow_after_reading():
    assert _asked("do well") not in (os.getpid(), None)
    assert _asked("grow later") == 2 << 30
