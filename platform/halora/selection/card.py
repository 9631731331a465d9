"""The model card of a bundle, in Markdown with the header that model hubs read. Pure."""

from collections.abc import Iterable, Sequence

import yaml

from halora.analysis.trials import OTHER_ACCURACY
from halora.selection.claims import Certification, RobustnessLine
from halora.settings.trial import TrialConfig


def model_card(config: TrialConfig, certification: Certification) -> str:
    """What a person has to know before deploying the adapter."""
    certificate, scores, energy = certification.certificate, certification.scores, certification.energy
    header = {"base_model": certification.base, "library_name": "peft", "tags": ["lora", "halora", "rram"]}
    drop = scores["clean_accuracy"] - scores["accuracy"]
    others = "".join(f"| {title} | {scores[name]:.4f} |\n" for name, title in OTHER_ACCURACY.items() if name in scores)
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {certification.base} for {certificate.task} on {certificate.chip}",
        f"A LoRA adapter (rank {config.lora.rank} on {', '.join(config.lora.targets)}) for a chip that holds the "
        f"frozen weights of {certification.base} in RRAM and the adapter in SRAM, trained by "
        f"`{config.training.method}` with HaLoRA Sweep (trial {certificate.sweep}/{certificate.trial}). The chip is "
        "simulated.",
        "## Certificate",
        certificate.statement(),
        "| measured on certified chips and test rows | |\n|---|---|\n"
        f"| accuracy | {scores['accuracy']:.4f} [{scores['accuracy_low']:.4f}, {scores['accuracy_high']:.4f}] |\n"
        f"| accuracy of the worst chip | {scores['accuracy_worst']:.4f} |\n"
        f"| clean accuracy | {scores['clean_accuracy']:.4f} (drop {drop:+.4f}) |\n"
        f"{others}"
        f"| margin in nats | {scores['margin']:.3f} [{scores['margin_low']:.3f}, {scores['margin_high']:.3f}] |\n"
        f"| noise of the weights | {scores['noise_db']:.1f} dB |",
        "## Gates",
        _table(
            ("gate", "measured", "threshold", "result"),
            (
                (g.name, f"{g.measured} {g.unit}", f"{g.comparison} {g.threshold:g}", "pass" if g.passed else "FAIL")
                for g in certification.gates
            ),
        ),
        "## Energy",
        f"{energy['energy_uj_per_token']:.4g} uJ per token ({energy['phase']}, context of {energy['context_tokens']} "
        f"tokens; {energy['boundary']}). {energy['latency_us_per_token']:.4g} us per token and "
        f"{energy['tokens_per_s']:.4g} tokens/s with {energy['sequences']} at once, {energy['power_w']:.4g} W, "
        f"{energy['area_mm2']:.4g} mm2 on {energy['dies']} of its dies.",
        _table(("component", "uJ per token"), ((name, f"{uj:.4g}") for name, uj in energy["components_uj"].items())),
        *_baselines(certification),
        *_robustness(certification.robustness, certificate.min_accuracy),
        "## Loading",
        "```python\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("BASE")  # {certification.base}, as {certification.dtype}\n'
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")\n```',
        f"Digest of the base's weights: `{certification.base_sha256}` (`halora adapter verify` compares it). The chip "
        "is in `chip.json`, what aihwkit-lightning can say of it in `aihwkit-lightning.json`.",
        "## What this does not say",
        "The chip, its noise, its energy and its time are models: `chip.json` lists the first, `energy.json` what is "
        "counted. "
        "The certificate speaks of chips drawn from this noise model and of these test rows, not of other data; the "
        "rows are taken as they are. Robustness lines rest on few chips each and share no error level.",
    ]
    return "\n\n".join(sections) + "\n"


def _baselines(certification: Certification) -> Iterable[str]:
    energy, own = certification.energy["baselines_uj_per_token"], certification.energy["energy_uj_per_token"]
    if energy:
        rows = ((name, f"{uj:.4g}", f"{100 * own / uj:.3g} %") for name, uj in energy.items())
        yield _table(("named baseline", "uJ per token", "this chip takes"), rows)


def _robustness(lines: Sequence[RobustnessLine], min_accuracy: float) -> Iterable[str]:
    if lines:
        yield "## Robustness"
        yield _table(
            ("condition", "", f"chips that reach {min_accuracy:g}", "share, 95 % bound", "accuracy", "worst chip"),
            map(_line, lines),
        )


def _line(line: RobustnessLine) -> tuple[str, ...]:
    if line.accuracy is None or line.accuracy_worst is None or line.bound is None:
        return line.group, line.name, f"n/a: {line.reason}", "", "", ""
    reached, bound = f"{line.meeting_spec} of {line.chips}", f">= {100 * line.bound:.1f} %"
    return line.group, line.name, reached, bound, f"{line.accuracy:.4f}", f"{line.accuracy_worst:.4f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
