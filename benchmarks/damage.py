"""What noise does to an untrained base, by the reference its sigma is relative to: no timing, a table of damage.

Two bases that compute the same, SmolLM2 and its twin with a Qwen2.5's weight outliers, on instances of `halora-2026`
and its variants without converters, in bf16. Prints a row per sigma, chip and base as soon as it is known; about 20
minutes of one core. Lost is the share of the clean score above chance.

    python -m benchmarks.damage
"""

import argparse
from statistics import fmean

from halora.evaluation.scoring import margin, option_scores
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import load_chip
from halora.hardware.instance import ChipInstance
from halora.hardware.noise import mean_db
from halora.training.batches import pack
from halora.training.models import load_base
from halora.training.rram import install
from halora.trial_runner import task_rows

_MODELS = ("smollm2-135m-instruct", "smollm2-135m-instruct-outliers")
_PRESETS = ("halora-2026-tensor-max", "halora-2026", "halora-2026-channel-max", "halora-2026-absolute")
_STRENGTHS = (0.005, 0.01, 0.02)


class _Base:
    """One base and the rows it is scored on."""

    def __init__(self, model: str, rows: int) -> None:
        self.base = load_base(model, "bf16")
        self.array = install(self.base.causal_lm)
        self.rows = task_rows("arc-easy", "validation", rows)
        self.packed = [pack(row, self.base.tokenizer) for row in self.rows]
        self.chance = fmean(1 / len(row.options) for row in self.rows)
        self.clean = self.margins()

    def margins(self) -> list[float]:
        """Margin of every row in nats, on the chip under the model."""
        scores = option_scores(self.base.causal_lm, self.array, self.packed, batch_size=16)
        return [margin(each, row.answer) for each, row in zip(scores, self.packed, strict=True)]

    def damage(self, preset: str, sigma: float, chips: int) -> tuple[str, ...]:
        """The figures of a row of the table."""
        lossless = {"adc": {"lossless": True}, "dac": {"lossless": True}}
        chip = load_chip({"preset": preset, "noise": {"sigma": sigma}, **lossless})
        margins, by_layer = [], []
        for seed in range(chips):
            self.array.program(ChipInstance(chip, NoiseKey(role=Role.SEARCH, chip_seed=seed), chip.noise.level))
            self.array.materialise()
            margins += self.margins()
            by_layer.append(self.array.noise_db())
        self.array.clear()
        layers = [mean_db([on_chip[name] for on_chip in by_layer]) for name in by_layer[0]]
        right, clean = fmean(m > 0 for m in margins), fmean(m > 0 for m in self.clean)
        return (
            f"{mean_db(layers):+.1f}",
            f"{max(layers):+.1f}",
            str(sum(ratio_db > 0 for ratio_db in layers)),
            f"{right:.3f}",
            f"{(clean - right) / (clean - self.chance):.0%}",
            f"{fmean(margins):+.2f}",
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100, help="validation rows of ARC-Easy")
    parser.add_argument("--chips", type=int, default=3, help="chip instances")
    arguments = parser.parse_args()
    bases = {model: _Base(model, arguments.rows) for model in _MODELS}
    print("| sigma | chip | base | noise dB, mean | worst layer | layers over 0 dB | accuracy | lost | margin |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, base in bases.items():
        accuracy = fmean(m > 0 for m in base.clean)
        print(f"| 0 | - | {model} | - | - | 0 | {accuracy:.3f} | 0% | {fmean(base.clean):+.2f} |", flush=True)
    for sigma in _STRENGTHS:
        for preset in _PRESETS:
            for model, base in bases.items():
                figures = base.damage(preset, sigma, arguments.chips)
                print(f"| {sigma:g} | {preset} | {model} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
