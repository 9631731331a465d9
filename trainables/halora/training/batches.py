"""Rows as token sequences, laid out for one forward pass, in an order fixed by the seed.

A row is packed with one or more of its options into one piece: the prompt, then option after option. Each option sees
the prompt and itself only and starts at the position right after the prompt, so the piece stands for one sequence per
option. Training packs the right option, scoring all of them. The pieces of a batch are laid end to end, none seeing
another, so that no token is padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halora.errors import UserError
from halora.hardware.addressing import derive_seed
from halora.training.attention import RowLayout
from halora.training.tasks import Row

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


def encode(row: Row, tokenizer: Any, only: int | None = None) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each option, which end to end are those of the whole text.

    That is, what the tokenizer makes of prompt and option as one text, with the tokens that it puts before any text.
    All options share the prompt's ids: a token that reaches across the boundary, or that an option changes, is the
    option's. Where nothing is left of a prompt, it is the token that texts begin with. A row's single option is a
    completion: it ends with the token that texts end with, so that a model trained on it learns to stop.

    Args:
        row: The row.
        tokenizer: The model's tokenizer.
        only: Encode this option alone.

    Raises:
        UserError: An option has no tokens, or the prompt has none and the tokenizer no token to begin with.
    """
    texts = row.options if only is None else row.options[only : only + 1]
    prompt, options = encode_texts(row.prompt, texts, tokenizer)
    if not prompt or not all(options) or not all(texts):
        raise UserError(f"row '{row.row_id}' has an empty prompt or option")
    if len(row.options) == 1 and tokenizer.eos_token_id is not None:
        options = [[*options[0], tokenizer.eos_token_id]]
    return prompt, options


