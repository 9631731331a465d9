"""Oracles: Holm's own worked example by hand, and how often families of equal or unequal means are called so."""

import numpy as np
import pytest

from halora.evaluation.decisions import holm, judged
from halora.evaluation.intervals import Estimate, crossed


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdicts_follow_the_corrected_p_values():
    sure, likely, none = Estimate(1.0, 0.1, 30), Estimate(-0.21, 0.1, 300), Estimate(0.01, 0.1, 300)
    assert likely.p_different < 0.05
    assert [gain.verdict for gain in judged([likely], [None])] == ["worse"]
    gains = judged([sure, likely, none], [0.5, 0.5, 0.5])
    assert [gain.verdict for gain in gains] == ["better", "equivalent", "equivalent"]
    assert gains[1].p_different == pytest.approx(2 * likely.p_different)
    assert [gain.verdict for gain in judged([sure, likely, none], [None, None, None])][1:] == ["undecided", "undecided"]
    assert judged([none], [None])[0].p_equivalent is None
    found = sure.interval()
    assert (gains[0].mean, gains[0].low, gains[0].high) == (found.mean, found.low, found.high)


def test_a_family_of_equal_means_is_called_different_in_five_of_a_hundred():
    """Four contestants; with the plain p-values it would be 18 %. 1,000 families: three standard errors are 0.02."""
    rng = np.random.default_rng(0)
    families = [[crossed(rng.normal(size=(1, 40))) for _ in range(4)] for _ in range(1000)]
    called = np.mean([any(g.verdict in ("better", "worse") for g in judged(each, [None] * 4)) for each in families])
    assert called == pytest.approx(0.05, abs=0.022)
    assert np.mean([any(e.p_different < 0.05 for e in each) for each in families]) > 0.15


def test_means_at_the_margin_are_called_equivalent_in_five_of_a_hundred():
    rng = np.random.default_rng(1)
    found = [judged([crossed(rng.normal(0.5, 1, (1, 40)))], [0.5])[0] for _ in range(1000)]
    assert np.mean([gain.p_equivalent < 0.05 for gain in found]) == pytest.approx(0.05, abs=0.022)
    near = [judged([crossed(rng.normal(0, 1, (1, 40)))], [0.5])[0] for _ in range(300)]
    assert np.mean([gain.verdict == "equivalent" for gain in near]) > 0.8
