"""Oracles: the definition of an epoch; tokens laid out by hand."""

import pytest
from transformers import AutoTokenizer

from halora.errors import UserError
from halora.training.batches import encode, lay_out, mixture_of, pack, pack_answer, rows_at_step
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


def _mixed(sizes: dict[str, int]) -> list[Row]:
    rows = [Row(f"{task}-{i}", "?", (" a", " b"), 0, task) for task, size in sizes.items() for i in range(size)]
    return rows[::2] + rows[1::2]


def test_a_single_task_s_mixture_is_drawn_as_the_task():
    rows = _mixed({"x": 20})
    mixture = mixture_of(rows, {"x": 3.0})
    for step in (0, 7, 31):
        assert rows_at_step(mixture, 8, 5, step) == rows_at_step(len(rows), 8, 5, step)


@pytest.mark.parametrize("weights", [{"x": 1, "y": 1, "z": 1}, {"x": 5, "y": 0.02, "z": 2}])
def test_a_mixture_is_drawn_by_its_weights(weights):
    rows = _mixed({"x": 10, "y": 40, "z": 6})
    mixture = mixture_of(rows, weights)
    steps, batch_size = 1400, 8
    drawn = [rows[i] for step in range(steps) for i in rows_at_step(mixture, batch_size, 1, step)]
    epochs = steps * batch_size / len(rows)
    for task, weight in weights.items():
        share = sum(row.task == task for row in drawn) / len(drawn)
        assert share == pytest.approx(weight / sum(weights.values()), abs=1 / len(rows) / epochs**0.5)
    first = [sum(row.task == task for row in drawn[: len(rows)]) for task in weights]
    exact = [len(rows) * weight / sum(weights.values()) for weight in weights.values()]
    assert all(abs(count - wanted) < 1 for count, wanted in zip(first, exact, strict=True))


def test_every_row_of_a_task_comes_before_any_comes_again():
    rows = _mixed({"x": 10, "y": 40, "z": 6})
    mixture = mixture_of(rows, {"x": 1, "y": 1, "z": 1})
    drawn = [rows[i] for step in range(200) for i in rows_at_step(mixture, 7, 1, step)]
    for epoch in range(200 * 7 // len(rows)):  # the rows of an epoch are shuffled
        until = drawn[: (epoch + 1) * len(rows)]
        for task, size in {"x": 10, "y": 40, "z": 6}.items():
            ids = [row.row_id for row in until if row.task == task]
            counts = [ids.count(f"{task}-{i}") for i in range(size)]
            assert max(counts) - min(counts) <= 1


def test_weights_of_the_sizes_make_every_epoch_a_permutation():
    sizes = {"x": 10, "y": 41, "z": 6}
    mixture = mixture_of(_mixed(sizes), {task: size / 57 for task, size in sizes.items()})
    drawn = [i for step in range(30) for i in rows_at_step(mixture, 19, 3, step)]
    for start in range(0, 570, 57):
        assert sorted(drawn[start : start + 57]) == list(range(57))


def test_the_mixed_rows_of_a_step_depend_on_seed_and_step_alone():
    rows = _mixed({"x": 10, "y": 40})
    ahead, anew = mixture_of(rows, {"x": 2, "y": 1}), mixture_of(rows, {"x": 2, "y": 1})
    late_first = [rows_at_step(ahead, 8, 1, step) for step in (40, 3, 17)]
    assert [rows_at_step(anew, 8, 1, step) for step in (3, 17, 40)] == [late_first[i] for i in (1, 2, 0)]
    assert rows_at_step(anew, 8, 2, 3) != rows_at_step(anew, 8, 1, 3)


def test_training_packs_the_right_option_and_nothing_else(tokenizer):
    for row in ROWS:
        prompt, option = tokenizer(row.prompt).input_ids, tokenizer(row.options[row.answer]).input_ids
        packed = pack_answer(row, tokenizer)
        assert packed.tokens == prompt + option
        assert packed.positions == list(range(len(prompt + option)))
        assert packed.sources == list(range(len(prompt) - 1, len(prompt + option) - 1))


@pytest.mark.parametrize("copies", [1, 3, 40])
def test_a_batch_holds_every_token_once_and_no_padding(tokenizer, copies):
    rows = [pack(row, tokenizer) for row in ROWS * copies]
    batch = lay_out(rows)
    assert batch.input_ids[0].tolist() == [token for row in rows for token in row.tokens]
    assert batch.rows == [(row.row_id, len(row.tokens)) for row in rows]
    assert batch.targets.tolist() == [token for row in rows for token in row.tokens[row.prompt_length :]]
    expected = [row.tokens[source] for row in rows for source in row.sources]
    assert batch.input_ids[0, batch.sources].tolist() == expected


def test_a_token_sees_its_own_row_and_option_only(tokenizer):
    rows = [pack(row, tokenizer) for row in ROWS]
    layout = lay_out(rows).row_layout
    longest = layout.visible.shape[-1]
    places = iter(layout.places.tolist())
    for i, row in enumerate(rows):
        for seer, option in enumerate(row.segments):
            assert next(places) == i * longest + seer
            expected = [seen <= seer and other in (0, option) for seen, other in enumerate(row.segments)]
            assert layout.visible[i, 0, seer].tolist() == expected + [False] * (longest - len(expected))


def test_prompt_and_option_tokens_spell_the_row(tokenizer):
    prompt, options = encode(ROWS[1], tokenizer)
    for option, text in zip(options, ROWS[1].options, strict=True):
        assert tokenizer.decode(prompt + option) == ROWS[1].prompt + text


def test_a_row_without_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="row 'c' has an empty prompt or option"):
        encode(Row("c", "Question:", ("", " x"), 0), tokenizer)
