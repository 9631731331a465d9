"""A trial's folder: the names of its files, and what of them a later process reads."""

import json
from pathlib import Path

TRIAL_FILE = "trial.json"
"""The configuration of a trial, in its folder."""
REPORTS_FILE = "reports.json"
"""Its reports while it trained, there."""
RESULT_FILE = "result.json"
"""Its scores at the last goal it reached, there."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The adapter's weights in its folder, as PEFT names them."""
OPTIMIZER_FILE = "optimizer.safetensors"
"""The optimiser's moments, in a checkpoint."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below a trial's folder."""
    found = sorted(folder.glob("step-*/progress.json"))
    return found[-1].parent if found else None


def adapter_folder(folder: Path) -> Path | None:
    """The trained adapter in a trial's folder, in PEFT's format."""
    checkpoint = latest_checkpoint(folder)
    return checkpoint / "adapter" if checkpoint else None


def past_reports(folder: Path) -> list[dict[str, float]]:
    """Reports of a trial up to its latest checkpoint, by step; whoever asked for them may have ended meanwhile."""
    checkpoint, written = latest_checkpoint(folder), folder / REPORTS_FILE
    if checkpoint is None or not written.exists():
        return []
    reached = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["step"]
    return [report for report in json.loads(written.read_text(encoding="utf-8")) if report["step"] <= reached]
