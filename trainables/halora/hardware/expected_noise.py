"""What noise to expect of a chip before any model is loaded: measured on a stand-in layer of normal weights and inputs.

Weights of trained models have heavier tails than the normal distribution, so noise relative to the largest weight is
stronger there than here; `halora noise show --model` has the noise of a real model's layers.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.converters import ExactReads, drive, noise_power, reads_are_exact, tilewise_product
from halora.hardware.instance import ChipInstance
from halora.hardware.manufactured import Columns
from halora.hardware.noise import Programming, noise_to_signal_db, ratio_db
from halora.hardware.outliers import in_rram

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
    rest, side = in_rram(weight, chip)
    programming = Programming.of(rest, chip, ChipInstance(chip, _KEY, chip.noise.level).level_at(_KEY.module))
    key = _KEY.part("programming")
    held = programming.held(rest, key)
    clean, through_held, of_side = x @ weight.T, x @ held.T, 0.0 if side is None else side.product(x)
    converted, product, reads_db = through_held, through_held, -inf
    if not reads_are_exact(chip):
        reads, copies = ExactReads.calibrated(calibration, rest, chip), programming.copies(rest, key)
        columns = Columns.of(chip, key, rest)
        converted = tilewise_product(x, copies, chip, reads.converters, columns)
        product = reads.product(x, copies, lambda like: _normal("reads", *like.shape), columns)
        scale, cycles = drive(x, chip.dac, reads.converters.input_range)
        power = noise_power(scale, cycles, outputs, chip, reads.converters, reads.noise)
        if power is not None:
            reads_db = ratio_db(float(power.expand_as(clean).sum()), float(clean.square().sum()))
    if side is not None:
        held = held.clone()
        side.add_to(held)
    return ExpectedNoise(
        weights_db=noise_to_signal_db(weight, held),
        reads_db=reads_db,
        converters_db=ratio_db(float((converted - through_held).square().sum()), float(clean.square().sum())),
        product_db=noise_to_signal_db(clean, product + of_side),
    )


def _normal(purpose: str, *shape: int) -> Tensor:
    return torch.from_numpy(_KEY.part(purpose).standard_normal(shape))
