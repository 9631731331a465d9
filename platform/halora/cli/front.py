"""`halora front`: the non-dominated trials of a sweep."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.analysis.formats import searched_values
from halora.cli.output import Format, FormatOption, StoreOption, open_store, show_rows, talk
from halora.records.store import Store

if TYPE_CHECKING:
    from halora.analysis.summary import FrontView

app = typer.Typer(help="The front of accuracy against energy.", no_args_is_help=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a launched sweep.")],
    all_: Annotated[bool, typer.Option("--all", help="Dominated trials too.")] = False,
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="FIELD=VALUE",
            help="Only trials for which this holds; = != < <= > >= over method, model, chip, task, noise, "
            "noise_strength, searched values and metrics. Can be given several times.",
        ),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            metavar="METRIC",
            help="Draw the front over these two or three metrics instead of the sweep's objectives; "
            "METRIC:max or METRIC:min where the name does not tell which is better.",
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
    store: StoreOption = None,
) -> None:
    """Trials no other trial beats in every objective, the best in the last objective first."""
    print_front(name, open_store(store), form, everything=all_, conditions=filter_ or (), objectives=objective or ())


def print_front(
    name: str,
    store: Store,
    form: Format,
    *,
    everything: bool = False,
    conditions: Sequence[str] = (),
    objectives: Sequence[str] = (),
) -> None:
    """Print a sweep's front.

    Raises:
        UserError: A condition or an objective does not fit the recorded trials.
    """
    from halora.api.front import Front
    from halora.api.store import Store as Surface

    view = Front(Surface(store), name, objectives, conditions).view
    rows = _rows(view, form, everything)
    if rows or form is not Format.TABLE:
        feasible = len(view.groups.feasible)
        show_rows(rows, form, f"front of {name}: {len(view.members)} of {feasible} finished trials")
    else:
        talk.print(f"sweep '{name}' has no finished trial yet", markup=False)
    _tell_apart(view)


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
            row["interval"] = f"{p.metrics['accuracy_low']:.3f}..{p.metrics['accuracy_high']:.3f}"
        row["p_front"] = round(view.probability[p.number], 2)
        columns = {"margin": "margin", "clean": "clean_accuracy"}
        columns |= {"per_byte": "accuracy_per_byte", "summed": "accuracy_summed"}
        for column, metric in columns.items():
            if metric in p.metrics:
                row[column] = round(p.metrics[metric], 4)
        if everything:
            row["front"] = p.number in members
        row["params"] = _params(p.params, form)
        rows.append(row)
    return rows


def _tell_apart(view: "FrontView") -> None:
    """Say on stderr which trials the front leaves out, and which one is its knee."""
    groups = view.groups
    apart = {"failed": groups.failed, "broke a constraint": groups.violating, "have no score": groups.unscored}
    told = [f"{len(points)} {what}" for what, points in apart.items() if points]
    told += [f"knee: trial {view.knee.number}"] if view.knee else []
    if told:
        talk.print("; ".join(told), markup=False, highlight=False)


def _params(params: Any, form: Format) -> Any:
    """Searched values; in a table on one line: last part of the path, numbers to three digits."""
    match form:
        case Format.JSON:
            return params
        case Format.CSV:
            return json.dumps(params)
        case Format.TABLE:
            return searched_values(params)
