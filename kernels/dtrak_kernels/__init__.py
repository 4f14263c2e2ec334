"""Random projection of per-sample gradients and the regularised kernel inverse, for any model.

Importing it imports no Triton: kernels are loaded when a CUDA tensor first needs one.
"""

from .gradients.sketcher import GradientSketcher
from .ops import check_features, project, project_
from .projection import Projection
from .ridge.solver import RidgeSolver

__all__ = [
    "GradientSketcher",
    "Projection",
    "RidgeSolver",
    "check_features",
    "project",
    "project_",
]
