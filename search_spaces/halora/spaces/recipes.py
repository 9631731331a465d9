"""Points every sweep tries first, beside its own: the paper's recipe and good guesses at plain LoRA."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halora.spaces.ranked import ranked_points
from halora.spaces.resolving import default_value, fixed_value

if TYPE_CHECKING:
    from halora.spaces.sweep import SweepConfig

_METHOD = "training.method"

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # HaLoRA, arXiv 2502.19747, section 4.1; it states no learning rate
    "the paper's recipe": {
        "training.method": "halora",
        "training.mu": 0.1,
        "training.schedule.shape": "constant",
        "training.schedule.strength_start": 0.01,
        "training.schedule.redraw_steps": 400,
        "lora.rank": 4,
    },
    # ten times the rate of full finetuning, nearly whatever the rank (Schulman et al., LoRA Without Regret, 2025)
    "tuned LoRA": {"training.method": "lora", "training.learning_rate": 1e-3, "lora.rank": 8},
    # where a sweep searches it; docs/lab.md, 2026-11-29
    "tuned LoRA, a thousandth of the weights in SRAM": {
        "training.method": "lora",
        "training.learning_rate": 1e-3,
        "lora.rank": 8,
        "chip.mapping.outliers.share": 0.001,
    },
}


def first_points(sweep: "SweepConfig") -> list[dict[str, Any]]:
    """The file's own points, those of the chip's ranking, then the recipes; a method the space lacks is left out.

    Those of the ranking are like the file's first point otherwise, a recipe is as near as the space allows. A point of
    the file that has a recipe's values stands for it, at whatever learning rate.
    """
    points = [{path: sweep.space[path].own(value) for path, value in point.items()} for point in sweep.first]
    like = points[0] if points else {}
    ranked = [_nearest_point(sweep, {**like, **values}) for values in ranked_points(sweep)]
    points += [point for point in ranked if point is not None and point not in points]
    for recipe in RECIPES.values():
        if any(path.startswith("chip.") and path not in sweep.space for path in recipe):
            continue
        point = _nearest_point(sweep, recipe)
        if point is None:
            continue
        own = {path: value for path, value in point.items() if path in recipe and path != "training.learning_rate"}
        if not any(own.items() <= other.items() for other in points):
            points.append(point)
    return points


def _nearest_point(sweep: "SweepConfig", recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    defaults = sweep.resolve({}).model_dump(mode="json")
    own_method = defaults["training"]["method"]
    if _METHOD not in sweep.space and recipe.get(_METHOD, own_method) != own_method:
        return None
    values: dict[str, Any] = {}
    for path, distribution in sweep.space.items():
        if not distribution.applies(values):
            continue
        default = fixed_value(sweep.trial, path) if path == "chip" else default_value(defaults, path)
        value = distribution.nearest(recipe.get(path, default))
        if value is not None:
            values[path] = value
        elif path == _METHOD:
            return None
    return values
