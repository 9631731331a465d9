"""What HaLoRA's L_reg is worth beside the task: its gradient over the task's, step by step, and the mu that changes it.

The first steps of HaLoRA on SmolLM2-135M and ARC-Easy under a preset's noise, for both ways to add the modules up. The
share is proportional to mu, so the mu at which the term is 1, 10 and 100 % of the task's gradient follows from the
median over the steps; another mu also takes another path, which the first steps do not show. docs/training.md has the
result.

    python -m benchmarks.reg_share --steps 12
"""

import argparse
from statistics import median

from halora.spaces.sweep import load_trial
from halora.training.engine import Finetuner
from halora.trial_runner import TrialRunner

_PARTS = {"": "A and B", "_a": "A", "_b": "B"}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--mu", type=float, default=0.1)
    parser.add_argument("--norm", choices=("frobenius", "spectral"), default="frobenius")
    parser.add_argument("--chip", default="halora-2026")
    arguments = parser.parse_args()
    runner = TrialRunner()
    for reduction in ("mean", "sum"):
        reports = _reports(runner, arguments, reduction)
        print(f"\n{arguments.norm}, {reduction} over the modules, mu {arguments.mu:g}")
        print("step  task gradient  share of A and B  of A      of B")
        for step, report in enumerate(reports, start=1):
            shares = "  ".join(f"{report.get(f'reg_share{part}', float('nan')):<8.4f}" for part in _PARTS)
            print(f"{step:<4d}  {report['task_grad_norm']:<13.3f}  {shares}")
        for part, name in _PARTS.items():
            found = [report[f"reg_share{part}"] for report in reports if report.get(f"reg_share{part}")]
            middle = median(found)
            mus = [f"{100 * share:g} % at mu {arguments.mu * share / middle:.2g}" for share in (0.01, 0.1, 1.0)]
            print(f"{name}: {min(found):.4f} to {max(found):.4f}, median {middle:.4f}; {', '.join(mus)}")


def _reports(runner: TrialRunner, arguments: argparse.Namespace, reduction: str) -> list[dict[str, float]]:
    """What every step saw."""
    settings = {
        "chip": arguments.chip,
        "training.method": "halora",
        "training.mu": arguments.mu,
        "training.reg_norm": arguments.norm,
        "training.reg_reduction": reduction,
        "training.learning_rate": arguments.learning_rate,
        "training.batch_size": arguments.batch_size,
        "training.steps": arguments.steps,
    }
    config = load_trial("quickstart", settings)
    base, array = runner.base(config)
    finetuner = Finetuner(base, array, runner.training_rows(config, config.training.train_rows), config)
    try:
        return [finetuner.train_steps(1) for _ in range(arguments.steps)]
    finally:
        finetuner.close()


if __name__ == "__main__":
    main()
