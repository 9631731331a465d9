"""Oracle: whatever is in a file, reading it gives a value or a `UserError`, within bounds of time and memory.

Shipped sweeps and chips, tables of curves and of states, rows of every schema, configurations of models and adapters
are damaged byte by byte and value by value. What is read without complaint can be written and read again.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st
from malformed import attack, damaged_bytes, damaged_values, yaml_text
from safetensors.numpy import save

from halora.cli.arguments import chip_from, overrides_from
from halora.hardware.chip_files import PRESETS, preset_names
from halora.hardware.measured_states import read_states
from halora.hardware.shapes import known_shape
from halora.spaces.sweep import SHIPPED, SweepConfig, load_sweep, load_trial, shipped_sweeps
from halora.sweep.simulation.table import read_table
from halora.training.models import model_shape
from halora.training.saved_lora import read_saved_lora
from halora.training.tasks import load_rows

CURVES = "trial,step,accuracy,clean_accuracy,seconds,lora.rank,training.method\n" + "".join(
    f"{trial},{step},0.{trial}{step},0.9,{step / 4},{rank},lora\n"
    for trial, rank in enumerate((4, 8))
    for step in (1, 2)
)
STATES = "conductance_us,mean_us,std_us,time_s\n" + "".join(
    f"{g},{g - 1},0.5,{t}\n" for t in (1, 60) for g in (2, 9, 30)
)
ROWS: list[dict[str, Any]] = [
    {"query": "2 + 2 =", "choices": ["3", "4"], "gold": 1},
    {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question_stem": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A", "id": "q7"},
    {"question": "Which?", "choices": ["a", "b"], "answer": 0},
    {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
    {"sentence": "The _ is red.", "option1": "sun", "option2": "sea", "answer": "1"},
    {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    {"question": "is it", "passage": "It is.", "answer": True},
    {"question": "is it", "passage": "It is.", "label": 0},
    {"activity_label": "A", "ctx_a": "a.", "ctx_b": "b", "endings": ["x", "y"], "label": "1"},
    {"instruction": "Add.", "input": "1 1", "output": "2", "answer": "2"},
    {"prompt": "p", "completion": " c"},
    {"question": "How many?", "answer": "So #### 4"},
]
MODEL = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 2, "content": "x"}],
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "m",
    "layers_to_transform": None,
}
OVERRIDDEN = [
    *(
        "trial.training.steps",
        "trial.chip",
        "trial.task",
        "trial.model",
        "space.lora.rank",
        "first",
        "seed",
        "a..b",
        ".",
    ),
]
LORA_WEIGHTS = save(
    {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight": np.ones(shape, dtype=np.float32)
        for matrix, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
)


def _model_weights() -> bytes:
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    named = {f"model.layers.0.self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
    named |= {f"model.layers.0.mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")}
    named |= {"model.layers.0.mlp.down_proj.weight": (8, 12), "model.embed_tokens.weight": (10, 8)}
    return save({name: np.ones(shape, dtype=np.float32) for name, shape in named.items()})


WEIGHTS = _model_weights()


def _text(data: st.DataObject, content: str) -> bytes:
    """A YAML text damaged by its bytes, or by its values."""
    if data.draw(st.booleans(), label="bytes"):
        return damaged_bytes(data, content.encode())
    return damaged_values(data, yaml.safe_load(content), yaml_text)


def _object(data: st.DataObject, value: Any) -> bytes:
    """The same of JSON."""
    if data.draw(st.booleans(), label="bytes"):
        return damaged_bytes(data, json.dumps(value).encode())
    return damaged_values(data, json.loads(json.dumps(value)), json.dumps)


def _written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def _sweep(data: st.DataObject, folder: Path) -> None:
    shipped = data.draw(st.sampled_from(shipped_sweeps()))
    path = _written(folder / "sweep.yaml", _text(data, (SHIPPED / f"{shipped}.yaml").read_text(encoding="utf-8")))
    sweep = load_sweep(path)
    again = folder / "again.yaml"
    again.write_text(yaml_text(sweep.model_dump(mode="json")), encoding="utf-8")
    assert load_sweep(str(again)) == sweep


def _trial(data: st.DataObject, folder: Path) -> None:
    shipped = data.draw(st.sampled_from(shipped_sweeps()))
    content = (SHIPPED / f"{shipped}.yaml").read_text(encoding="utf-8")
    if data.draw(st.booleans(), label="alone"):
        content = yaml_text(yaml.safe_load(content)["trial"])
    json.dumps(
        load_trial(_written(folder / "trial.yaml", _text(data, content))).model_dump(mode="json"), allow_nan=False
    )


def _override(data: st.DataObject, folder: Path) -> None:
    text = _text(data, "- 8").decode("utf-8", "surrogateescape")  # as a terminal passes bytes on
    paths = [
        "trial.training.steps",
        "trial.chip",
        "space.lora.rank",
        "first",
        "trial.task",
        "trial.model",
        "seed",
        "a..b",
        ".",
    ]
    load_sweep("methods", overrides_from([f"{data.draw(st.sampled_from(paths))}={text}"]))


def _chip(data: st.DataObject, folder: Path) -> None:
    preset = data.draw(st.sampled_from(preset_names()))
    content = (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8")
    chip = chip_from(_written(folder / "chip.yaml", _text(data, content)), None).description
    json.dumps(chip.model_dump(mode="json"), allow_nan=False).encode()


@cache
def _quickstart() -> SweepConfig:
    return load_sweep("quickstart")


def _curves(data: st.DataObject, folder: Path) -> None:
    sweep = _quickstart()
    table = read_table(Path(_written(folder / "curves.csv", damaged_bytes(data, CURVES.encode()))), sweep)
    assert 0 <= table.accuracy({"lora.rank": 8}, 2, 0) <= 1


def _states(data: st.DataObject, folder: Path) -> None:
    read_states(Path(_written(folder / "states.csv", damaged_bytes(data, STATES.encode()))))


def _rows(data: st.DataObject, folder: Path) -> None:
    chosen = data.draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3))
    lines = [_object(data, row) if data.draw(st.booleans()) else json.dumps(row).encode() for row in chosen]
    content = b"\n".join(lines)
    (folder / "train.jsonl").write_bytes(damaged_bytes(data, content) if data.draw(st.booleans()) else content)
    (folder / "validation.jsonl").write_text(json.dumps(ROWS[0]))
    for row in load_rows(str(folder), "train"):
        json.dumps([row.row_id, row.prompt, row.options, row.reference], ensure_ascii=False).encode()


def _model(data: st.DataObject, folder: Path) -> None:
    """`model_shape` remembers folders, so each is another one."""
    made = folder / data.draw(st.uuids()).hex
    made.mkdir(exist_ok=True)
    config, tokenizer, weights = json.dumps(MODEL).encode(), json.dumps(TOKENIZER).encode(), WEIGHTS
    match data.draw(st.sampled_from(["config", "tokenizer", "weights"])):
        case "config":
            config = _object(data, MODEL)
        case "tokenizer":
            tokenizer = _object(data, TOKENIZER)
        case "weights":
            weights = damaged_bytes(data, weights)
    path = _written(made / "config.json", config)
    (made / "tokenizer.json").write_bytes(tokenizer)
    (made / "model.safetensors").write_bytes(weights)
    if data.draw(st.booleans(), label="alone"):
        known_shape(path)
    else:
        model_shape(str(made))


def _adapter(data: st.DataObject, folder: Path) -> None:
    config, weights = json.dumps(ADAPTER).encode(), LORA_WEIGHTS
    if data.draw(st.booleans(), label="weights"):
        weights = damaged_bytes(data, weights)
    else:
        config = _object(data, ADAPTER)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert read_saved_lora(folder).ranks


KINDS = {
    read.__name__.strip("_"): read
    for read in (_sweep, _trial, _override, _chip, _curves, _states, _rows, _model, _adapter)
}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged hub id is another hub id, and is not asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_files_are_read_or_refused(kind, tmp_path):
    assert attack(lambda data: KINDS[kind](data, tmp_path), 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused(kind, tmp_path):
    assert attack(lambda data: KINDS[kind](data, tmp_path), 400) > 100
