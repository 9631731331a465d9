"""Oracles: the same training by one worker; the uninterrupted run; what becomes of a trial whose worker is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayError
from safetensors.torch import load_file

from halora.errors import UserError
from halora.evaluation.chips import ChipScores
from halora.events import Failed, Reported, Scored, WorkerLost
from halora.heartbeat import Heartbeats
from halora.rank_workers import WorkerLostError
from halora.settings.trial import TrialConfig
from halora.storage import TrialStorage
from halora.sweep.run.executor import _loss
from halora.trainable import HaloraTrainable
from halora.trial_folder import REPORTS_FILE, adapter_folder
from halora.trial_runner import Training, TrialRunner

SETTINGS = {"steps": 6, "schedule": {"strength_start": 0.05, "redraw_steps": 2}, "mu": 0.3, "worker_timeout_s": 60}


@pytest.fixture(scope="module")
def runner():
    """Rank 0's runner on a Ray with room for two peers, which outlive a trial."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    runner = TrialRunner()
    yield runner
    runner.end_peers()
    ray.shutdown()


@pytest.fixture(scope="module")
def heartbeats(runner):
    """Name of the actor that workers beat to, and the longest silence in seconds."""
    actor = ray.remote(num_cpus=0)(Heartbeats).options(name="heartbeats").remote()
    yield "heartbeats", 600.0
    ray.kill(actor)


def _run(runner: TrialRunner, config: TrialConfig, folder: Path, stop_at: int | None = None) -> list[float]:
    """Losses from the latest checkpoint to the end, or until `stop_at`."""
    training = runner.train(config, folder)
    try:
        return _go_on(training, stop_at)
    finally:
        training.close()


