"""What a model takes on a chip and the noise to expect there, before anything is trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.responses import HTMLResponse

from halora.analysis.charts import Chart
from halora.analysis.layers import GroupFigures, by_group
from halora.analysis.trial_charts import beside_chart
from halora.dashboard.site import Site, is_fragment
from halora.errors import UserError
from halora.hardware.baselines import baselines
from halora.hardware.chip import Chip
from halora.hardware.chip_files import expand_chip, preset_names
from halora.hardware.energy import EnergyBreakdown, energy_per_token
from halora.hardware.expected_noise import ExpectedNoise, expected_noise
from halora.hardware.layers import changed_by
from halora.hardware.mapping import Placement
from halora.hardware.shapes import named_shapes
from halora.settings.training import LoraSettings
from halora.spaces.language import with_values
from halora.spaces.mistakes import describe
from halora.yaml_files import parse_yaml

_MOST_INPUTS = 2048
_MOST_TEXT = 4000
_MOST_GROUPS = 12  # whose noise is looked at


@dataclass(frozen=True)
class Knob:
    """A slider.

    Attributes:
        name: In the URL.
        label: Beside it.
        path: Field of the chip that it sets; empty for the rank.
        low: Its least value.
        high: Its largest.
        step: Between two values.
        choices: The values, where they are not evenly spaced.
    """

    name: str
    label: str
    path: str
    low: float = 0
    high: float = 0
    step: float = 1
    choices: tuple[int, ...] = ()


KNOBS = (
    Knob("bits", "ADC bits", "adc.bits", 4, 10),
    Knob("rows", "rows per tile", "tile.rows", choices=(16, 32, 64, 128, 256, 512, 1024)),
    Knob("reads", "reads averaged", "read.averaged", 1, 16),
    Knob("slices", "weight slices", "coding.slices", 1, 4),
    Knob("sram", "share of weights in SRAM, whole layers", "mapping.sram_fraction", 0, 0.5, 0.01),
    Knob("outliers", "share of each layer's weights in SRAM, the largest", "mapping.outliers.share", 0, 0.02, 0.0005),
    Knob("rank", "LoRA rank", "", 0, 64),
)


@dataclass(frozen=True)
class Setting:
    """What the form is set to.

    Attributes:
        model: A model known by name.
        preset: A shipped chip.
        context_tokens: Tokens that each token attends to.
        values: Value of each knob.
        layers: Groups of layers with values of their own, in YAML as a chip file has them; empty for none.
    """

    model: str
    preset: str
    context_tokens: int
    values: Mapping[str, float]
    layers: str = ""


@dataclass(frozen=True)
class Explored:
    """What a setting gives.

    Attributes:
        energy: By component.
        noise: On a stand-in layer.
        groups: Of layers with values of their own.
        noise_of: Noise of the product in dB by group, on the stand-in layer.
        rram_share: Share of the linear weights that sits in RRAM.
        named_uj: Energy per token of named baselines, in microjoule.
        chart: The energies.
        command: The command line that says the same.
    """

    energy: EnergyBreakdown
    noise: ExpectedNoise
    groups: Sequence[GroupFigures]
    noise_of: Mapping[str, float]
    rram_share: float
    named_uj: Mapping[str, float]
    chart: Chart
    command: str


def routes(site: Site) -> APIRouter:
    """Its address."""
    router = APIRouter()

    @router.get("/chip")
    def chip(request: Request) -> HTMLResponse:
        problems: list[str] = []
        setting = read_setting(request.query_params, problems)
        found = None
        try:
            found = explore(setting) if not problems else None
        except UserError as error:
            problems += error.problems
        fragment = is_fragment(request)
        return site.page(
            request,
            "chip_view" if fragment else "chip",
            path="/chip",
            setting=setting,
            found=found,
            problems=problems,
            knobs=KNOBS,
            models=list(named_shapes()),
            presets=preset_names(),
            **({"oob": True} if fragment and request.query_params.get("set_for") != setting.preset else {}),
        )

    return router


def read_setting(params: QueryParams, problems: list[str]) -> Setting:
    """The form's state; a preset that was just chosen brings its own values."""
    model = params.get("model", "llama-3.2-1b")
    preset = params.get("preset", "halora-2026")
    for name, given, known in (("model", model, named_shapes()), ("chip", preset, preset_names())):
        if given not in known:
            problems.append(f"no {name} '{given[:80]}' ({', '.join(known)})")
    own = _own_values(preset if preset in preset_names() else "halora-2026")
    fresh = params.get("set_for", preset) != preset
    values = dict(own)
    for knob in KNOBS:
        text = params.get(knob.name, "").strip()
        if text and not fresh:
            value = _number(text)
            if value is None:
                problems.append(f"{knob.label}: '{text[:40]}' is not a number")
            else:
                values[knob.name] = value
    context = params.get("context", "512")
    if not (context.isdecimal() and 0 < int(context[:9]) <= 10**6):
        problems.append(f"context: '{context[:40]}' is not a number of tokens up to a million")
        context = "512"
    layers = "" if fresh else params.get("layers", "").strip()
    if len(layers) > _MOST_TEXT:
        problems.append(f"layers: {len(layers)} characters, {_MOST_TEXT} at most")
        layers = ""
    return Setting(model, preset, int(context), values, layers)


