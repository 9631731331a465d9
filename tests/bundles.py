"""A bundle as a certification makes it, without a sweep: a random adapter of the tiny LLaMA, scored and exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from halora.files import sha256_of
from halora.hardware.addressing import Role
from halora.records.recorder import dataset
from halora.selection.bundle import Bundle, write_bundle
from halora.selection.bundle_reading import read_bundle
from halora.selection.claims import Evidence, Origin, asked_scenarios, concluded, priced
from halora.settings.trial import TrialConfig
from halora.spaces.gates import Gates
from halora.training.models import plain_base, weights_digest
from halora.trial_folder import ADAPTER_WEIGHTS
from halora.trial_runner import TrialRunner

ORIGIN = Origin(sweep="made-up", trial=3, launch="ab12", attempt=1, earlier=0, spent=0.0)
ASKED = Gates(
    min_accuracy=0.01, min_yield=0.2, confidence=0.9, test_rows=6, robustness_chips=1, max_drop=1.0, max_adapter_kb=100
)


def make_bundle(folder: Path, model: str, task: str) -> Path:
    """The folder of a bundle of three chips and six rows, below `folder`."""
    import torch

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    content: dict[str, Any] = {
        "model": model,
        "task": task,
        "chip": "halora-2026",
        "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "training": {"steps": 2},
        "evaluation": {"rows": 6, "chip_instances": 3, "calibration_tokens": 16},
    }
    config, runner = TrialConfig.model_validate(content), TrialRunner()

    def scored(config: TrialConfig, chips: int) -> Any:
        sized = config.evaluation.model_copy(update={"chip_instances": chips})
        series = f"{ORIGIN.launch}/{ORIGIN.attempt}"
        found = runner.evaluate(
            config.model_copy(update={"evaluation": sized}),
            folder / "adapter",
            split="test",
            role=Role.CERTIFY,
            series=series,
        )
        return replace(found, tasks=("tiny",) * len(found.tasks))

    robustness = {
        line.name: scored(config.model_copy(update={"chip": line.chip}), ASKED.robustness_chips)
        for line in asked_scenarios(config, ASKED)
        if line.chip is not None
    }
    named = config.model_copy(update={"model": "llama", "task": "tiny"})
    evidence = Evidence(
        origin=ORIGIN,
        config=named,
        asked=ASKED,
        scores=scored(config, 3),
        robustness=robustness,
        task="tiny",
        rows_digest=dataset(task, "test", 6)["digest"],
        base="llama",
        base_sha256=weights_digest(plain_base(model, "fp32").causal_lm),
        energy=priced(config),
        adapter_sha256=sha256_of(folder / "adapter" / ADAPTER_WEIGHTS),
        adapter_bytes=(folder / "adapter" / ADAPTER_WEIGHTS).stat().st_size,
        reload_share=0.25,
    )
    bundle = Bundle(named, concluded(evidence), evidence.scores, evidence.robustness)
    write_bundle(folder / "bundle", bundle, folder / "adapter")
    return folder / "bundle"


def forge(made: Path, folder: Path, adapter: Path | None = None, **changes: Any) -> Path:
    """A bundle in a new folder with all its claims computed anew, from evidence that is changed.

    Args:
        made: A right bundle.
        folder: The new one.
        adapter: Folder of another adapter.
        changes: Fields of `Evidence`.
    """
    true, weights = read_bundle(made), (adapter or made) / ADAPTER_WEIGHTS
    claims = true.certification
    evidence: dict[str, Any] = {
        "origin": ORIGIN,
        "config": true.config,
        "asked": claims.asked,
        "scores": true.scores,
        "robustness": true.robustness,
        "task": "tiny",
        "rows_digest": claims.certificate.rows_digest,
        "base": "llama",
        "base_sha256": claims.base_sha256,
        "energy": claims.energy,
        "adapter_sha256": sha256_of(weights),
        "adapter_bytes": weights.stat().st_size,
        "reload_share": 0.25,
    }
    found = Evidence(**evidence | changes)
    bundle = Bundle(found.config, concluded(found), found.scores, found.robustness)
    write_bundle(folder, bundle, adapter or made)
    return folder
