"""What several commands take: `--set`, and a chip."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.errors import UserError

if TYPE_CHECKING:
    from halora.api.chip import Chip

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
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="FIELD=VALUE",
        help="Only trials for which this holds; = != < <= > >= over method, model, chip, task, noise, "
        "noise_strength, searched values and metrics. Can be given several times.",
    ),
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
    from halora.api.chip import Chip

    return Chip(name, overrides_from(settings, example="adc.bits=6"))


@contextmanager
def told_as_options(*arguments: str) -> Iterator[None]:
    """Tell mistakes in these arguments of a function by the options that they are typed with.

    Raises:
        UserError: The one that the block raises, so told.
    """
    try:
        yield
    except UserError as error:
        names = tuple(f"{argument}:" for argument in arguments)
        told = [f"--{problem}" if problem.startswith(names) else problem for problem in error.problems]
        raise type(error)(told, error.next_step) from None
