"""How far noise moves a finetuning off its noise-free trajectory, with and without HaLoRA's L_reg.

For every weight mu two runs share initialisation and data order, one without noise (ideal) and one under the chip's
noise. The gap at step t is the distance between their weight changes s B A, over all adapted layers, relative to the
length of the ideal run's path up to t. Values of mu are compared at matched task loss: each at the first step where its
ideal run reaches the lowest smoothed task loss that all of them reach. docs/lab.md has the result.

    python benchmarks/trajectory_gap.py --steps 24 --seeds 3
"""

import argparse
from statistics import fmean, stdev

import torch
from torch import Tensor

from halora.settings.trial import TrialConfig
from halora.spaces.sweep import load_trial
from halora.training.adapter import lora_pairs
from halora.training.engine import Finetuner
from halora.trial_runner import TrialRunner, task_rows

_MUS = (0.0, 0.1, 1.0, 10.0)
_SMOOTHED = 4  # steps that the task loss is averaged over

Pairs = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sigma", type=float, default=0.01)
    arguments = parser.parse_args()
    runner = TrialRunner()
    for norm in ("frobenius", "spectral"):
        runs = {(mu, seed): _gaps(runner, arguments, mu, seed, norm) for mu in _MUS for seed in range(arguments.seeds)}
        reached = max(min(losses) for losses, _ in runs.values())
        print(f"\nL_reg {norm}; matched at a task loss of {reached:.3f} nats")
        print("mu     step  gap at that step  gap at the end")
        for mu in _MUS:
            steps, matched, last = [], [], []
            for seed in range(arguments.seeds):
                losses, gaps = runs[mu, seed]
                step = next(i for i, loss in enumerate(losses) if loss <= reached)
                steps.append(step + _SMOOTHED)
                matched.append(gaps[step + _SMOOTHED - 1])
                last.append(gaps[-1])
            print(f"{mu:<6g} {fmean(steps):4.1f}  {_mean(matched)}   {_mean(last)}")


def _gaps(
    runner: TrialRunner, arguments: argparse.Namespace, mu: float, seed: int, norm: str
) -> tuple[list[float], list[float]]:
    """Smoothed task losses of the ideal run, and the relative gap after every step."""
    settings = {
        "seed": seed,
        "training.method": "halora",
        "training.mu": mu,
        "training.reg_norm": norm,
        "training.reg_reduction": "mean",
        "training.steps": arguments.steps,
        "training.batch_size": arguments.batch_size,
        "training.schedule": {"strength_start": arguments.sigma, "redraw_steps": 4},
    }
    noisy = load_trial("quickstart", settings)
    ideal = load_trial("quickstart", settings | {"chip": "ideal", "training.schedule": {"strength_start": 0.0}})
    losses, ideal_path = _trajectory(runner, ideal)
    _, noisy_path = _trajectory(runner, noisy)
    length, gaps, scale = 0.0, [], ideal.lora.alpha_over_rank
    for t in range(1, len(ideal_path)):
        length += scale * _distance(ideal_path[t], ideal_path[t - 1])
        gaps.append(scale * _distance(noisy_path[t], ideal_path[t]) / length)
    return [fmean(losses[t : t + _SMOOTHED]) for t in range(len(losses) - _SMOOTHED + 1)], gaps


def _trajectory(runner: TrialRunner, config: TrialConfig) -> tuple[list[float], list[Pairs]]:
    """Task loss of every step, and the adapter before the first and after every step."""
    base, array = runner.base(config)
    finetuner = Finetuner(base, array, list(task_rows(config.task, "train", config.training.train_rows)), config)
    try:
        losses, path = [], [_copy(base.causal_lm)]
        while not finetuner.done:
            losses.append(finetuner.train_step().task_loss)
            path.append(_copy(base.causal_lm))
    finally:
        finetuner.close()
    return losses, path


def _copy(model: torch.nn.Module) -> Pairs:
    return [(a.detach().clone(), b.detach().clone()) for a, b in lora_pairs(model)]


def _distance(one: Pairs, other: Pairs) -> float:
    """Frobenius norm of the difference of all B A, by rank-sized products."""
    total = 0.0
    for (a1, b1), (a2, b2) in zip(one, other, strict=True):
        a, b = torch.cat([a1, a2]), torch.cat([b1, -b2], dim=1)  # B1 A1 - B2 A2 as one product
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return max(total, 0.0) ** 0.5


def _mean(values: list[float]) -> str:
    spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
