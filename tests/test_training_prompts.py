"""Oracles: `tokenizer.apply_chat_template`; lengths counted by hand."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from halora.errors import UserError
from halora.training.batches import encode, pack
from halora.training.models import BaseModel, load_base
from halora.training.prompts import chat_rows, prepared_rows
from halora.training.tasks import Row, load_rows

ROW = Row("a", "Question: Which is a fruit?\nAnswer:", (" stone", " apple"), 1, "fruits")
LIMIT = 512  # positions of the tiny models


@pytest.fixture(scope="module")
def base(tiny_models) -> BaseModel:
    """The tiny LLaMA model, with SmolLM2's tokenizer."""
    return load_base(tiny_models["llama"], "fp32")


def test_a_chat_prompt_is_what_the_tokenizer_s_template_makes_of_it(base):
    message = [{"role": "user", "content": ROW.prompt}]
    expected = base.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True).input_ids
    (row,) = prepared_rows([ROW], base, "chat")
    prompt, options = encode(row, base.tokenizer)
    assert prompt == expected
    assert [base.tokenizer.decode(option) for option in options] == ["stone", "apple"]  # begins the assistant's turn
    assert replace(row, prompt=ROW.prompt, options=ROW.options) == ROW


def test_a_plain_prompt_stays_as_it_is(base):
    assert prepared_rows([ROW], base, "plain") == [ROW]


def test_a_tokenizer_without_a_template_is_refused(base):
    class Bare:
        chat_template = None

    with pytest.raises(UserError, match="prompt_format chat: the model's tokenizer has no chat template"):
        chat_rows([ROW], Bare())


def test_a_template_that_refuses_a_lone_message_is_told(base, tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    for template, told in (
        ("{{ raise_exception('roles must alternate') }}", "refuses a user's message: roles must alternate"),
        ("{% for", "refuses a user's message: "),
        ("{{ messages[7].content }}", "refuses a user's message: "),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=told):
            chat_rows([ROW], tokenizer)


def test_rows_longer_than_the_model_s_positions_are_all_told(base):
    word = base.tokenizer(" fruit").input_ids
    fixed = len(base.tokenizer(ROW.prompt).input_ids) + 1  # and one token of the option
    assert len(word) == 1
    fitting, long, longer = (
        replace(ROW, row_id=f"row-{n}", prompt=" fruit" * (LIMIT - fixed + n) + ROW.prompt) for n in (0, 1, 30)
    )
    lengths = [len(pack(row, base.tokenizer).tokens) - 1 for row in (fitting, long, longer)]
    assert lengths == [LIMIT, LIMIT + 1, LIMIT + 30]
    assert prepared_rows([ROW, fitting], base, "plain") == [ROW, fitting]
    with pytest.raises(UserError) as refused:
        prepared_rows([ROW, long, fitting, longer], base, "plain")
    assert refused.value.problems == [
        f"row 'row-1' of task 'fruits' has 513 tokens; model '{base.name}' takes 512",
        f"row 'row-30' of task 'fruits' has 542 tokens; model '{base.name}' takes 512",
    ]
    with pytest.raises(UserError, match="has 519 tokens, 8 to generate among them"):
        prepared_rows([fitting], base, "plain", new_tokens=8)


def test_real_rows_fit_the_embedded_model_s_positions(base):
    rows = load_rows("boolq", "validation", 50)
    with pytest.raises(UserError, match="of task 'boolq' has"):  # 512 positions are too few for some passages
        prepared_rows(load_rows("boolq", "validation"), base, "plain")
    assert len(chat_rows(rows, base.tokenizer)) == 50


def test_an_empty_prompt_is_the_token_that_texts_begin_with(base):
    prompt, options = encode(replace(ROW, prompt=""), base.tokenizer)
    assert prompt == [base.tokenizer.bos_token_id]
    assert options == encode(ROW, base.tokenizer)[1]


def test_a_completion_ends_with_the_token_that_texts_end_with(base):
    _, (completion,) = encode(Row("c", "2 + 2 =", (" 4",), 0), base.tokenizer)
    assert completion == [*base.tokenizer(" 4").input_ids, base.tokenizer.eos_token_id]
