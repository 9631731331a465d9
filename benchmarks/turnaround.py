"""A sweep of short trials from its command to its end, against plain Ray Tune with a fresh process per trial.

16 HaLoRA trials of 10 steps of 8 rows, the noise redrawn at every step, each scored on 40 rows, clean and on one chip
instance; two at a time with one thread each. Ours is `halora sweep launch` with all it records. The other
(`plain_sweep.py`) loads the base from the same converted safetensors.

    python -m benchmarks.turnaround
"""

import json
import os
import sys
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import yaml

from benchmarks.harness import Work, interleave, parser, record, rows_done, run, save
from benchmarks.plain_sweep import RESULTS_FILE
from benchmarks.ways import CHIP, SIGMA, row_order
from halora.records.store import Store
from halora.settings.training import Dtype
from halora.spaces.sweep import SweepConfig, load_sweep
from halora.training.batches import pack_answer
from halora.training.models import find_model
from halora.trial_runner import TrialRunner


def main() -> None:
    """Measure and save."""
    command = parser(__doc__, rounds=5, threads=None)
    command.add_argument("--trials", type=int, default=16, help="trials of a sweep")
    command.add_argument("--dtype", choices=get_args(Dtype), default="bf16", help="of the weights")
    arguments = command.parse_args()
    sweep = short_sweep(arguments.trials, arguments.dtype)
    seconds = interleave({"ours": OurSweep(sweep), "plain": PlainSweep(sweep)}, arguments.rounds, warm_up=0)
    case = f"turnaround/{arguments.dtype}, {arguments.trials} trials, against plain Ray Tune"
    save([record(case, seconds["ours"], seconds["plain"])], arguments.results)


def short_sweep(trials: int, dtype: Dtype, model: str = "smollm2-135m-instruct", task: str = "arc-easy") -> SweepConfig:
    """Our sweep."""
    content = {
        "name": "turnaround",
        "family": "benchmarks",
        "trials": trials,
        "concurrent": 2,
        "trial": {
            "model": model,
            "task": task,
            "chip": CHIP,
            "training": {
                "dtype": dtype,
                "steps": 10,
                "batch_size": 8,
                "schedule": {"strength_start": SIGMA, "redraw_steps": 1},
                "report_every": 10,
                "train_rows": 256,
            },
            "evaluation": {"rows": 40, "chip_instances": 1},
        },
        "space": {
            "training.learning_rate": {"low": 5e-4, "high": 5e-3, "log": True},
            "training.mu": {"low": 1e-3, "high": 1.0, "log": True},
        },
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 10.0},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_sweep(str(path))


class OurSweep:
    """The sweep launched as a user launches it, each time in a store of its own."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep, self._config = sweep, sweep.resolve({})
        runner = TrialRunner()
        tokenizer = runner.base(self._config)[0].tokenizer
        rows = runner.training_rows(self._config, self._config.training.train_rows)
        taken = chain.from_iterable(islice(row_order(self._config, rows), self._config.training.steps))
        self._loss_tokens = sum(len(pack_answer(rows[i], tokenizer).sources) for i in taken)

    def __call__(self) -> Work:
        """Run it."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "sweep.yaml"
            path.write_text(yaml.safe_dump(self._sweep.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
            store = Store(Path(folder) / "store")
            halora = Path(sys.executable).with_name("halora")
            run([str(halora), "sweep", "launch", str(path), "--store", str(store.root)])
            trials = [store.sweep(self._sweep.name).trial(number) for number in range(self._sweep.trials)]
            rows = rows_done(trials, self._config.training.batch_size)
        dtype, threads = self._config.training.dtype, threads_per_trial(self._sweep)
        return Work(rows, dtype, threads, len(trials) * self._loss_tokens)


class PlainSweep:
    """The user's sweep: told the same rows, and which of them each step takes."""

    def __init__(self, sweep: SweepConfig) -> None:
        config = sweep.resolve({})
        runner = TrialRunner()
        rows = runner.training_rows(config, config.training.train_rows)
        self._job = {
            "trials": sweep.trials,
            "concurrent": sweep.concurrent,
            "threads": threads_per_trial(sweep),
            "seed": sweep.seed,
            "model": find_model(config.model, config.training.dtype),
            "dtype": config.training.dtype,
            "sigma": SIGMA,
            "rank": config.lora.rank,
            "alpha": config.lora.rank * config.lora.alpha_over_rank,
            "train_rows": [asdict(row) for row in rows],
            "order": list(islice(row_order(config, rows), config.training.steps)),
            "scored_rows": [asdict(row) for row in runner.scored_rows(config)],
        }

    def __call__(self) -> Work:
        """Run it."""
        with TemporaryDirectory() as folder:
            (Path(folder) / "job.json").write_text(json.dumps(self._job), encoding="utf-8")
            run([sys.executable, "-m", "benchmarks.plain_sweep", folder])
            trials = json.loads((Path(folder) / RESULTS_FILE).read_text(encoding="utf-8"))
        (threads,) = {trial["threads"] for trial in trials}
        (dtype,) = {trial["dtype"] for trial in trials}
        rows = sum(trial["trained_rows"] + trial["scored_rows"] for trial in trials)
        return Work(rows, dtype, threads, sum(trial["loss_tokens"] for trial in trials))


def threads_per_trial(sweep: SweepConfig) -> int:
    """Of torch in each trial's process: its share of the cores."""
    return max((os.cpu_count() or 1) // sweep.concurrent, 1)


if __name__ == "__main__":
    main()
