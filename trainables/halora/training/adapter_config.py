"""What of a stored adapter's configuration may reach PEFT: the keys that say a LoRA branch's shape, by plain names.

PEFT takes some of its keys for regular expressions (`exclude_modules`, `rank_pattern`, `alpha_pattern`,
`layers_pattern`, a `target_modules` that is a text), which can be written so that matching never ends, and others for
places of code or weights. An adapter may be anybody's file, so what is not known here is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halora.errors import UserError
from halora.reading import is_file, read_object
from halora.trial_folder import ADAPTER_WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's configuration of an adapter, in its folder."""
_LARGEST_RANK = 1024
_PLAIN_NAME = re.compile(r"[\w.]{1,200}")
_SHAPE = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path"}
_NAMES = {"target_modules", "exclude_modules", "layers_pattern"}
_NUMBERS_BY_NAME = {"rank_pattern", "alpha_pattern"}
_OF_NO_EFFECT = {
    *("peft_version", "revision", "auto_mapping", "task_type", "inference_mode", "lora_dropout", "init_lora_weights"),
    *("megatron_core", "qalora_group_size", "corda_config", "eva_config", "loftq_config"),
}
"""Keys that say nothing of how a stored adapter computes."""
_OFF: tuple[Any, ...] = (None, False, "", "none", [], {})
"""Values by which PEFT leaves a feature off."""


def read_lora_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of the LoRA adapter in a folder.

    Raises:
        UserError: One of its files is missing or cannot be read, it is another kind of adapter's, or it has keys that
            are not known to be harmless; all are told.
    """
    if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not is_file(folder / name)]:
        raise UserError(f"no adapter in '{folder}': it has no {' and no '.join(missing)}")
    path = folder / ADAPTER_CONFIG
    content = read_object(path, f"'{path}'")
    if (kind := content.get("peft_type")) != "LORA":
        raise UserError(f"'{path}': it is of PEFT's type {kind}, not LORA; adapters of other kinds are not simulated")
    if problems := list(_problems(content)):
        raise UserError([f"'{path}': {problem}" for problem in problems])
    return content


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(content.get("base_model_name_or_path"), str | None):
        yield f"base_model_name_or_path: a text is wanted, got {_short(content['base_model_name_or_path'])}"
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        yield f"r: a whole number from 1 to {_LARGEST_RANK} is wanted, got {_short(rank)}"
    if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        yield f"lora_alpha: a positive number is wanted, got {_short(alpha)}"
    for key in sorted({"use_rslora", "use_dora"} & content.keys()):
        if type(content[key]) is not bool:
            yield f"{key}: true or false is wanted, got {_short(content[key])}"
    for key, value in content.items():
        if key in _SHAPE | _OF_NO_EFFECT or _is_off(value):
            continue
        if key in _NAMES:
            names = value if isinstance(value, list) else [value]
            if not all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in names):
                yield f"{key}: plain names of modules are wanted, and no patterns, got {_short(value)}"
        elif key in _NUMBERS_BY_NAME:
            if not (isinstance(value, dict) and all(_is_rank(*pair) for pair in value.items())):
                yield f"{key}: numbers by plain names of modules are wanted, and no patterns, got {_short(value)}"
        elif key == "layers_to_transform":
            if not all(type(layer) is int for layer in (value if isinstance(value, list) else [value])):
                yield f"{key}: whole numbers are wanted, got {_short(value)}"
        else:
            yield f"{key}: only a LoRA branch on named layers is supported, without {_short(value)}"


def _is_rank(name: str, value: Any) -> bool:
    return bool(_PLAIN_NAME.fullmatch(name)) and type(value) in (int, float) and 0 < value <= _LARGEST_RANK


def _is_off(value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in _OFF)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
