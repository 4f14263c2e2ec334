"""Random projection of per-sample gradients and the regularised kernel inverse, for any model.

Importing it costs nothing: torch is imported with the first name that needs it, and Triton when a
CUDA tensor first needs a kernel.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiling import compile_ahead
    from .gradients.accumulator import Accumulator
    from .gradients.sketcher import GradientSketcher
    from .gradients.weight import LayerGradient
    from .gradients.whitening.definition import Whitening
    from .ops import check_features, project, project_
    from .projection import KINDS, Projection
    from .ridge import RidgeSolver, TopK, top_k

# of both distributions, dtrak and dtrak-kernels
__version__ = "0.1.0"

_PLACES = {
    "Accumulator": "gradients.accumulator",
    "GradientSketcher": "gradients.sketcher",
    "KINDS": "projection",
    "LayerGradient": "gradients.weight",
    "Projection": "projection",
    "RidgeSolver": "ridge",
    "TopK": "ridge",
    "Whitening": "gradients.whitening.definition",
    "check_features": "ops",
    "compile_ahead": "compiling",
    "project": "ops",
    "project_": "ops",
    "top_k": "ridge",
}

__all__ = [
    "KINDS",
    "Accumulator",
    "GradientSketcher",
    "LayerGradient",
    "Projection",
    "RidgeSolver",
    "TopK",
    "Whitening",
    "check_features",
    "compile_ahead",
    "project",
    "project_",
    "top_k",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
