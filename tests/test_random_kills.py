"""Real sweeps whose driver and workers are killed at random moments.

Oracles: the same sweep undisturbed; MLflow's tables beside the records; Optuna's own storage. One trial runs at a time,
so that decisions come in the order of the undisturbed sweep.
"""

import json
import random
import re
import time

import pytest
import yaml
from commands import background, halora, loss_history, runs, study_of, with_rungs
from records_audit import differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(10800)]
_LOST = "resumes from its checkpoint: its worker ended"


@pytest.mark.parametrize(
    ("model", "steps", "every", "kills"),
    [("llama", 48, 3, 10), ("smollm2-135m-instruct", 24, 4, 6)],
)
@pytest.mark.parametrize("database", [False, True], ids=["journal", "postgresql"])
def test_kills_of_drivers_and_workers_lose_and_repeat_nothing(
    database, model, steps, every, kills, store, tiny_models, tiny_task, tmp_path, request, monkeypatch
):
    where, chance = "postgresql" if database else "journal", random.Random(20 + database)
    if database:
        monkeypatch.setenv("HALORA_STUDY_URL", request.getfixturevalue("postgresql"))
    names = [f"{model}-{where}-{kind}" for kind in ("whole", "killed")]
    for name in names:
        content = with_rungs(name, {"llama": tiny_models.get(model, model)}, tiny_task) | {"concurrent": 1}
        content["trial"]["training"] |= {"steps": steps, "report_every": every}
        content["early_stopping"]["rungs"][0]["steps"] = steps // 2
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    quiet = halora(store, "sweep", "launch", tmp_path / f"{names[0]}.yaml")
    assert quiet.returncode == 0, quiet.stderr
    victims = ["driver", "worker"] * (kills // 2)
    chance.shuffle(victims)
    pace = max(quiet.stderr.count("\ntrial ") // kills, 1)
    said = _kill_and_resume(store, names[1], tmp_path / f"{names[1]}.yaml", victims, pace, chance)
    assert sum(_LOST in line for line in said) == kills // 2

    whole, killed = (runs(store, name) for name in names)
    assert [run.data.tags["halora.trial"] for run in killed] == [str(number) for number in range(6)]
    assert [run.data.params for run in killed] == [run.data.params for run in whole]
    assert [run.data.tags["halora.state"] for run in killed] == [run.data.tags["halora.state"] for run in whole]
    assert {run.info.status for run in [*killed, *runs(store, names[1], kind="sweep")]} == {"FINISHED"}
    for one, other in zip(killed, whole, strict=True):
        told, losses = zip(*loss_history(store, one), strict=True)
        expected, undisturbed = zip(*loss_history(store, other), strict=True)
        assert told == expected
        assert losses == pytest.approx(undisturbed, abs=1e-4)
        scores = ("margin", "accuracy", "energy_uj_per_token", "chips", "rung_accuracy")
        for score in scores:
            assert one.data.metrics.get(score) == pytest.approx(other.data.metrics.get(score), abs=1e-3), score
    assert _budget(store, names[1]) == _budget(store, names[0])
    assert _front(store, names[1]) == _front(store, names[0])
    records = store / "sweeps" / names[1] / "events.jsonl"
    assert differences(f"sqlite:///{store / 'mlflow.db'}", names[1], records) == []
    trials, undisturbed = (study_of(store, name).trials for name in reversed(names))
    assert [(trial.number, trial.state) for trial in trials] == [(trial.number, trial.state) for trial in undisturbed]


def _kill_and_resume(store, name, file, victims, pace, chance):
    """Launch, kill at random moments what `victims` names, and resume after a driver's end; lines of all drivers.

    Moments are counted in lines about trials, at most `pace` new ones, as a machine's speed is its own; some come while
    a driver starts. A trial that lost its worker reports before the next worker is killed, as three losses in a row
    would fail it.
    """
    arguments, left, said = ["launch", file], list(victims), []
    while left:
        with background(store, "sweep", *arguments) as driver:
            driver.wait_for("the sweep runs")
            while left:
                until = _told(driver.lines) + chance.randint(0, pace)
                while _told(driver.lines) < until or (left[0] == "worker" and _mourning([*said, *driver.lines])):
                    assert driver.process.poll() is None, f"{len(left)} kills left: {driver.said}"
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.5))
                if left.pop(0) == "driver":
                    driver.process.kill()
                    driver.end()
                    break
                while not (found := driver.workers()):
                    assert driver.process.poll() is None, driver.said
                    time.sleep(0.1)
                heard = len(driver.lines)
                chance.choice(found).kill()
                driver.wait_for(_LOST, after=heard)
            said += driver.lines
        arguments = ["resume", name]
    last = halora(store, "sweep", "resume", name)
    assert last.returncode == 0, last.stderr
    return said


def _told(lines):
    """Lines about trials."""
    return sum(line.startswith("trial ") for line in list(lines))


def _mourning(lines):
    """Whether the trial that lost the last worker has not reported since."""
    before, lost, since = "".join(lines).rpartition("resumes from its checkpoint")
    if not lost:
        return False
    number = re.findall(r"trial +(\d+) $", before)[-1]
    return not re.search(rf"trial +{number} (training|paused|finished)", since)


def _budget(store, name):
    """How the trials ended, and the optimiser steps taken."""
    (row,) = json.loads(halora(store, "sweep", "status", name, "--format", "json").stdout)
    shown = halora(store, "sweep", "resume", name).stderr
    return {key: value for key, value in row.items() if key != "sweep"}, re.findall(
        r"\d+ of \d+ optimiser steps", shown
    )


def _front(store, name):
    rows = json.loads(halora(store, "front", "show", name, "--format", "json").stdout)
    return [(row["trial"], row["params"], row["accuracy"], row["energy_uj_per_token"]) for row in rows]
