"""Many short trials over four Ray nodes, each a raylet of its own on this machine, against plain Ray Tune.

Both run the same trainable on SmolLM2-135M, four trials at once with one thread each: one HaLoRA step of two rows,
scored on four rows, clean and on a chip. Ours is `halora sweep launch --address` with all that it records, checks and
watches; the other is Ray Tune with Optuna's sampler and reused actors, and keeps what Tune keeps. Printed besides:
trials per minute, the highest sum of the workers' memory (PSS), and the share of the cores that they used.

    python -m benchmarks.cluster
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

from benchmarks.harness import Work, interleave, parser, record, rows_done, run, save
from halora.trial_folder import RESULT_FILE

NODES = 4
BATCH_SIZE = 2
_SAMPLE_S = 2.0


def main() -> None:
    """Measure and save; with `--plain FOLDER ADDRESS`, be the plain sweep."""
    command = parser(__doc__, rounds=1, threads=None)
    command.add_argument("--trials", type=int, default=200, help="trials of a sweep")
    command.add_argument("--plain", nargs=2, metavar=("FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    arguments = command.parse_args()
    if arguments.plain:
        run_plain(Path(arguments.plain[0]), arguments.plain[1], arguments.trials)
        return
    with four_nodes() as address:
        ways = {"ours": Sweep(address, arguments.trials, "ours"), "plain": Sweep(address, arguments.trials, "plain")}
        seconds = interleave(ways, arguments.rounds, warm_up=0)
        peaks = {name: way.peak_gib for name, way in ways.items()}
        shares = {name: way.used for name, way in ways.items()}
    case = f"cluster/{arguments.trials} trials over {NODES} nodes, against plain Ray Tune"
    save(
        [
            record(case, seconds["ours"], seconds["plain"]),
            record(f"{case}: memory", peaks["ours"], peaks["plain"], "GiB"),
            record(f"{case}: use of the cores", shares["ours"], shares["plain"], "of them"),
        ],
        arguments.results,
    )
    for name, took in seconds.items():
        print(f"{name}: {[round(60 * arguments.trials / each, 1) for each in took]} trials per minute", file=sys.stderr)


class Sweep:
    """One of the two ways, started as a user starts it.

    Attributes:
        peak_gib: Highest memory of the workers in each round.
        used: Share of this machine's cores that they used in each round.
    """

    def __init__(self, address: str, trials: int, way: str) -> None:
        self._address, self._trials, self._way = address, trials, way
        self.peak_gib: list[float] = []
        self.used: list[float] = []

    def __call__(self) -> Work:
        """Run it."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "sweep.yaml"
            path.write_text(yaml.safe_dump(sweep_of(self._trials)), encoding="utf-8")
            own = [str(Path(sys.executable).with_name("halora")), "sweep", "launch", str(path), "--follow"]
            own += ["--address", self._address, "--store", f"{folder}/store"]
            other = [sys.executable, "-m", "benchmarks.cluster", "--trials", str(self._trials)]
            other += ["--plain", folder, self._address]
            with watched() as seen:
                run(own if self._way == "ours" else other)
            work = work_in(Path(folder))
        self.peak_gib.append(seen["peak"] / 2**30)
        self.used.append(seen["cpu_s"] / seen["elapsed_s"] / (os.cpu_count() or 1))
        return work


def work_in(folder: Path) -> Work:
    """What the trials below a folder did; the trainable is the same, so their rows tell, and tokens are not counted."""
    trials = [result.parent for result in folder.glob(f"**/trials/*/{RESULT_FILE}")]
    return Work(rows_done(trials, BATCH_SIZE), "fp32", 1, loss_tokens=0)


def sweep_of(trials: int) -> dict[str, Any]:
    """The sweep as a file has it."""
    return {
        "name": "cluster",
        "family": "benchmarks",
        "trials": trials,
        "concurrent": NODES,
        "trial": {
            "model": "smollm2-135m-instruct",
            "task": "arc-easy",
            "chip": {"preset": "ideal", "noise": {"kind": "gaussian", "reference": "tensor_max", "sigma": 0.01}},
            "training": {"steps": 1, "batch_size": BATCH_SIZE, "report_every": 1, "train_rows": 64},
            "evaluation": {"rows": 4, "chip_instances": 1},
        },
        "space": {"training.learning_rate": {"low": 5e-4, "high": 5e-3, "log": True}},
        "search": {"sampler": "random"},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 10.0},
    }


def run_plain(folder: Path, address: str, trials: int) -> None:
    """The same trials by plain Ray Tune."""
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    from halora.events import Reported, Scored
    from halora.heartbeat import Heartbeats
    from halora.settings.trial import Goal
    from halora.spaces.sweep import load_sweep
    from halora.trainable import HaloraTrainable

    sweep = load_sweep(str(folder / "sweep.yaml"))
    ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    heartbeats = ray.remote(num_cpus=0)(Heartbeats).options(name="heartbeats").remote()

    class Plain(HaloraTrainable):
        """The trainable, told by Tune what to search; it reports once, as every report has to hold the accuracy."""

        def step(self) -> dict[str, Any]:
            while isinstance(event := super().step()["event"], Reported):
                pass
            assert isinstance(event, Scored), event
            return {"accuracy": event.metrics["accuracy"], "done": True}

        def _begin(self, config: dict[str, Any]) -> None:
            trial = sweep.resolve({"training.learning_rate": config["learning_rate"]})
            scored = trial.evaluation
            super()._begin(
                {
                    "job": self.trial_id,
                    "number": 0,
                    "folder": str(folder / "trials" / self.trial_id),
                    "trial": trial.model_dump(mode="json"),
                    "goal": asdict(Goal(trial.training.steps, scored.chip_instances, scored.rows)),
                    "heartbeats": config["heartbeats"],
                }
            )

    results = tune.Tuner(
        tune.with_resources(Plain, {"cpu": 1}),
        param_space={"learning_rate": tune.loguniform(5e-4, 5e-3), "heartbeats": ("heartbeats", 60.0)},
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric="accuracy", mode="max"),
            num_samples=trials,
            max_concurrent_trials=NODES,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the trainable keeps its own
            verbose=0,
        ),
    ).fit()
    assert not results.errors
    ray.kill(heartbeats)


@contextmanager
def four_nodes() -> Iterator[str]:
    """Ray with a head that runs no trial and four nodes of one core, as Ray's own tests start it; its address."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield str(cluster.address)
    finally:
        cluster.shutdown()


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Memory and time of the workers while the block runs: highest `peak` in bytes, `cpu_s`, `elapsed_s`."""
    seen: dict[str, float] = {"peak": 0.0}
    spent: dict[int, float] = {}
    began, ended = time.perf_counter(), threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            total = 0
            for process in psutil.process_iter(["cmdline"]):
                name = " ".join(process.info["cmdline"] or [])
                if "ray::" in name and ("Trainable" in name or "Plain" in name):
                    try:
                        total += process.memory_full_info().pss
                        times = process.cpu_times()
                        spent[process.pid] = times.user + times.system
                    except psutil.Error:
                        continue
            seen["peak"] = max(seen["peak"], total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen |= {"cpu_s": sum(spent.values()), "elapsed_s": time.perf_counter() - began}


if __name__ == "__main__":
    main()
