"""The `halora` command in processes of its own, each with a real Ray, and what MLflow holds of its sweeps."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

HALORA = Path(sys.executable).parent / "halora"


def _environment(store):
    own = {"HALORA_STORE": str(store), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return os.environ | own


def halora(store, *args, cwd=None, timeout=1200):
    """Run the command, in the folder that holds the store."""
    return subprocess.run(
        [HALORA, *map(str, args)],
        env=_environment(store),
        cwd=cwd or store.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Background:
    """The command in a session of its own, as in a terminal; its stderr is read line by line."""

    def __init__(self, store, *args):
        self.lines = []
        self.process = subprocess.Popen(
            [HALORA, *map(str, args)],
            env=_environment(store),
            cwd=store.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self):
        """Its stderr so far."""
        return "".join(self.lines)

    def wait_for(self, text, timeout=1000, after=0):
        """Wait until a line of stderr holds the text, leaving out as many lines as came `after` which it is to come."""
        end = time.monotonic() + timeout
        while text not in "".join(self.lines[after:]):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, f"no '{text}' in: {self.said}"
            time.sleep(0.05)

    def end(self, timeout=1200):
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def family(self):
        """All processes it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self):
        """The processes among them that train."""
        found = []
        for process in self.family():
            with suppress(psutil.NoSuchProcess):  # it ends at this moment
                if "Trainable" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self):
        """End it and whatever it started, if anything is left."""
        left = [*self.family(), self.process] if self.process.poll() is None else []
        for process in left:
            process.kill()


@contextmanager
def background(store, *args):
    running = Background(store, *args)
    try:
        yield running
    finally:
        running.kill()


def training_steps(said, number):
    """Steps of a trial's reports in the order they were told."""
    return [int(step) for step in re.findall(rf"trial +{number} training +step (\d+)/", said)]


def client_of(store):
    """MLflow's client of a store's own database."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store / 'mlflow.db'}")


def runs(store, name, kind="trial"):
    """MLflow's runs of a sweep, by trial number."""
    client = client_of(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`halora.sweep` = '{name}' and tags.`halora.kind` = '{kind}'")
    return sorted(found, key=lambda run: int(run.data.tags.get("halora.trial", -1)))


def study_of(store, name):
    """Optuna's study of a sweep, read from its own storage: the journal file, or the database of studies."""
    import optuna

    folder = store / "sweeps" / name
    if (journal := folder / "study.journal").exists():
        backend = optuna.storages.journal.JournalFileBackend(str(journal))
        return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    launch = yaml.safe_load((folder / "sweep.yaml").read_text())["launch"]
    return optuna.load_study(study_name=f"{name}-{launch}", storage=os.environ["HALORA_STUDY_URL"])


def loss_history(store, run):
    """(step, train_loss) of a run as recorded, by step."""
    history = client_of(store).get_metric_history(run.info.run_id, "train_loss")
    return sorted((metric.step, metric.value) for metric in history)


def content_of(name, models, task, **training):
    """A sweep over the tiny models' fixed part."""
    return {
        "name": name,
        "family": "tiny",
        "description": "tiny models",
        "seed": 7,
        "trials": 3,
        "trial": {
            "model": models["llama"],
            "task": task,
            "chip": "halora-2026",
            "training": {"method": "halora", "mu": 0.01, "batch_size": 4, "learning_rate": 0.05, **training},
            "evaluation": {"chip_instances": 2, "rows": 8, "calibration_tokens": 64, "context_tokens": 64},
        },
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
    }


def with_rungs(name, models, task):
    """A sweep of six trials, half of them stopped at a rung, and a race."""
    content = content_of(name, models, task, steps=6, report_every=1, schedule={"redraw_steps": 2})
    return content | {
        "trials": 6,
        "concurrent": 2,
        "space": {
            "lora.rank": {"choices": [2, 4, 8]},
            "training.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
            "chip.adc.bits": {"low": 5, "high": 9, "kind": "int"},
        },
        "search": {"sampler": "random"},
        "early_stopping": {"rungs": [{"steps": 2, "rows": 4, "chip_instances": 1}], "reduction_factor": 2},
        "racing": {"extra": 4, "most": 4},
    }
