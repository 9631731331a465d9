"""Energy, area and time of single events, each with its source, from `constants.yaml`."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, assert_never

import yaml

from halora.errors import UserError

AdcCosts = Literal["isaac", "survey", "linear"]
"""Energy per conversion: ISAAC's 32 nm table, the regression over the published ADC survey, or linear in the bits."""

_SURVEY_BITS = range(4, 15)


class AdcCost(NamedTuple):
    """What one converter takes.

    Attributes:
        conversion_pj: Energy of one conversion, in picojoule.
        area_um2: Area of one converter, in square micrometre.
        conversion_ns: Time of one conversion, in nanoseconds.
    """

    conversion_pj: float
    area_um2: float
    conversion_ns: float


@cache
def energy_constants() -> dict[str, Any]:
    """Value by name of every constant in `constants.yaml`."""
    entries = yaml.safe_load((files("halora.hardware") / "constants.yaml").read_text(encoding="utf-8"))
    return {name: entry["value"] for name, entry in entries.items()}


@cache
def constant_names() -> frozenset[str]:
    """Constants that are one number, which a chip may replace."""
    return frozenset(name for name, value in energy_constants().items() if isinstance(value, int | float))


def adc_cost(costs: AdcCosts, bits: int, constants: Mapping[str, Any], where: str = "chip.adc.bits") -> AdcCost:
    """Energy, area and time of a converter.

    Args:
        costs: `isaac`: the table of Shafiee et al. (ISCA 2016), 4 to 10 bits. `survey`: the regression of
            hwcomponents-adc over Murmann's survey (arXiv 2404.06553), leakage included, `bits` taken as effective
            ones; optimistic, as it gives the best published designs. `linear`: energy and area per bit. Time goes with
            the bits, one comparison each; that of `survey` is the rate asked of it.
        bits: Resolution.
        constants: Values by the names of `constants.yaml`.
        where: Field that the bits are from, for whom they are wrong.

    Raises:
        UserError: The source does not cover these bits, or a constant it needs is zero.
    """
    match costs:
        case "isaac":
            table: dict[int, float] = constants["adc_isaac_pj"]
            _check_range("isaac", bits, table, where)
            return AdcCost(table[bits], constants["adc_isaac_um2"][bits], bits * constants["adc_isaac_ns_per_bit"])
        case "survey":
            _check_range("survey", bits, _SURVEY_BITS, where)
            return _survey_cost(bits, constants["adc_survey_node_nm"], constants["adc_survey_rate_msps"])
        case "linear":
            per_bit = (constants[f"adc_linear_{unit}_per_bit"] for unit in ("pj", "um2", "ns"))
            return AdcCost(*(bits * each for each in per_bit))
        case unknown:
            assert_never(unknown)


def _check_range(costs: AdcCosts, bits: int, covered: range | Mapping[int, float], where: str) -> None:
    if bits not in covered:
        raise UserError(f"{where}: the costs '{costs}' cover {min(covered)} to {max(covered)} bits, got {bits}")


@cache
def _survey_cost(bits: int, node_nm: float, rate_msps: float) -> AdcCost:
    if problems := [
        f"chip.costs.{name}: must be above 0, got {value:g}"
        for name, value in (("adc_survey_node_nm", node_nm), ("adc_survey_rate_msps", rate_msps))
        if value <= 0
    ]:
        raise UserError(problems)
    from hwcomponents_adc import ADC

    converter = ADC(n_bits=bits, tech_node=node_nm * 1e-9, throughput=rate_msps * 1e6)
    return AdcCost(float(converter.get_energy()) * 1e12, float(converter.area) * 1e12, 1000 / rate_msps)
