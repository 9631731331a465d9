"""Cloze scoring: the log-likelihood of every option's text after the prompt.

A row is scored in one pass: prompt and options share one sequence, each option sees the prompt and itself only, and
starts at the position right after the prompt. The scores equal those of one sequence per option.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halora.training.batches import encode
from halora.training.rram import RramArray
from halora.training.tasks import Row


@dataclass(frozen=True)
class PackedRow:
    """A row's prompt and options as one sequence.

    Attributes:
        row_id: Id of the row.
        tokens: Token ids: prompt, then option after option.
        segments: Per token, 0 for the prompt and 1 + option index for an option.
        positions: Per token, its position in the sequence it stands for.
        sources: Per option token, the index of the token whose output predicts it.
        answer: Index of the right option.
    """

    row_id: str
    tokens: list[int]
    segments: list[int]
    positions: list[int]
    sources: list[int]
    answer: int

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens; option tokens follow."""
        return len(self.tokens) - len(self.sources)


def pack(row: Row, tokenizer: Any) -> PackedRow:
    """Lay a row out for one pass."""
    prompt, options = encode(row, tokenizer)
    tokens, segments, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    sources: list[int] = []
    for index, option in enumerate(options):
        start = len(tokens)
        sources += [len(prompt) - 1, *range(start, start + len(option) - 1)]
        tokens += option
        segments += [index + 1] * len(option)
        positions += range(len(prompt), len(prompt) + len(option))
    return PackedRow(row.row_id, tokens, segments, positions, sources, row.answer)


@torch.no_grad()
def option_scores(causal_lm: Any, array: RramArray, rows: Sequence[PackedRow], batch_size: int) -> list[list[float]]:
    """Log-likelihood in nats of every option of every row, in the order given."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    scores: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(rows), batch_size):
        indices = by_length[start : start + batch_size]
        batch = _score_batch(causal_lm, array, [rows[i] for i in indices])
        for i, row_scores in zip(indices, batch, strict=True):
            scores[i] = row_scores
    return scores


def margin(scores: Sequence[float], answer: int) -> float:
    """Score of the right option less the best wrong one, in nats; positive when the row is answered rightly."""
    return scores[answer] - max(score for i, score in enumerate(scores) if i != answer)


def _score_batch(causal_lm: Any, array: RramArray, rows: Sequence[PackedRow]) -> list[list[float]]:
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    positions = torch.zeros_like(tokens)
    segments = torch.full_like(tokens, -1)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        tokens[i, :size] = torch.tensor(row.tokens)
        positions[i, :size] = torch.tensor(row.positions)
        segments[i, :size] = torch.tensor(row.segments)
    parameter = next(causal_lm.parameters())
    with array.reading([(row.row_id, len(row.tokens)) for row in rows]):
        hidden = causal_lm.get_decoder()(
            input_ids=tokens.to(parameter.device),
            position_ids=positions.to(parameter.device),
            attention_mask=_tree_mask(segments, parameter.dtype).to(parameter.device),
            use_cache=False,
        ).last_hidden_state
    batch_index = torch.tensor([i for i, row in enumerate(rows) for _ in row.sources])
    source_index = torch.tensor([source for row in rows for source in row.sources])
    targets = torch.tensor([token for row in rows for token in row.tokens[row.prompt_length :]])
    logits = causal_lm.get_output_embeddings()(hidden[batch_index, source_index]).float()
    chosen = logits.gather(1, targets.to(logits.device)[:, None])[:, 0] - logits.logsumexp(dim=1)
    log_likelihoods = iter(chosen.tolist())
    scores = []
    for row in rows:
        options = row.segments[row.prompt_length :]
        row_scores = [0.0] * max(options)
        for option in options:
            row_scores[option - 1] += next(log_likelihoods)
        scores.append(row_scores)
    return scores


def _tree_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (rows, 1, tokens, tokens) from segments (rows, tokens); padding sees itself only."""
    length = segments.shape[1]
    seen = segments[:, None, :]
    seer = segments[:, :, None]
    causal = torch.ones((length, length), dtype=torch.bool).tril()
    allowed = causal & ((seen == seer) | (seen == 0))
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return mask[:, None]