def _go_on(training: Training, stop_at: int | None = None) -> list[float]:
    losses = []
    while not training.done and (stop_at is None or training._finetuner.step < stop_at):
        losses.append(training.advance()["train_loss"])
    return losses


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter_folder(folder) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """Losses of one worker by dtype, set by the first test that needs them."""
    return {}


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "engine"),
    [
        ("fp32", 0, {}),
        pytest.param("fp32", 1, {}, marks=pytest.mark.slow),
        ("fp32", 2, {"gradient_accumulation": 2}),
        pytest.param("fp32", 3, {}, marks=pytest.mark.slow),
        pytest.param("fp32", 3, {"activation_checkpointing": True, "gradient_accumulation": 2}, marks=pytest.mark.slow),
        pytest.param("bf16", 1, {}, marks=pytest.mark.slow),
        pytest.param("bf16", 3, {"activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_two_workers_train_like_one(runner, alone, tiny_trial, tmp_path, dtype, zero_stage, engine):
    """The loss of every step within 1e-4 (bf16: 3e-2) and weights within 1e-3; 7 rows are shared unevenly."""
    settings = SETTINGS | {"dtype": dtype, "batch_size": 7}
    if dtype not in alone:
        alone[dtype] = _run(TrialRunner(), tiny_trial(**settings), tmp_path / "alone")
    config = tiny_trial(**settings, zero_stage=zero_stage, workers=2, **engine)
    losses = _run(runner, config, tmp_path / "two")
    assert losses == pytest.approx(alone[dtype], abs=1e-4 if dtype == "fp32" else 3e-2)
    parts = [loss for stop in (2, None) for loss in _run(runner, config, tmp_path / "parts", stop_at=stop)]
    assert parts == pytest.approx(losses, abs=1e-4 if dtype == "fp32" else 3e-2)


@pytest.mark.parametrize(
    ("zero_stage", "engine"),
    [(0, {}), (2, {"gradient_accumulation": 2}), pytest.param(3, {}, marks=pytest.mark.slow)],
)
def test_gradients_of_two_workers_are_those_of_one(runner, tiny_trial, tmp_path, zero_stage, engine):
    """Norms of both terms' gradients within 1e-2 of themselves after two steps; 7 rows are shared unevenly."""
    settings = SETTINGS | {"steps": 3, "batch_size": 7, "reg_reduction": "sum"}
    _run(TrialRunner(), tiny_trial(**settings), tmp_path / "one")
    _run(runner, tiny_trial(**settings, zero_stage=zero_stage, workers=2, **engine), tmp_path / "two")
    one, two = (json.loads((tmp_path / name / REPORTS_FILE).read_text()) for name in ("one", "two"))
    for alone, shared in zip(one, two, strict=True):
        told = {name for name in alone if "grad_norm" in name or "share" in name}
        assert len(told) >= 4
        assert {name: shared[name] for name in told} == pytest.approx({name: alone[name] for name in told}, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("before", [1, 2])
def test_a_checkpoint_is_read_with_another_number_of_workers(runner, alone, tiny_trial, tmp_path, zero_stage, before):
    settings = SETTINGS | {"zero_stage": zero_stage}
    if "four rows" not in alone:
        alone["four rows"] = _run(TrialRunner(), tiny_trial(**SETTINGS), tmp_path / "whole")
    benches = {1: TrialRunner(), 2: runner}
    parts = _run(benches[before], tiny_trial(**settings, workers=before), tmp_path / "parts", stop_at=3)
    parts += _run(benches[3 - before], tiny_trial(**settings, workers=3 - before), tmp_path / "parts")
    assert parts == pytest.approx(alone["four rows"], abs=1e-4)


def test_a_loss_that_is_not_finite_fails_on_all_workers_and_keeps_them(runner, tiny_trial, tmp_path):
    config = tiny_trial(**(SETTINGS | {"mu": 1e39}), workers=2)
    training = runner.train(config, tmp_path / "lost")
    before = training._peers._actors
    with pytest.raises(FloatingPointError, match=r"loss inf at step 0"):
        _go_on(training)
    training.close()
    assert _run(runner, tiny_trial(**SETTINGS, workers=2), tmp_path / "next")
    assert runner._peers._actors == before


def test_a_damaged_checkpoint_is_told_and_the_workers_stay_usable(runner, tiny_trial, tmp_path):
    config = tiny_trial(**SETTINGS, workers=2)
    whole = _run(runner, config, tmp_path / "whole")
    _run(runner, config, tmp_path / "cut", stop_at=3)
    weights = adapter_folder(tmp_path / "cut") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        runner.train(config, tmp_path / "cut")
    assert _run(runner, config, tmp_path / "again") == pytest.approx(whole, abs=1e-5)


def _peer_pid(training: Training) -> int:
    (actor,) = training._peers._actors
    return ray.get(actor.__ray_call__.remote(lambda peer: os.getpid()))


@pytest.mark.parametrize(
    ("how", "timeout_s", "cause", "within_s"),
    [
        (signal.SIGKILL, 60, "worker 1 of 2 ended: .*", 30),
        pytest.param(signal.SIGSTOP, 20, "worker 1 of 2 did not answer for 10 s", 60, marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_ends_the_step_soon_and_by_name(runner, tiny_trial, tmp_path, how, timeout_s, cause, within_s):
    config = tiny_trial(**(SETTINGS | {"worker_timeout_s": timeout_s, "steps": 1000}), workers=2)
    training = runner.train(config, tmp_path)
    training.advance()
    pid = _peer_pid(training)
    os.kill(pid, how)
    start = time.monotonic()
    with pytest.raises(WorkerLostError, match=cause):
        _go_on(training)
    training.close()
    assert time.monotonic() - start < within_s
    assert adapter_folder(tmp_path) is not None
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": 3})})
    assert len(_run(runner, config, tmp_path / "next")) == 3  # with a new peer


def test_a_lost_worker_ends_the_job_and_not_the_trainable(heartbeats, tiny_trial, tmp_path):
    (tmp_path / "lost").mkdir()
    (tmp_path / "next").mkdir()
    trainable = HaloraTrainable.__new__(HaloraTrainable)
    job = _job(tiny_trial(**SETTINGS, workers=2), heartbeats)
    trainable.setup({"number": 0, "folder": str(tmp_path / "lost"), **job})
    assert isinstance(trainable.step()["event"], Reported)
    os.kill(_peer_pid(trainable._training), signal.SIGKILL)
    report = trainable.step()
    assert isinstance(report["event"], WorkerLost)
    assert report["done"]
    assert report["event"].cause.startswith("worker 1 of 2 ended")
    trainable.reset_config({"number": 1, "folder": str(tmp_path / "next"), **job})
    assert isinstance(trainable.step()["event"], Reported)
    trainable.cleanup()


def test_a_bare_base_is_scored_by_the_worker_that_trains_on_it_next(heartbeats, tiny_trial, tmp_path):
    """Oracle: the bench that scores by hand; the base in memory is the same object."""
    config = tiny_trial(steps=2, evaluation={"rows": 6, "chip_instances": 2, "calibration_tokens": 16})
    job = _job(config, heartbeats) | {"folder": str(tmp_path)}
    worker = HaloraTrainable.__new__(HaloraTrainable)
    worker.setup(job | {"number": -1, "goal": None})
    report = worker.step()
    assert report["done"]
    assert ChipScores.from_json(report["event"].scores) == TrialRunner().evaluate(config, None)
    loaded = worker._runner.base(config)[0]
    worker.reset_config(job | {"number": 0})
    assert isinstance(worker.step()["event"], Reported)
    assert worker._runner.base(config)[0] is loaded
    worker.cleanup()


SCARCE = """
import json, resource, sys
from types import SimpleNamespace
import psutil
from halora.trainable import HaloraTrainable
from halora.trial_runner import TrialRunner
from halora.settings.trial import TrialConfig

config, job = TrialConfig.model_validate(json.loads(sys.argv[1])), json.loads(sys.argv[2])
trainable = HaloraTrainable.__new__(HaloraTrainable)
trainable._heart, trainable._runner = SimpleNamespace(job=""), TrialRunner()  # no Ray, whose threads would die first
trainable._begin(job | {"trial": config.model_dump(mode="json")})
reports = [trainable.step()["event"].to_json()]
limit = psutil.Process().memory_info().vms + 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
while (report := trainable.step()["event"].to_json())["kind"] == "out_of_memory":
    reports.append(report | {"rows": config.training.micro_batch})
    config = config.with_micro_batch_halved(1)
    trainable.reset_config(job | {"trial": config.model_dump(mode="json")})
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
reports += [report, trainable.step()["event"].to_json()]
print(json.dumps(reports))
"""


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_goes_on_in_smaller_parts(tiny_trial, tmp_path):
    """Oracles: a limit that the kernel sets to a process's memory; the losses of a training that has enough."""
    config = tiny_trial(steps=3, batch_size=64, schedule={"strength_start": 0.05})
    plenty = _run(TrialRunner(), config, tmp_path / "plenty")
    job = {"job": "a", "number": 0, "folder": str(tmp_path / "scarce"), "goal": {"steps": 3, "chip_instances": 1}}
    command = [sys.executable, "-c", SCARCE, config.model_dump_json(), json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    reports = json.loads(run.stdout.splitlines()[-1])
    short = [report for report in reports if report["kind"] == "out_of_memory"]
    assert [report["rows"] for report in short] == [64 >> i for i in range(len(short))]
    assert short[0]["cause"] == "out of memory with 64 rows at a time"
    assert [r["metrics"]["train_loss"] for r in reports if r["kind"] == "reported"] == pytest.approx(plenty, rel=1e-4)


def _job(config: TrialConfig, heartbeats: tuple[str, float]) -> dict:
    goal = {"steps": config.training.steps, "chip_instances": 1}
    return {"job": "a", "heartbeats": heartbeats, "trial": config.model_dump(mode="json"), "goal": goal}


def test_a_trial_goes_from_node_to_node(heartbeats, tiny_trial, tmp_path, monkeypatch):
    """Oracle: the same trial by one worker in its own folder. A race needs what another node scored."""
    config = tiny_trial(steps=4, schedule={"redraw_steps": 2}, evaluation={"rows": 4, "calibration_tokens": 16})

    def node(name, goal, storage, steps=None):
        """Events of a job on a new node, up to a step where it dies."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
        (tmp_path / name).mkdir(exist_ok=True)
        job = {"job": "it", "heartbeats": heartbeats, "number": 0, "goal": goal, "storage": storage}
        job |= {"folder": str(tmp_path / f"{name}-folder"), "trial": config.model_dump(mode="json")}
        worker = HaloraTrainable.__new__(HaloraTrainable)
        worker.setup(job)
        events, done = [], False
        while not done:
            report = worker.step()
            done = report["done"]
            events.append(report["event"])
            if len(events) == steps:
                worker._heart.stop()  # as it would with its process
                return events
        worker.cleanup()
        assert not storage or not list((tmp_path / name).glob("halora-trial-*"))
        return events

    url, whole = f"{tmp_path / 'storage'}/00000", {"steps": 4, "chip_instances": 1}
    alone = node("alone", whole, "")
    assert [type(event) for event in alone] == [*4 * [Reported], Scored], alone
    first, second = node("one", whole, url, steps=2), node("two", whole, url)
    assert [event.metrics.get("train_loss") for event in first + second] == pytest.approx(
        [event.metrics.get("train_loss") for event in alone], abs=1e-5
    )
    assert second[-1].accuracy_by_chip == alone[-1].accuracy_by_chip
    assert not any((tmp_path / f"{name}-folder").exists() for name in ("one", "two"))
    TrialStorage(url).keep_adapter()
    raced = node("three", {"steps": 4, "chip_instances": 3, "first_chip": 1}, url)
    assert raced[-1].accuracy_by_chip[:1] == alone[-1].accuracy_by_chip
    assert len(raced[-1].accuracy_by_chip) == 3
    assert TrialStorage(url).fetch_result(tmp_path / "there", 4, 3)

    shutil.rmtree(url)
    (lacking,) = node("four", {"steps": 4, "chip_instances": 3, "first_chip": 1}, url)
    assert isinstance(lacking, Failed)
    assert "lacks the trial's adapter" in lacking.cause
    Path(url).write_text("in the way")
    (refused,) = node("five", whole, url)
    assert isinstance(refused, WorkerLost)
    assert f"storage '{url}' cannot be" in refused.cause


def test_an_error_raised_in_a_worker_is_told_from_the_end_of_the_worker(runner, tmp_path):
    """Oracle: an actor that raises, and one that exits, with the errors that Ray hands its Tune."""

    @ray.remote(num_cpus=0)
    class Worker:
        def raise_error(self):
            raise RuntimeError("its own")

        def end(self):
            os._exit(1)

    worker, file = Worker.remote(), tmp_path / "error.pkl"
    for call, raised in ((worker.raise_error, True), (worker.end, False)):
        with pytest.raises(RayError) as told:
            ray.get(call.remote())
        file.write_bytes(cloudpickle.dumps(told.value))
        assert (not _loss(SimpleNamespace(pickled_error_file=str(file)))) is raised
    file.write_bytes(b"no pickle")
    assert not _loss(SimpleNamespace(pickled_error_file=str(file)))
    assert _loss(SimpleNamespace(pickled_error_file=None))
