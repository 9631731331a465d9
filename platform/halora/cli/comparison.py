"""Prints a closing comparison: one pair in words, more as a table of contestants by chips."""

from typing import TYPE_CHECKING

from halora.analysis.trials import OTHER_ACCURACY
from halora.cli.output import Format, say, show_rows

if TYPE_CHECKING:
    from halora.evaluation.decisions import Gain
    from halora.sweep.run.comparison import Cell, ClosingComparison

_ENDPOINTS = {"accuracy": ".3f", "margin": "+.2f"}


def print_comparison(comparison: "ClosingComparison") -> None:
    """Show the comparison on stderr, or its tables on stdout."""
    by_name: dict[str, list[Cell]] = {}
    for cell in comparison.cells:
        by_name.setdefault(cell.contestant, []).append(cell)
    for origin in comparison.adapters:
        if origin["cause"]:
            say(f"comparison: {origin['contestant']} with seed {origin['seed']} is left out: {origin['cause']}")
    if len(comparison.cells) == 2 and len(by_name) == 2:
        _print_pair(comparison, by_name.pop(comparison.reference)[0], *by_name.popitem()[1])
        return
    say(
        f"\ncomparison on {comparison.chip_instances} fresh instances of each chip and {comparison.rows} fresh rows; "
        f"in brackets the 95 % interval of the gain over '{comparison.reference}', and the p-value of no difference"
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
    for cell in comparison.cells:
        if cell.accuracy_gain is not None:
            say(f"  {verdict(comparison, cell)} on {cell.chip}")
    say(_foot(comparison))


def verdict(comparison: "ClosingComparison", cell: "Cell") -> str:
    """What the comparison says of a contestant beside the reference: of the method from three seeds on."""
    from halora.evaluation.decisions import ENOUGH_SEEDS

    if cell.seeds >= ENOUGH_SEEDS and _reference_seeds(comparison, cell.chip) not in range(1, ENOUGH_SEEDS):
        who = f"'{cell.contestant}' ({cell.seeds} training seeds) is"
    elif cell.seeds == 1:
        who = f"this adapter of '{cell.contestant}' is"
    elif cell.seeds:
        who = f"these {cell.seeds} adapters of '{cell.contestant}' are"
    else:
        who = f"the {cell.contestant} base is"
    words = {"better": "better than", "worse": "worse than", "equivalent": "equivalent to"}
    by_word: dict[str, list[str]] = {}
    for what in _ENDPOINTS:
        by_word.setdefault(words.get(_gain(cell, what).verdict, "undecided beside"), []).append(what)
    said = "; ".join(f"{word} '{comparison.reference}' in {' and '.join(names)}" for word, names in by_word.items())
    return f"{who} {said}"


def _reference_seeds(comparison: "ClosingComparison", chip: str) -> int:
    return next(c.seeds for c in comparison.cells if (c.contestant, c.chip) == (comparison.reference, chip))


def _foot(comparison: "ClosingComparison") -> str:
    count = 2 * sum(cell.accuracy_gain is not None for cell in comparison.cells)
    said = f"  p-values are corrected for {count} tests (Holm), intervals are not; below 0.05 counts"
    margins = {what: by for what, by in comparison.equivalence_margin.items() if by is not None}
    if margins:
        within = ", ".join(f"{by:g}{' nats' if what == 'margin' else ''} of {what}" for what, by in margins.items())
        said += f"; equivalent means within {within}"
    if comparison.seeds == 1:
        said += "\n  one training seed: nothing is said about training again (comparison.seeds)"
    if comparison.chip_instances == 1:
        said += "\n  one chip: intervals are over rows, and say nothing about other chips"
    return said


def _gain(cell: "Cell", what: str) -> "Gain":
    found: Gain | None = getattr(cell, f"{what}_gain")
    assert found is not None
    return found


def _entry(cell: "Cell", what: str, shown: str) -> str:
    if what not in _ENDPOINTS or cell.accuracy_gain is None:
        return f"{cell.summary[what]:{shown}}"
    gain, signed = _gain(cell, what), f"+{shown.removeprefix('+')}"
    return f"{cell.summary[what]:{shown}}  [{gain.low:{signed}} .. {gain.high:{signed}}] p {gain.p_different:.2g}"


def _print_pair(comparison: "ClosingComparison", base: "Cell", adapter: "Cell") -> None:
    before, after = base.summary, adapter.summary
    what = "best adapter" if adapter.seeds == 1 else f"best configuration, {adapter.seeds} adapters trained anew"
    lines = [
        f"\n{what} (trial {adapter.number}) beside the {base.contestant} base, "
        f"on the same {comparison.chip_instances} fresh chips and {comparison.rows} fresh rows:",
        f"  clean     {before['clean_accuracy']:.3f} -> {after['clean_accuracy']:.3f} accuracy, "
        f"{before['clean_margin']:+.2f} -> {after['clean_margin']:+.2f} nats margin",
    ]
    for name, shown in _ENDPOINTS.items():
        gain, signed = _gain(adapter, name), f"+{shown.removeprefix('+')}"
        unit = " nats" if name == "margin" else ""
        equivalent = "" if gain.p_equivalent is None else f", of no equivalence {gain.p_equivalent:.2g}"
        lines.append(
            f"  {name:<9} {before[name]:{shown}} -> {after[name]:{shown}}{unit}   gain {gain.mean:{signed}}  "
            f"95 % interval [{gain.low:{signed}}, {gain.high:{signed}}]  p of no difference {gain.p_different:.2g}"
            f"{equivalent}"
        )
    lines += [
        f"  {title}: {before[name]:.3f} -> {after[name]:.3f}"
        for name, title in OTHER_ACCURACY.items()
        if name in before
    ]
    say("\n".join([*lines, f"  {verdict(comparison, adapter)}", _foot(comparison)]))
