"""What a certified adapter is asked beside its certificate: other strengths of noise, time, other kinds of noise. Pure.

The chip instances of every line are the certificate's own first ones, so lines can be compared with it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from halora.errors import UserError
from halora.hardware.chip import Chip
from halora.hardware.chip_files import merge
from halora.spaces.mistakes import describe

TIMES_S = {"1 second": 1.0, "1 day": 86_400.0, "1 year": 365.25 * 86_400, "10 years": 3652.5 * 86_400}
"""Time since programming at which accuracy is asked."""

FAMILIES: dict[str, dict[str, Any]] = {
    "gaussian, 1 % of a tile's largest weight": {"noise": {"kind": "gaussian", "sigma": 0.01, "reference": "tile_max"}},
    "stuck cells, 0.1 % low and 0.01 % high": {"faults": {"stuck_low_rate": 1e-3, "stuck_high_rate": 1e-4}},
    "programming and drift of HfOx cells, 1 day": {
        "noise": {"kind": "wan-2022"},
        "retention": {"refresh_interval_s": 86_400.0},
    },
}
"""Kinds of noise, each as a change of the chip: assumed strengths, the drift as measured on NeuRRAM (Wan 2022)."""


@dataclass(frozen=True)
class Scenario:
    """One line of the table.

    Attributes:
        group: `noise`, `time` or `kind`.
        name: What is asked.
        chip: The chip to score on; none where it cannot be said.
        reason: Why not; empty where it can.
    """

    group: str
    name: str
    chip: Chip | None
    reason: str = ""


def scenarios(chip: Chip, strengths: Iterable[float] = ()) -> list[Scenario]:
    """All lines for a chip; half and twice the strength of its noise beside the strengths asked for."""
    own = chip.noise.level
    wanted = sorted({*strengths, *((own / 2, own, 2 * own) if own else ())})
    found = [Scenario("noise", strength_name(chip, strength), _at_strength(chip, strength)) for strength in wanted]
    found += _over_time(chip)
    kinds = [_changed(chip, "kind", name, change) for name, change in FAMILIES.items()]
    return found + [each for each in kinds if each.chip != chip]


def strength_name(chip: Chip, strength: float) -> str:
    """Name of the line with the chip's noise at a strength."""
    return f"{chip.noise.kind} {strength:g}"


def _at_strength(chip: Chip, strength: float) -> Chip:
    return chip.model_copy(update={"noise": chip.noise.with_level(strength)})


def _over_time(chip: Chip) -> list[Scenario]:
    if not chip.ages:
        return [Scenario("time", "later", None, "the chip's description has no ageing")]
    return [
        _changed(chip, "time", name, {"retention": {"refresh_interval_s": time_s}}) for name, time_s in TIMES_S.items()
    ]


def _changed(chip: Chip, group: str, name: str, change: Mapping[str, Any]) -> Scenario:
    try:
        changed = Chip.model_validate(merge(chip.model_dump(mode="json"), dict(change)))
    except ValidationError as error:
        return Scenario(group, name, None, "; ".join(describe(error, Chip)))
    except UserError as error:
        return Scenario(group, name, None, "; ".join(error.problems))
    return Scenario(group, name, changed)
