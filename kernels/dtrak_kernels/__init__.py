"""Random projection of per-sample gradients and the regularised kernel inverse, for any model.

Importing it imports neither torch nor Triton: a public name brings the module it lives in, and
kernels are loaded when a CUDA tensor first needs one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import Projection, check_features, project, project_
    from .ridge import RidgeSolver
    from .sketcher import GradientSketcher

__all__ = [
    "GradientSketcher",
    "Projection",
    "RidgeSolver",
    "check_features",
    "project",
    "project_",
]

_HOMES = {
    "GradientSketcher": "sketcher",
    "Projection": "ops",
    "RidgeSolver": "ridge",
    "check_features": "ops",
    "project": "ops",
    "project_": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
