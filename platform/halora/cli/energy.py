"""`halora energy`: what a model takes on a chip, from its dimensions alone."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.arguments import ChipOption, ChipSetOption, chip_from
from halora.cli.output import Format, FormatOption, show_rows, talk
from halora.errors import UserError, attempt, nearest

if TYPE_CHECKING:
    from halora.hardware.chip import Chip
    from halora.hardware.energy import EnergyBreakdown
    from halora.hardware.latency import Phase
    from halora.hardware.shapes import ModelShape


def energy(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A known model (llama-3.2-1b, qwen2.5-0.5b, ...), a folder, a config.json, or a hub id.",
        ),
    ],
    chip: ChipOption = "halora-2026",
    rank: Annotated[int, typer.Option(help="LoRA rank on q, k, v, up and down; 0 for no adapter.")] = 4,
    set_: ChipSetOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens the totals are for, and that each attends to.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences the chip works on at once, for time and power.")] = 1,
    phase: Annotated[str, typer.Option(help="prefill: tokens of a prompt; decode: generated one by one.")] = "prefill",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What to compare with: a100_halora_paper, a100_int8_peak, a100_bf16_peak, a100_decode_bw. "
            "Default: the paper's figure where it has one, else the A100 at its INT8 peak, or decoding.",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Energy and time of a token by component, power, area, and the ratio to a named baseline."""
    from halora.hardware.baselines import default_baseline, named_baseline
    from halora.hardware.energy import energy_per_token
    from halora.settings.training import LoraSettings

    problems = [
        f"--{option}: must be {least} or more, got {given}"
        for option, given, least in (("tokens", tokens, 1), ("rank", rank, 0), ("sequences", sequences, 1))
        if given < least
    ]
    shape = attempt(problems, lambda: _shape(model))
    described = attempt(problems, lambda: chip_from(chip, set_))
    known_phase = attempt(problems, lambda: _phase(phase))
    against = attempt(problems, lambda: _baseline(baseline, shape))
    found: EnergyBreakdown | None = None
    if shape is not None and described is not None:
        found = attempt(
            problems,
            lambda: energy_per_token(
                shape,
                described,
                rank=max(rank, 0),
                targets=LoraSettings().targets,
                context_tokens=max(tokens, 1),
                sequences=max(sequences, 1),
                **({"phase": known_phase} if known_phase else {}),
            ),
        )
    if problems:
        raise UserError(problems)
    assert shape is not None
    assert described is not None
    assert found is not None

    against = against or default_baseline(shape, found.latency.phase)
    if (stands_for := named_baseline(against).phase) is not (priced_for := found.latency.phase):
        talk.print(f"note: {against} stands for {stands_for}, not for {priced_for}", markup=False, highlight=False)
    answer = {"model": model, "chip": described.name, "chip_hash": described.content_hash, "rank": rank}
    _show(answer | _figures(found, tokens) | _comparison(found, against, shape, described, tokens), form)


def _figures(found: "EnergyBreakdown", tokens: int) -> dict[str, Any]:
    from halora.hardware.energy import ENERGY

    latency, metrics = found.latency, found.metrics
    return {
        "phase": latency.phase.value,
        "tokens": tokens,
        "context": latency.phase.context(latency.context_tokens),
        "sequences": latency.sequences,
        "boundary": found.boundary,
        "fill": found.fill,
        **{name: value for name, value in metrics.items() if name != ENERGY},
        "dies": latency.dies,
        "path_us": latency.path_us,
        "path_components_us": dict(latency.components_us),
        "interval_us": latency.interval_us,
        "bottleneck": latency.bottleneck,
        "total_mj": found.total_uj_per_token * tokens / 1000,
        "components_mj": {name: value * tokens / 1000 for name, value in found.components_uj.items()},
        "lora_share": found.lora_share,
    }


def _comparison(
    found: "EnergyBreakdown", baseline: str, shape: "ModelShape", chip: "Chip", tokens: int
) -> dict[str, Any]:
    from halora.hardware.baselines import baseline_energy_uj_per_token, named_baseline

    energy_uj_per_token = baseline_energy_uj_per_token(baseline, shape, chip, found.latency.context_tokens)
    return {
        "baseline": baseline,
        "baseline_description": named_baseline(baseline).description,
        "baseline_mj": energy_uj_per_token * tokens / 1000,
        "ratio": found.total_uj_per_token / energy_uj_per_token,
    }


def _shape(model: str) -> "ModelShape":
    from halora.hardware.shapes import known_shape, named_shapes

    if (shape := known_shape(model)) is not None:
        return shape
    hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".json")
    if Path(model).is_dir() or hub_id:
        from halora.training.models import model_shape

        return model_shape(model)
    known = ", ".join(named_shapes())
    raise UserError(
        f"no model '{model}': not known ({known}), no folder or config.json, no hub id (owner/name)"
        + nearest(model.lower(), named_shapes())
    )


def _phase(name: str) -> "Phase":
    from halora.hardware.latency import Phase

    if name not in list(Phase):
        raise UserError(f"--phase: no phase '{name}' ({', '.join(Phase)}){nearest(name, Phase)}")
    return Phase(name)


def _baseline(name: str | None, shape: "ModelShape | None") -> str | None:
    """The name, if it is a baseline's and that has a figure for the model."""
    from halora.hardware.baselines import check_baseline, named_baseline

    if name is not None:
        named_baseline(name)
        if shape is not None:
            check_baseline(name, shape)
    return name


def _show(answer: dict[str, Any], form: Format) -> None:
    if form is Format.JSON:
        print(json.dumps(answer, indent=1))
        return
    components: dict[str, float] = answer["components_mj"]
    rows = [
        {"component": name, "energy_mj": energy_mj, "share": energy_mj / answer["total_mj"]}
        for name, energy_mj in components.items()
    ]
    title = f"{answer['model']} on {answer['chip']}, rank {answer['rank']}, {answer['tokens']} tokens"
    show_rows(rows, form, title)
    if form is Format.TABLE:
        waits: dict[str, float] = answer["path_components_us"]
        path = [{"component": name, "time_us": us, "share": us / answer["path_us"]} for name, us in waits.items()]
        show_rows(path, form, "path of one token")
        told = ("components_mj", "path_components_us", "model", "chip", "rank", "tokens")
        show_rows([{"": name, "value": value} for name, value in answer.items() if name not in told], form)
