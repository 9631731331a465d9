"""What a chip's noise is: errors as its models state them, and as chip instance 0 of the search pool shows them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from halora.analysis.figures import ErrorPanel, error_figure
from halora.api.energy import named
from halora.hardware import error_curves
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import cells_err
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.hardware.layers import changed_by, changed_everywhere
from halora.hardware.noise import mean_db, weight_error_factor
from halora.hardware.noise_models import GaussianNoise
from halora.hardware.variation import PROGRAMMED_K, differences
from halora.training.rram import RramArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_TABLE_POINTS = 11
_INSTANCE = NoiseKey(role=Role.SEARCH, chip_seed=0)
_REFERENCES = {
    "absolute": "1, in weight units",
    "tensor_max": "max|W| of the whole matrix",
    "channel_max": "max|W| of the output",
    "tile_max": "max|W| of the tile",
    "std": "the standard deviation of the whole matrix",
}


class _Drawn(NamedTuple):
    """The layer that the figure shows, the chip it meets, and what that programs of its weight."""

    name: str
    chip: Chip
    weight: Tensor


@dataclass(frozen=True)
class Noise:
    """Noise of a chip alone, or of a model's layers on it.

    Attributes:
        chip: The chip.
        model: The model as it was named; empty for the chip alone.
        rows: Of the chip, its error over conductance at both ends of the refresh interval, or its sigma; of a model,
            realised noise-to-signal ratio in dB by layer in RRAM, none where there is no error.
        means: Mean of each of the model's ratios, in dB.
    """

    chip: Chip
    model: str
    rows: Sequence[Mapping[str, Any]]
    means: Mapping[str, float | None] = field(default_factory=dict)
    _drawn: _Drawn | None = None

    @property
    def mean_db(self) -> float | None:
        """Mean realised noise-to-signal power ratio of a model's layers in dB; none without error, or without model."""
        return self.means.get("noise_db")

    @property
    def other_causes(self) -> list[str]:
        """What moves weights and products of the chip besides what the rows of the chip alone state."""
        chip = self.chip
        alone = [chip, *(changed_by(chip, [name]) for name in chip.layers)]
        causes = {
            "finite levels": chip.cells.levels is not None,
            "stuck cells": chip.faults.occur,
            "clipping": any(each.coding.clip_std is not None for each in alone),
            "IR drop": chip.wires.resistance_ohm > 0,
            "read noise": chip.read.noisy,
            "DAC": not chip.dac.lossless,
            "ADC": not chip.adc.lossless,
            f"temperature ({chip.temperature.kelvin:g} K)": chip.temperature.kelvin != PROGRAMMED_K,
        }
        return [*(cause for cause, acts in causes.items() if acts), *differences(chip)]

    def to_pandas(self) -> "DataFrame":
        """The rows as a table."""
        from pandas import DataFrame

        return DataFrame(list(self.rows))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `halora noise show --format json` prints them."""
        noise = self.chip.noise.model_dump(mode="json")
        about = {"chip": self.chip.name, "chip_hash": self.chip.content_hash, "noise": noise}
        if not self.model:
            return about | {"rows": list(self.rows)}
        return about | {"model": self.model, "layers": list(self.rows), "mean_db": self.mean_db}

    def figure(self) -> "Figure | None":
        """Errors stated and drawn, of a ramp of weights or the model's first layer in RRAM; none without one."""
        if self._drawn is None:
            return None
        noise_db = {row["layer"]: row["noise_db"] for row in self.rows if self.model and row["noise_db"] is not None}
        title = f"{self.chip.name}, chip instance 0: {self._drawn.name}"
        return error_figure(_panels(self._drawn), noise_db, title)


