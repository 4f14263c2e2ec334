"""The regularised inverse by conjugate gradients, where no Gram matrix fits the memory.

    queries [M, K]  ->  queries (ΦᵀΦ + λI)⁻¹ [M, K], each product reading the features once

Where the product is the float32 kernel, its solutions are refined: float32 solves for what is left,
float64 says what is left, until the tolerance is met or float32 no longer helps.

Index legend: N training rows, K features, M queries, B right-hand sides solved together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import (
    NotConvergedError,
    Product,
    conjugate_gradient,
    gram_product,
    nystrom_preconditioner,
)
from .rows import RowReader

_TINY = torch.finfo(torch.float64).tiny


def columns_together(num_features: int) -> int:
    """Right-hand sides solved together: 64 MiB of float64 per vector block, at most 256."""
    return max(1, min(256, 64 * 2**20 // (8 * num_features)))


def preconditioner_rank(num_samples: int, num_features: int) -> int:
    """Rank of the preconditioner: a sketch costs as much as one product with as many vectors."""
    return max(1, min(num_samples, num_features, 128))


def iterative_inverse(
    reader: RowReader,
    damping: float,
    *,
    tolerance: float,
    max_iterations: int,
    implementation: str | None,
) -> Product:
    """``queries [M, K] -> queries (ΦᵀΦ + λI)⁻¹``, float64; the preconditioner is made once.

    Args:
        reader: of the features.
        damping: λ > 0 in units of ``gram``.
        tolerance: the largest relative residual of any query.
        max_iterations: for each precision.
        implementation: of the Gram-vector product, as in :func:`gram_product`.

    Raises:
        ValueError: a row of the features is not finite.
    """
    for _ in reader.blocks():
        # a first reading, for the sake of the finite check alone
        pass
    precondition = nystrom_preconditioner(
        reader.features,
        damping,
        rank=preconditioner_rank(reader.num_samples, reader.num_features),
        device=reader.device,
        combine=reader.group.sum,
    )
    system = _System(reader, damping, precondition, tolerance, max_iterations, implementation)
    columns = columns_together(reader.num_features)

    def inverse(queries: Tensor) -> Tensor:
        solved = queries.new_empty(queries.shape)
        for start in range(0, queries.shape[0], columns):
            part = queries[start : start + columns].T.contiguous()
            solved[start : start + columns] = system.solve(part).T
        return solved

    return inverse


@dataclass(frozen=True)
class _System:
    """``(ΦᵀΦ + λI) X = right``, and how well it is to be solved."""

    reader: RowReader
    damping: float
    precondition: Product
    tolerance: float
    max_iterations: int
    implementation: str | None

    def solve(self, right: Tensor) -> Tensor:
        """``(ΦᵀΦ + λI)⁻¹ right`` for ``right [K, B]`` float64."""
        scale = torch.linalg.norm(right, dim=0).clamp(min=_TINY)
        right = right / scale
        x, residual, worst = torch.zeros_like(right), right, 1.0
        features = self.reader.features
        on_gpu = isinstance(features, Tensor) and features.is_cuda
        refine = self.implementation == "triton" or (self.implementation is None and on_gpu)
        while refine and worst > self.tolerance:
            try:
                candidate = x + self._rough_solution(residual)
            except NotConvergedError:
                break
            candidate_residual = right - self._product(candidate)
            reached = float(torch.linalg.norm(candidate_residual, dim=0).max())
            # float32 has given what it can at this conditioning: float64 does the rest
            refine = reached < 0.5 * worst
            if reached < worst:
                x, residual, worst = candidate, candidate_residual, reached
        if worst > self.tolerance:
            size = torch.linalg.norm(residual, dim=0).clamp(min=self.tolerance)
            x = x + size * conjugate_gradient(
                self._product,
                residual / size,
                tolerance=self.tolerance / float(size.max()),
                max_iterations=self.max_iterations,
                preconditioner=self.precondition,
            )
        return x * scale

    def _rough_solution(self, residual: Tensor) -> Tensor:
        """Three digits of the solution for ``residual [K, B]``, from products in float32."""
        size = torch.linalg.norm(residual, dim=0).clamp(min=_TINY)
        step = conjugate_gradient(
            self._fast_product,
            (residual / size).float(),
            tolerance=1e-3,
            max_iterations=self.max_iterations,
            preconditioner=lambda vectors: self.precondition(vectors.double()).float(),
        )
        return step.double() * size

    def _product(self, vectors: Tensor) -> Tensor:
        return self._times(vectors, "torch")

    def _fast_product(self, vectors: Tensor) -> Tensor:
        return self._times(vectors, self.implementation)

    def _times(self, vectors: Tensor, implementation: str | None) -> Tensor:
        group, features = self.reader.group, self.reader.features
        # λ counts once, whoever the rows are with
        damping = self.damping if group.rank == 0 else 0.0
        return group.sum(gram_product(features, vectors, damping, implementation=implementation))
