"""A sweep file to start from: commented, for a model, a task and a chip, and valid as it is."""

import json
import re

from halora.errors import UserError, attempt
from halora.hardware.chip import load_chip
from halora.pricing import trial_energy
from halora.settings.trial import TrialConfig
from halora.spaces.sweep import SweepConfig, sweep_from
from halora.training.models import estimated_shape
from halora.training.tasks import check_task
from halora.yaml_files import parse_yaml

_RANKS = (4, 8, 16)
_TEXT = """\
# A sweep: what is fixed (`trial`), what is searched (`space`), and for how long. See docs/search.md of HaLoRA Sweep.
# Check it: halora sweep validate FILE; what it would take: halora sweep launch FILE --dry-run
name: {name}                # of the launch; --name gives another
family: {family}            # MLflow's experiment: sweeps of a family are compared
description: {description}
seed: 1
trials: 24
concurrent: 1               # trials at the same time; --dry-run says how many fit

trial:                      # fixed values, and defaults of searched ones
  model: {model}
  task: {task}
  chip: {chip}
  lora: {{rank: 8}}
  training:
    method: halora          # lora: no noise in training; noise_lora: noise; halora: noise and the regulariser
    mu: 0.01                # weight of the regulariser
    schedule: {{shape: constant, strength_start: {level}, redraw_steps: 8}}   # the chip's own strength
    steps: 200
    batch_size: 8
    learning_rate: 1.0e-3
    report_every: 20
  evaluation:
    chip_instances: 5       # chips that every trial is scored on
    rows: 100               # validation rows

space:                      # searched fields by path; `when` makes one depend on another
  training.method: {{choices: [lora, noise_lora, halora]}}
  training.mu: {{low: 1.0e-3, high: 1.0, log: true, when: {{training.method: [halora]}}}}
  training.learning_rate: {{low: 3.0e-4, high: 5.0e-3, log: true}}
  lora.rank: {{choices: [{ranks}]}}
  chip.adc.bits: {{low: {low_bits}, high: {bits}, kind: int}}   # fewer bits: less energy, more error

early_stopping:             # trials pause at a rung; the better third goes on
  rungs: [{{steps: 60, rows: 50, chip_instances: 2}}]
  reduction_factor: 3

reference_point: {{accuracy: 0.0, energy_uj_per_token: {energy}}}   # worse than any trial; hypervolumes start here

# What an adapter has to pass before it may be deployed: halora adapter select NAME
gates: {{min_accuracy: 0.5, min_yield: 0.9, confidence: 0.95}}
"""


def starting_file(model: str, task: str, chip: str, name: str = "") -> str:
    """The text of a sweep file.

    Args:
        model: A known model, a folder or a hub id.
        task: A known task, a folder or a hub data set.
        chip: A preset's name, or a YAML file.
        name: Of the sweep; made of the three where left out.

    Raises:
        UserError: There is no such model, task or chip; all at once.
    """
    problems: list[str] = []
    attempt(problems, lambda: estimated_shape(model))
    attempt(problems, lambda: check_task(task))
    described = attempt(problems, lambda: load_chip(chip))
    if problems or described is None:
        raise UserError(problems)
    bits, parts = described.adc.bits, [_last(model), _last(task), described.name]
    content = {"model": model, "task": task, "chip": chip, "lora": {"rank": max(_RANKS)}, "training": {"steps": 1}}
    energy = trial_energy(TrialConfig.model_validate(content), estimated=True).total_uj_per_token
    text = _TEXT.format(
        name=json.dumps(name or "-".join(parts)[:80]),
        family=json.dumps("-".join(parts[:2])[:80]),
        description=json.dumps(f"{parts[0]} on {parts[1]}, chip {parts[2]}"),
        model=json.dumps(model),
        task=json.dumps(task),
        chip=json.dumps(chip),
        level=f"{described.noise.level:g}",
        ranks=", ".join(map(str, _RANKS)),
        low_bits=max(bits - 2, min(bits, 4)),
        bits=bits,
        energy=f"{1.2 * energy:.2g}",
    )
    _checked(text)
    return text


def _checked(text: str) -> SweepConfig:
    content = parse_yaml(text, "the new file")
    assert isinstance(content, dict)
    return sweep_from(content, "the new file")


def _last(name: str) -> str:
    """The last part of a name or a path, as a sweep's name takes it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-.")[:30] or "x"
