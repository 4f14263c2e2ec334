"""Attribution methods on top of features: every one a small function, ``[M, N]`` scores out.

Letters: M queries, N training samples, K features, S steps of a trajectory. φ are projected
gradients of one output function, Φ ``[N, K]`` those of the training set, λ the damping in units of
``ΦᵀΦ``, a sum over training samples. Positive scores are proponents: samples whose presence lowers
the query's loss.

TRAK and D-TRAK are one formula: what differs is the output function the features are gradients of.

Source:
    The table of methods compared by D-TRAK, Zheng et al. 2024 (arXiv:2311.00500), and its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver, TopK, top_k

from ..runs.measure import available_bytes, format_bytes

__all__ = [
    "TopK",
    "check_room",
    "ensemble",
    "gas",
    "gradient_cosine",
    "gradient_dot",
    "journey_query_features",
    "relative_influence",
    "renormalised_influence",
    "top_k",
    "tracin_cp",
    "trak",
]

# bytes of training features held in float64 at once
_BLOCK_BYTES = 64 * 2**20


def check_room(num_queries: int, num_train: int, instead: str) -> None:
    """Refuse a matrix of scores that does not fit the memory, before anything is computed.

    Args:
        num_queries: M.
        num_train: N.
        instead: what to do.

    Raises:
        ValueError: ``[M, N]`` float32 and a copy take more than there is.
    """
    needed, free = 8 * num_queries * num_train, available_bytes(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"scores of {num_queries:,} queries by {num_train:,} training images must fit in "
            f"{format_bytes(free)} of memory, got {format_bytes(needed)}: {instead}"
        )


def trak(solver: RidgeSolver, queries: Tensor, damping: float) -> Tensor:
    """TRAK, and D-TRAK: ``φ_xᵀ (ΦᵀΦ + λI)⁻¹ φ_i``.

    No residual weighting, no 1/N in the Gram and no normalisation, as in D-TRAK's code.

    Args:
        solver: on the training features; share it between methods and dampings.
        queries: ``[M, K]`` floating.
        damping: λ in units of ``ΦᵀΦ``.

    Returns:
        ``[M, N]`` float32.

    Raises:
        ValueError: as :meth:`RidgeSolver.scores`.

    Source:
        TRAK, Park et al. 2023 (arXiv:2303.14186); D-TRAK, Zheng et al. 2024 (arXiv:2311.00500).
    """
    return solver.scores(queries, damping)


def relative_influence(solver: RidgeSolver, queries: Tensor, damping: float) -> Tensor:
    """Relative influence: TRAK's score divided by ``‖(ΦᵀΦ + λI)⁻¹ φ_i‖₂``.

    A training sample with zero features scores 0; else as :func:`trak`.

    Source:
        RelatIF, Barshan et al. 2020 (arXiv:2003.11630), the θ-relative form.
    """
    return _divide(solver.scores(queries, damping), solver.preconditioned_norms(damping))


def renormalised_influence(solver: RidgeSolver, queries: Tensor, damping: float) -> Tensor:
    """Renormalised influence: TRAK's score divided by ``‖φ_i‖₂``.

    A training sample with zero features scores 0; else as :func:`trak`.

    Source:
        Hammoudeh and Lowd 2022 (arXiv:2201.10055), renormalised influence.
    """
    return _divide(solver.scores(queries, damping), solver.feature_norms())


def gradient_dot(queries: Tensor, features: Any) -> Tensor:
    """Gradient similarity: ``φ_xᵀ φ_i``.

    Args:
        queries: ``[M, K]`` floating.
        features: ``[N, K]`` floating tensor, or a store answering ``store[i:j]``.

    Returns:
        ``[M, N]`` float32, computed in float64.

    Raises:
        ValueError: the widths differ.
    """
    return torch.cat([product.float() for product, _ in _products(queries, features)], dim=1)


def gradient_cosine(queries: Tensor, features: Any) -> Tensor:
    """Cosine of the gradients: ``φ_xᵀ φ_i / (‖φ_x‖₂ ‖φ_i‖₂)``; 0 where either is zero.

    Args:
        queries: ``[M, K]`` floating.
        features: ``[N, K]`` floating tensor, or a store answering ``store[i:j]``.

    Returns:
        ``[M, N]`` float32 in [-1, 1], computed in float64.

    Raises:
        ValueError: the widths differ.
    """
    lengths = torch.linalg.norm(queries.double(), dim=1)[:, None]
    parts = [
        _divide(_divide(product, norms), lengths).float()
        for product, norms in _products(queries, features)
    ]
    return torch.cat(parts, dim=1)


def tracin_cp(queries: Sequence[Tensor], features: Sequence[Any]) -> Tensor:
    """TracInCP: the mean over checkpoints of :func:`gradient_dot`, without learning rates.

    Args:
        queries: one ``[M, K]`` per checkpoint.
        features: one ``[N, K]`` tensor or store per checkpoint, in the same order.

    Returns:
        ``[M, N]`` float32.

    Raises:
        ValueError: no checkpoint, or not as many of one as of the other.

    Source:
        Pruthi et al. 2020 (arXiv:2002.08484), with equal weights as in D-TRAK's code.
    """
    _check_checkpoints(queries, features)
    return ensemble(gradient_dot(q, f) for q, f in zip(queries, features, strict=True))


def gas(queries: Sequence[Tensor], features: Sequence[Any]) -> Tensor:
    """GAS: the mean over checkpoints of :func:`gradient_cosine`.

    Args:
        queries: one ``[M, K]`` per checkpoint.
        features: one ``[N, K]`` tensor or store per checkpoint, in the same order.

    Returns:
        ``[M, N]`` float32 in [-1, 1].

    Raises:
        ValueError: no checkpoint, or not as many of one as of the other.

    Source:
        Hammoudeh and Lowd 2022 (arXiv:2201.10055), as in D-TRAK's code.
    """
    _check_checkpoints(queries, features)
    return ensemble(gradient_cosine(q, f) for q, f in zip(queries, features, strict=True))


def journey_query_features(step_features: Tensor) -> Tensor:
    """Journey-TRAK: a query's features averaged over the steps of its sampling trajectory.

    Score them with :func:`trak` against ordinary training features.

    Args:
        step_features: ``[S, M, K]`` floating, S >= 1.

    Returns:
        ``[M, K]`` float32, the mean over steps.

    Raises:
        ValueError: ``step_features`` is not ``[S, M, K]`` with at least one step.

    Source:
        Georgiev et al. 2023 (arXiv:2312.06205), averaged over the whole journey as D-TRAK does.
    """
    if step_features.ndim != 3 or step_features.shape[0] == 0:
        raise ValueError(
            f"step_features must be [S, M, K] with S >= 1, got shape {tuple(step_features.shape)}"
        )
    return step_features.mean(dim=0, dtype=torch.float64).float()


def ensemble(scores: Any) -> Tensor:
    """The mean of score matrices, one per model or checkpoint.

    Args:
        scores: an iterable of ``[M, N]`` tensors, of which one is held at a time.

    Returns:
        ``[M, N]`` float32, summed in float64.

    Raises:
        ValueError: no matrix, or matrices of different shapes.
    """
    total: Tensor | None = None
    count = 0
    for matrix in scores:
        if total is None:
            total = torch.zeros(matrix.shape, dtype=torch.float64, device=matrix.device)
        if matrix.shape != total.shape:
            raise ValueError(
                f"scores must all be {list(total.shape)}, got {list(matrix.shape)} "
                f"at number {count}"
            )
        total += matrix
        count += 1
    if total is None:
        raise ValueError("scores must hold at least one matrix, got none")
    return (total / count).float()


def _products(queries: Tensor, features: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """``(φ_xᵀ φ_i [M, B], ‖φ_i‖₂ [B])`` in float64, a block of training samples at a time."""
    N, K = (int(size) for size in features.shape)
    if queries.ndim != 2 or queries.shape[1] != K:
        raise ValueError(f"queries must be [M, {K}], got shape {tuple(queries.shape)}")
    size = max(1, _BLOCK_BYTES // (8 * K))
    for start in range(0, N, size):
        rows = torch.as_tensor(features[start : start + size]).double()
        yield queries.double() @ rows.T, torch.linalg.norm(rows, dim=1)


def _divide(scores: Tensor, norms: Tensor) -> Tensor:
    """``scores / norms`` in the dtype of ``scores``; 0 where the norm is 0."""
    return torch.where(norms > 0, scores / torch.where(norms > 0, norms, 1.0), 0.0).to(scores.dtype)


def _check_checkpoints(queries: Sequence[Tensor], features: Sequence[Any]) -> None:
    if len(queries) != len(features) or not queries:
        raise ValueError(
            "queries and features must have one entry per checkpoint, "
            f"got {len(queries)} and {len(features)}"
        )
