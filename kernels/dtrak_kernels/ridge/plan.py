"""What each factorisation of ridge regression costs, and which is the cheapest that fits."""

from __future__ import annotations

from dataclasses import dataclass

from .iteration import columns_together, preconditioner_rank
from .rows import BLOCK_BYTES

METHODS = ("primal", "dual", "svd", "cg")
MEMORY_BUDGET = 8 * 2**30


@dataclass(frozen=True)
class RidgePlan:
    """Which factorisation would be used, and what each would cost.

    Attributes:
        method: ``"primal"``, ``"dual"`` or ``"cg"``: the cheapest whose memory fits.
        flops: floating-point operations (a multiply-add is two) per method, leading terms.
        peak_bytes: bytes of working memory per method, beyond the features, queries and scores.
        memory_budget: the bytes the choice was held to.
    """

    method: str
    flops: dict[str, float]
    peak_bytes: dict[str, int]
    memory_budget: int


def plan_ridge(
    num_samples: int,
    num_features: int,
    *,
    num_queries: int = 1000,
    num_dampings: int = 1,
    memory_budget: int = MEMORY_BUDGET,
) -> RidgePlan:
    """The factorisation a :class:`RidgeSolver` would choose for ``[N, K]`` features, and its cost.

    One damping is solved by Cholesky, several by one eigendecomposition. The cost of ``"cg"``
    assumes 100 iterations for each damping.

    Args:
        num_samples: ``N``, at least 1.
        num_features: ``K``, at least 1.
        num_queries: ``M``, for the cost of applying the inverse.
        num_dampings: ``L``, at least 1.
        memory_budget: bytes of working memory the choice may use.

    Raises:
        ValueError: a size below 1.
    """
    sizes = {
        "num_samples": num_samples,
        "num_features": num_features,
        "num_queries": num_queries,
        "num_dampings": num_dampings,
        "memory_budget": memory_budget,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    N, K, M, L = num_samples, num_features, num_queries, num_dampings

    def factorise(n: int) -> float:
        # Cholesky n³/3; symmetric eigendecomposition with vectors about 9 n³
        return n**3 / 3 if L == 1 else 9.0 * n**3

    flops = {
        "primal": float(N) * K * K + factorise(K) + L * (4.0 * M * K * K + 2.0 * M * N * K),
        "dual": float(K) * N * N + factorise(N) + 2.0 * M * N * K + L * 4.0 * M * N * N,
        "cg": L * (100 * 4.0 + 2.0) * M * N * K,
    }
    # one block as read, as a mask and in float64, and what is made of it before it is cut down
    block = min(6 * BLOCK_BYTES, 48 * N * max(K, M))
    peak_bytes = {
        # the Gram, its factor and the library's workspace; queries in float64, before and after
        "primal": 4 * 8 * K * K + block + 16 * M * K,
        "dual": 4 * 8 * N * N + block + min(memory_budget // 4, 8 * N * K + 24 * M * N),
        # CG holds six vectors per right-hand side and the preconditioner's three
        "cg": 8 * K * (6 * min(M, columns_together(K)) + 3 * preconditioner_rank(N, K))
        + block
        + 16 * M * K,
    }
    fitting = [m for m in ("dual", "primal") if peak_bytes[m] <= memory_budget]
    # both orders of the product give the same scores: the smaller matrix wins, dual on a tie
    method = min(fitting, key=lambda m: flops[m]) if fitting else "cg"
    return RidgePlan(method, flops, peak_bytes, memory_budget)
