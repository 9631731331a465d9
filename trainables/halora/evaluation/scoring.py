"""Scoring by options: the log-likelihood of every option's text after the prompt, all options of a row in one pass.

The scores equal those of one sequence per option. Summed, they favour short options; over their length in bytes they do
less so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halora.training.batches import Batch, PackedRow, encode, lay_out
from halora.training.rram import RramArray
from halora.training.tasks import Row


def option_scores(causal_lm: Any, array: RramArray, rows: Sequence[PackedRow], batch_size: int) -> list[list[float]]:
    """Log-likelihood in nats of every option of every row, in the order given."""
    found = option_sums(array, rows, batch_size, lambda batch: batch.log_likelihoods(causal_lm)[:, None])
    return [[log_likelihood for (log_likelihood,) in of_row] for of_row in found]


@torch.no_grad()
def option_sums(
    array: RramArray, rows: Sequence[PackedRow], batch_size: int, of_targets: Callable[[Batch], Tensor]
) -> list[list[list[float]]]:
    """Sums over the tokens of every option of every row, in the order given, `[row][option][figure]`.

    Args:
        array: The layers that are read.
        rows: Rows with their options.
        batch_size: Rows of one pass.
        of_targets: Figures of a batch's option tokens, `(targets, figures)`.
    """
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    found: list[list[list[float]]] = [[] for _ in rows]
    for start in range(0, len(rows), batch_size):
        indices = by_length[start : start + batch_size]
        batch = lay_out([rows[i] for i in indices])
        with array.reading(batch.rows, batch.predicting):
            figures = of_targets(batch)
        of_target = iter(figures.tolist())
        for i in indices:
            options = rows[i].segments[rows[i].prompt_length :]
            sums = [[0.0] * figures.shape[1] for _ in range(max(options))]
            for option in options:
                sums[option - 1] = [
                    total + value for total, value in zip(sums[option - 1], next(of_target), strict=True)
                ]
            found[i] = sums
    return found


@torch.no_grad()
def plain_option_scores(causal_lm: Any, tokenizer: Any, row: Row) -> list[float]:
    """Log-likelihood in nats of every option of a row, each behind the whole prompt, by the model's own forward."""
    prompt, options = encode(row, tokenizer)
    scores = []
    for option in options:
        logits = causal_lm(input_ids=torch.tensor([prompt + option])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(dim=-1).gather(1, torch.tensor(option)[:, None])
        scores.append(float(chosen.sum()))
    return scores


def per_byte(scores: Sequence[float], options: Sequence[str]) -> list[float]:
    """Scores over the length of their options in UTF-8 bytes, without the space that parts them from the prompt.

    The `acc_bytes` of lm-evaluation-harness (`lm_eval/api/task.py`). Its `acc_norm` divides by characters, likewise
    without that space: the same for plain ASCII.

    Args:
        scores: Log-likelihood in nats of every option.
        options: Their texts.

    Returns:
        Nats per byte.
    """
    return [score / len(text.removeprefix(" ").encode()) for score, text in zip(scores, options, strict=True)]


def margin(scores: Sequence[float], answer: int) -> float:
    """Score of the right option less the best wrong one, in nats; positive when the row is answered rightly."""
    return scores[answer] - max(score for i, score in enumerate(scores) if i != answer)
