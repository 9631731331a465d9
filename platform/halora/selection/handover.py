"""An adapter in the formats that other tools serve: PEFT's own, a GGUF LoRA for llama.cpp, or merged into its base."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from halora.errors import UserError
from halora.files import write_json
from halora.reading import read_tensors
from halora.training.adapter_config import ADAPTER_CONFIG
from halora.training.models import find_model, plain_base
from halora.training.saved_lora import read_saved_lora
from halora.trial_folder import ADAPTER_WEIGHTS

HandOver = Literal["peft", "gguf", "merged"]

_GGUF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture by the type of a base; of other types the order of outputs is not known here."""

MERGED = (
    "merged: there is no branch in SRAM any more. A chip would hold the sum in RRAM, with its noise: certificate, "
    "scores and energy say nothing of it, and it is as large as its base"
)
"""What a merged model gives up."""


def hand_over(adapter: Path, place: Path, form: HandOver, base: str) -> None:
    """Write an adapter for another tool, atomically.

    Args:
        adapter: Folder of the adapter, as PEFT stores it.
        place: A new folder; for `gguf` a new file.
        form: `peft`: its two files; `gguf`: a LoRA as llama.cpp loads it beside its base; `merged`: a model of
            `transformers`, base and adapter in one.
        base: Its base model: a name, a hub id or a folder.

    Raises:
        UserError: The place exists, there is no such base or adapter, or the format has no place for it.
    """
    if place.exists():
        raise UserError(f"'{place}' exists", "name a new folder, or for gguf a new file")
    saved = read_saved_lora(adapter)
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as scratch:
        made = Path(scratch) / "made"
        match form:
            case "peft":
                made.mkdir()
                shutil.copyfile(adapter / ADAPTER_WEIGHTS, made / ADAPTER_WEIGHTS)
                described = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
                write_json(made / ADAPTER_CONFIG, described | {"base_model_name_or_path": saved.base or base})
            case "gguf":
                if saved.variant == "dora":
                    raise UserError("a GGUF LoRA has no place for DoRA's magnitudes", "export it merged")
                _write_gguf(adapter, made, saved.rank, saved.alpha, base, by_root=saved.variant == "rslora")
            case "merged":
                _write_merged(adapter, made, base)
        made.rename(place)


def _write_gguf(adapter: Path, file: Path, rank: int, alpha: float, base: str, *, by_root: bool) -> None:
    """The layout of llama.cpp's `convert_lora_to_gguf.py`: its graph scales each branch by alpha over its rank."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(find_model(base))
    if config.model_type not in _GGUF:
        raise UserError(
            f"a GGUF LoRA is written for bases of the types {', '.join(_GGUF)}, not '{config.model_type}'",
            "export it as peft or merged",
        )
    architecture = _GGUF[config.model_type]
    known = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    tensors = read_tensors(adapter / ADAPTER_WEIGHTS, f"'{adapter / ADAPTER_WEIGHTS}'")
    ranks = {int(tensor.shape[0]) for name, tensor in tensors.items() if ".lora_A." in name}
    if by_root and ranks != {rank}:
        raise UserError(
            "a GGUF LoRA has one alpha: rsLoRA with ranks that differ cannot be written", "export it merged"
        )
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha * rank**0.5 if by_root else alpha)
    for name, tensor in sorted(tensors.items()):
        layer, _, matrix = name.removeprefix("base_model.model.").rpartition(".lora_")
        values = tensor.float().numpy()
        kind = layer.rpartition(".")[2]
        if matrix == "B.weight" and architecture == "llama" and kind in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
            values = interleaved(values, heads)
        found = names.get_name(layer)
        if found is None:
            raise UserError(f"llama.cpp has no layer for '{layer}'")
        writer.add_tensor(f"{found}.weight.lora_{matrix[0].lower()}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Outputs of LLaMA's q or k in the order that llama.cpp rotates them: halves of each head, value by value.

    Args:
        values: `(heads * head_dim, ...)`, as `transformers` has them.
        heads: Number of heads.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _write_merged(adapter: Path, folder: Path, base: str) -> None:
    from halora.hardware.rounding import AS_IT_IS
    from halora.training.adapter import attach_saved

    model = plain_base(base, "fp32")
    merged = attach_saved(model, adapter, AS_IT_IS).merge_and_unload()
    merged.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
