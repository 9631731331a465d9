"""Training batches: rows in an order fixed by the seed, tokenised, padded on the right, labelled on the option only."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.training.tasks import Row

IGNORED = -100
"""Label of a token without loss."""


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, both (rows, tokens); labels are `IGNORED` on the prompt and the padding."""

    input_ids: Tensor
    labels: Tensor


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


def training_batch(rows: Sequence[Row], tokenizer: Any) -> Batch:
    """One batch of prompts with their right options."""
    sequences, starts = [], []
    for row in rows:
        prompt, options = encode(row, tokenizer)
        sequences.append(prompt + options[row.answer])
        starts.append(len(prompt))
    length = max(map(len, sequences))
    input_ids = torch.zeros((len(rows), length), dtype=torch.long)  # causal attention never looks at right padding
    labels = torch.full((len(rows), length), IGNORED)
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
        labels[i, start : len(sequence)] = torch.tensor(sequence[start:])
    return Batch(input_ids, labels)


def rows_at_step(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of one step: epoch after epoch, each in an order of its own; a function of the step alone."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch_order(num_rows, seed, p // num_rows)[p % num_rows]) for p in positions]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(num_rows)
