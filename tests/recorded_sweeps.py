"""Sweeps over tiny models whose trials are made up and recorded, without training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halora.events import Answers, Began, Event, Finished, Reported, Scored, SweepStarted
from halora.pricing import trial_energy
from halora.records import names
from halora.records.event_log import EventLog
from halora.records.recorder import SweepRecorder
from halora.records.store import Store
from halora.spaces.sweep import SweepConfig
from halora.sweep.run.launched import as_launched
from halora.sweep.run.state import write_sweep

SCORES = {name: 0.25 + i / 100 for i, name in enumerate(names.SCORE_METRICS)}

LAYERS = tuple(f"model.layers.{depth}.{kind}" for depth in (0, 1) for kind in ("self_attn.q_proj", "mlp.up_proj"))
"""Layers in RRAM of a made-up trial; layer i has -30 - i dB on chip 0, each chip 1 dB less."""


def made_up_sweep(store: Store, name: str, model: str, task: str, **more: Any) -> SweepConfig:
    """A sweep with its folder in the store, as a launch leaves it."""
    content = {
        "name": name,
        "family": "records",
        "description": "what it is for",
        "trials": 4,
        "trial": {"model": model, "task": task, "chip": "halora-2026", "training": {"steps": 4}},
        "space": {"lora.rank": {"choices": [2, 4, 8]}, "training.method": {"choices": ["lora", "halora"]}},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
        **more,
    }
    sweep = as_launched(SweepConfig.model_validate(content))
    folder = store.sweep(name)
    folder.root.mkdir(parents=True)
    write_sweep(folder, sweep)
    return sweep


def begin(recorder: SweepRecorder, sweep: SweepConfig, number: int, **values: Any) -> Any:
    """Record the beginning of a trial; its configuration and its energy."""
    chosen = {"lora.rank": 4, **{path.replace("__", "."): value for path, value in values.items()}}
    config = sweep.resolve(chosen)
    energy = trial_energy(config)
    recorder.begin_trial(number, config, chosen, energy)
    return config, energy


def finish(recorder: SweepRecorder, folder: Path, number: int, accuracy: float, **more: float) -> Any:
    """Record made-up scores of a trial and an adapter; the trial."""
    trial = folder / "trials" / f"{number:05d}"
    (trial / "adapter").mkdir(parents=True, exist_ok=True)
    (trial / "adapter" / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
    correct = np.random.default_rng(number).random((3, 16)) < (accuracy if accuracy == accuracy else 0)
    result = {"noisy_correct": correct.tolist(), "row_ids": list(range(16)), "chip_seeds": [0, 1, 2]}
    result |= {"layers": list(LAYERS), "layer_noise_db": [[-30.0 - i - chip for i in range(4)] for chip in range(3)]}
    (trial / "result.json").write_text(json.dumps(result))
    limits = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
    scored = Scored(
        trial=number,
        step=4,
        metrics=SCORES | limits | more,
        accuracy_by_chip=correct.mean(axis=1).tolist(),
        scores_file=f"trials/{number:05d}/result.json",
        adapter=f"trials/{number:05d}/adapter",
    )
    recorder.record(scored)
    return recorder.recorded.point(number)


def generated_event_log(
    path: Path, trials: int, reports: int = 4, seed: int = 0, launch: str = ""
) -> list[dict[str, Any]]:
    """An event log of many finished trials with random scores, written at once; their beginnings and scores."""
    rng = np.random.default_rng(seed)
    energies, accuracies = rng.uniform(1, 6, trials).round(2), rng.uniform(0.2, 0.9, trials).round(2)
    kept = []
    events: list[Event] = [SweepStarted()]
    for number in range(trials):
        method = ("lora", "noise_lora", "halora")[number % 3]
        labels = {"method": method, "model": "m", "chip": "c", "task": "t", "noise": "gaussian", "noise_strength": 0.01}
        params = {"lora.rank": int(2 ** rng.integers(1, 5)), "training.learning_rate": float(10 ** rng.uniform(-4, -2))}
        energy = {"energy_uj_per_token": float(energies[number]), "energy_uj_per_token.adc": 0.5}
        config = {"padding": "x" * 2500}  # about the size of a real one
        begun = Began(
            trial=number,
            params=params,
            labels=labels,
            metrics=energy,
            chip_hash="",
            config=config,
            datasets=[],
            program={},
        )
        losses = [{"train_loss": 3 / step, "train_strength": 0.01} for step in range(1, reports + 1)]
        events += [begun, *(Reported(trial=number, step=i, metrics=loss) for i, loss in enumerate(losses))]
        accuracy = float(accuracies[number])
        scores = SCORES | {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
        answers = Answers.of("g", (rng.random(48) < accuracy).reshape(3, 16))
        by_chip = [accuracy] * 3
        scored = Scored(trial=number, step=reports, metrics=scores, accuracy_by_chip=by_chip, answers=answers)
        events += [scored, Finished(trial=number)]
        kept.append({"number": number, **labels, **params, **energy, **scores})
    log = EventLog(path, launch)
    for i, event in enumerate(events):
        log.append(replace(event, time_ms=1 + i))
    log.close()
    return kept
