"""Oracle: `transformers`, given prompt and option as one text, on tokenizers of each kind, read from their files."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from halora.evaluation.chips import evaluate
from halora.hardware.chip import load_chip
from halora.settings.evaluation import EvaluationSettings
from halora.training.batches import encode
from halora.training.models import load_base
from halora.training.prompts import prepared_rows
from halora.training.rram import install
from halora.training.tasks import Row, load_rows

BEGIN, END = "<begin>", "<end>"
CORPUS = ["Question: Which is a fruit?\nAnswer: apple", "Answer: 12 + 7 = 19 (A) stone  apple", "yes no 1 2 3 0"] * 20
ROWS = [
    Row("a", "Question: Which is a fruit?\nAnswer:", (" stone", " apple"), 1),
    Row("b", "12 + 7 =", (" 19", " 20", " 2"), 0),
    Row("space at the end", "Answer: ", ("apple", "19"), 0),
    Row("inside a word", "Answer: (A", (") stone", "pple"), 1),
    Row("nothing between", "Question", (":", "s", "?"), 0),
]


def _byte_level() -> Tokenizer:
    """As Llama 3, Qwen and SmolLM2 have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=[BEGIN, END], initial_alphabet=alphabet)
    )
    return made


def _metaspace() -> Tokenizer:
    """As SentencePiece has it, newer files."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoders.Metaspace(),
    )
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", BEGIN, END]))
    return made


def _prepended() -> Tokenizer:
    """As Llama 2's files have it: a space before every text, by a normaliser."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", BEGIN, END]))
    return made


def _template(before: list[str], after: list[str], made: Tokenizer) -> processors.TemplateProcessing:
    names = [BEGIN, END]
    return processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=[(name, made.token_to_id(name)) for name in names]
    )


@pytest.fixture(scope="module", params=["byte level", "Metaspace", "prepended"])
def make(request):
    return {"byte level": _byte_level, "Metaspace": _metaspace, "prepended": _prepended}[request.param]


@pytest.fixture(params=[([], []), ([BEGIN], []), ([BEGIN], [END]), ([], [END])], ids=["bare", "begin", "both", "end"])
def tokenizer(make, request, tmp_path):
    """A tokenizer as it is read from its file, and what its post-processor puts before and after a text."""
    made, (before, after) = make(), request.param
    if before or after:
        made.post_processor = _template(before, after, made)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BEGIN, eos_token=END).save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path), before, after


@pytest.mark.parametrize("row", ROWS, ids=[row.row_id for row in ROWS])
def test_prompt_and_option_are_the_tokens_of_their_whole_text(tokenizer, row):
    read, before, after = tokenizer
    prompt, options = encode(row, read)
    for index, (option, text) in enumerate(zip(options, row.options, strict=True)):
        whole = read(row.prompt + text).input_ids
        assert prompt + option == whole[: len(whole) - len(after)]
        (alone,) = encode(row, read, only=index)[1]
        assert encode(row, read, only=index)[0] + alone == prompt + option
    begins = prompt[:1] == [read.bos_token_id]
    assert begins == bool(before)


def test_a_chat_template_that_writes_the_first_token_is_not_begun_twice(tokenizer):
    read, before, _ = tokenizer
    prompt, _ = encode(Row("chat", f"{BEGIN}Question", (" a", " b"), 0), read)
    assert prompt.count(read.bos_token_id) == 1
    if before:
        assert encode(Row("plain", "Question", (" a", " b"), 0), read)[0][0] == read.bos_token_id


def test_an_empty_prompt_is_the_token_that_texts_begin_with(tokenizer):
    read, *_ = tokenizer
    assert encode(Row("e", "", ("apple", "19"), 0), read)[0] == [read.bos_token_id]


def test_clean_accuracy_and_margin_are_those_of_transformers(tiny_models, tiny_task, tmp_path):
    """A LLaMA whose `tokenizer.json` adds the first token by its post-processor, as Llama 3's does."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    read = AutoTokenizer.from_pretrained(tiny_models["llama"])
    begin = read.convert_ids_to_tokens(1)
    read.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 1)]
    )
    model.save_pretrained(tmp_path)
    read.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), "fp32")
    rows = prepared_rows(load_rows(tiny_task, "validation"), base, "plain")
    settings = EvaluationSettings(rows=len(rows), chip_instances=1, calibration_tokens=16)
    scores = evaluate(base, install(base.causal_lm), load_chip("ideal"), rows, rows[:2], settings)
    for row, margin in zip(rows, scores.clean, strict=True):
        by_option = []
        for text in row.options:
            ids, asked = read(row.prompt + text, return_tensors="pt").input_ids, len(read(row.prompt).input_ids)
            assert ids[0, 0] == 1
            likely = model(ids).logits[0, asked - 1 : -1].log_softmax(dim=-1)
            by_option.append(float(likely.gather(1, ids[0, asked:, None]).sum()))
        right = by_option.pop(row.answer)
        assert margin == pytest.approx(right - max(by_option), abs=1e-4)
