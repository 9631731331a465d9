"""What noise to expect of a chip before any model is loaded: measured on a stand-in layer of normal weights and inputs.

Weights of trained models have heavier tails than the normal distribution, so noise relative to the largest weight is
stronger there than here; `halora noise show --model` has the noise of a real model's layers.
"""

from dataclasses import dataclass
from math import inf, log10

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.converters import ExactReads, full_scale, reads_are_exact, tilewise_product
from halora.hardware.noise import noise_to_signal_db, programmed_weight, read_noise_power

_KEY = NoiseKey(role=Role.SEARCH, chip_seed=0, module="stand-in")


@dataclass(frozen=True)
class ExpectedNoise:
    """Ratios of noise to signal power in dB, -inf for none.

    Attributes:
        weights_db: Of the weights as they are programmed, aged and read through the wires.
        reads_db: Of a product, by the noise of its reads.
        converters_db: Of a product, by DAC and ADC.
        product_db: Of a product, by all of it together.
    """

    weights_db: float
    reads_db: float
    converters_db: float
    product_db: float


def expected_noise(chip: Chip, *, inputs: int = 1024, outputs: int = 128, tokens: int = 64) -> ExpectedNoise:
    """Noise of chip instance 0 of the search pool on the stand-in layer; the same for every call.

    Args:
        chip: The chip.
        inputs: d_in of the layer.
        outputs: d_out of the layer.
        tokens: Tokens the product is measured on; as many others set the converters' ranges.
    """
    weight = _normal("weight", outputs, inputs)
    x, calibration = _normal("inputs", tokens, inputs), _normal("calibration", tokens, inputs)
    held = programmed_weight(weight, chip, _KEY.part("programming"), chip.noise.level)
    clean = x @ weight.T
    power = read_noise_power(weight, chip)
    converted, product = clean, x @ held.T
    if not reads_are_exact(chip):
        converters = full_scale(calibration, weight, chip)
        converted = tilewise_product(x, weight, chip, converters)
        reads = ExactReads(chip, converters, power)
        product = reads.product(x, held, lambda like: _normal("reads", *like.shape))
    return ExpectedNoise(
        weights_db=noise_to_signal_db(weight, held),
        reads_db=_db(float(power.sum() * outputs), float(weight.square().sum())),
        converters_db=noise_to_signal_db(clean, converted),
        product_db=noise_to_signal_db(clean, product),
    )


def _normal(purpose: str, *shape: int) -> Tensor:
    return torch.from_numpy(_KEY.part(purpose).standard_normal(shape))


def _db(noise_power: float, signal_power: float) -> float:
    return 10 * log10(noise_power / signal_power) if noise_power > 0 else -inf
