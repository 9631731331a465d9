"""`halora noise`: what a chip's noise is, and which layers of a model feel it most."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.arguments import ChipOption, ChipSetOption, chip_from
from halora.cli.output import Format, FormatOption, say, show_rows, talk
from halora.errors import UserError, attempt

if TYPE_CHECKING:
    from torch import Tensor

    from halora.analysis.figures import ErrorPanel
    from halora.evaluation.sensitivity import LayerSensitivity
    from halora.hardware.chip import Chip
    from halora.training.models import BaseModel
    from halora.training.rram import RramArray

app = typer.Typer(help="See a chip's noise, and the layers that feel it most.", no_args_is_help=True)

_MODEL_HELP = "An embedded model (smollm2-135m-instruct, ...), a folder, or a hub id."
_TABLE_POINTS = 11
_REFERENCES = {
    "absolute": "1, in weight units",
    "tensor_max": "max|W| of the whole matrix",
    "channel_max": "max|W| of the output",
    "tile_max": "max|W| of the tile",
    "std": "the standard deviation of the whole matrix",
}


class SensitivityFormat(StrEnum):
    """Forms of the answer; `yaml` is a chip file with the order as its ranking."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    YAML = "yaml"


@app.command()
def show(
    chip: ChipOption = "halora-2026",
    set_: ChipSetOption = None,
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP + " Default: the chip alone.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the errors, stated and drawn, to this file.")
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """The chip's error over conductance, or with a model the realised noise of each layer.

    Draws are those of chip instance 0 of the search pool.
    """
    problems: list[str] = []
    described = attempt(problems, lambda: chip_from(chip, set_))
    _check_model(problems, model, described)
    problems += _picture_problems(picture)
    if problems:
        raise UserError(problems)
    assert described is not None

    noise = described.noise.model_dump(mode="json")
    answer = {"chip": described.name, "chip_hash": described.content_hash, "noise": noise}
    if model is None:
        rows = _chip_rows(described)
        if form is Format.JSON:
            print(json.dumps(answer | {"rows": rows}, indent=1))
        else:
            show_rows(rows, form, f"noise of {described.name}, {described.noise.kind}")
        _tell_other_causes(described)
        _draw(picture, described, None, {})
        return
    from halora.evaluation.sensitivity import with_mapping
    from halora.hardware.mapping import Outliers
    from halora.hardware.noise import mean_db

    _, array = _loaded(model)
    noise_db = _realised_db(array, described)
    ratios = {"noise_db": noise_db}
    if described.mapping.outliers.occur:
        ratios["without_outliers_db"] = _realised_db(array, with_mapping(described, outliers=Outliers()))
    rows = [{"layer": name, **{what: _finite(of[name]) for what, of in ratios.items()}} for name in noise_db]
    means = {what: _finite(mean_db(of.values())) for what, of in ratios.items()}
    if form is Format.JSON:
        print(json.dumps(answer | {"model": model, "layers": rows, "mean_db": means["noise_db"]}, indent=1))
    else:
        show_rows([*rows, {"layer": "mean", **means}], form, f"{model} on {described.name}")
    _draw(picture, described, array, noise_db)


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    chip: ChipOption = "halora-2026",
    task: Annotated[str, typer.Option(help="A known task, a folder of JSONL files, or a hub id.")] = "arc-easy",
    rows: Annotated[int, typer.Option(help="Validation rows to score.")] = 8,
    outliers: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Rank by what this share of a layer's weights in SRAM saves.")
    ] = None,
    set_: ChipSetOption = None,
    form: Annotated[
        SensitivityFormat, typer.Option("--format", help="Form of the answer; yaml: a chip file with the ranking.")
    ] = SensitivityFormat.TABLE,
) -> None:
    """Layers by how far each one's noise alone moves the scores, most sensitive per weight first.

    One forward per layer on chip instance 0 of the search pool. The order is the one `mapping.ranking` of a chip takes:
    write it with --format yaml > ranked.yaml and use it with --chip ranked.yaml --set mapping.sram_fraction=0.1.
    With --outliers the order is that of what the share would save, per value it puts into SRAM.
    """
    problems: list[str] = []
    described = attempt(problems, lambda: chip_from(chip, set_))
    _check_model(problems, model, described)
    attempt(problems, lambda: _check_task(task))
    if rows < 1:
        problems.append(f"--rows: must be 1 or more, got {rows}")
    if outliers is not None and not 0 < outliers < 1:
        problems.append(f"--outliers: a share between 0 and 1, got {outliers:g}")
    if problems:
        raise UserError(problems)
    assert described is not None

    from halora.evaluation.sensitivity import layer_sensitivity
    from halora.settings.evaluation import EvaluationSettings
    from halora.training.tasks import load_rows

    settings = EvaluationSettings()
    scored = load_rows(task, "validation", rows)
    calibration_rows = load_rows(task, "train", settings.calibration_tokens)
    base, array = _loaded(model)
    with _progress() as progress:
        found = layer_sensitivity(
            base, array, described, scored, calibration_rows, settings, outliers=outliers, progress=progress
        )
    _show_sensitivity(found, described, form, f"{model} on {described.name}, {len(scored)} rows of {task}")


