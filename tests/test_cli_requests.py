"""A trial stopped, one cloned and one discarded while a sweep runs on a real Ray, and the sweep then deleted.

Oracles: MLflow's own database, and what a program was told.
"""

import json
import sys
from contextlib import contextmanager

import pytest
import yaml
from commands import background, content_of, halora, runs, training_steps
from raylets import frozen
from records_audit import differences

import halora as surface

STEPS, NAME = 400, "asked"


@contextmanager
def _while_training(driver, number):
    """While a trial trains its worker does nothing, so that what is asked comes before its next report."""
    driver.wait_for(f"trial {number:>3} training")
    (worker,) = driver.workers()
    with frozen(worker.pid):
        yield


@pytest.fixture(scope="module")
def asked(store, tiny_models, tiny_task, tmp_path_factory):
    """The driver after its end, and what it notified a program of."""
    folder = tmp_path_factory.mktemp("asked")
    content = content_of(NAME, tiny_models, tiny_task, steps=STEPS, report_every=4)
    content |= {"trials": 2, "probe": None, "space": {"lora.rank": {"choices": [2, 4, 8]}}, "first": [{"lora.rank": 4}]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    (folder / "take.py").write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')")
    place, told = f"{folder}/stored", folder / "told.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALORA_NOTIFY", f"{sys.executable} {folder}/take.py {told}")
        with background(store, "sweep", "launch", folder / "sweep.yaml", "--checkpoint-url", place) as driver:
            driver.wait_for("trial   0 training")
            sweep = surface.Store(store).sweep(NAME)
            with _while_training(driver, 0):
                sweep.stop_trial(0)
                assert sweep.clone_trial(0, {"lora.rank": 8}) == {"lora.rank": 8}
            with _while_training(driver, 1):
                sweep.stop_trial(1)
            with _while_training(driver, 2):
                sweep.discard_trial(2)
            driver.end()
    return driver, [json.loads(line) for line in told.read_text().splitlines()]


def test_trials_end_as_somebody_asked_for_it(asked, store):
    driver, told = asked
    assert driver.process.returncode == 0, driver.said
    stopped, clone, discarded = runs(store, NAME)
    assert [run.info.status for run in (stopped, clone, discarded)] == ["FINISHED", "FINISHED", "KILLED"]
    for run in (stopped, clone):
        last = int(run.data.tags["halora.cut_short_at"])
        number = int(run.data.tags["halora.trial"])
        assert last < STEPS
        assert last == training_steps(driver.said, number)[-1]
        assert {"accuracy", "clean_accuracy"} <= run.data.metrics.keys()
        assert len(run.outputs.model_outputs) == 1
    assert clone.data.tags["halora.clone_of"] == "0"
    assert (stopped.data.params["lora.rank"], clone.data.params["lora.rank"]) == ("4", "8")
    assert discarded.data.tags["halora.state"] == "discarded"
    assert not {"accuracy", "halora.cut_short_at"} & {*discarded.data.metrics, *discarded.data.tags}
    log = store / "sweeps" / NAME / "events.jsonl"
    assert differences(f"sqlite:///{store / 'mlflow.db'}", NAME, log) == []
    assert {point.number for point in surface.Store(store).front(NAME)} <= {0, 1}
    assert [each["event"] for each in told][-1] == "ended"
    assert told[-1]["trials"] == {"finished": 2, "discarded": 1}
    assert {*told[0]["joined"]} == {0}


def test_it_leaves_nothing_once_it_is_deleted(asked, store):
    launch = yaml.safe_load((store / "sweeps" / NAME / "sweep.yaml").read_text())["launch"]
    place = (store / "sweeps" / NAME / "checkpoint-url").read_text()
    assert place.endswith(launch)
    done = halora(store, "sweep", "delete", NAME, "--yes")
    assert done.returncode == 0, done.stderr
    assert runs(store, NAME) == runs(store, NAME, kind="sweep") == []
    left = [path for path in (*store.rglob("*"), *store.parent.parent.rglob(f"*{launch}*")) if launch in str(path)]
    assert left == []


def test_a_budget_of_gpu_hours_is_refused_where_no_trial_gets_a_gpu(store, tiny_models, tiny_task, tmp_path):
    content = content_of("gpus", tiny_models, tiny_task, steps=2) | {"space": {"lora.rank": {"choices": [2, 4]}}}
    content |= {"resources": {"gpus": 0}, "budget": {"gpu_hours": 2}}
    (tmp_path / "gpus.yaml").write_text(yaml.safe_dump(content))
    refused = halora(store, "sweep", "launch", tmp_path / "gpus.yaml")
    assert refused.returncode == 2
    assert "budget.gpu_hours: 2, but no GPU is set aside for a trial here" in refused.stderr
    assert not (store / "sweeps" / "gpus").exists()
