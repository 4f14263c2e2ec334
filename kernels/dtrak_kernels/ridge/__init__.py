"""Scores from features: the regularised inverse of their Gram matrix."""

from .factors import cholesky
from .gram import gram_product
from .plan import METHODS, RidgePlan, plan_ridge
from .ranking import TopK, top_k
from .rows import FeatureRows
from .solver import RidgeSolver

__all__ = [
    "METHODS",
    "FeatureRows",
    "RidgePlan",
    "RidgeSolver",
    "TopK",
    "cholesky",
    "gram_product",
    "plan_ridge",
    "top_k",
]
