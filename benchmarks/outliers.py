"""What the largest weights in SRAM give back, untrained and trained: no timing, accuracies with their intervals.

SmolLM2 and its twin with a Qwen2.5's weight outliers on ARC-Easy, on instances of `halora-2026` without converters
under two readings of sigma, and on chips of measured cells. Adapters of rank 4 are trained for 120 steps of 16 rows
at 1e-3 with nothing in SRAM, `noise_lora` at sigma 0.01 of the tensor's largest weight, one seed each. Accuracies are
over validation rows that no training or search has seen, on the same chips; in brackets 95 % intervals over rows and
chips. A row is kept as soon as it is known, adapters in `.cache/outliers`: interrupt it and start it again as you like.
About four hours of one core with bfloat16; without, seven with `--dtype fp32`.

    python -m benchmarks.outliers
"""

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from halora.evaluation.chips import ChipScores
from halora.evaluation.intervals import share
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import load_trial
from halora.trial_folder import adapter_folder
from halora.trial_runner import TrialRunner

_LOSSLESS = {"adc": {"lossless": True}, "dac": {"lossless": True}}
_READINGS = {"halora-2026-tensor-max": (0.01, 0.02, 0.04), "halora-2026": (0.02, 0.04, 0.08)}
_SMOLLM2, _TWIN = "smollm2-135m-instruct", "smollm2-135m-instruct-outliers"
_UNTRAINED = "untrained"
_METHODS = ("lora", "noise_lora", _UNTRAINED)
_FIRST_ROW = 200
_RESULTS = Path(__file__).parent / "outliers-results.jsonl"
_ADAPTERS = Path(__file__).parents[1] / ".cache" / "outliers"


def _config(
    model: str, chip: dict[str, Any], share_in_sram: float, strengths: tuple[float, ...], size: Any
) -> TrialConfig:
    evaluation = {"rows": size.rows, "chip_instances": size.chips, "noise_strengths": list(strengths)}
    settings = {
        "model": model,
        "chip": {**chip, **_LOSSLESS, "mapping": {"outliers": {"share": share_in_sram}}},
        "training.dtype": size.dtype,
        **{f"evaluation.{name}": value for name, value in evaluation.items()},
    }
    return load_trial("quickstart", settings)


def _cells() -> Iterator[tuple[str, str, str, dict[str, Any], tuple[float, ...]]]:
    """Base, adapter, name of the chip, the chip, and further strengths: the rows of the table, most wanted first."""
    for model in (_SMOLLM2, _TWIN):
        for preset in ("cmo-hfox", "neurram-2022"):
            yield model, _UNTRAINED, preset, {"preset": preset}, ()
    for preset, (own, *others) in _READINGS.items():
        chip = {"preset": preset, "noise": {"sigma": own}}
        for method in _METHODS:
            yield _SMOLLM2, method, preset, chip, tuple(others)
        yield _TWIN, _UNTRAINED, preset, chip, tuple(others)


def _trained(runner: TrialRunner, method: str, dtype: str, folder: Path) -> Path | None:
    """The adapter's folder; none for the untrained base."""
    if method == _UNTRAINED:
        return None
    settings = {
        "chip": {"preset": "halora-2026-tensor-max", **_LOSSLESS},
        "training.method": method,
        "training.dtype": dtype,
        "training.steps": 120,
        "training.batch_size": 16,
        "training.learning_rate": 1e-3,
        "training.report_every": 20,
        "training.schedule": {"strength_start": 0.01, "redraw_steps": 4},
        "lora.rank": 4,
    }
    training = runner.train(load_trial("quickstart", settings), folder)
    while not training.done:
        training.advance()
    training.close()
    return adapter_folder(folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100, help=f"validation rows of ARC-Easy, from {_FIRST_ROW} on")
    parser.add_argument("--chips", type=int, default=10, help="chip instances")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.001], help="shares of the weights in SRAM")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=_METHODS, help="adapters to look at")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the frozen weights and products")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="rows that are known, and where new ones go")
    size = parser.parse_args()
    known = [json.loads(line) for line in size.results.read_text().splitlines()] if size.results.exists() else []
    print("| base | adapter | chip | share in SRAM | noise dB | clean | accuracy at each strength |")
    print("|---|---|---|---|---|---|---|")
    runner = TrialRunner()
    trained = cache(lambda method: _trained(runner, method, size.dtype, _ADAPTERS / f"{method}-{size.dtype}"))
    for model, method, name, chip, others in _cells():
        if method not in size.methods:
            continue
        for share_in_sram in size.shares:
            row = {"base": model, "adapter": method, "chip": name, "share": share_in_sram}
            row |= {"rows": size.rows, "chips": size.chips, "dtype": size.dtype}
            found = next((each for each in known if row.items() <= each.items()), None)
            if found is None:
                config = _config(model, chip, share_in_sram, others, size)
                scores = runner.evaluate(config, trained(method), first_row=_FIRST_ROW)
                found = row | _measured([config.chip.noise.level, *others], scores)
                with size.results.open("a", encoding="utf-8") as results:
                    results.write(json.dumps(found) + "\n")
            _print(found)


def _measured(strengths: list[float], scores: ChipScores) -> dict[str, Any]:
    """What a row says beside what it is of."""
    right = (share(np.array(each)) for each in (scores.noisy_correct, *scores.strength_correct))
    accuracies = [
        {"strength": strength, "mean": round(each.mean, 4), "low": round(each.low, 4), "high": round(each.high, 4)}
        for strength, each in zip(strengths, right, strict=True)
    ]
    clean = round(fmean(scores.clean_correct), 4)
    return {"noise_db": round(fmean(scores.noise_db), 2), "clean": clean, "accuracies": accuracies}


def _print(row: dict[str, Any]) -> None:
    said = "; ".join("{strength:g}: {mean:.3f} [{low:.3f}, {high:.3f}]".format(**each) for each in row["accuracies"])
    figures = f"{row['noise_db']:.1f} | {row['clean']:.3f} | {said}"
    print(f"| {row['base']} | {row['adapter']} | {row['chip']} | {row['share']:g} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
