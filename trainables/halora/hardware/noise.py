"""What a chip instance does to a weight matrix: Gaussian programming noise, then IR drop.

Both are static per chip instance: drawn or computed once, the same for every read. The frozen weight is never written;
the functions return a new tensor. Not modelled here: see `halora.hardware.chip`.
"""

from typing import assert_never

import torch

from halora.hardware.addressing import NoiseKey
from halora.hardware.chip import Chip, GaussianNoise


def reference_scale(weight: torch.Tensor, noise: GaussianNoise) -> torch.Tensor:
    """What sigma is relative to, in weight units.

    Args:
        weight: `(out_features, in_features)`.
        noise: Its `reference` chooses the scale.

    Returns:
        A scalar, or `(out_features, 1)` for `channel_max`.
    """
    match noise.reference:
        case "absolute":
            return weight.new_ones(())
        case "tensor_max":
            return weight.abs().amax()
        case "channel_max":
            return weight.abs().amax(dim=1, keepdim=True)
        case "std":
            return weight.std()
        case unknown:
            assert_never(unknown)


def ir_drop_gain(in_features: int, chip: Chip) -> torch.Tensor:
    """Relative signal of each input row after the voltage lost along its tile column, `(in_features,)`, mean 1.

    First order, for equal cells: the current of all cells flows through the shared wire, so the cell k segments from
    the converter loses r G (k R - k^2 / 2) of its read voltage. The mean loss is taken out by the digital scale.
    """
    rows = chip.tile.rows
    position = torch.arange(in_features, dtype=torch.float32) % rows + 1
    loss = chip.wires.resistance_ohm * chip.wires.conductance_us * 1e-6 * (position * rows - position.square() / 2)
    gain = 1 / (1 + loss)
    return gain / gain.mean()


def programmed_weight(weight: torch.Tensor, chip: Chip, key: NoiseKey, sigma: float) -> torch.Tensor:
    """The weight as one chip instance holds and reads it, W* = (W0 + sigma * reference * E) * IR drop.

    Args:
        weight: Frozen weight `(out_features, in_features)`, left unchanged.
        chip: Noise reference, tile height and wires.
        key: Address of the chip instance at this module; E is standard normal.
        sigma: Standard deviation in units of the chip's noise reference.

    Returns:
        A new tensor in `weight`'s dtype; exactly `weight` for sigma 0 and no wire resistance.
    """
    if sigma == 0 and chip.wires.resistance_ohm == 0:
        return weight
    noisy = weight.float()
    if sigma > 0:
        unit = torch.from_numpy(key.standard_normal(tuple(weight.shape))).to(weight.device)
        noisy = torch.addcmul(noisy, unit, sigma * reference_scale(noisy, chip.noise))
    if chip.wires.resistance_ohm > 0:
        noisy = noisy * ir_drop_gain(weight.shape[1], chip).to(weight.device)
    return noisy.to(weight.dtype)


def noise_to_signal_db(weight: torch.Tensor, programmed: torch.Tensor) -> float:
    """Power of the weight error over the power of the weight, 10 log10(|W* - W|^2 / |W|^2); -inf without error."""
    error = (programmed.float() - weight.float()).square().sum()
    return float(10 * torch.log10(error / weight.float().square().sum()))
