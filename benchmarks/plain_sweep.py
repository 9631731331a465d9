"""A sweep as a competent user writes it: Ray Tune with Optuna's sampler, transformers and PEFT, a process per trial.

Searches the learning rate and mu of HaLoRA for the accuracy on a noisy chip. `benchmarks.turnaround` runs it and says
what it is to do.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

RESULTS_FILE = "trials.json"


def main() -> None:
    """Run the sweep that `job.json` in a folder describes, and write the results of its trials beside it."""
    command = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    command.add_argument("folder", type=Path)
    folder = command.parse_args().folder
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    ray.init(num_cpus=job["concurrent"], include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, job=job), {"cpu": 1}),
        param_space={"learning_rate": tune.loguniform(5e-4, 5e-3), "mu": tune.loguniform(1e-3, 1.0)},
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric="accuracy", mode="max", seed=job["seed"]), num_samples=job["trials"]
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors, results.errors
    (folder / RESULTS_FILE).write_text(
        json.dumps([result.metrics for result in results], default=str), encoding="utf-8"
    )


def run_trial(config: dict[str, float], job: dict[str, Any]) -> None:
    """Train an adapter under noise and score it, clean and on noisy weights."""
    import torch

    from benchmarks import plain
    from halora.training.tasks import Row

    torch.set_num_threads(job["threads"])
    train_rows = [Row(**row) for row in job["train_rows"]]
    scored_rows = [Row(**row) for row in job["scored_rows"]]
    model, tokenizer = plain.load(job["model"], job["dtype"])
    noise = plain.NoisyWeights(model, job["sigma"])
    model = plain.with_adapter(model, job["rank"], job["alpha"], job["seed"])
    batches = plain.training_batches(train_rows, tokenizer, job["order"])
    training = plain.Training(model, batches, config["learning_rate"], noise, config["mu"])
    trained_rows = loss_tokens = 0
    for _ in job["order"]:
        loss, labels = training.step()
        trained_rows += len(labels)
        loss_tokens += int((labels != -100).sum())
    model.save_pretrained(Path(tune.get_context().get_trial_dir()) / "adapter")

    def accuracy() -> float:
        scores = plain.option_scores(model, tokenizer, scored_rows, batch_size=32, by_length=True)
        return sum(margin > 0 for margin in plain.margins(scores, scored_rows)) / len(scored_rows)

    noise.restore()
    clean_accuracy = accuracy()
    noise.redraw()
    tune.report(
        {
            "loss": loss,
            "clean_accuracy": clean_accuracy,
            "accuracy": accuracy(),
            "trained_rows": trained_rows,
            "scored_rows": len(scored_rows),
            "loss_tokens": loss_tokens,
            "threads": torch.get_num_threads(),
            "dtype": plain.dtype_name(model),
        }
    )


if __name__ == "__main__":
    main()
