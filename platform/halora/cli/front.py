"""`halora front`: the non-dominated trials of a sweep."""

import json
from typing import Annotated, Any

import typer

from halora.cli.output import Format, FormatOption, StoreOption, open_store, show_rows, talk
from halora.records.store import Store

app = typer.Typer(help="The front of accuracy against energy.", no_args_is_help=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a launched sweep.")],
    all_: Annotated[bool, typer.Option("--all", help="Dominated trials too.")] = False,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """Trials no other trial beats in accuracy and energy, by rising energy."""
    place = open_store(store)
    place.existing(name)
    print_front(name, place, form, everything=all_)


def print_front(name: str, store: Store, form: Format, *, everything: bool = False) -> None:
    """Print a sweep's front."""
    from halora.analysis.front import front
    from halora.records import queries
    from halora.records.tracking import open_client

    points = [p for record in queries.trials(open_client(store), name) if (p := record.point())]
    members = front(points)
    chosen = sorted(points, key=lambda p: p.energy_uj_per_token) if everything else members
    on_front = {point.number for point in members}
    rows: list[dict[str, Any]] = [
        {
            "trial": p.number,
            "energy_uj_per_token": round(p.energy_uj_per_token, 4),
            "accuracy": round(p.accuracy, 4),
            "interval": f"{p.accuracy_low:.3f}..{p.accuracy_high:.3f}",
            "margin": round(p.margin, 3),
            "clean": round(p.clean_accuracy, 4),
            **({"front": p.number in on_front} if everything else {}),
            "params": _params(p.params, form),
        }
        for p in chosen
    ]
    if rows or form is not Format.TABLE:
        show_rows(rows, form, f"front of {name}: {len(members)} of {len(points)} finished trials")
    else:
        talk.print(f"sweep '{name}' has no finished trial yet", markup=False)


def _params(params: dict[str, str], form: Format) -> Any:
    """Searched values; in a table on one line: last part of the path, numbers to three digits."""
    match form:
        case Format.JSON:
            return params
        case Format.CSV:
            return json.dumps(params)
        case Format.TABLE:
            return " ".join(f"{path.rpartition('.')[2]}={_number(value)}" for path, value in sorted(params.items()))


def _number(value: str) -> str:
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value
