"""A chip as a configuration of IBM's aihwkit-lightning 2.1.0, as far as the two models agree.

Its layers take the largest weight and the largest input *of a tile*, where a chip here takes those of the whole matrix
and token. So matrices stay whole there (`max_input_size = -1`), and what a tile height changes is left out. How the
package computes was read in its source, `nn/modules/torch_utils/torch_linear.py` and `quant_utils.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from halora.hardware.chip import Chip
from halora.hardware.noise import weight_error_factor
from halora.hardware.noise_models import GaussianNoise
from halora.hardware.rounding import AS_IT_IS
from halora.hardware.variation import PROGRAMMED_K, differences

PACKAGE = "aihwkit-lightning==2.1.0"

_ENUMS = {
    "modifier.noise_type": "WeightNoiseInjectionType",
    "modifier.quantization_type": "WeightQuantizationType",
    "clip.type": "WeightClipType",
}
"""Settings whose value is a member of an enumeration of the package, by its name."""

_NOISE_TYPES = {"tensor_max": "ADD_NORMAL", "channel_max": "ADD_NORMAL_PER_CHANNEL"}
_QUANTIZATION_TYPES = {"tensor_max": "DISCRETIZE", "channel_max": "DISCRETIZE_PER_CHANNEL"}
_CLIP_TYPES = {"tensor_max": "LAYER_GAUSSIAN", "channel_max": "LAYER_GAUSSIAN_PER_CHANNEL"}
_WHOSE = {"tensor_max": "the matrix", "channel_max": "the output channel"}


@dataclass(frozen=True)
class LightningSettings:
    """What aihwkit-lightning can say of a chip.

    Attributes:
        chip: Name of the chip.
        chip_hash: Its content hash.
        configuration: Plain nested values by the names of `TorchInferenceRPUConfig`; members of enumerations by name.
        carried: What of the chip it says, a sentence each.
        left_out: What it does not say, a sentence each.
    """

    chip: str
    chip_hash: str
    configuration: dict[str, Any]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        return {
            "package": PACKAGE,
            "chip": self.chip,
            "chip_hash": self.chip_hash,
            "configuration": self.configuration,
            "carried": list(self.carried),
            "left_out": list(self.left_out),
            "python": self.to_python(),
        }

    def to_python(self) -> str:
        """Source of a function `rpu_config` that builds the configuration.

        With an ADC it takes the converter's full scale, which the package asks for and a chip does not state.
        """
        settings = dict(_leaves(self.configuration))
        enums = sorted({_ENUMS[path] for path in settings if path in _ENUMS})
        has_adc = "forward.out_res" in settings
        lines = [
            f"from aihwkit_lightning.simulator.configs import {', '.join(['TorchInferenceRPUConfig', *enums])}",
            "",
            "",
            f"def rpu_config({'out_bound: float' if has_adc else ''}) -> TorchInferenceRPUConfig:",
            f'    """The chip {self.chip} ({self.chip_hash}) for {PACKAGE}, as far as it goes."""',
            "    config = TorchInferenceRPUConfig()",
        ]
        for path, value in settings.items():
            lines.append(f"    config.{path} = {f'{_ENUMS[path]}.{value}' if path in _ENUMS else repr(value)}")
        if has_adc:
            lines.append("    config.forward.out_bound = out_bound  # over input range times largest weight")
        return "\n".join([*lines, "    return config", ""])


def lightning_settings(chip: Chip) -> LightningSettings:
    """The chip in aihwkit-lightning's terms."""
    draft = _Draft()
    for section in (_programming, _weights, _inputs, _outputs, _unknown_there):
        section(chip, draft)
    return LightningSettings(
        chip.name, chip.content_hash, _nested(draft.settings), tuple(draft.carried), tuple(draft.left_out)
    )


@dataclass
class _Draft:
    """The settings by dotted path so far, and what they say and do not say."""

    settings: dict[str, Any] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def _programming(chip: Chip, draft: _Draft) -> None:
    noise = chip.noise
    if noise.level == 0:
        return
    if not isinstance(noise, GaussianNoise) or noise.reference not in _NOISE_TYPES:
        relative = f" relative to {noise.reference}" if isinstance(noise, GaussianNoise) else ""
        draft.left_out.append(
            f"Programming error: the package has no {noise.kind} noise{relative}, only normal noise relative to the "
            "largest weight of the matrix or output channel."
        )
        return
    std_dev = noise.sigma * weight_error_factor(chip)
    draft.settings |= {"modifier.noise_type": _NOISE_TYPES[noise.reference], "modifier.std_dev": std_dev}
    given = f"sigma {noise.sigma:g}"
    if std_dev != noise.sigma:
        given = f"{given}, which write-verify, slices and replicas make {std_dev:.4g},"
    draft.carried.append(
        f"Programming error: {given} of the largest weight of {_WHOSE[noise.reference]} (modifier.std_dev)."
    )
    draft.left_out.append(
        "Lifetime of the noise: the package draws anew in every forward of training mode and has no noise in "
        "evaluation mode; a draw of this chip lasts until its cells are programmed again."
    )


