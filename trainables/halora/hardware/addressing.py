"""Every random draw of a chip has an address, so it never depends on the order of calls.

A draw is named by (role, series, chip seed, canonical module name, purpose, draw index, example id). The name is hashed
to the seed of a generator of its own, SFC64 on the CPU (docs/decisions/004). A chip instance therefore shows the same
noise to every adapter, in every process, on every device, at every batch size.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod

import numpy as np

_ADDRESSES = json.JSONEncoder(sort_keys=True)
_WRAPPER_PARTS = frozenset({"base_model", "module", "base_layer", "_orig_mod", "causal_lm"})


class Role(StrEnum):
    """What a chip instance is for. The role is part of every key, so the three pools of chips are disjoint."""

    TRAIN = "train"
    SEARCH = "search"
    CERTIFY = "certify"


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """The address of one draw.

    Attributes:
        role: Pool the chip instance comes from.
        chip_seed: Number of the chip instance within its pool, or within its series.
        module: Canonical name of the linear layer, see `canonical_name`.
        purpose: What is drawn, e.g. `programming` or `adc`.
        draw: Index of the programming event or read; static draws stay at 0.
        example: Id of the row being read; empty for draws that do not depend on it.
        series: Which series of a pool that has several: every certification draws chips of its own.
    """

    role: Role
    chip_seed: int
    module: str = ""
    purpose: str = ""
    draw: int = 0
    example: str = ""
    series: str = ""

    def at(self, *, module: str, purpose: str, example: str = "") -> "NoiseKey":
        """The same chip instance and draw index, at one module, purpose and example."""
        return replace(self, module=module, purpose=purpose, example=example)

    def lasting(self) -> "NoiseKey":
        """The draw that lasts as long as the chip instance, whatever is programmed or read."""
        return replace(self, draw=0, example="")

    def part(self, purpose: str, draw: int | None = None) -> "NoiseKey":
        """A draw of its own for a part of this one, e.g. a slice's cells; the draw index stays unless given."""
        return replace(self, purpose=f"{self.purpose}/{purpose}", draw=self.draw if draw is None else draw)

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal draws, float32, of `shape`."""
        return self.generator().standard_normal(shape, dtype=np.float32)

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uniform draws over [0, 1) in steps of 2^-24, float32, of `shape`."""
        return self.generator().random(shape, dtype=np.float32)

    def uniform_bytes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uniform draws over 0 .. 255, uint8, of `shape`; a longer first axis continues a shorter one."""
        return np.frombuffer(self.generator().bytes(prod(shape)), dtype=np.uint8).reshape(shape)

    def generator(self) -> np.random.Generator:
        """A generator that begins at this address."""
        return np.random.Generator(np.random.SFC64(self.seed()))

    def seed(self) -> int:
        """128 bits that depend on every part of the address."""
        named = {name: part for name, part in vars(self).items() if part or name != "series"}
        address = _ADDRESSES.encode(named).encode()
        return int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "little")


def canonical_name(module_name: str) -> str:
    """The module's name in the plain model, without the prefixes that PEFT, DeepSpeed or compilers add."""
    return ".".join(part for part in module_name.split(".") if part not in _WRAPPER_PARTS)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    text = json.dumps([str(part) for part in parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
