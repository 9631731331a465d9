"""Every name that MLflow sees, in one place; a test freezes them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from halora.analysis.trials import STRENGTH_METRIC as STRENGTH_METRIC
from halora.analysis.trials import VIOLATION as VIOLATION
from halora.events import Event, Scored
from halora.hardware.energy import COSTS as COSTS
from halora.hardware.energy import ENERGY as ENERGY

# Tags of parent and child runs.
SWEEP = "halora.sweep"  # name of the sweep, for people
LAUNCH = "halora.launch"  # identity of the launch: what every run is found by; certified chips are drawn from it
KIND = "halora.kind"  # sweep | trial
NUMBER = "halora.trial"
CHIP_HASH = "halora.chip_hash"
VERSION = "halora.version"  # of this program, where the sweep was run
COMMIT = "halora.commit"  # that it ran from, `+` after it where files differed; none outside of git
STATE = "halora.state"  # running | finished | stopped | failed | interrupted | discarded
CLONE_OF = "halora.clone_of"  # the trial that somebody had it begun like
CUT_SHORT_AT = "halora.cut_short_at"  # optimiser step at which somebody ended its training
CAUSE = "halora.cause"
WARNING = "halora.warning"  # of a sweep, where noise exceeds the signal of layers of its untrained base
LABEL = "halora.{label}"  # what a trial is, to filter by
LABELS = ("method", "model", "chip", "task", "noise", "noise_strength")

# Metrics of a child run while it trains; step = optimiser step.
TRAINING_METRICS = (
    "train_loss",
    "train_task_loss",
    "train_reg_loss",  # before its weight
    "train_strength",
    "train_task_grad_norm",  # of the last step, before clipping
    "train_reg_grad_norm",  # of mu L_reg
    "train_reg_share",  # of mu L_reg's gradient over the task's: of all A and B, of A, of B
    "train_reg_share_a",
    "train_reg_share_b",
)

# Metrics of an evaluated child run.
SCORE_METRICS = (
    "clean_accuracy",
    "clean_accuracy_low",
    "clean_accuracy_high",
    "clean_margin",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_std_chips",
    "accuracy_worst",
    "drop_low",
    "drop_high",
    "margin",
    "margin_low",
    "margin_high",
    "noise_db",
)
BESIDE_METRICS = (  # by the way of scoring options that was not asked for
    "clean_accuracy_per_byte",
    "clean_margin_per_byte",
    "accuracy_per_byte",
    "margin_per_byte",
    "clean_accuracy_summed",
    "clean_margin_summed",
    "accuracy_summed",
    "margin_summed",
)
TASK_METRICS = (  # followed by the name of a mixture's task
    "accuracy.",
    "clean_accuracy.",
    "accuracy_per_byte.",
    "clean_accuracy_per_byte.",
    "accuracy_summed.",
    "clean_accuracy_summed.",
)
# STRENGTH_METRIC: accuracy at another strength of the chip's noise, which follows.
RUNG_METRIC = "rung_{score}"  # a score at a rung of early stopping; step = optimiser step
RUNG_SCORES = ("accuracy", "clean_accuracy", "margin")  # and those of BESIDE_METRICS that there are
FRONT_PROBABILITY = "front_probability"  # step = trials finished so far
# COSTS: energy, time, throughput, power and area, known before training.
ENERGY_COMPONENT = "energy_uj_per_token.{component}"
# VIOLATION: by how much the sweep's constraints are broken, above 0 they are; or `.NAME` after it for one of them.

# Metrics of the parent run; step = trials finished so far.
HYPERVOLUME = "hypervolume"
FRONT_SIZE = "front_size"
TRIALS_DONE = "trials_done"

# Artifacts.
CONFIG_FILE = "config.json"
SCORES_FILE = "scores.json"
ADAPTER = "adapter"  # the logged model that holds a trial's adapter
SWEEP_FILE = "sweep.yaml"
FRONT_JSON = "front.json"
FRONT_CSV = "front.csv"
SUMMARY_FILE = "summary.md"
FRONT_PNG = "front.png"
REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.json"
DAMAGE_FILE = "damage.json"  # what the chips do to the untrained bases

# Selection: artifacts of the trial's run, below a folder of their own for each certification.
CERTIFICATION_FOLDER = "selection/attempt-{attempt:02d}"
CERTIFICATION_FILE = "certification.json"  # certificate, gates, robustness; the scores are in SCORES_FILE beside it
ROBUSTNESS_FILE = "robustness.json"  # scores behind each line of the robustness table

# Selection: the model registry.
CANDIDATE = "candidate"  # alias: passed every gate
CHAMPION = "champion"  # alias: promoted by a person
ATTEMPT = "halora.attempt"
ADAPTER_SHA256 = "halora.adapter_sha256"
GATE = "halora.gate.{gate}"
YIELD_BOUND = "halora.yield_bound"
REPLACED = "halora.replaced"  # version that was champion before this one


def registered_name(model: str, task: str, chip: str, identity: Sequence[str]) -> str:
    """Name of a registered model: one chip's champion never stands in the way of another's.

    Args:
        model: The base, for people.
        task: The task, for people.
        chip: The chip, for people.
        identity: What tells these three from all others; its digest ends the name.
    """
    digest = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()
    parts = (model[:80], task[:80], f"{chip[:60]}-{digest[:8]}")  # MLflow takes 256 characters
    return "halora." + ".".join(re.sub(r"[^\w-]+", "-", part).strip("-") for part in parts)


def is_score(name: str) -> bool:
    """Whether a metric is one of an evaluated trial: a score, or by how much it breaks a constraint."""
    return name in (*SCORE_METRICS, *BESIDE_METRICS) or name.startswith((*TASK_METRICS, STRENGTH_METRIC, VIOLATION))


def metrics_of(event: Event) -> Mapping[str, float]:
    """An event's metrics by the names they have in MLflow; none for most events."""
    metrics: Mapping[str, Any] = getattr(event, "metrics", {})
    if isinstance(event, Scored) and not event.final:
        return {RUNG_METRIC.format(score=name): value for name, value in metrics.items()}
    return metrics


def identity(launch: str, number: int | None) -> dict[str, str]:
    """Tags by which the run of a trial is found again, or the parent run of its launch."""
    tags = {LAUNCH: launch, KIND: "sweep" if number is None else "trial"}
    return tags if number is None else {**tags, NUMBER: str(number)}


def query(tags: Mapping[str, str]) -> str:
    """MLflow's search for the runs that have all of these tags."""
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())


def metric(name: str) -> str:
    """A metric's name as MLflow takes it.

    It takes some characters, 250 of them, and no path that another spelling would do for, as the path of a task's
    folder may be. Such a name is spelled otherwise, and ends in its digest, so that it stays apart from others.
    """
    spelled = re.sub(r"[^\w./: -]", "_", name)
    spelled = "/".join(re.sub(r"^\.{1,2}$", "_", part) for part in spelled.split("/") if part)
    longest = 250  # characters, as MLflow takes them
    return name if spelled == name and len(name) <= longest else bounded(spelled, longest, of=name)


def bounded(name: str, most: int, of: str = "") -> str:
    """A name cut to so many characters; one that is longer, or is spelled otherwise than `of`, ends in a digest."""
    if len(name) <= most and of in ("", name):
        return name
    digest = hashlib.sha256((of or name).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: most - len(digest) - 1]}-{digest}"
