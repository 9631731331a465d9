"""Oracles: the binomial distribution, brute force over chip counts, orderings by hand."""

from math import nan

import pytest
from pydantic import ValidationError
from scipy.stats import binom

from halora.analysis.gates import Gate, branch_gates, certified_gates, search_gates
from halora.analysis.trials import RecordedTrial
from halora.errors import UserError
from halora.hardware.chip import load_chip
from halora.records.names import registered_name
from halora.selection.certificate import Certificate, chips_needed, yield_lower_bound
from halora.selection.robustness import scenarios
from halora.spaces.gates import Gates


@pytest.mark.parametrize("error", [0.05, 0.05 / 3, 1e-4])
@pytest.mark.parametrize(("chips", "failures"), [(1, 0), (59, 0), (59, 1), (93, 1), (200, 13), (20, 19)])
def test_at_the_bound_so_few_failures_are_seen_with_the_error_level(chips, failures, error):
    bound = yield_lower_bound(chips, failures, error)
    assert binom.cdf(failures, chips, 1 - bound) == pytest.approx(error, abs=1e-9)


def test_no_chip_that_passes_bounds_nothing():
    assert yield_lower_bound(7, 7, 0.05) == 0.0


def test_chips_needed():
    assert [chips_needed(0.95, 0.05, failures) for failures in range(3)] == [59, 93, 124]
    for wanted, error, failures in [(0.5, 0.1, 0), (0.9, 0.01, 2), (0.8, 0.05 / 3, 1), (0.05, 0.5, 0)]:
        fewest = next(n for n in range(failures + 1, 1000) if yield_lower_bound(n, failures, error) >= wanted)
        assert chips_needed(wanted, error, failures) == fewest
    with pytest.raises(UserError, match="more than 100,000 chips"):
        chips_needed(0.9999999, 0.05)


def certificate(failures=0, earlier=2, spent=0.05 * 2 / 3, chips=107, **changes):
    content = {
        "sweep": "s", "trial": 4, "launch": "1a2b", "attempt": 1, "earlier": earlier, "spent": spent,
        "confidence": 0.95, "min_accuracy": 0.4, "scoring": "options", "min_yield": 0.95, "chips": chips,
        "failures": failures, "task": "arc-easy", "rows": 100, "rows_digest": "d",
        "chip": "c", "chip_hash": "h", "noise": "gaussian",
    }  # fmt: skip
    return Certificate(**content | changes)


def test_a_certificate_states_its_conditions_and_comes_back_from_json():
    one = certificate(failures=1)
    again = Certificate.from_json(one.to_json())
    assert again == one
    assert not one.passed
    assert certificate().passed
    assert one.error == pytest.approx(0.05 / 12)  # the third of them: 1 / (3 * 4)
    assert "106 of 107 chip instances" in one.statement()
    assert "series 1a2b/1" in one.statement()
    assert "on this test set (100 rows of arc-easy, scored by options)" in one.statement()
    assert "how dies, wafers and lots differ is not modelled" in one.statement()
    assert "and the 2 begun before it on these rows in this store together" in one.statement()
    assert "results on new rows" in one.statement()
    first = certificate(earlier=0, spent=0.0).statement()
    assert "before it" not in first
    assert "new rows" not in first
    assert "other stores are not counted" in first


COSTS = {
    "energy_uj_per_token": 4.0, "latency_us_per_token": 2.0, "tokens_per_s": 5e5, "power_w": 2.0, "area_mm2": 300.0,
}  # fmt: skip
SCORES = {
    "accuracy": 0.5625, "accuracy_low": 0.5, "accuracy_high": 0.625, "clean_accuracy": 0.5625, "drop_high": 0.0625,
    "margin": 0.1,
}  # fmt: skip


def gates_by_name(gates, **changes):
    measured = {
        "costs": COSTS, "adapter_bytes": 2_000_000, "chips": 59, "yield_bound": 0.9505,
        "accuracy_at": {0.02: (0.5, 0.4)}, "reload_share": 1.0,
    }  # fmt: skip
    return {
        gate.name: gate for gate in certified_gates(SCORES | changes.pop("scores", {}), gates, **measured | changes)
    }


ALL_GATES = Gates(
    min_accuracy=0.5, max_drop=0.0625, max_energy_uj_per_token=4.0, max_adapter_kb=2000, max_ci_halfwidth=0.0625,
    min_chips=59, min_accuracy_at={0.02: 0.4}, max_latency_us_per_token=2.0, min_tokens_per_s=5e5, max_power_w=2.0,
    max_area_mm2=300.0,
)  # fmt: skip


