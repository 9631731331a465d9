"""Whether training under recycled draws of the noise ends where training under true draws does.

For every seed two trainings share initialisation, data order and noise level; the noise is redrawn at every step, as
training draws it (a stretch of a table with random signs) and truly. Both adapters are scored on the same rows and chip
instances, whose draws are always true. docs/lab.md has the result.

    python -m benchmarks.recycled_noise --steps 12 --seeds 6
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.ways import trial
from halora.evaluation.intervals import crossed
from halora.hardware import draws
from halora.hardware.addressing import NoiseKey
from halora.settings.trial import TrialConfig
from halora.trial_folder import adapter_folder
from halora.trial_runner import TrialRunner


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--chips", type=int, default=2)
    arguments = parser.parse_args()
    runner = TrialRunner()
    recycled, true = [], []
    for seed in range(arguments.seeds):
        config = trial(
            {
                "seed": seed,
                "training.mu": 0.01,
                "training.steps": arguments.steps,
                "evaluation": {"rows": arguments.rows, "chip_instances": arguments.chips},
            }
        )
        recycled.append(margins(runner, config))
        with true_draws():
            true.append(margins(runner, config))
        print(f"seed {seed}: recycled {recycled[-1].mean():.3f}, true {true[-1].mean():.3f} nats", flush=True)
    for name, values in {
        "recycled": np.array(recycled),
        "true": np.array(true),
        "recycled less true": np.array(recycled) - np.array(true),
    }.items():
        found = crossed(values).interval()
        print(f"margin in nats, {name}: {found.mean:.3f}, 95 % interval [{found.low:.3f}, {found.high:.3f}]")


def margins(runner: TrialRunner, config: TrialConfig) -> np.ndarray:
    """Margin of every scored row after training, the mean over chip instances, `(rows,)`."""
    with tempfile.TemporaryDirectory() as folder:
        training = runner.train(config, Path(folder))
        while not training.done:
            training.advance()
        training.close()
        return np.array(runner.evaluate(config, adapter_folder(Path(folder))).noisy).mean(axis=0)


@contextmanager
def true_draws() -> Iterator[None]:
    """Have training chips draw every normal anew, too."""

    def drawn(key: NoiseKey, like: Tensor) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(key.standard_normal(tuple(like.shape))).to(like), like.new_ones(len(like), 1)

    with mock.patch.object(draws, "_recycled", drawn):
        yield


if __name__ == "__main__":
    main()
