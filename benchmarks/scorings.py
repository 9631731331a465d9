"""Options chosen by their summed log-likelihood and by that per byte, beside chance, by task, on a clean base.

Both come from the same forward passes. Chance is the mean of one over a row's number of options.

    python -m benchmarks.scorings --rows 50 --split validation
"""

import argparse
from statistics import fmean, stdev
from typing import get_args

from halora.cli.output import Format, show_rows
from halora.evaluation.scoring import margin, option_scores, per_byte
from halora.settings.names import KNOWN_TASKS
from halora.training.batches import pack
from halora.training.models import load_base
from halora.training.prompts import prepared_rows
from halora.training.rram import install
from halora.training.tasks import Split, load_rows


def main() -> None:
    """Measure and print."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--model", default="smollm2-135m-instruct")
    command.add_argument("--task", action="append", choices=KNOWN_TASKS, help="several times for several; all of them")
    command.add_argument("--rows", type=int, default=50)
    command.add_argument("--split", default="validation", choices=get_args(Split))
    arguments = command.parse_args()
    base = load_base(arguments.model, "fp32")
    array = install(base.causal_lm)
    found = []
    for task in arguments.task or KNOWN_TASKS:
        rows = prepared_rows(load_rows(task, arguments.split, arguments.rows), base, "plain")
        scores = option_scores(base.causal_lm, array, [pack(row, base.tokenizer) for row in rows], batch_size=8)
        summed = [margin(each, row.answer) > 0 for each, row in zip(scores, rows, strict=True)]
        lengths = [margin(per_byte(each, row.options), row.answer) > 0 for each, row in zip(scores, rows, strict=True)]
        gains = [int(one) - int(other) for one, other in zip(lengths, summed, strict=True)]
        found.append(
            {
                "task": task,
                "rows": len(rows),
                "chance": round(fmean(1 / len(row.options) for row in rows), 3),
                "options": round(fmean(summed), 3),
                "options_per_byte": round(fmean(lengths), 3),
                "gain": round(fmean(gains), 3),
                "gain_standard_error": round(stdev(gains) / len(gains) ** 0.5, 3),
            }
        )
        show_rows(found[-1:], Format.CSV)
    show_rows(found, Format.TABLE)


if __name__ == "__main__":
    main()