def explore(setting: Setting) -> Explored:
    """Energy and noise of a setting.

    Raises:
        UserError: With every mistake.
    """
    overrides = {knob.path: setting.values[knob.name] for knob in KNOBS if knob.path}
    overrides = {path: int(value) if float(value).is_integer() else value for path, value in overrides.items()}
    groups = parse_yaml(setting.layers, "layers") if setting.layers else {}
    try:
        described = Chip.model_validate(
            with_values(expand_chip(setting.preset), overrides) | ({"layers": groups} if groups else {})
        )
    except ValidationError as error:
        raise UserError([f"chip.{problem}" for problem in describe(error, Chip)]) from None
    shape, rank = named_shapes()[setting.model], int(setting.values["rank"])
    targets = LoraSettings().targets
    energy = energy_per_token(shape, described, rank=rank, targets=targets, context_tokens=setting.context_tokens)
    sizes, met = shape.sizes, described.on_layers(shape.sizes)
    on_chip = sum(size for name, size in sizes.items() if met[name].place is not Placement.HOST)
    in_rram = sum(size for name, size in sizes.items() if met[name].place is Placement.RRAM)
    named = {
        f"{name} ({it.phase})": found
        for name, it in baselines().items()
        if (found := it.energy_uj_per_token(shape, described, setting.context_tokens)) is not None
    }
    own = _own_values(setting.preset)
    moved = [k.path for k in KNOBS if k.path and own[k.name] != overrides[k.path]]
    command = ["halora energy", setting.model, "--chip", setting.preset, "--rank", str(rank)]
    command += ["--tokens", str(setting.context_tokens), *(f"--set {path}={overrides[path]}" for path in moved)]
    if groups:
        command += ["--set", quote(f"layers={json.dumps(groups)}")]
    inputs = min(shape.hidden, _MOST_INPUTS)
    figures = by_group(described, sizes, energy.layers_uj)
    return Explored(
        energy=energy,
        noise=expected_noise(described, inputs=inputs),
        groups=figures,
        noise_of={
            group.name: expected_noise(changed_by(described, group.groups), inputs=inputs).product_db
            for group in figures[:_MOST_GROUPS]
        },
        rram_share=in_rram / on_chip,
        named_uj=named,
        chart=beside_chart(energy.components_uj, named, setting.preset),
        command=" ".join(command),
    )


def _own_values(preset: str) -> dict[str, float]:
    """What the knobs stand at for a preset."""
    chip = Chip.model_validate(expand_chip(preset)).model_dump()
    found: dict[str, float] = {}
    for knob in KNOBS:
        value: Any = chip
        for part in knob.path.split(".") if knob.path else ():
            value = value[part]
        found[knob.name] = value if knob.path else LoraSettings().rank
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 1e6 else None