def test_a_gate_at_its_threshold_passes_and_beyond_it_fails():
    assert all(gate.passed for gate in gates_by_name(ALL_GATES).values())
    beyond = {
        "no_nan": {"scores": {"margin": nan}},
        "min_accuracy": {"scores": {"accuracy_low": 0.4999, "accuracy_high": 0.6249}},
        "max_drop": {"scores": {"drop_high": 0.063}},
        "max_energy_uj_per_token": {"costs": COSTS | {"energy_uj_per_token": 4.01}},
        "max_latency_us_per_token": {"costs": COSTS | {"latency_us_per_token": 2.01}},
        "min_tokens_per_s": {"costs": COSTS | {"tokens_per_s": 4.9e5}},
        "max_power_w": {"costs": COSTS | {"power_w": 2.1}},
        "max_area_mm2": {"costs": COSTS | {"area_mm2": 301.0}},
        "max_adapter_kb": {"adapter_bytes": 2_000_001},
        "max_ci_halfwidth": {"scores": {"accuracy_high": 0.626}},
        "min_chips": {"chips": 58},
        "min_accuracy_at_0.02": {"accuracy_at": {0.02: (0.5, 0.399)}},
        "min_yield": {"yield_bound": 0.9499},
        "reload_reproduces": {"reload_share": 1.01},
    }
    assert gates_by_name(ALL_GATES).keys() == beyond.keys()
    for name, change in beyond.items():
        assert [gate.name for gate in gates_by_name(ALL_GATES, **change).values() if not gate.passed] == [name]


def test_what_serving_asks_of_a_branch():
    gates = Gates(max_rank=16, servable=True)
    verdicts = {
        (rank, variant): [gate.name for gate in branch_gates(gates, rank, variant) if not gate.passed]
        for rank in (16, 17, 513)
        for variant in ("plain", "rslora", "dora")
    }
    assert verdicts == {
        (16, "plain"): [],
        (16, "rslora"): [],
        (16, "dora"): ["servable"],
        (17, "plain"): ["max_rank"],
        (17, "rslora"): ["max_rank"],
        (17, "dora"): ["max_rank", "servable"],
        (513, "plain"): ["max_rank", "servable"],
        (513, "rslora"): ["max_rank", "servable"],
        (513, "dora"): ["max_rank", "servable"],
    }
    assert branch_gates(Gates(), 999, "dora") == []
    metrics = {"accuracy": 0.5, "clean_accuracy": 0.6, "energy_uj_per_token": 2.0}
    found = RecordedTrial(number=0, params={"lora.rank": 32}, metrics=metrics)
    assert [gate.name for gate in search_gates(found, gates) if not gate.passed] == ["max_rank"]
    assert all(gate.passed for gate in search_gates(RecordedTrial(number=0, metrics=metrics), gates))


def test_a_gate_tells_value_threshold_and_unit_and_no_number_fails():
    gate = Gate("max_energy_uj_per_token", 4.5, "<=", 4.0, "uJ/token")
    assert str(gate) == "max_energy_uj_per_token 4.5 > 4 uJ/token"
    assert str(Gate("min_accuracy", 0.5, ">=", 0.4)) == "min_accuracy 0.5 >= 0.4"
    found = gates_by_name(ALL_GATES)
    assert str(found["min_accuracy"]) == "min_accuracy 0.5 (lower end over rows and chips; mean 0.5625) >= 0.5"
    assert str(found["max_drop"]) == "max_drop 0.0625 (upper end over rows and chips; mean 0) <= 0.0625"
    assert Gate.from_json(found["max_drop"].to_json()) == found["max_drop"]
    alone = gates_by_name(ALL_GATES, chips=1)
    assert alone["min_accuracy"].over == alone["min_accuracy_at_0.02"].over == "rows of one chip"
    non_finite = Gate("min_accuracy", nan, ">=", 0.4)
    assert not non_finite.passed
    assert not Gate.from_json(non_finite.to_json()).passed


def test_what_the_search_recorded_is_enough_for_its_gates():
    gates = Gates(min_accuracy=0.4, max_drop=0.2, max_energy_uj_per_token=3)
    point = RecordedTrial(number=0, metrics={"accuracy": 0.5, "energy_uj_per_token": 3.5, "margin": nan})
    verdicts = {gate.name: gate.passed for gate in search_gates(point, gates)}
    assert verdicts == {"no_nan": False, "min_accuracy": True, "max_drop": False, "max_energy_uj_per_token": False}


