"""`halora front`: the non-dominated trials of a sweep."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.analysis.formats import searched_values
from halora.analysis.table import PARAM
from halora.cli.arguments import FilterOption
from halora.cli.output import (
    ColumnsOption,
    Format,
    FormatOption,
    SortOption,
    StoreOption,
    open_store,
    say,
    show_rows,
    talk,
)
from halora.records.store import Store

if TYPE_CHECKING:
    from halora.analysis.summary import FrontView

app = typer.Typer(help="The front of accuracy against energy.", no_args_is_help=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a launched sweep.")],
    all_: Annotated[bool, typer.Option("--all", help="Dominated trials too.")] = False,
    filter_: FilterOption = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            metavar="METRIC",
            help="Draw the front over these two or three metrics instead of the sweep's objectives; "
            "METRIC:max or METRIC:min where the name does not tell which is better.",
        ),
    ] = None,
    columns: ColumnsOption = None,
    sort: SortOption = None,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """Trials no other trial beats in every objective, the best in the last objective first."""
    place, asked = open_store(store), {"columns": columns, "sort": sort}
    print_front(name, place, form, everything=all_, conditions=filter_ or (), objectives=objective or (), **asked)


def print_front(
    name: str,
    store: Store,
    form: Format,
    *,
    everything: bool = False,
    conditions: Sequence[str] = (),
    objectives: Sequence[str] = (),
    columns: str | None = None,
    sort: str | None = None,
) -> None:
    """Print a sweep's front, and which of its trials to take.

    Raises:
        UserError: A condition, an objective or a column does not fit the recorded trials.
    """
    from halora.api.front import Front
    from halora.api.store import Store as Surface

    found = Front(Surface(store), name, objectives, conditions)
    view = found.view
    rows = _rows(view, form, everything)
    if rows or form is not Format.TABLE:
        feasible = len(view.groups.feasible)
        title = f"front of {name}: {len(view.members)} of {feasible} finished trials"
        show_rows(rows, form, title, columns=columns, sort=sort, keep=["params"])
    elif conditions and not view.groups.all:
        talk.print(f"no trial of sweep '{name}' meets {' and '.join(conditions)}", markup=False, highlight=False)
        return
    _tell_apart(view)
    if form is Format.TABLE:
        recommended = found.recommendation()
        say(f"\n{recommended.text}")
        if recommended.command:
            say(f"next: {recommended.command}")


def _rows(view: "FrontView", form: Format, everything: bool) -> list[dict[str, Any]]:
    members = {point.number for point in view.members}
    last = view.objectives[-1]
    chosen = view.members
    if everything:
        sign = -1 if last.maximise else 1
        chosen = sorted(view.groups.feasible, key=lambda point: sign * point.metrics[last.metric])
    rows = []
    for p in chosen:
        row: dict[str, Any] = {"trial": p.number}
        row |= {each.metric: round(p.metrics[each.metric], 4) for each in reversed(view.objectives)}
        if {"accuracy", "accuracy_low", "accuracy_high"} <= p.metrics.keys():
            row["accuracy"] = round(p.accuracy, 4)
            low, high = p.metrics["accuracy_low"], p.metrics["accuracy_high"]
            if form is Format.TABLE:
                row["interval"] = f"{low:.3f}..{high:.3f}"
            else:
                row |= {"accuracy_low": round(low, 4), "accuracy_high": round(high, 4)}
        row["p_front"] = round(view.probability[p.number], 2)
        columns = {"margin": "margin", "clean": "clean_accuracy"}
        columns |= {"per_byte": "accuracy_per_byte", "summed": "accuracy_summed"}
        for column, metric in columns.items():
            if metric in p.metrics:
                row[column] = round(p.metrics[metric], 4)
        if everything:
            row["front"] = p.number in members
        row |= _params(p.params, form)
        rows.append(row)
    return rows


def _tell_apart(view: "FrontView") -> None:
    """Say on stderr which trials the front leaves out, and which one is its knee."""
    groups = view.groups
    apart = {"failed": groups.failed, "violate a constraint": groups.violating, "have no score": groups.unscored}
    told = [f"{len(points)} {what}" for what, points in apart.items() if points]
    told += [f"knee: trial {view.knee.number}"] if view.knee else []
    if told:
        talk.print("; ".join(told), markup=False, highlight=False)


def _params(params: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """Searched values: in a table on one line, in CSV in columns of their own."""
    match form:
        case Format.JSON:
            return {"params": params}
        case Format.CSV:
            return {f"{PARAM}{path}": value for path, value in params.items()}
        case Format.TABLE:
            return {"params": searched_values(params)}
