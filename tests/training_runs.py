"""Trainings that tests run, as a trial's process does."""

from pathlib import Path

from halora.settings.trial import TrialConfig
from halora.trial_runner import TrialRunner


def run_reports(
    runner: TrialRunner, config: TrialConfig, folder: Path, stop_at: int | None = None
) -> list[dict[str, float]]:
    """Reports from the latest checkpoint to the end, or until `stop_at`, as if killed there."""
    folder.mkdir(exist_ok=True)
    training = runner.train(config, folder)
    reports = []
    try:
        while not training.done and (stop_at is None or training._finetuner.step < stop_at):
            reports.append(training.advance())
    finally:
        training.close()
    return reports


def run_losses(runner: TrialRunner, config: TrialConfig, folder: Path, stop_at: int | None = None) -> list[float]:
    """The loss of each of these reports."""
    return [report["train_loss"] for report in run_reports(runner, config, folder, stop_at)]