def chip_noise(chip: Chip, model: Any = None) -> Noise:
    """The noise of a chip alone, or of a model's layers on it, see `halora.Chip.noise`."""
    if model is None:
        rows = _chip_rows(chip)
        if chip.layers:
            rows = [{"layers": "the others", **row} for row in rows]
            rows += [{"layers": name, **row} for name in chip.layers for row in _chip_rows(changed_by(chip, [name]))]
        return Noise(chip, "", rows, _drawn=_Drawn("a ramp of weights", chip, error_curves.ramp()))
    with _layers(model) as array:
        met = array.on_layers(chip)
        ratios = {"noise_db": _realised_db(array, chip)}
        if any(layer.chip.mapping.outliers.share for layer in met.values()):
            bare = changed_everywhere(chip, "mapping.outliers.share", 0.0)
            ratios["without_outliers_db"] = _realised_db(array, bare)
        first = next((layer for layer in array.layers if layer.name in ratios["noise_db"]), None)
        drawn = None
        if first is not None:
            own = met[first.name].chip
            drawn = _Drawn(first.name, own, first.split(own)[0].detach().float().cpu())
    rows = [
        {
            "layer": name,
            **({"groups": " ".join(met[name].groups)} if chip.layers else {}),
            **{what: finite_db(of[name]) for what, of in ratios.items()},
        }
        for name in ratios["noise_db"]
    ]
    means = {what: finite_db(mean_db(of.values())) for what, of in ratios.items()}
    return Noise(chip, named(model), rows, means, drawn)


@contextmanager
def _layers(model: Any) -> Iterator[RramArray]:
    if not isinstance(model, str):
        from halora.training.on_chip import layers_of

        with layers_of(model) as array:
            yield array
        return
    from halora.training.models import load_base
    from halora.training.rram import install

    yield install(load_base(model, "fp32").causal_lm)


def _realised_db(array: RramArray, chip: Chip) -> dict[str, float]:
    array.program(ChipInstance(chip, _INSTANCE, chip.noise.level), regenerate=True)
    try:
        return array.noise_db()
    finally:
        array.clear()


def finite_db(ratio_db: float) -> float | None:
    """The ratio; nothing where there is no error, as JSON has no infinity."""
    return ratio_db if isfinite(ratio_db) else None


def _chip_rows(chip: Chip) -> list[dict[str, Any]]:
    """What the models state: cells over conductance at both ends of the refresh interval, weights in one row."""
    rows: list[dict[str, Any]] = []
    if chip.noise.domain == "weight":
        rows.append({"of": "weight", "std": chip.noise.level * weight_error_factor(chip), **_meaning(chip)})
    if cells_err(chip, chip.noise):
        cells = chip.cells
        conductance = torch.linspace(cells.g_min_us, cells.g_max_us, _TABLE_POINTS)
        for moment in ("start", "end"):
            curve = error_curves.stated_cell_error(chip, conductance, moment)
            rows += [
                {
                    "of": "cell",
                    "moment": moment,
                    "time_s": error_curves.moment_s(chip, moment),
                    "conductance_us": target,
                    "mean_error_us": round(mean, 9),
                    "std_us": std,
                    "std_of_g_max": std / cells.g_max_us,
                }
                for target, mean, std in zip(curve.target, curve.mean, curve.std, strict=True)
            ]
    return rows


def _meaning(chip: Chip) -> dict[str, Any]:
    """What the standard deviation of a model of the weight domain is in units of."""
    noise, tile = chip.noise, chip.tile
    if not isinstance(noise, GaussianNoise):
        return {"times": f"as {noise.kind} defines it"}
    size = f" ({tile.rows} inputs x {tile.columns} outputs)" if noise.reference == "tile_max" else ""
    return {"sigma": noise.sigma, "times": _REFERENCES[noise.reference] + size, "lasts": "until programmed again"}


def _panels(layer: _Drawn) -> list[ErrorPanel]:
    chip, weight = layer.chip, layer.weight
    key = _INSTANCE.at(module=layer.name, purpose="programming")
    panels = []
    if cells_err(chip, chip.noise):
        conductance = torch.linspace(chip.cells.g_min_us, chip.cells.g_max_us, 100)
        for moment in ("start", "end"):
            stated = error_curves.stated_cell_error(chip, conductance, moment)
            drawn = error_curves.drawn_cell_error(weight, chip, key, moment)
            title = f"cells at the {moment}, {error_curves.moment_s(chip, moment):g} s"
            panels.append(ErrorPanel(title, "conductance aimed at (µS)", "error (µS)", stated, drawn))
    if chip.noise.domain == "weight":
        stated = error_curves.stated_weight_error(weight, chip)
        drawn = error_curves.drawn_weight_error(weight, chip, key)
        panels.append(
            ErrorPanel("weights (drawn: from every cause)", "weight / max|W|", "error / max|W|", stated, drawn)
        )
    return panels
