"""The yield certificate: an exact lower bound on the share of chips that meet a spec. Pure arithmetic.

n chip instances are fixed beforehand and all are tried. With k failures among them the bound is that of Clopper and
Pearson (Biometrika 1934), one-sided: the share p at which n - k or more successes would be seen with a probability of
just the error level.

What a chip is here: one draw of everything that differs from cell to cell and from read to read under one description.
Not modelled: what differs from die to die, wafer to wafer or lot to lot, so the yield is none of manufacturing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from scipy.special import betaincinv

from halora.errors import UserError

_MOST_CHIPS = 100_000
_LEAST_LEFT = 1e-12
"""What differs by rounding alone from nothing left of an error level."""


def yield_lower_bound(chips: int, failures: int, error: float) -> float:
    """Share of chips that meet the spec at least, but for a probability of `error`; 0 if none did.

    Args:
        chips: Chips tried, n.
        failures: Those of them that missed the spec, k.
        error: Error level, one-sided.
    """
    assert 0 <= failures <= chips
    assert 0 < error < 1
    return float(betaincinv(chips - failures, failures + 1, error)) if failures < chips else 0.0


@cache
def chips_needed(min_yield: float, error: float, failures: int = 0) -> int:
    """Fewest chips with which the bound reaches `min_yield` though `failures` of them miss the spec.

    59 for a yield of 95 % at an error level of 5 % without a failure, ln(0.05) / ln(0.95) rounded up.

    Raises:
        UserError: It takes more than 100,000.
    """
    low, high = failures, failures + 1
    while yield_lower_bound(high, failures, error) < min_yield:
        low, high = high, 2 * high
        if low > _MOST_CHIPS:
            raise UserError(f"a yield of {min_yield:g} takes more than {_MOST_CHIPS:,} chips", "ask for a lower one")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if yield_lower_bound(middle, failures, error) >= min_yield else (middle, high)
    return high


@dataclass(frozen=True)
class Certificate:
    """What was shown of one adapter on chips that no search saw.

    Attributes:
        sweep: Name of the sweep.
        trial: Number of the trial.
        launch: Identity of the sweep's launch.
        attempt: Which of the launch's certifications this is, from 1.
        earlier: Certifications begun before it in its store, of whatever sweep, on any of its test rows.
        spent: Sum of their error levels.
        confidence: Of all of them together with this one.
        min_accuracy: A chip meets the spec if its accuracy on the test rows is this or more.
        scoring: How answers are chosen, see `EvaluationSettings.scoring`.
        min_yield: Share of chips asked for.
        chips: Chips tried, fixed beforehand: those from 0 on of `series`.
        failures: Chips that missed the spec.
        task: Task of the test rows.
        rows: Number of test rows.
        rows_digest: Digest of their text.
        chip: Name of the chip's description.
        chip_hash: Its content hash.
        noise: The noise model in a few words.
    """

    sweep: str
    trial: int
    launch: str
    attempt: int
    earlier: int
    spent: float
    confidence: float
    min_accuracy: float
    scoring: str
    min_yield: float
    chips: int
    failures: int
    task: str
    rows: int
    rows_digest: str
    chip: str
    chip_hash: str
    noise: str

    @property
    def series(self) -> str:
        """Which series of the `certify` pool its chips are of; no other certification has it."""
        return f"{self.launch}/{self.attempt}"

    @property
    def error(self) -> float:
        """Error level of this attempt."""
        return error_share(self.confidence, self.earlier, self.spent)

    @property
    def bound(self) -> float:
        """Lower bound on the share of chips that meet the spec."""
        return yield_lower_bound(self.chips, self.failures, self.error)

    @property
    def passed(self) -> bool:
        """Whether the bound reaches the yield asked for."""
        return self.bound >= self.min_yield

    def statement(self) -> str:
        """What may be said, with its conditions."""
        said = [
            f"At least {100 * self.bound:.2f} % of chips reach an accuracy of {self.min_accuracy:g} on this test set "
            f"({self.rows} rows of {self.task}, scored by {self.scoring}), under this noise model ({self.noise}; chip "
            f"{self.chip} {self.chip_hash}): {self.chips - self.failures} of {self.chips} chip instances that no "
            f"search saw did (series {self.series}, this certification's own).",
            "A chip is a draw of its cells' errors and reads under this one description; how dies, wafers and lots "
            "differ is not modelled.",
        ]
        level = f"of an error level of {1 - self.confidence:.3g} it takes {self.error:.3g}"
        if not self.earlier:
            return " ".join(
                [
                    *said,
                    f"Confidence {100 * self.confidence:g} %: {level}, as the first on these rows in this store; other "
                    "stores are not counted.",
                ]
            )
        before = "the one" if self.earlier == 1 else f"the {self.earlier}"
        return " ".join(
            [
                *said,
                f"Confidence {100 * self.confidence:g} % for this certification and {before} begun before it on these "
                f"rows in this store together: {level}, after {self.spent:.3g}; other stores are not counted.",
                "The rows are the same as then: the more often adapters are chosen by results on them, the further "
                "these lie above results on new rows, of which this says nothing.",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones and the statement included."""
        derived = {"error": self.error, "bound": self.bound, "passed": self.passed, "statement": self.statement()}
        return asdict(self) | derived

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Certificate":
        """What `to_json` gave."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


def error_share(confidence: float, earlier: int, spent: float) -> float:
    """What the next certification takes of an error level that is `1 - confidence` for all of them together.

    One part in `earlier + 2` of what is left: at an unchanged confidence the k-th takes 1 / (k (k + 1)) of the level,
    and k of them k / (k + 1), so that some is left for any number (union bound; every attempt meets chips of its own).

    Args:
        confidence: Asked for.
        earlier: Certifications begun before.
        spent: Sum of their error levels.
    """
    left = 1 - confidence - spent
    return left / (earlier + 2) if left > _LEAST_LEFT else 0.0
