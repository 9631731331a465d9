"""Oracles: the definition of an epoch; tokens laid out by hand."""

import pytest
from transformers import AutoTokenizer

from halora.errors import UserError
from halora.training.batches import encode, lay_out, pack, pack_answer, rows_at_step
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


def test_training_packs_the_right_option_and_nothing_else(tokenizer):
    for row in ROWS:
        prompt, option = tokenizer(row.prompt).input_ids, tokenizer(row.options[row.answer]).input_ids
        packed = pack_answer(row, tokenizer)
        assert packed.tokens == prompt + option
        assert packed.positions == list(range(len(prompt + option)))
        assert packed.sources == list(range(len(prompt) - 1, len(prompt + option) - 1))


@pytest.mark.parametrize("copies", [1, 3, 40])
def test_a_batch_holds_every_token_once_and_little_padding(tokenizer, copies):
    rows = [pack(row, tokenizer) for row in ROWS * copies]
    batch = lay_out(rows)
    assert sorted(batch.input_ids[batch.is_real].tolist()) == sorted(token for row in rows for token in row.tokens)
    assert batch.targets.tolist() == [token for row in rows for token in row.tokens[row.prompt_length :]]
    longest = max(len(row.tokens) for row in rows)
    assert batch.input_ids.shape[1] - batch.is_real.sum(dim=1).min() <= longest
    expected = [row.tokens[source] for row in rows for source in row.sources]
    assert batch.input_ids[batch.sources[0], batch.sources[1]].tolist() == expected


def test_a_token_sees_its_own_row_and_option_only(tokenizer):
    rows = [pack(row, tokenizer) for row in ROWS]
    batch = lay_out(rows)
    (laid_out,) = batch.sequences
    segments = {row.row_id: row.segments for row in rows}
    owners = [(row_id, segment) for row_id, _ in laid_out for segment in segments[row_id]]
    for seer, (row, option) in enumerate(owners):
        expected = [
            seen <= seer and other_row == row and other_option in (0, option)
            for seen, (other_row, other_option) in enumerate(owners)
        ]
        assert batch.attention_mask[0, 0, seer, : len(owners)].tolist() == expected


def test_prompt_and_option_tokens_spell_the_row(tokenizer):
    prompt, options = encode(ROWS[1], tokenizer)
    for option, text in zip(options, ROWS[1].options, strict=True):
        assert tokenizer.decode(prompt + option) == ROWS[1].prompt + text


def test_a_row_without_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="row 'c' has an empty prompt or option"):
        encode(Row("c", "Question:", ("", " x"), 0), tokenizer)
