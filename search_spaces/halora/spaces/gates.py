"""What an adapter has to pass before it may be deployed."""

from pydantic import Field, model_validator

from halora.strict_model import StrictModel


class Gates(StrictModel):
    """Bounds on a candidate, and how many chips they are shown on."""

    min_accuracy: float = Field(default=0.0, ge=0, le=1)
    """Accuracy that a chip needs; a trial is a candidate if its mean over the search's chips reaches it.

    Certified, the lower end of the 95 % interval of the mean over chips and test rows has to reach it."""
    min_accuracy_at: dict[float, float] = Field(default_factory=dict)
    """Accuracy needed at other strengths of the chip's noise, by the strength in the noise model's own measure: of the
    lower end of the 95 % interval of the mean over `robustness_chips` and test rows."""
    max_drop: float | None = Field(default=None, ge=0, le=1)
    """Clean accuracy less the mean over chips; certified, the upper end of its 95 % interval."""
    max_energy_uj_per_token: float | None = Field(default=None, gt=0)
    max_latency_us_per_token: float | None = Field(default=None, gt=0)
    """Time per token, in the phase and for the sequences of `evaluation`."""
    min_tokens_per_s: float | None = Field(default=None, gt=0)
    max_power_w: float | None = Field(default=None, gt=0)
    max_area_mm2: float | None = Field(default=None, gt=0)
    max_adapter_kb: float | None = Field(default=None, gt=0)
    """Size of the adapter's weights as stored, in units of 1,000 bytes."""
    max_rank: int | None = Field(default=None, ge=1)
    """LoRA rank, as a server of adapters allows it (vLLM's `max_lora_rank`)."""
    servable: bool = False
    """Whether vLLM has to be able to serve it beside its base: no DoRA, a rank of 512 at most."""
    max_ci_halfwidth: float | None = Field(default=None, gt=0, le=1)
    """Half of the 95 % interval of the accuracy over test rows and certified chips."""
    min_chips: int = Field(default=1, ge=1)
    """Chip instances that a certificate rests on at least; the wanted yield may ask for more."""
    min_yield: float = Field(default=0.95, gt=0, lt=1)
    """Share of chips that has to reach `min_accuracy`, shown by the certificate's lower bound."""
    failures: int = Field(default=0, ge=0)
    """Certified chips that may miss it all the same; more of them ask for more chips."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of all certifications begun in a store on the same test rows, whatever sweep they are of, together."""
    candidates: int = Field(default=1, ge=1)
    """Candidates that a selection certifies at most, the preferred ones in turn, until one passes."""
    test_rows: int | None = Field(default=None, ge=2)
    """Rows of the test split, in a fixed shuffled order; all of them when left out."""
    robustness_chips: int = Field(default=5, ge=0)
    """Chip instances for every line of the robustness table, over noise, time and kinds of noise; none for 0."""

    @model_validator(mode="after")
    def _levels_are_measured(self) -> "Gates":
        if self.min_accuracy_at and not self.robustness_chips:
            raise ValueError("min_accuracy_at is measured for the robustness table: set robustness_chips to 1 or more")
        return self
