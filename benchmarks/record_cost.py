"""What recording a training report costs the loop that runs the trials, and how fast a front of many trials is shown.

Three ways record the same four metrics of one step, each in a SQLite store of its own: the sweep's recorder, with its
exporter at work; Ray's MLflowLoggerCallback; MLflow's `log_metric`, once for each metric. The time is that of the call,
as the trial waits for it. docs/lab.md has the result.

    python benchmarks/record_cost.py
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlflow import MlflowClient
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.experiment import Trial
from recorded_sweeps import begin, generated_event_log

from halora.events import Reported
from halora.records.exporter import recording
from halora.records.store import Store
from halora.spaces.sweep import SweepConfig, load_sweep

_SHOW = """
import atexit
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
from halora.cli.main import main
main()
"""

_METRICS = {"train_loss": 2.0, "train_task_loss": 1.5, "train_reg_loss": 0.5, "train_strength": 0.01}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trials", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _logging(Path(folder), arguments.steps)
        _reading(Path(folder), arguments.trials)


def _logging(folder: Path, steps: int) -> None:
    ways = {"this recorder": _ours, "MLflowLoggerCallback": _callback, "log_metric": _direct}
    times_ms = {name: way(folder / str(number), steps) for number, (name, way) in enumerate(ways.items())}
    own = median(times_ms["this recorder"])
    print(f"{'recording a step':<22}{'median ms':>12}{'99 % ms':>12}{'times ours':>12}")
    for name, found in times_ms.items():
        print(f"{name:<22}{median(found):>12.3f}{quantiles(found, n=100)[98]:>12.3f}{median(found) / own:>12.0f}")


def _timed(record: Callable[[int], None], steps: int) -> list[float]:
    times_ms = []
    for step in range(steps):
        began = time.perf_counter()
        record(step)
        times_ms.append(1000 * (time.perf_counter() - began))
        time.sleep(0.01)  # the trial trains
    return times_ms


def _sweep() -> SweepConfig:
    return load_sweep("quickstart").model_copy(update={"launch": "0" * 32})


def _ours(folder: Path, steps: int) -> list[float]:
    store, sweep = Store(folder), _sweep()
    store.sweep(sweep.name).root.mkdir(parents=True)
    store.sweep(sweep.name).sweep_file.write_text("name: quickstart\n", encoding="utf-8")
    with recording(store, sweep, print) as recorder:
        begin(recorder, sweep, 0)
        time.sleep(10)  # the exporter makes MLflow's database, as at the start of any first sweep
        found = _timed(lambda step: recorder.record(Reported(trial=0, step=step, metrics=_METRICS)), steps)
        recorder.finish(interrupted=False)
    return found


def _callback(folder: Path, steps: int) -> list[float]:
    folder.mkdir()
    callback = MLflowLoggerCallback(f"sqlite:///{folder / 'mlflow.db'}", experiment_name="beside")
    callback.setup()
    trial = Trial("beside", config={}, stub=True, storage=None)
    callback.log_trial_start(trial)
    return _timed(lambda step: callback.log_trial_result(step, trial, {"training_iteration": step, **_METRICS}), steps)


def _direct(folder: Path, steps: int) -> list[float]:
    folder.mkdir()
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run_id = client.create_run(client.create_experiment("beside")).info.run_id

    def record(step: int) -> None:
        for name, value in _METRICS.items():
            client.log_metric(run_id, name, value, step=step)

    return _timed(record, steps)


def _reading(folder: Path, trials: int) -> None:
    store, sweep = Store(folder / "large"), _sweep()
    place = store.sweep(sweep.name)
    place.root.mkdir(parents=True)
    place.sweep_file.write_text("name: quickstart\n", encoding="utf-8")
    generated_event_log(place.event_log_file, trials)
    arguments = ["front", "show", sweep.name, "--store", str(store.root)]
    print(f"\n{'front show':<22}{'seconds':>12}{'MiB':>12}   ({trials} trials)")
    for name in ("cold", "warm", "warm again"):
        began = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", _SHOW, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        peak_kib = int(run.stdout.split()[-2])
        print(f"{name:<22}{time.perf_counter() - began:>12.2f}{peak_kib / 1024:>12.0f}")


if __name__ == "__main__":
    main()
