"""Rows as token sequences, laid out for one forward pass, in an order fixed by the seed.

A row is packed with one or more of its options into one piece: the prompt, then option after option. Each option sees
the prompt and itself only and starts at the position right after the prompt, so the piece stands for one sequence per
option. Training packs the right option, scoring all of them. The pieces of a batch are laid end to end in few
sequences of about equal length, none seeing another, so that hardly a token is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.training.tasks import Row

_TOKENS = 256  # per sequence, about: enough for fast products, few enough that attention stays a small part
_PADDING = -1


@dataclass(frozen=True)
class PackedRow:
    """A row's prompt and options as one piece.

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


def encode(row: Row, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each option; tokenised apart, so all options share the prompt's ids.

    Raises:
        UserError: The prompt or an option has no tokens.
    """
    prompt = tokenizer(row.prompt, add_special_tokens=False).input_ids
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        prompt = [tokenizer.bos_token_id, *prompt]
    options = [tokenizer(option, add_special_tokens=False).input_ids for option in row.options]
    if not prompt or not all(options):
        raise UserError(f"row '{row.row_id}' has an empty prompt or option")
    return prompt, options


def pack(row: Row, tokenizer: Any) -> PackedRow:
    """Lay a row out with all of its options."""
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


def pack_answer(row: Row, tokenizer: Any) -> PackedRow:
    """Lay a row out with its right option only."""
    return pack(replace(row, options=(row.options[row.answer],), answer=0), tokenizer)


@dataclass(frozen=True)
class Batch:
    """Packed rows in sequences.

    Attributes:
        sequences: The rows (id, number of tokens) of each sequence, in order.
        input_ids: Token ids, `(sequences, tokens)`.
        position_ids: Position of every token in the sequence it stands for, `(sequences, tokens)`.
        attention_mask: Whether a token (third axis) sees another (last), `(sequences, 1, tokens, tokens)`.
        sources: Sequence and place of the tokens whose outputs predict option tokens, `(2, targets)`, row after row.
        targets: Those option tokens, `(targets,)`.
    """

    sequences: list[list[tuple[str, int]]]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    sources: Tensor
    targets: Tensor

    @cached_property
    def is_real(self) -> Tensor:
        """Whether a token is no padding, `(sequences, tokens)`."""
        lengths = torch.tensor([sum(tokens for _, tokens in rows) for rows in self.sequences])
        return torch.arange(self.input_ids.shape[1])[None] < lengths[:, None]

    def hidden(self, causal_lm: Any) -> Tensor:
        """The decoder's last hidden state, `(sequences, tokens, width)`."""
        parameter = next(causal_lm.parameters())
        hidden: Tensor = causal_lm.get_decoder()(
            input_ids=self.input_ids.to(parameter.device),
            position_ids=self.position_ids.to(parameter.device),
            attention_mask=_additive(self.attention_mask, parameter.dtype).to(parameter.device),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def log_likelihoods(self, causal_lm: Any) -> Tensor:
        """Log-likelihood of every target in nats, `(targets,)`; logits are made only where a target is predicted."""
        hidden = self.hidden(causal_lm)[self.sources[0], self.sources[1]]
        logits = causal_lm.get_output_embeddings()(hidden).float()
        return -torch.nn.functional.cross_entropy(logits, self.targets.to(logits.device), reduction="none")


def lay_out(rows: Sequence[PackedRow]) -> Batch:
    """Lay rows end to end in few sequences of about equal length."""
    count = min(ceil(sum(len(row.tokens) for row in rows) / _TOKENS), len(rows))
    held: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True):
        shortest = lengths.index(min(lengths))
        held[shortest].append(i)
        lengths[shortest] += len(rows[i].tokens)
    input_ids = torch.zeros((count, max(lengths)), dtype=torch.long)
    position_ids, segments = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    owners = torch.full_like(input_ids, _PADDING)
    starts: dict[int, tuple[int, int]] = {}
    for sequence, indices in enumerate(held):
        start = 0
        for i in indices:
            place = slice(start, start + len(rows[i].tokens))
            input_ids[sequence, place] = torch.tensor(rows[i].tokens)
            position_ids[sequence, place] = torch.tensor(rows[i].positions)
            segments[sequence, place] = torch.tensor(rows[i].segments)
            owners[sequence, place] = i
            starts[i] = sequence, start
            start = place.stop
    sources = [(starts[i][0], starts[i][1] + source) for i, row in enumerate(rows) for source in row.sources]
    targets = [token for row in rows for token in row.tokens[row.prompt_length :]]
    return Batch(
        [[(rows[i].row_id, len(rows[i].tokens)) for i in indices] for indices in held],
        input_ids,
        position_ids,
        _attention_mask(owners, segments),
        torch.tensor(sources).T,
        torch.tensor(targets),
    )


def _attention_mask(owners: Tensor, segments: Tensor) -> Tensor:
    """Who sees whom, from the row and the segment of each token (sequences, tokens)."""
    tokens = owners.shape[1]
    causal = torch.ones((tokens, tokens), dtype=torch.bool).tril()
    same_row = owners[:, :, None] == owners[:, None, :]
    shared = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    return (causal & same_row & shared)[:, None]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def rows_at_step(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of one step: epoch after epoch, each in an order of its own; a function of the step alone."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch_order(num_rows, seed, p // num_rows)[p % num_rows]) for p in positions]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(num_rows)
