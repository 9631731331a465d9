"""Rows made ready for one model: in its chat template where that is asked for, and none longer than it can take."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from halora.errors import UserError
from halora.training.batches import encode
from halora.training.models import BaseModel
from halora.training.tasks import Row, refuse_rows


def prepared_rows(
    rows: Sequence[Row], base: BaseModel, prompt_format: Literal["plain", "chat"], new_tokens: int = 0
) -> list[Row]:
    """Rows with their prompts in the asked format, each checked to fit the model.

    Args:
        rows: Rows as the task gives them.
        base: The model and its tokenizer.
        prompt_format: `plain`, or `chat` for the tokenizer's chat template.
        new_tokens: Tokens that are to be generated after each prompt.

    Raises:
        UserError: The tokenizer has no chat template, or rows have more tokens than the model has positions; all of
            them are told.
    """
    ready = chat_rows(rows, base.tokenizer) if prompt_format == "chat" else list(rows)
    limit = _most_tokens(base.causal_lm.config)
    if limit is not None:
        lengths = ((row, _num_tokens(row, base.tokenizer, new_tokens, limit)) for row in ready)
        refuse_rows(
            [
                f"row '{row.row_id}' of task '{row.task}' has {length} tokens"
                + (f", {new_tokens} to generate among them" if new_tokens else "")
                + f"; model '{base.name}' takes {limit}"
                for row, length in lengths
                if length > limit
            ],
            "shorten or drop these rows, or take a model with more positions",
        )
    return ready


def _most_tokens(config: Any) -> int | None:
    """Tokens of the longest row that a model takes, by its `transformers` configuration.

    With `longrope` those it was first trained with: a longer row would rotate all rows of its batch otherwise.
    """
    rotations = getattr(config, "rope_parameters", None) or {}
    by_type = [each for each in rotations.values() if isinstance(each, dict)] or [rotations]
    limits = [each["original_max_position_embeddings"] for each in by_type if each.get("rope_type") == "longrope"]
    positions = getattr(config, "max_position_embeddings", None)
    return min([*limits, *([] if positions is None else [positions])], default=None)


def chat_rows(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Rows whose prompt is the user's message and whose option is the assistant's.

    Raises:
        UserError: The tokenizer has no chat template, or one that fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "prompt_format chat: the model's tokenizer has no chat template",
            "take prompt_format plain, or an instruction-tuned model",
        )
    return [
        replace(row, prompt=_chat(row.prompt, tokenizer), options=tuple(option.lstrip() for option in row.options))
        for row in rows
    ]


def _chat(prompt: str, tokenizer: Any) -> str:
    message = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever Jinja and the template itself raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"prompt_format chat: the tokenizer's chat template refuses a user's message: {said}",
            "take prompt_format plain, or correct the template",
        ) from None


def _num_tokens(row: Row, tokenizer: Any, new_tokens: int, limit: int) -> int:
    """Tokens of the longest sequence that a row stands for; 0 where its bytes alone show that they are few enough."""
    if len(row.prompt.encode()) + max(len(option.encode()) for option in row.options) + new_tokens + 2 <= limit:
        return 0  # no tokenizer makes more tokens than there are bytes, but for those a text begins and ends with
    prompt, options = encode(row, tokenizer)
    return len(prompt) + max(new_tokens, *map(len, options))
