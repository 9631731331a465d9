"""How numbers and searched values are written for people, and data for a page's scripts."""

import json
from collections.abc import Mapping
from math import floor, isfinite, log10
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many digits, as a table shows it; a dash for none, and for what is not finite."""
    if value is None or not isfinite(value):
        return "–"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    decimals = max(digits - 1 - floor(log10(abs(value))), 0)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{seconds:.0f} s"


def searched_values(params: Mapping[str, Any]) -> str:
    """Searched values on one line: the last part of each path, numbers to three digits."""
    return " ".join(
        f"{path.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for path, value in sorted(params.items())
    )


def script_json(content: Any) -> Markup:
    """JSON that cannot end the script element it is in; what is not finite becomes null."""
    return htmlsafe_json_dumps(_finite(content), dumps=json.dumps, allow_nan=False, separators=(",", ":"))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content
