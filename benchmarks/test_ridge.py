"""The regularised inverse: one damping and D-TRAK's 27, against the published float32 inverses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from protocol import Check, Provider, Roofs, Work, relative_error
from races import Contest, Races
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver

# (N, K, M): the paper's CIFAR-2 on a GPU
GPU_SIZES, CPU_SIZES, SMOKE_SIZES = (5000, 32768, 1000), (640, 4096, 100), (50, 200, 5)
# the values D-TRAK's notebooks try
SWEEP = [m * 10.0**j for j in range(-2, 7) for m in (1, 2, 5)]
# λ at which results are compared: the published inverse is right there, too
DAMPING = 1.0e3

ONE, ALL = "dual, one damping", f"dual, {len(SWEEP)} dampings"
GRAM, INVERSE = "published: float32 Gram", "published: one float32 inverse"


def exact_scores(features: Tensor, queries: Tensor) -> Tensor:
    """``Ψ (ΦᵀΦ + λI)⁻¹ Φᵀ`` as it is written, in float64, ``[M, N]``."""
    wide = features.double()
    gram = wide.T @ wide
    gram.diagonal().add_(DAMPING)
    return torch.linalg.solve(gram, queries.double().T).T @ wide.T


def make_contest(device: torch.device, sizes: tuple[int, int, int]) -> Contest:
    """Everyone computes scores ``[M, N]``, but for the Gram, which the published way makes once."""
    N, K, M = sizes
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(N, K, generator=generator, device=device)
    queries = torch.randn(M, K, generator=generator, device=device)
    oracle = exact_scores(features, queries)
    gram = features.T @ features
    wide_gram = features.double().T @ features.double()

    def published() -> Tensor:
        damped = gram + DAMPING * torch.eye(K, device=device)
        return queries @ torch.linalg.inv(damped) @ features.T

    def one() -> Tensor:
        return RidgeSolver(features).scores(queries, DAMPING)

    def sweep() -> list[Tensor]:
        return list(RidgeSolver(features).iter_sweep(queries, SWEEP))

    def compared(allowed: float, which: Callable[[Any], Tensor] = lambda x: x) -> tuple[Check, ...]:
        def error(result: Any) -> float:
            return relative_error(which(result), oracle)

        return (Check("the primal form in float64", error, allowed),)

    # the Gram of the smaller side, its factorisation, and the products with the queries
    flops = float(N) ** 2 * K + float(N) ** 3 / 3 + 2.0 * M * N * K
    moved = 4.0 * (N * K + M * K + M * N)
    least = Work(flops, moved, "float64")
    many = Work(flops + 2.0 * len(SWEEP) * M * N * N, moved, "float64")
    gram_check = Check(
        "the Gram in float64", lambda result: relative_error(result, wide_gram), 1e-5
    )
    return Contest(
        suite="ridge",
        group="regularised inverse",
        sizes={"N": N, "K": K, "M": M},
        baselines=(INVERSE,),
        providers=[
            Provider(INVERSE, lambda: published, compared(1e-3), Work(flops, moved)),
            Provider(
                GRAM,
                lambda: lambda: features.T @ features,
                (gram_check,),
                Work(float(N) * K * K, 4.0 * (N * K + K * K)),
            ),
            Provider(ONE, lambda: one, compared(1e-5), least),
            Provider(ALL, lambda: sweep, compared(1e-5, lambda r: r[SWEEP.index(DAMPING)]), many),
        ],
        facts={"dampings": len(SWEEP)},
    )


@pytest.mark.parametrize("name", [INVERSE, GRAM, ONE, ALL])
def test_ridge(
    benchmark: Any,
    name: str,
    races: Races,
    roofs: Callable[[str], Roofs],
    device: torch.device,
    smoke: bool,
) -> None:
    large = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    sizes = SMOKE_SIZES if smoke else large
    races.present(benchmark, "ridge", name, lambda: make_contest(device, sizes), roofs)
