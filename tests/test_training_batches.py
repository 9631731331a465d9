"""Oracles: the definition of an epoch; tokens laid out by hand."""

import pytest
from transformers import AutoTokenizer

from halora.errors import UserError
from halora.training.batches import IGNORED, encode, rows_at_step, training_batch
from halora.training.tasks import Row

ROWS = [
    Row("a", "Question: Which is a fruit?\nAnswer:", (" stone", " apple"), 1),
    Row("b", "Question: What is 12 + 7, in one number?\nAnswer:", (" 19", " 20", " 5 apples or so"), 2),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (7, 7), (3, 8)])
def test_every_epoch_is_a_permutation_of_all_rows(num_rows, batch_size):
    steps = 3 * num_rows
    stream = [i for step in range(steps) for i in rows_at_step(num_rows, batch_size, 5, step)]
    epochs = [tuple(stream[start : start + num_rows]) for start in range(0, len(stream), num_rows)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_the_rows_of_a_step_depend_on_seed_and_step_alone():
    late_first = [rows_at_step(50, 8, seed=1, step=step) for step in (40, 3, 17)]
    assert [rows_at_step(50, 8, seed=1, step=step) for step in (3, 17, 40)] == [late_first[i] for i in (1, 2, 0)]
    assert rows_at_step(50, 8, seed=2, step=3) != rows_at_step(50, 8, seed=1, step=3)


def test_labels_cover_the_right_option_and_nothing_else(tokenizer):
    batch = training_batch(ROWS, tokenizer)
    for i, row in enumerate(ROWS):
        prompt = tokenizer(row.prompt).input_ids
        option = tokenizer(row.options[row.answer]).input_ids
        assert batch.input_ids[i, : len(prompt) + len(option)].tolist() == prompt + option
        expected = [IGNORED] * len(prompt) + option
        expected += [IGNORED] * (batch.labels.shape[1] - len(expected))
        assert batch.labels[i].tolist() == expected


def test_prompt_and_option_tokens_spell_the_row(tokenizer):
    prompt, options = encode(ROWS[1], tokenizer)
    for option, text in zip(options, ROWS[1].options, strict=True):
        assert tokenizer.decode(prompt + option) == ROWS[1].prompt + text


def test_a_row_without_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="row 'c' has an empty prompt or option"):
        encode(Row("c", "Question:", ("", " x"), 0), tokenizer)
