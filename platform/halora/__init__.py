"""HaLoRA Sweep from Python: chips, sweeps, Pareto fronts and adapters. The reference is docs/python.md.

Names are imported when they are first used, so that `import halora` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halora.api.adapter import Adapter as Adapter
    from halora.api.chip import Chip as Chip
    from halora.api.front import Front as Front
    from halora.api.noisy import noisy as noisy
    from halora.api.store import Store as Store
    from halora.api.sweep import Sweep as Sweep
    from halora.errors import UserError as UserError

__path__ = extend_path([], __name__)  # of every source root, in the order of sys.path (docs/decisions/027)

_MODULES = {
    "Adapter": "halora.api.adapter",
    "Chip": "halora.api.chip",
    "Front": "halora.api.front",
    "Store": "halora.api.store",
    "Sweep": "halora.api.sweep",
    "UserError": "halora.errors",
    "noisy": "halora.api.noisy",
}

__all__ = ["Adapter", "Chip", "Front", "Store", "Sweep", "UserError", "__version__", "noisy"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("halora-sweep")
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
