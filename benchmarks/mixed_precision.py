"""What converters by group of layers do to an untrained base, beside what they cost: no timing, no training.

The points that the sweep `mixed-precision` tries first (every uniform chip, and mixed ones) on instances of its chip:
energy per token, and by how many nats the options' log-likelihoods move from the clean ones. Prints a row as soon as it
is known; about a minute of one core each with the defaults.

    python -m benchmarks.mixed_precision
"""

import argparse
from collections.abc import Sequence
from statistics import fmean

from halora.evaluation.scoring import margin, option_scores
from halora.evaluation.sensitivity import mean_change
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.instance import ChipInstance
from halora.pricing import trial_energy
from halora.spaces.recipes import first_points
from halora.spaces.resolving import group_and_field
from halora.spaces.sweep import load_sweep
from halora.training.batches import PackedRow, pack
from halora.training.calibration import calibrate
from halora.training.models import load_base
from halora.training.rram import install
from halora.trial_runner import task_rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="validation rows of ARC-Easy")
    parser.add_argument("--chips", type=int, default=2, help="chip instances")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that set the converters' ranges")
    arguments = parser.parse_args()
    sweep = load_sweep("mixed-precision")
    base = load_base(sweep.resolve({}).model, "fp32")
    array = install(base.causal_lm)
    packed = [pack(row, base.tokenizer) for row in task_rows("arc-easy", "validation", arguments.rows)]
    training_rows = task_rows("arc-easy", "train", 64)
    clean = option_scores(base.causal_lm, array, packed, batch_size=16)
    groups = list(sweep.resolve({}).chip.layers)
    print(f"| {' | '.join(groups)} | µJ per token | change, nats | margin, nats |")
    print("|---" * (len(groups) + 3) + "|")
    bits = ["-"] * len(groups)
    print(f"| {' | '.join(bits)} | - | 0 | {_margin(clean, packed):+.2f} |", flush=True)
    for point in first_points(sweep):
        config = sweep.resolve(point)
        chip = config.chip
        reads = calibrate(base, array, chip, training_rows, arguments.tokens, "statistical")
        changes, margins = [], []
        for seed in range(arguments.chips):
            key = NoiseKey(role=Role.SEARCH, chip_seed=seed)
            array.program(ChipInstance(chip, key, chip.noise.level), reads, digital=True)
            scores = option_scores(base.causal_lm, array, packed, batch_size=16)
            changes.append(mean_change(clean, scores))
            margins.append(_margin(scores, packed))
        array.clear()
        by_group = {of[0]: str(value) for path, value in point.items() if (of := group_and_field(path))}
        energy = trial_energy(config).total_uj_per_token
        bits = [by_group[group] for group in groups]
        print(f"| {' | '.join(bits)} | {energy:.2f} | {fmean(changes):.2f} | {fmean(margins):+.2f} |", flush=True)


def _margin(scores: Sequence[Sequence[float]], packed: Sequence[PackedRow]) -> float:
    """Mean margin of the rows, in nats."""
    return fmean(margin(each, row.answer) for each, row in zip(scores, packed, strict=True))


if __name__ == "__main__":
    main()