def _check_model(problems: list[str], model: str | None, chip: "Chip | None") -> None:
    """Add what is wrong with the model, or with the chip's mapping of its layers."""
    from halora.training.models import model_shape

    shape = attempt(problems, lambda: model_shape(model)) if model is not None else None
    if shape is not None and chip is not None:
        attempt(problems, lambda: chip.mapping.places(shape.sizes))


def _check_task(task: str) -> None:
    from halora.training.tasks import check_task

    check_task(task)


def _picture_problems(picture: Path | None) -> list[str]:
    if picture is None:
        return []
    problems = [] if picture.suffix.lower() == ".png" else [f"--picture {picture}: the name must end in .png"]
    if not picture.parent.is_dir():
        problems.append(f"--picture {picture}: there is no folder '{picture.parent}'")
    return problems


def _loaded(model: str) -> "tuple[BaseModel, RramArray]":
    from halora.training.models import load_base
    from halora.training.rram import install

    talk.print(f"loading {model}", markup=False, highlight=False)
    base = load_base(model, "fp32")
    return base, install(base.causal_lm)


def _realised_db(array: "RramArray", chip: "Chip") -> dict[str, float]:
    from halora.hardware.addressing import NoiseKey, Role
    from halora.hardware.instance import ChipInstance

    instance = ChipInstance(chip, NoiseKey(role=Role.SEARCH, chip_seed=0), chip.noise.level)
    array.program(instance, regenerate=True)
    try:
        return array.noise_db()
    finally:
        array.clear()


def _finite(ratio_db: float) -> float | None:
    """The ratio; nothing where there is no error, as JSON has no infinity."""
    return ratio_db if isfinite(ratio_db) else None


def _chip_rows(chip: "Chip") -> list[dict[str, Any]]:
    """What the models state: cells over conductance at both ends of the refresh interval, weights in one row."""
    import torch

    from halora.hardware.error_curves import moment_s, stated_cell_error
    from halora.hardware.noise import cells_err, weight_error_factor

    rows: list[dict[str, Any]] = []
    if chip.noise.domain == "weight":
        rows.append({"of": "weight", "std": chip.noise.level * weight_error_factor(chip), **_meaning(chip)})
    if cells_err(chip, chip.noise):
        cells = chip.cells
        conductance = torch.linspace(cells.g_min_us, cells.g_max_us, _TABLE_POINTS)
        for moment in ("start", "end"):
            curve = stated_cell_error(chip, conductance, moment)
            rows += [
                {
                    "of": "cell",
                    "moment": moment,
                    "time_s": moment_s(chip, moment),
                    "conductance_us": target,
                    "mean_error_us": round(mean, 9),
                    "std_us": std,
                    "std_of_g_max": std / cells.g_max_us,
                }
                for target, mean, std in zip(curve.target, curve.mean, curve.std, strict=True)
            ]
    return rows


def _meaning(chip: "Chip") -> dict[str, Any]:
    """What the standard deviation of a model of the weight domain is in units of."""
    from halora.hardware.noise_models import GaussianNoise

    noise, tile = chip.noise, chip.tile
    if not isinstance(noise, GaussianNoise):
        return {"times": f"as {noise.kind} defines it"}
    size = f" ({tile.rows} inputs x {tile.columns} outputs)" if noise.reference == "tile_max" else ""
    return {"sigma": noise.sigma, "times": _REFERENCES[noise.reference] + size, "lasts": "until programmed again"}


def _tell_other_causes(chip: "Chip") -> None:
    """Say what moves weights and products besides the curves."""
    causes = {
        "finite levels": chip.cells.levels is not None,
        "stuck cells": chip.faults.occur,
        "clipping": chip.coding.clip_std is not None,
        "IR drop": chip.wires.resistance_ohm > 0,
        "read noise": chip.read.noisy,
        "DAC": not chip.dac.lossless,
        "ADC": not chip.adc.lossless,
    }
    if acting := [cause for cause, acts in causes.items() if acts]:
        text = f"not in these rows, but in the chip: {', '.join(acting)}"
        say(text)


