"""Random projection of per-sample gradients and the regularised kernel inverse, for any model.

Importing it imports no Triton: kernels are loaded when a CUDA tensor first needs one.
"""

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
