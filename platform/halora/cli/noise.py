"""`halora noise`: what a chip's noise is, and which layers of a model feel it most."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.arguments import ChipOption, ChipSetOption, chip_from
from halora.cli.output import Format, FormatOption, say, show_rows, talk
from halora.errors import UserError, attempt

if TYPE_CHECKING:
    from halora.api.noise import Noise
    from halora.evaluation.sensitivity import LayerSensitivity
    from halora.hardware.chip import Chip
    from halora.training.models import BaseModel
    from halora.training.rram import RramArray

app = typer.Typer(help="See a chip's noise, and the layers that feel it most.", no_args_is_help=True)

_MODEL_HELP = "An embedded model (smollm2-135m-instruct, ...), a folder, or a hub id."


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
    _check_model(problems, model, None if described is None else described.description)
    problems += _picture_problems(picture)
    if problems:
        raise UserError(problems)
    assert described is not None

    if model is not None:
        talk.print(f"loading {model}", markup=False, highlight=False)
    found = described.noise(model)
    if form is Format.JSON:
        print(json.dumps(found.to_json(), indent=1))
    elif model is None:
        show_rows(found.rows, form, f"noise of {described.name}, {described.description.noise.kind}")
    else:
        show_rows([*found.rows, {"layer": "mean", **found.means}], form, f"{model} on {described.name}")
    if model is None and found.other_causes:
        say(f"not in these rows, but in the chip: {', '.join(found.other_causes)}")
    if picture is not None:
        _write(picture, found)


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
    described = attempt(problems, lambda: chip_from(chip, set_).description)
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
        attempt(problems, lambda: chip.on_layers(shape.sizes))


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


def _write(picture: Path, noise: "Noise") -> None:
    """Write the picture: of the first layer in RRAM, or without a model of a ramp of weights."""
    figure = noise.figure()
    if figure is None:
        talk.print("no layer is in RRAM: no picture", markup=False)
        return
    try:
        figure.savefig(picture, format="png")
    except OSError as error:
        raise UserError(f"--picture {picture}: cannot be written: {error.strerror}") from None
    say(f"picture: {picture}")


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
    from halora.api.noise import finite_db

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
                "noise_db": finite_db(layer.noise_db),
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

    from halora.hardware.layers import changed_everywhere

    ranked = changed_everywhere(chip, "mapping.ranking", tuple(names)).model_copy(
        update={"name": f"{chip.name}-ranked"}
    )
    return yaml.safe_dump(ranked.model_dump(mode="json"), sort_keys=False)