def _point(number, accuracy, energy, **more):
    metrics = {"accuracy": accuracy, "energy_uj_per_token": energy, "clean_accuracy": accuracy}
    return RecordedTrial(number=number, metrics=metrics | more.pop("metrics", {}), **more)


POINTS = [
    _point(0, 0.30, 1.0),  # the cheapest
    _point(1, 0.48, 1.5),  # the knee
    _point(2, 0.50, 4.0),  # the most accurate
    _point(3, 0.47, 2.0),  # dominated by 1
    _point(4, 0.10, 0.5),  # too inaccurate
    _point(5, 0.60, 9.0),  # too much energy
    _point(6, 0.40, 1.2, metrics={"constraint_violation.area": 0.5}),
    RecordedTrial(number=7, state="failed", cause="NaN loss"),
    _point(8, 0.49, 1.6, metrics={"margin": nan}),
]


@pytest.mark.parametrize(
    ("prefer", "order"),
    [("knee", [1, 2, 0, 3]), ("accuracy", [2, 1, 0, 3]), ("energy", [0, 1, 2, 3])],
)
def test_candidates_come_front_by_front_in_the_preferred_order(prefer, order):
    from halora.analysis.candidates import standings

    found = standings(POINTS, Gates(min_accuracy=0.25, max_energy_uj_per_token=5), prefer)
    assert [each.point.number for each in found if each.qualifies] == order
    reasons = {each.point.number: each.reasons for each in found if not each.qualifies}
    assert reasons == {
        4: ("min_accuracy 0.1 < 0.25",),
        5: ("max_energy_uj_per_token 9 > 5 uJ/token",),
        6: ("violates area by 0.5",),
        7: ("it is failed: NaN loss",),
        8: ("no_nan 1 > 0 metrics",),
    }


def test_where_nothing_lies_beyond_the_line_between_the_extremes_the_most_accurate_is_preferred():
    from halora.analysis.candidates import standings

    points = [_point(3, 0.367, 2.18), _point(5, 0.5, 3.238), _point(1, 0.667, 3.6)]  # of a demo
    assert [each.point.number for each in standings(points, Gates())] == [1, 3, 5]


def test_without_trials_nobody_stands():
    from halora.analysis.candidates import standings

    assert standings([], Gates()) == []


def test_robustness_is_asked_over_noise_time_and_kinds():
    chip = load_chip("neurram-2022")
    lines = {line.name: line for line in scenarios(chip)}
    assert {line.group for line in lines.values()} == {"noise", "time", "kind"}
    assert lines["1 day"].chip == chip
    assert lines["1 second"].chip.retention.refresh_interval_s == 1
    assert lines["10 years"].chip is None  # measured up to two days
    assert "172800" in lines["10 years"].reason.replace(",", "")
    own, twice = lines["wan-2022 1"].chip, lines["wan-2022 2"].chip
    assert own == chip
    assert twice.noise.level == 2 * chip.noise.level
    stuck = next(line.chip for name, line in lines.items() if name.startswith("stuck"))
    assert stuck.faults.occur
    assert stuck.noise == chip.noise


def test_a_chip_without_ageing_says_nothing_over_time():
    chip = load_chip("halora-2026")
    lines = scenarios(chip, strengths=[0.03])
    assert [line.reason for line in lines if line.group == "time"] == ["the chip's description has no ageing"]
    assert [line.name for line in lines if line.group == "noise"] == [
        f"gaussian {level}" for level in (0.005, 0.01, 0.02, 0.03)
    ]
    kinds = [line for line in lines if line.group == "kind"]
    assert len(kinds) == 2  # its own kind is a line above
    assert all(line.chip is not None for line in kinds)


def test_gates_that_cannot_be_measured_are_refused():
    with pytest.raises(ValidationError, match="set robustness_chips"):
        Gates(min_accuracy_at={0.02: 0.3}, robustness_chips=0)
    with pytest.raises(ValidationError):
        Gates(min_yield=1.0)


def test_a_registered_name_tells_base_task_and_chip():
    told, identity = (
        ("meta-llama/Llama-3.2-1B", "arc-easy+2*openbookqa", "halora-2026"),
        ("base", "task", "0123456789ab"),
    )
    name = registered_name(*told, identity)
    assert name == "halora.meta-llama-Llama-3-2-1B.arc-easy-2-openbookqa.halora-2026-59ff30eb"
    others = [("base", "task", "another chip"), ("base", "another task", identity[2]), ("other", *identity[1:])]
    assert len({name, *(registered_name(*told, other) for other in others)}) == 4
    assert registered_name("模型", "c++", "x" * 300, identity) == f"halora.模型.c.{'x' * 60}-59ff30eb"
