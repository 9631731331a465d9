"""Generation scoring: greedy decoding on whatever chip lies under the model, and an answer parsed from the text.

Every new token is read with the whole sequence before it, without a cache of keys and values: the noise of a read is a
function of row and position, and a longer read continues a shorter one, so each token is what one long read would give.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from halora.errors import UserError
from halora.evaluation.scoring import option_scores
from halora.training.batches import PackedRow, encode, lay_out, pack_answer
from halora.training.models import BaseModel
from halora.training.rram import RramArray
from halora.training.tasks import Row, refuse_rows


def generate(base: BaseModel, array: RramArray, rows: Sequence[Row], batch_size: int, max_new_tokens: int) -> list[str]:
    """The text of `greedy_tokens` for every row, without the end token."""
    tokens = greedy_tokens(base, array, rows, batch_size, max_new_tokens)
    return [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


def greedy_tokens(
    base: BaseModel, array: RramArray, rows: Sequence[Row], batch_size: int, max_new_tokens: int
) -> list[list[int]]:
    """What `continued` writes after the prompt of every row."""
    prompts = [(row.row_id, encode(row, base.tokenizer, only=row.answer)[0]) for row in rows]
    return continued(base, array, prompts, batch_size, max_new_tokens)


@torch.no_grad()
def continued(
    base: BaseModel,
    array: RramArray,
    prompts: Sequence[tuple[str, list[int]]],
    batch_size: int,
    max_new_tokens: int,
    until: Sequence[str] = (),
) -> list[list[int]]:
    """The most likely token after every prompt, and after it the next, up to an end token or `max_new_tokens`.

    Args:
        base: The model and its tokenizer.
        array: Its layers.
        prompts: Id of the row, which addresses the noise of its reads, and tokens of each.
        batch_size: Prompts of one pass.
        max_new_tokens: Most tokens after a prompt.
        until: Texts that end one as well.
    """
    ends = end_tokens(base)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
    written: list[list[int]] = [[] for _ in prompts]

    def ended(i: int) -> bool:
        if written[i][-1] in ends:
            return True
        text = base.tokenizer.decode(written[i]) if until else ""
        return any(stop in text for stop in until)

    for start in range(0, len(prompts), batch_size):
        going = by_length[start : start + batch_size]
        for _ in range(max_new_tokens):
            batch = lay_out([_to_go_on(prompts[i][0], prompts[i][1] + written[i]) for i in going])
            with array.reading(batch.rows, batch.predicting):
                tokens = batch.logits(base.causal_lm).argmax(dim=-1).tolist()
            for i, token in zip(going, tokens, strict=True):
                written[i].append(token)
            going = [i for i in going if not ended(i)]
            if not going:
                break
    return written


def reference_scores(base: BaseModel, array: RramArray, rows: Sequence[Row], batch_size: int) -> list[float]:
    """Mean log-likelihood per token of every row's right option, in nats: smooth where a right answer is not."""
    packed = [pack_answer(row, base.tokenizer) for row in rows]
    scores = option_scores(base.causal_lm, array, packed, batch_size)
    return [score / len(row.sources) for (score,), row in zip(scores, packed, strict=True)]


def parsed_answer(text: str, pattern: str) -> str | None:
    """The last match of `pattern` in a text, or its first group where it has one; nothing without a match."""
    matches = list(re.finditer(pattern, text))
    return matches[-1][matches[-1].re.groups] if matches else None


def same_answer(answer: str | None, reference: str) -> bool:
    """Whether two answers are equal: as numbers where both are (18, 18.0 and 1,800 for 1800), else as text."""
    if answer is None:
        return False
    try:
        return float(answer.replace(",", "")) == float(reference.replace(",", ""))
    except ValueError:
        return answer.strip().casefold() == reference.strip().casefold()


def reference_answers(rows: Sequence[Row], pattern: str) -> list[str]:
    """The right answer of every row: its reference or, where it has none, what `pattern` finds in its right option.

    Raises:
        UserError: The pattern finds nothing; all such rows are told.
    """
    found = [row.reference or parsed_answer(row.options[row.answer], pattern) for row in rows]
    refuse_rows(
        [
            f"row '{row.row_id}' of task '{row.task}': no answer in '{row.options[row.answer].strip()[-40:]}'"
            for row, answer in zip(rows, found, strict=True)
            if not answer
        ],
        f"evaluation.answer_pattern is {pattern!r}; give one that finds the answers, or give rows an answer",
    )
    return [answer or "" for answer in found]


def check_scorable(rows: Sequence[Row], scoring: str, pattern: str) -> None:
    """Refuse rows that cannot be scored the asked way.

    Raises:
        UserError: Rows with nothing to choose from where options are scored, or without an answer to find for
            `generation`.
    """
    if scoring == "generation":
        reference_answers(rows, pattern)
        return
    single = sorted({row.task for row in rows if len(row.options) == 1})
    if single:
        raise UserError(
            f"evaluation.scoring {scoring}: rows of task {', '.join(single)} have one completion, nothing to choose "
            "from",
            "take evaluation.scoring generation",
        )


def end_tokens(base: BaseModel) -> set[int]:
    """Tokens that end a text, by the model and its tokenizer."""
    configured: Any = base.causal_lm.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, base.tokenizer.eos_token_id) if token is not None}


def _to_go_on(row_id: str, tokens: list[int]) -> PackedRow:
    """A text whose next token is asked for: its last token is where the batch makes logits."""
    last = len(tokens) - 1
    return PackedRow(row_id, tokens, [0] * len(tokens), list(range(len(tokens))), [last], 0)
