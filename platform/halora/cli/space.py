"""`halora space`: what sweeps search."""

import json
from typing import TYPE_CHECKING, Any

import typer

from halora.cli.arguments import SweepArgument, SweepSetOption, overrides_from
from halora.cli.output import Format, FormatOption, show_rows, talk

if TYPE_CHECKING:
    from halora.spaces.language import Categorical, Range

app = typer.Typer(help="What sweeps search.", no_args_is_help=True)


@app.command("list")
def list_(form: FormatOption = Format.TABLE) -> None:
    """The shipped sweeps."""
    from halora.spaces.language import size
    from halora.spaces.sweep import load_sweep, shipped_sweeps

    rows = []
    for name in shipped_sweeps():
        sweep = load_sweep(name)
        row = {"sweep": name, "trials": sweep.trials, "fields": len(sweep.space), "configurations": size(sweep.space)}
        rows.append(row | {"description": sweep.description})
    show_rows(rows, form)


@app.command()
def show(sweep: SweepArgument, set_: SweepSetOption = None, form: FormatOption = Format.TABLE) -> None:
    """The searched fields of a sweep, what follows from them, and the points tried first."""
    from halora.spaces.language import size
    from halora.spaces.recipes import first_points
    from halora.spaces.resolving import default_value, fixed_value
    from halora.spaces.sweep import load_sweep

    config = load_sweep(sweep, overrides_from(set_))
    defaults = config.resolve({}).model_dump(mode="json")
    rows: list[dict[str, Any]] = [
        {
            "field": path,
            "kind": _kind(distribution),
            "values": _values(distribution),
            "when": _when(distribution),
            "default": _text(fixed_value(config.trial, path) if path == "chip" else default_value(defaults, path)),
        }
        for path, distribution in config.space.items()
    ]
    rows += [
        {"field": path, "kind": "derived", "values": text, "when": "", "default": ""}
        for path, text in config.derived.items()
    ]
    points, number = first_points(config), size(config.space)
    if form is not Format.TABLE:
        show_rows(rows, form)
        return
    show_rows(rows, form, f"{sweep}: {config.description}")
    how_many = f"{number:,} configurations" if number else "configurations without number (a float is searched)"
    talk.print(f"\n{how_many}; {config.trials} trials by {config.search.sampler}", markup=False, highlight=False)
    for constraint in config.constraints:
        talk.print(f"constraint: {constraint}", markup=False, highlight=False)
    for point in points:
        values = ", ".join(f"{path} {_text(value)}" for path, value in point.items())
        talk.print(f"tried first: {values}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """The JSON Schema of a sweep file, for an editor: `halora space schema > sweep.schema.json`."""
    from halora.spaces.schema import sweep_schema

    print(json.dumps(sweep_schema(), indent=1))


def _kind(distribution: "Categorical | Range") -> str:
    from halora.spaces.language import Categorical

    if isinstance(distribution, Categorical):
        return "choice"
    return f"log {distribution.kind}" if distribution.log else distribution.kind


def _values(distribution: "Categorical | Range") -> str:
    from halora.spaces.language import Categorical

    if isinstance(distribution, Categorical):
        return ", ".join(map(_text, distribution.choices))
    return f"{distribution.low:g} .. {distribution.high:g}"


def _when(distribution: "Categorical | Range") -> str:
    return " and ".join(f"{name} is {' or '.join(map(_text, values))}" for name, values in distribution.when.items())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)