def _draw(picture: Path | None, chip: "Chip", array: "RramArray | None", noise_db: Mapping[str, float]) -> None:
    """Write the picture: of the first layer in RRAM, or without a model of a ramp of weights."""
    if picture is None:
        return
    from halora.analysis.figures import error_figure
    from halora.hardware.error_curves import ramp

    name, weight = "a ramp of weights", ramp()
    if array is not None:
        layer = next((layer for layer in array.layers if layer.name in noise_db), None)
        if layer is None:
            talk.print("no layer is in RRAM: no picture", markup=False)
            return
        name, weight = layer.name, layer.split(chip)[0].detach().float().cpu()
    drawn = {layer: ratio for layer, ratio in noise_db.items() if isfinite(ratio)}
    figure = error_figure(_panels(chip, name, weight), drawn, f"{chip.name}, chip instance 0: {name}")
    try:
        figure.savefig(picture, format="png")
    except OSError as error:
        raise UserError(f"--picture {picture}: cannot be written: {error.strerror}") from None
    say(f"picture: {picture}")


def _panels(chip: "Chip", name: str, weight: "Tensor") -> "list[ErrorPanel]":
    import torch

    from halora.analysis.figures import ErrorPanel
    from halora.hardware import error_curves
    from halora.hardware.addressing import NoiseKey, Role
    from halora.hardware.noise import cells_err

    key = NoiseKey(role=Role.SEARCH, chip_seed=0).at(module=name, purpose="programming")
    panels = []
    if cells_err(chip, chip.noise):
        conductance = torch.linspace(chip.cells.g_min_us, chip.cells.g_max_us, 100)
        for moment in ("start", "end"):
            stated = error_curves.stated_cell_error(chip, conductance, moment)
            drawn = error_curves.drawn_cell_error(weight, chip, key, moment)
            title = f"cells at the {moment}, {error_curves.moment_s(chip, moment):g} s"
            panels.append(ErrorPanel(title, "conductance aimed at (µS)", "error (µS)", stated, drawn))
    if chip.noise.domain == "weight":
        stated = error_curves.stated_weight_error(weight, chip)
        drawn = error_curves.drawn_weight_error(weight, chip, key)
        panels.append(
            ErrorPanel("weights (drawn: from every cause)", "weight / max|W|", "error / max|W|", stated, drawn)
        )
    return panels


@contextmanager
def _progress() -> "Iterator[Any]":
    """Progress over layers: a bar on a terminal, a line per tenth elsewhere."""
    from rich.progress import Progress

    with Progress(console=talk, disable=not talk.is_terminal) as bar:
        task = bar.add_task("layers", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not talk.is_terminal and 10 * done // total > 10 * (done - 1) // total:
                talk.print(f"layer {done} of {total}", markup=False, highlight=False)

        yield tell


def _show_sensitivity(found: "Sequence[LayerSensitivity]", chip: "Chip", form: SensitivityFormat, title: str) -> None:
    names = [layer.name for layer in found]
    if form is SensitivityFormat.YAML:
        print(_ranked_chip(chip, names), end="")
        return
    total, so_far, rows = sum(layer.weights for layer in found), 0, []
    for layer in found:
        so_far += layer.weights
        rows.append(
            {
                "layer": layer.name,
                "weights": layer.weights,
                "noise_db": _finite(layer.noise_db),
                "change_nats": layer.change_nats,
                "change_per_million_weights": layer.change_per_million_weights,
                **layer.by_outliers,
                "weights_share_so_far": so_far / total,
            }
        )
    if form is SensitivityFormat.JSON:
        answer = {"chip": chip.name, "chip_hash": chip.content_hash, "layers": rows, "ranking": names}
        print(json.dumps(answer, indent=1))
    else:
        show_rows(rows, Format(form.value), title)
    say(
        "to keep the first of these in SRAM: --format yaml > ranked.yaml, "
        "then --chip ranked.yaml --set mapping.sram_fraction=0.1"
    )


def _ranked_chip(chip: "Chip", names: Sequence[str]) -> str:
    import yaml

    from halora.evaluation.sensitivity import with_mapping

    ranked = with_mapping(chip, ranking=tuple(names)).model_copy(update={"name": f"{chip.name}-ranked"})
    return yaml.safe_dump(ranked.model_dump(mode="json"), sort_keys=False)
