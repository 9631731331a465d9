"""How a sweep's closing comparison is shown: two contestants in words, more as a table of contestants by chips."""

from typing import TYPE_CHECKING

from halora.analysis.trials import OTHER_ACCURACY
from halora.cli.output import Format, show_rows, talk

if TYPE_CHECKING:
    from halora.evaluation.intervals import Interval
    from halora.sweep.comparison import Cell, ClosingComparison


def print_comparison(comparison: "ClosingComparison") -> None:
    """Show the comparison on stderr, or its tables on stdout."""
    by_name: dict[str, list[Cell]] = {}
    for cell in comparison.cells:
        by_name.setdefault(cell.contestant, []).append(cell)
    if len(comparison.cells) == 2 and len(by_name) == 2:
        _print_pair(comparison, by_name.pop(comparison.reference)[0], *by_name.popitem()[1])
        return
    talk.print(
        f"\ncomparison on {comparison.chip_instances} fresh instances of each chip and {comparison.rows} fresh rows; "
        f"in brackets the 95 % interval of the gain over '{comparison.reference}'",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    told = comparison.cells[0].summary
    others = [(name, ".3f", title) for name, title in OTHER_ACCURACY.items() if name in told]
    for what, shown, title in (("accuracy", ".3f", "accuracy"), *others, ("margin", "+.2f", "margin in nats")):
        rows = []
        for name, cells in by_name.items():
            number = cells[0].number
            row = {"contestant": name, "trial": "-" if number is None else str(number)}
            rows.append(row | {cell.chip: _entry(cell, what, shown) for cell in cells})
        show_rows(rows, Format.TABLE, title)


def _entry(cell: "Cell", what: str, shown: str) -> str:
    gain: Interval | None = getattr(cell, f"{what}_gain", None)
    signed = f"+{shown.removeprefix('+')}"
    interval = "" if gain is None else f"  [{gain.low:{signed}} .. {gain.high:{signed}}]"
    return f"{cell.summary[what]:{shown}}{interval}"


def _print_pair(comparison: "ClosingComparison", base: "Cell", adapter: "Cell") -> None:
    gain, accuracy = adapter.margin_gain, adapter.accuracy_gain
    assert gain is not None
    assert accuracy is not None
    verdict = (
        "the adapter is better: a 95 % interval of a gain excludes 0"
        if adapter.better
        else "not significant: both intervals include 0; raise trial.training.steps and comparison.rows to decide"
    )
    before, after = base.summary, adapter.summary
    others = "".join(
        f"  {title}: {before[name]:.3f} -> {after[name]:.3f}\n"
        for name, title in OTHER_ACCURACY.items()
        if name in before
    )
    talk.print(
        f"\nbest adapter (trial {adapter.number}) beside the {base.contestant} base, "
        f"on the same {comparison.chip_instances} fresh chips and {comparison.rows} fresh rows:\n"
        f"  clean     {before['clean_accuracy']:.3f} -> {after['clean_accuracy']:.3f} accuracy, "
        f"{before['clean_margin']:+.2f} -> {after['clean_margin']:+.2f} nats margin\n"
        f"  accuracy  {before['accuracy']:.3f} -> {after['accuracy']:.3f}   "
        f"gain {accuracy.mean:+.3f}  95 % interval [{accuracy.low:+.3f}, {accuracy.high:+.3f}]\n"
        f"  margin    {before['margin']:+.2f} -> {after['margin']:+.2f} nats   "
        f"gain {gain.mean:+.2f}  95 % interval [{gain.low:+.2f}, {gain.high:+.2f}]\n"
        f"{others}  {verdict}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