def _weights(chip: Chip, draft: _Draft) -> None:
    scale, slices, levels = chip.coding.scale, chip.coding.slices, chip.cells.levels
    if scale not in _WHOSE:
        if chip.coding.clip_std is not None or levels is not None:
            draft.left_out.append(
                f"Clipping and finite levels: matrices stay whole in the package, and this chip scales by {scale}: "
                f"clip_std {chip.coding.clip_std}, {levels} levels."
            )
        return
    if chip.coding.clip_std is not None:
        draft.settings |= {"clip.type": _CLIP_TYPES[scale], "clip.sigma": chip.coding.clip_std}
        draft.carried.append(
            f"Clipping: weights at {chip.coding.clip_std:g} standard deviations of {_WHOSE[scale]} (clip.sigma), once "
            "`clip_weights` of a layer is called; the package's optimiser does so at every step."
        )
    if levels is not None and slices == 1:
        draft.settings |= {"modifier.quantization_type": _QUANTIZATION_TYPES[scale], "modifier.res": 2 * levels - 2}
        draft.carried.append(
            f"Finite levels: {levels} per cell, so {2 * levels - 1} values of a weight (modifier.res counts steps)."
        )
    elif levels is not None:
        draft.left_out.append(
            f"Finite levels: the package does not cut weights into slices; this chip has {slices} of {levels} levels."
        )


def _inputs(chip: Chip, draft: _Draft) -> None:
    dac = chip.dac
    if dac.lossless and chip.adc.lossless:
        return
    per_token = dac.lossless or dac.range == "token"
    draft.settings |= {"pre_post.input_range.enable": True, "pre_post.input_range.dynamic": per_token}
    if not per_token:
        draft.settings["pre_post.input_range.learn_input_range"] = False
        draft.left_out.append(
            "Input ranges: this chip has those of least squared error on calibration tokens; the package takes its own "
            "from a calibration or from the first batches of training."
        )
    if not dac.lossless:
        draft.settings["forward.inp_res"] = _steps(dac.input_bits)
        on = "the scale of each token's largest input" if per_token else "a fixed range per layer"
        draft.carried.append(f"Input converters: {dac.input_bits} bits on {on} (forward.inp_res counts steps).")


def _outputs(chip: Chip, draft: _Draft) -> None:
    draft.settings["mapping.max_input_size"] = -1
    adc = chip.adc
    if adc.lossless:
        return
    draft.settings["forward.out_res"] = _steps(adc.bits)
    draft.carried.append(f"ADC: {adc.bits} bits (forward.out_res counts steps), once forward.out_bound is set.")
    draft.left_out += [
        "Full scale of the ADC: this chip has that of least squared error on calibration tokens, for every tile; the "
        "package has one forward.out_bound, over input range times largest weight, to be chosen on data.",
        f"Tiles of {chip.tile.rows} rows: matrices stay whole in the package (mapping.max_input_size), so one "
        "conversion stands for those of all tiles; tiles of its own would have noise and input range by the largest "
        "values of each.",
    ]
    if chip.dac.cycles > 1 and not chip.dac.lossless:
        draft.left_out.append(f"Read cycles: the package drives inputs at once, this chip in {chip.dac.cycles} cycles.")
    if adc.noise_steps:
        draft.left_out.append(
            f"ADC noise of {adc.noise_steps:g} steps: the package has output noise in training mode only, relative to "
            "the largest weight."
        )


def _unknown_there(chip: Chip, draft: _Draft) -> None:
    mapping, retention, faults, lora = chip.mapping, chip.retention, chip.faults, chip.lora
    rates = f"{faults.stuck_low_rate:g} low, {faults.stuck_high_rate:g} high"
    own = [f"{name}: {group.in_words}" for name, group in chip.layers.items()]
    left_out = {
        f"Ageing: the package knows no time; cells of this chip are {retention.refresh_interval_s:g} s old.": chip.ages,
        f"Drift compensation ({retention.compensation}): the package has no drift.": (
            (chip.ages or chip.temperature.kelvin != PROGRAMMED_K) and retention.compensation != "none"
        ),
        f"Differences between chips: the package draws none; this chip has {'; '.join(differences(chip))}.": (
            differences(chip) != []
        ),
        f"Calibration of columns ({chip.adc.calibration_reads} reads): the package has no columns of their own.": (
            chip.adc.calibration_reads > 0
        ),
        f"Temperature: the package knows none; this chip is read at {chip.temperature.kelvin:g} K, where its cells "
        f"conduct {chip.warm_cells.g_min_us:g} to {chip.warm_cells.g_max_us:g} uS.": (
            chip.temperature.kelvin != PROGRAMMED_K
        ),
        f"Stuck cells: the package has none; this chip has {rates}.": faults.occur,
        "Read noise: weights of the package do not change from read to read.": chip.read.noisy,
        "IR drop: wires are ideal in the package.": chip.wires.resistance_ohm > 0,
        "Layers in SRAM or digital logic: to be named in `exclude_modules` of `convert_to_analog`.": (
            mapping.sram != () or mapping.digital != () or mapping.sram_fraction > 0
        ),
        f"Layers with values of their own ({'; '.join(own)}): the settings are those of the others.": own != [],
        "Outliers in SRAM: to be taken off the weights before `convert_to_analog`, and added beside it.": (
            mapping.outliers.share > 0
        ),
        f"LoRA branch: its {lora.weight_bits} bits of weights and {lora.input_bits} of inputs; the package has no "
        "digital branch.": min(lora.weight_bits, lora.input_bits) < AS_IT_IS,
        f"Attention: its {chip.attention.bits} bits; the package leaves it alone.": chip.attention.bits < AS_IT_IS,
        "Output projection: it is on this chip; the package has it as any linear layer.": mapping.lm_head,
        "Energy and area: the package computes none.": True,
    }
    draft.left_out += [sentence for sentence, applies in left_out.items() if applies]


def _steps(bits: int) -> int:
    """Steps between the outermost codes of a signed converter, the package's measure of resolution."""
    return max((1 << bits) - 2, 2)


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings of values by dotted path."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings by dotted path."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
