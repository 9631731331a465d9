"""What several commands take: `--set`, and a chip."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.errors import UserError

if TYPE_CHECKING:
    from halora.hardware.chip import Chip

ChipOption = Annotated[str, typer.Option(help="A preset's name, or the path of a YAML file.")]
ChipSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value of the chip, e.g. adc.bits=6."),
]
SweepArgument = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A shipped sweep's name, or the path of a YAML file.")
]
SweepSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value of the file, e.g. trial.training.steps=40."),
]


def overrides_from(settings: list[str] | None, example: str = "trial.training.steps=40") -> dict[str, Any]:
    """Typed overrides from `PATH=VALUE` texts; values are read as YAML.

    Raises:
        UserError: One of them has no `=`, or its value is not YAML.
    """
    from halora.yaml_files import parse_yaml

    overrides = {}
    for setting in settings or []:
        path, separator, value = setting.partition("=")
        if not separator or not path:
            raise UserError(f"--set {setting}: write PATH=VALUE, for example {example}")
        overrides[path] = parse_yaml(value, f"--set {path}: '{value}'")
    return overrides


def chip_from(name: str, settings: list[str] | None) -> "Chip":
    """The chip that `--chip` and `--set` describe.

    Raises:
        UserError: With every mistake.
    """
    from pydantic import ValidationError

    from halora.hardware.chip import Chip, expand_chip
    from halora.spaces.language import with_values
    from halora.spaces.mistakes import describe

    overrides = overrides_from(settings, example="adc.bits=6")
    try:
        return Chip.model_validate(with_values(expand_chip(name), overrides))
    except ValidationError as error:
        raise UserError([f"chip.{problem}" for problem in describe(error, Chip)]) from None
