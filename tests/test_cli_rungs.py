"""Early stopping, races and several workers by the command. Oracle: the same trial trained in this process."""

import json

import pytest
import yaml
from commands import content_of, halora, loss_history, runs, with_rungs


def test_early_stopping_pauses_promotes_and_races(store, tiny_models, tiny_task, tmp_path):
    """Oracle: a promoted trial trained in one go in this process, and scored on the same chips."""
    from halora.settings.trial import TrialConfig
    from halora.trial_folder import adapter_folder
    from halora.trial_runner import TrialRunner

    path = tmp_path / "rungs.yaml"
    path.write_text(yaml.safe_dump(with_rungs("rungs", tiny_models, tiny_task)))
    launched = halora(store, "sweep", "launch", path)
    assert launched.returncode == 0, launched.stderr
    assert "24 of 36 optimiser steps taken; early stopping saved 33%" in launched.stderr
    (row,) = json.loads(halora(store, "sweep", "status", "rungs", "--format", "json").stdout)
    assert (row["finished"], row["stopped"], row["failed"], row["unfinished"]) == (3, 3, 0, 0)
    trials = runs(store, "rungs")
    assert {run.info.status for run in trials} == {"FINISHED"}
    finished = [run for run in trials if run.data.tags["halora.state"] == "finished"]
    for run in trials:
        last = 6 if run in finished else 2
        assert [step for step, _ in loss_history(store, run)] == list(range(1, last + 1))
        assert ("accuracy" in run.data.metrics) == ("front_probability" in run.data.metrics) == (run in finished)
    promoted = finished[-1]
    folder = store / "sweeps" / "rungs" / "trials" / f"{int(promoted.data.tags['halora.trial']):05d}"
    config = TrialConfig.model_validate_json((folder / "trial.json").read_text())
    runner = TrialRunner()
    training = runner.train(config, tmp_path / "by hand")
    losses = []
    while not training.done:
        losses.append(training.advance()["train_loss"])
    training.close()
    assert [loss for _, loss in loss_history(store, promoted)] == pytest.approx(losses, abs=1e-4)
    result = json.loads((folder / "result.json").read_text())
    chips = {"evaluation": config.evaluation.model_copy(update={"chip_instances": len(result["chip_seeds"])})}
    scores = runner.evaluate(config.model_copy(update=chips), adapter_folder(tmp_path / "by hand"))
    assert result["chip_seeds"] == list(scores.chip_seeds)
    for margins, again in zip(result["noisy"], scores.noisy, strict=True):
        assert margins == pytest.approx(again, abs=1e-3)


@pytest.mark.slow
def test_trials_of_two_workers_give_the_losses_of_one(store, tiny_models, tiny_task, tmp_path):
    """Two trials after each other in one placement group of two, beside the same sweep on one worker."""
    losses = {}
    for workers in (1, 2):
        name = f"workers-{workers}"
        content = content_of(name, tiny_models, tiny_task, steps=4, report_every=2, workers=workers)
        content |= {"trials": 2, "space": {"lora.rank": {"choices": [2, 4]}}}
        content |= {"first": [{"lora.rank": 2}, {"lora.rank": 4}]}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        launched = halora(store, "sweep", "launch", path)
        assert launched.returncode == 0, launched.stderr
        losses[workers] = [loss_history(store, run) for run in runs(store, name)]
    for one, two in zip(losses[1], losses[2], strict=True):
        assert [step for step, _ in one] == [2, 4]
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)
