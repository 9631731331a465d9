"""How a chip's description names its noise models: a mapping with the model's `kind` and its fields.

A plug-in adds a kind: a subclass of `NoiseModel` (of `WeightNoise` if it moves weights) under the entry-point group
`halora.noise_models`, whose name is the kind.
"""

from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from halora.errors import UserError, nearest
from halora.hardware.cell_models import (
    CmoNoise,
    CmoRelaxation,
    MeasuredNoise,
    MiloNoise,
    PowerLawDrift,
    Wan2022Noise,
)
from halora.hardware.noise_models import GaussianNoise, NoiseModel, WeightNoise
from halora.hardware.pcm_models import PcmDrift, PcmNoise

ENTRY_POINTS = "halora.noise_models"
"""Entry-point group of plug-in models."""

_SHIPPED: dict[str, type[NoiseModel]] = {
    str(model.model_fields["kind"].default): model
    for model in (
        GaussianNoise,
        Wan2022Noise,
        MiloNoise,
        CmoNoise,
        PcmNoise,
        MeasuredNoise,
        PowerLawDrift,
        CmoRelaxation,
        PcmDrift,
    )
}


def noise_kinds(ages: bool = False) -> list[str]:
    """The shipped kinds of programming error, or of ageing."""
    return sorted(kind for kind, model in _SHIPPED.items() if model.ages == ages)


def noise_fields() -> list[str]:
    """Fields of any shipped model."""
    return list(dict.fromkeys(name for model in _SHIPPED.values() for name in model.model_fields))


def _model(kind: str) -> type[NoiseModel]:
    """The model of that kind.

    Raises:
        UserError: There is none, or the plug-in of that name is no noise model.
    """
    if kind in _SHIPPED:
        return _SHIPPED[kind]
    plugins = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if kind not in plugins:
        known = sorted({*_SHIPPED, *plugins})
        raise UserError(f"no noise model '{kind}'{nearest(kind, known)} (known: {', '.join(known)})")
    entry = plugins[kind]
    try:
        model = entry.load()
    except Exception as error:
        raise UserError(f"the plug-in '{kind}' ({entry.value}) cannot be loaded: {error}") from error
    if not (isinstance(model, type) and issubclass(model, NoiseModel)):
        raise UserError(f"the plug-in '{kind}' ({entry.value}) is not a subclass of halora's NoiseModel")
    if (model.domain == "weight") != issubclass(model, WeightNoise):
        raise UserError(f"the plug-in '{kind}' ({entry.value}) moves weights, so it must be a subclass of WeightNoise")
    if model.model_fields["kind"].default != kind:
        raise UserError(f'the plug-in {entry.value} must declare kind: Literal["{kind}"] = "{kind}"')
    return model


def _programming_noise(given: Any) -> Any:
    return _read(given, ages=False)


def _ageing(given: Any) -> Any:
    return _read(given, ages=True)


def _read(given: Any, ages: bool) -> Any:
    """The model that a mapping with a `kind` describes."""
    if isinstance(given, dict):
        if not isinstance(given.get("kind"), str):
            raise UserError(f"kind is required (known: {', '.join(noise_kinds(ages))})")
        given = _model(given["kind"]).model_validate(given)
    if isinstance(given, NoiseModel) and (given.ages != ages or given.lifetime == "read"):
        what = "an ageing model" if ages else "a model of programming error"
        raise UserError(f"'{given.kind}' is not {what} (known: {', '.join(noise_kinds(ages))})")
    return given


NoiseSetting = Annotated[SerializeAsAny[NoiseModel], BeforeValidator(_programming_noise)]
"""The error of programming in a chip's description: a mapping with a `kind`."""

AgeingSetting = Annotated[SerializeAsAny[NoiseModel], BeforeValidator(_ageing)]
"""What happens to programmed cells in a chip's description: a mapping with a `kind`."""
