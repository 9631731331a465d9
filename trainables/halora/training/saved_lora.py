"""What a PEFT folder holds, told by its files alone: a LoRA adapter, and of what rank on which layers. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halora.errors import UserError
from halora.reading import tensor_shapes
from halora.training.adapter_config import read_lora_config
from halora.trial_folder import ADAPTER_WEIGHTS

_PART = re.compile(
    r"base_model\.model\.(?P<layer>[\w.]+)\.lora_(?:(?P<matrix>[AB])\.weight|magnitude_vector(?:\.weight)?)"
)


@dataclass(frozen=True)
class SavedLora:
    """A LoRA adapter in a folder.

    Attributes:
        base: What PEFT calls its base model; empty where it does not say.
        rank: PEFT's `r`; single layers may have others.
        alpha: PEFT's `lora_alpha`.
        variant: `plain`, `rslora` or `dora`.
        ranks: Rank of each adapted layer, by the layer's canonical name.
    """

    base: str
    rank: int
    alpha: float
    variant: str
    ranks: Mapping[str, int]

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the adapted linear layers, e.g. `q_proj`."""
        return tuple(dict.fromkeys(layer.rpartition(".")[2] for layer in self.ranks))


def read_saved_lora(folder: Path) -> SavedLora:
    """The LoRA adapter in a PEFT folder.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: A file is missing or cannot be read; the adapter is of another kind; or it has tensors beside the A
            and B of linear layers (and the magnitudes of DoRA), which are neither simulated nor priced. All at once.
    """
    config = read_lora_config(folder)
    ranks, problems = _ranks(tensor_shapes(folder / ADAPTER_WEIGHTS, f"'{folder / ADAPTER_WEIGHTS}'"))
    if problems:
        raise UserError([f"adapter '{folder}': {problem}" for problem in problems])
    variant = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "plain"
    base = config.get("base_model_name_or_path") or ""
    return SavedLora(base, config["r"], float(config["lora_alpha"]), variant, ranks)


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], list[str]]:
    """Rank by layer, and what is wrong with the tensors."""
    problems: list[str] = []
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        part = _PART.fullmatch(name)
        if part is None:
            problems.append(f"tensor '{name}' is not part of a LoRA branch beside a linear layer")
        elif matrix := part["matrix"]:
            pairs.setdefault(part["layer"], {})[matrix] = shape
    for layer, pair in pairs.items():
        if len(pair) < 2:
            problems.append(f"layer '{layer}' has A or B alone")
        elif len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            problems.append(f"layer '{layer}' has A {list(pair['A'])} and B {list(pair['B'])}, which do not fit")
    if not pairs and not problems:
        problems.append(f"{ADAPTER_WEIGHTS} is empty; was it saved under ZeRO-3 without gathering?")
    return ({} if problems else {layer: pair["A"][0] for layer, pair in pairs.items()}), problems
