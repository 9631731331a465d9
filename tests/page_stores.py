"""A store with a sweep for every state a page can meet, made up and recorded without training."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recorded_sweeps import begin, finish, generated_event_log, made_up_sweep

from halora.analysis.gates import certified_gates
from halora.events import BasesProbed, Failed, Reported
from halora.files import write_json
from halora.records.index import read_sweep_state
from halora.records.names import CERTIFICATION_FILE
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.selection.attempts import open_attempt
from halora.selection.certificate import Certificate
from halora.selection.claims import Certification, RobustnessLine
from halora.spaces.gates import Gates
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.state import load_sweep_of

HOSTILE = "</script><script>document.title='broken in'</script> <img src=http://203.0.113.1/x onerror=alert(1)> \"'&‮🤖"
STORIES = ("zero", "one", "dozen", "infeasible", "failed", "numberless", "hostile", "large")
"""Names of the sweeps."""
LARGE = 2000
DRIFTING = {"preset": "halora-2026", "retention": {"ageing": {"kind": "power-law", "nu_mean": 0.05}}}
"""The chip of the sweep `one`."""

_SPACE = {
    "lora.rank": {"choices": [2, 4, 8, 16]},
    "training.method": {"choices": ["lora", "noise_lora", "halora"]},
    "training.mu": {"low": 1e-3, "high": 1.0, "log": True, "when": {"training.method": ["halora"]}},
    "training.learning_rate": {"low": 5e-4, "high": 5e-3, "log": True},
    "chip.adc.bits": {"low": 6, "high": 8, "kind": "int"},
    "chip.tile.rows": {"choices": [64, 128, 256]},
}


def fill(store: Store, model: str, task: str, stories: Sequence[str] = STORIES) -> None:
    """Make the sweeps of these stories."""
    for name in stories:
        description = HOSTILE * 80 if name == "hostile" else "what it is for"  # 10 kB
        chips = {"hostile": {"preset": "halora-2026", "name": HOSTILE}, "one": DRIFTING}
        chip = chips.get(name, "halora-2026")
        trial = {"model": model, "task": task, "chip": chip, "training": {"steps": 16}}
        trials = {"large": LARGE, "dozen": 12}.get(name, 4)
        more = {"trial": trial, "space": _SPACE, "trials": trials, "description": description}
        sweep = made_up_sweep(store, name, model, task, reference_point=_CORNER, **more)
        folder = store.sweep(name)
        if name == "large":
            generated_event_log(folder.event_log_file, LARGE)
            continue
        recorder = SweepRecorder(folder, sweep)
        _record(name, recorder, sweep, folder.root)
        recorder.record(BasesProbed(outcomes=[{"base": f"base of {HOSTILE}", "cause": "it was not at hand"}]))
        recorder.finish(interrupted=False)
        recorder.close()


_CORNER = {"accuracy": 0.1, "energy_uj_per_token": 10.0}


def _record(name: str, recorder: SweepRecorder, sweep: SweepConfig, folder: Path) -> None:
    match name:
        case "one":
            begin(recorder, sweep, 0)
            finish(recorder, folder, 0, 0.5)
        case "dozen":
            for number in range(12):
                varied_trial(recorder, sweep, folder, number)
        case "infeasible":
            for number in range(3):
                begin(recorder, sweep, number, lora__rank=2 ** (number + 1))
                finish(recorder, folder, number, 0.5, **{"constraint_violation.energy_uj_per_token": 1.5})
        case "failed":
            for number in range(3):
                begin(recorder, sweep, number)
                recorder.record(Failed(trial=number, cause=f"{HOSTILE} at step {number}"))
        case "numberless":
            for number in range(3):
                begin(recorder, sweep, number)
                finish(recorder, folder, number, float("nan"))
        case "hostile":
            for number in range(4):
                begin(recorder, sweep, number, lora__rank=2 ** (number + 1), lora__variant="plain")
                finish(recorder, folder, number, 0.3 + number / 20)


def certify_made_up(store: Store, sweep: str, number: int, *, failures: int = 0, adapter: bytes | None = None) -> None:
    """Keep a certification of a trial as `halora adapter select` keeps it; it is passed without failures.

    Args:
        store: The store.
        sweep: The sweep.
        number: The trial.
        failures: Certified chips that missed the spec.
        adapter: The adapter's file; without one the certification is only begun, with eight chips scored.
    """
    folder, gates = store.sweep(sweep), Gates(min_accuracy=0.3, min_yield=0.9)
    point = read_sweep_state(store, sweep).point(number)
    folder.selection.mkdir(exist_ok=True)
    digest = hashlib.sha256(adapter or b"").hexdigest()
    attempt = open_attempt(store, folder, load_sweep_of(folder).launch, number, digest, gates, ("tiny",))
    if adapter is None:
        (attempt.folder(folder) / "chips-00000.json").write_text(json.dumps({"chip_seeds": list(range(8))}))
        return
    certificate = Certificate(
        sweep=sweep,
        trial=number,
        launch=attempt.launch,
        attempt=attempt.number,
        earlier=attempt.spent.earlier,
        spent=attempt.spent.error,
        confidence=gates.confidence,
        min_accuracy=gates.min_accuracy,
        scoring="options",
        min_yield=gates.min_yield,
        chips=attempt.chips,
        failures=failures,
        task="tiny",
        rows=24,
        rows_digest="d",
        chip="halora-2026",
        chip_hash="0123456789ab",
        noise="gaussian",
    )
    energy = point.energy_uj_per_token
    found = certified_gates(
        point.metrics,
        gates,
        costs={"energy_uj_per_token": energy},
        adapter_bytes=len(adapter),
        chips=attempt.chips,
        yield_bound=certificate.bound,
        accuracy_at={},
        reload_share=0.1,
    )
    lines = (
        RobustnessLine("noise", "twice the noise", 5, 4, 0.4, 0.36, 0.25, 0.34),
        RobustnessLine("time", "1 day", 5, 4, 0.42, 0.38, 0.28, 0.34),
        RobustnessLine("time", "1 second", 5, 5, 0.5, 0.45, 0.375, 0.55),
        RobustnessLine("time", "10 years", reason=HOSTILE),
    )
    certification = Certification(
        certificate, gates, tuple(found), lines, {}, {"energy_uj_per_token": energy}, "tiny-llama", "b", "fp32", digest
    )
    write_json(attempt.folder(folder) / CERTIFICATION_FILE, certification.to_json())


def varied_trial(recorder: SweepRecorder, sweep: SweepConfig, folder: Path, number: int) -> None:
    """Record a trial of the space, with its losses; number 3 fails with a log, number 5 breaks a constraint."""
    rng = np.random.default_rng(number)
    method = ("lora", "noise_lora", "halora")[number % 3]
    values: dict[str, Any] = {
        "lora__rank": int(rng.choice([2, 4, 8, 16])),
        "training__method": method,
        "training__learning_rate": float(10 ** rng.uniform(-3.3, -2.3)),
        "chip__adc__bits": int(rng.integers(6, 9)),
        "chip__tile__rows": int(rng.choice([64, 128, 256])),
    }
    if method == "halora":
        values["training__mu"] = float(10 ** rng.uniform(-3, 0))
    begin(recorder, sweep, number, **values)
    for step in range(2, 17, 2):
        losses = {"train_loss": 3 / step, "train_task_loss": 2.5 / step, "train_strength": 0.01}
        gradients = {"train_task_grad_norm": 4.0, "train_reg_grad_norm": step / 8, "train_reg_share": step / 32}
        recorder.record(Reported(trial=number, step=step, metrics=losses | (gradients if method == "halora" else {})))
    if number == 3:
        log = folder / "ray" / f"{number:05d}_trial" / "stderr"
        log.parent.mkdir(parents=True)
        log.write_text("Traceback (most recent call last):\n" + "  a line\n" * 40 + f"RuntimeError: {HOSTILE}\n")
        recorder.record(Failed(trial=number, cause="RuntimeError: out of memory"))
        return
    accuracy = 0.2 + 0.1 * (values["chip__adc__bits"] - 5) + 0.05 * (number % 3) + float(rng.uniform(0, 0.05))
    broken = {"constraint_violation.clean_accuracy": 0.1} if number == 5 else {}
    finish(recorder, folder, number, accuracy, clean_accuracy=accuracy + 0.04, noise_db=-30.0 + number, **broken)
