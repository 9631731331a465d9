"""The yield certificate: an exact lower bound on the share of chips that meet a spec. Pure arithmetic.

n chip instances are fixed beforehand and all are tried. With k failures among them the bound is that of Clopper and
Pearson (Biometrika 1934), one-sided: the share p at which n - k or more successes would be seen with a probability of
just the error level.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import beta

from halora.errors import UserError

_MOST_CHIPS = 100_000


def yield_lower_bound(chips: int, failures: int, error: float) -> float:
    """Share of chips that meet the spec at least, but for a probability of `error`; 0 if none did.

    Args:
        chips: Chips tried, n.
        failures: Those of them that missed the spec, k.
        error: Error level, one-sided.
    """
    assert 0 <= failures <= chips
    assert 0 < error < 1
    return float(beta.ppf(error, chips - failures, failures + 1)) if failures < chips else 0.0


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
        attempt: Which of the sweep's certifications this is, from 1.
        attempts: How many there may ever be; they share the error level.
        confidence: Of all of them together.
        min_accuracy: A chip meets the spec if its accuracy on the test rows is this or more.
        min_yield: Share of chips asked for.
        chips: Chips tried, fixed beforehand.
        first_chip: Number of the first in the `certify` pool; those before it served earlier attempts.
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
    attempt: int
    attempts: int
    confidence: float
    min_accuracy: float
    min_yield: float
    chips: int
    first_chip: int
    failures: int
    task: str
    rows: int
    rows_digest: str
    chip: str
    chip_hash: str
    noise: str

    @property
    def error(self) -> float:
        """Error level of this attempt."""
        return error_per_attempt(self.confidence, self.attempts)

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
        shared = "" if self.attempts == 1 else f", attempt {self.attempt} of {self.attempts} that share it"
        return (
            f"At least {100 * self.bound:.2f} % of chips reach an accuracy of {self.min_accuracy:g} on this test set "
            f"({self.rows} rows of {self.task}), under this noise model ({self.noise}; chip {self.chip} "
            f"{self.chip_hash}): {self.chips - self.failures} of {self.chips} chip instances that no search saw did. "
            f"Confidence {100 * self.confidence:g} %{shared}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones and the statement included."""
        derived = {"error": self.error, "bound": self.bound, "passed": self.passed, "statement": self.statement()}
        return asdict(self) | derived

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Certificate":
        """What `to_json` gave."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


def error_per_attempt(confidence: float, attempts: int) -> float:
    """The error level split evenly: every attempt meets chips of its own, so that the shares add up (union bound)."""
    return (1 - confidence) / attempts