def encode_texts(prompt: str, texts: Sequence[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of each text that may follow it, see `encode`; empty where nothing is left."""
    pieces = [prompt, *(prompt + text for text in texts)]
    alone, *wholes = (tokenizer(text, add_special_tokens=False).input_ids for text in pieces)
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(alone, *wholes, strict=False)))
    first, options = alone[:shared], [whole[shared:] for whole in wholes]
    opening = _opening(tokenizer)
    if first[: len(opening)] != opening:  # a chat template may have written it already
        first = opening + first
    if not first:
        begins = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        first = [] if begins is None else [begins]
    return first, options


@lru_cache(maxsize=4)
def _opening(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before the tokens of any text. No attribute tells: a post-processor may put it there.

    Raises:
        UserError: It makes nothing of a text.
    """
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    fitting = [whole[:i] for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
    if not fitting:
        raise UserError("the model's tokenizer makes no tokens of the text 'a', or others beside special ones")
    return fitting[0]


def pack(row: Row, tokenizer: Any) -> PackedRow:
    """Lay a row out with all of its options."""
    return pack_tokens(row.row_id, *encode(row, tokenizer), row.answer)


def pack_answer(row: Row, tokenizer: Any) -> PackedRow:
    """Lay a row out with its right option only."""
    return pack_tokens(row.row_id, *encode(row, tokenizer, only=row.answer), 0)


def pack_tokens(row_id: str, prompt: list[int], options: list[list[int]], answer: int = 0) -> PackedRow:
    """Lay out what is tokens already."""
    tokens, segments, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    sources: list[int] = []
    for index, option in enumerate(options):
        start = len(tokens)
        sources += [len(prompt) - 1, *range(start, start + len(option) - 1)]
        tokens += option
        segments += [index + 1] * len(option)
        positions += range(len(prompt), len(prompt) + len(option))
    return PackedRow(row_id, tokens, segments, positions, sources, answer)


@dataclass(frozen=True)
class Batch:
    """Packed rows, end to end.

    Attributes:
        rows: Id and number of tokens of each row, in order.
        input_ids: Token ids, `(1, tokens)`.
        position_ids: Position of every token in the sequence it stands for, `(1, tokens)`.
        row_layout: Which tokens attend to which.
        sources: The tokens whose outputs predict option tokens, `(targets,)`, row after row.
        predicting: A name and 1 for each of these tokens, the same wherever its row stands: what the output projection
            reads, for `RramArray.reading`.
        targets: Those option tokens, `(targets,)`.
    """

    rows: list[tuple[str, int]]
    input_ids: Tensor
    position_ids: Tensor
    row_layout: RowLayout
    sources: Tensor
    predicting: list[tuple[str, int]]
    targets: Tensor

    def hidden(self, causal_lm: Any) -> Tensor:
        """The decoder's last hidden state, `(1, tokens, width)`."""
        hidden: Tensor = causal_lm.get_decoder()(**self._inputs(causal_lm)).last_hidden_state
        return hidden

    def logits(self, causal_lm: Any) -> Tensor:
        """Logits where a target is predicted, and nowhere else, `(targets, vocabulary)`.

        The model's own, so that they are scaled or capped where its family does so.
        """
        inputs = self._inputs(causal_lm)
        logits: Tensor = causal_lm(**inputs, logits_to_keep=self.sources.to(inputs["input_ids"].device)).logits
        return logits[0].float()

    def _inputs(self, causal_lm: Any) -> dict[str, Any]:
        device = next(causal_lm.parameters()).device
        return {
            "input_ids": self.input_ids.to(device),
            "position_ids": self.position_ids.to(device),
            **self.row_layout.arguments(device),
            "use_cache": False,
        }

    def log_likelihoods(self, causal_lm: Any) -> Tensor:
        """Log-likelihood of every target in nats, `(targets,)`."""
        logits = self.logits(causal_lm)
        return -torch.nn.functional.cross_entropy(logits, self.targets.to(logits.device), reduction="none")


def lay_out(rows: Sequence[PackedRow]) -> Batch:
    """Lay rows end to end."""
    lengths = [len(row.tokens) for row in rows]
    longest = max(lengths)
    segments = torch.full((len(rows), longest), _PADDING)
    for i, row in enumerate(rows):
        segments[i, : lengths[i]] = torch.tensor(row.segments)
    starts = accumulate(lengths[:-1], initial=0)
    positions = torch.tensor([position for row in rows for position in row.positions])
    return Batch(
        rows=[(row.row_id, length) for row, length in zip(rows, lengths, strict=True)],
        input_ids=torch.tensor([[token for row in rows for token in row.tokens]]),
        position_ids=positions[None],
        row_layout=RowLayout((segments != _PADDING).flatten().nonzero()[:, 0], _visible(segments), positions),
        sources=torch.tensor(
            [start + source for row, start in zip(rows, starts, strict=True) for source in row.sources]
        ),
        predicting=[(f"{row.row_id}, token {source}", 1) for row in rows for source in row.sources],
        targets=torch.tensor([token for row in rows for token in row.tokens[row.prompt_length :]]),
    )


def _visible(segments: Tensor) -> Tensor:
    """Who sees whom within each row, from the segments of its tokens, `(rows, longest)`."""
    causal = torch.ones((segments.shape[1],) * 2, dtype=torch.bool).tril()
    shared = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    return (causal & shared)[:, None]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which training rows are whose, and how often each task's turn comes.

    Attributes:
        groups: Indices of each task's rows.
        shares: Share of each task in the rows drawn; they sum to 1.
    """

    groups: tuple[np.ndarray, ...]
    shares: tuple[float, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows of all tasks: an epoch draws as many."""
        return sum(len(group) for group in self.groups)


def mixture_of(rows: Sequence[Row], weights: Mapping[str, float]) -> Mixture:
    """The mixture of rows by their task's weight; tasks without rows have no share."""
    indices: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        indices.setdefault(row.task, []).append(i)
    total = sum(weights[task] for task in indices)
    return Mixture(tuple(map(np.array, indices.values())), tuple(weights[task] / total for task in indices))


def rows_at_step(rows: int | Mixture, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of one step: epoch after epoch, each in an order of its own; a function of the step alone.

    An epoch of a mixture draws from each task its share of all rows, rounded up or down such that the mean is exact. A
    task's rows come again only after all of them have come.

    Args:
        rows: Number of rows, or their mixture.
        batch_size: Rows of a step.
        seed: Seeds the order.
        step: Number of the step.
    """
    num_rows = rows if isinstance(rows, int) else rows.num_rows
    positions = range(step * batch_size, (step + 1) * batch_size)
    order = _epoch_order if isinstance(rows, int) else _mixed_epoch
    return [int(order(rows, seed, p // num_rows)[p % num_rows]) for p in positions]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(num_rows)


@lru_cache(maxsize=4)
def _mixed_epoch(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    counts = [_counts(mixture.num_rows, mixture.shares, seed, e) for e in range(epoch + 1)]
    starts = np.sum(counts, axis=0) - counts[epoch]
    drawn = []
    for task, (group, start, count) in enumerate(zip(mixture.groups, starts, counts[epoch], strict=True)):
        passes = range(start // len(group), (start + count) // len(group) + 1)
        stream = np.concatenate([_epoch_order(len(group), derive_seed("task", seed, task), p) for p in passes])
        offset = start - passes[0] * len(group)
        drawn.append(group[np.sort(stream[offset : offset + count])])
    return np.concatenate(drawn)[_epoch_order(mixture.num_rows, seed, epoch)]


@lru_cache(maxsize=2**14)
def _counts(num_rows: int, shares: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
    """How many rows an epoch draws of each task: systematic sampling, so whole numbers with the right mean and sum."""
    bounds = np.round(np.cumsum((0.0, *shares)) * num_rows, 6)
    shift = np.random.default_rng(derive_seed("shares", seed, epoch)).random()
    return np.diff(np.floor(bounds + shift)).astype(int)
