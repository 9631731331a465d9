"""`halora energy`: what a model takes on a chip, from its dimensions alone."""

import json
from typing import Annotated, Any

import typer

from halora.cli.arguments import ChipOption, ChipSetOption, chip_from, told_as_options
from halora.cli.output import Format, FormatOption, show_rows, talk


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
    from halora.api.energy import model_energy

    with told_as_options("rank", "tokens", "phase", "sequences"):
        found = model_energy(
            model,
            lambda: chip_from(chip, set_).description,
            rank=rank,
            tokens=tokens,
            sequences=sequences,
            phase=phase,
            baseline=baseline,
        )
    if found.remark:
        talk.print(f"note: {found.remark}", markup=False, highlight=False)
    _show(found.to_json(), form)


def _show(answer: dict[str, Any], form: Format) -> None:
    if form is Format.JSON:
        print(json.dumps(answer, indent=1))
        return
    components: dict[str, float] = answer["components_mj"]
    rows = [
        {"component": name, "energy_mj": energy_mj, "share": energy_mj / answer["total_mj"]}
        for name, energy_mj in components.items()
    ]
    if form is Format.TABLE and answer.get("groups"):
        groups = [
            group | {"values": ", ".join(f"{path} {value}" for path, value in group["values"].items())}
            for group in answer["groups"]
        ]
        show_rows(groups, form, "layers with values of their own")
    title = f"{answer['model']} on {answer['chip']}, rank {answer['rank']}, {answer['tokens']} tokens"
    show_rows(rows, form, title)
    if form is Format.TABLE:
        waits: dict[str, float] = answer["path_components_us"]
        path = [{"component": name, "time_us": us, "share": us / answer["path_us"]} for name, us in waits.items()]
        show_rows(path, form, "path of one token")
        told = ("components_mj", "path_components_us", "groups", "model", "chip", "rank", "tokens")
        show_rows([{"": name, "value": value} for name, value in answer.items() if name not in told], form)
