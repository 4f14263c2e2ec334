"""Gram accumulation, one-pass Gram-vector products, and conjugate gradients on them.

    features [N, K]  ->  gram = ΦᵀΦ [K, K]           a sum over rows, block by block
    features [N, K], vectors V [K, M]  ->  Φᵀ(ΦV) + λV [K, M]     the Gram never formed

Index legend: N training rows, K features, M vectors, R rank of a preconditioner. The factorisations
that follow are the library's; see `solver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# panel of the lower triangle: wide enough for the library to run at speed, narrow enough that the
# wasted half of a diagonal panel stays small
_PANEL = 512
# bytes of one block of rows in the vectors' dtype, small enough to be in cache the second time
_BLOCK_BYTES = 8 * 2**20

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Product = Callable[[Tensor], Tensor]


class NotConvergedError(ValueError):
    """Conjugate gradients stopped before the tolerance; the message says the residual."""


def accumulate_gram(features: Tensor, out: Tensor) -> Tensor:
    r"""Add the lower triangle of ``ΦᵀΦ`` for one block of rows to ``out``: half a GEMM's work.

    A sum over rows, not a mean. Products and sums are taken in ``out``'s dtype, so a float64
    ``out`` holds the Gram of float32 features to float64 rounding. What lies above the diagonal is
    unspecified; call :func:`mirror_lower` once, after the last block.

    Args:
        features: ``[B, K]`` floating, one block of rows.
        out: ``[K, K]`` float32 or float64 on the same device, added to in place.

    Returns:
        ``out``.

    Raises:
        ValueError: ``features`` is not ``[B, K]``, or ``out`` is not ``[K, K]``.
        TypeError: ``out`` is neither float32 nor float64.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be [B, K], got shape {tuple(features.shape)}")
    K = features.shape[1]
    if out.shape != (K, K):
        raise ValueError(f"out must be [{K}, {K}], got {list(out.shape)}")
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64, got {out.dtype}")
    block = features.to(out.dtype)
    for start in range(0, K, _PANEL):
        stop = min(start + _PANEL, K)
        out[start:stop, :stop].addmm_(block[:, start:stop].T, block[:, :stop])
    return out


def mirror_lower(gram: Tensor) -> Tensor:
    """Copy the lower triangle of ``gram [K, K]`` over the upper one, in place."""
    K = gram.shape[0]
    for start in range(0, K, _PANEL):
        stop = min(start + _PANEL, K)
        diagonal = gram[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        gram[:start, start:stop] = gram[start:stop, :start].T
    return gram


def gram_product(
    features: Any, vectors: Tensor, damping: float, *, implementation: str | None = None
) -> Tensor:
    r"""The Gram times vectors, the Gram never formed: each feature row is read once.

    .. math:: \Phi^\top (\Phi V) + \lambda V

    ``"torch"`` takes rows a block at a time, in ``vectors``' dtype; ``"triton"`` is one kernel with
    float32 arithmetic and no atomics. Equal inputs give equal bits under either. Neither has a
    gradient formula.

    Args:
        features: ``[N, K]`` floating tensor, or a store with ``.shape`` and ``store[i:j]``
            (``"torch"`` only).
        vectors: ``[K, M]`` float32 or float64 on the features' device.
        damping: λ >= 0 in units of ``gram``.
        implementation: ``"torch"``, ``"triton"``, or ``None``: the kernel for a CUDA tensor with
            float32 vectors, torch for anything else. An explicit choice never falls back.

    Returns:
        ``[K, M]`` in ``vectors``' dtype.

    Raises:
        ValueError: ``vectors`` is not ``[K, M]``, damping is negative or not finite,
            ``implementation`` is unknown.
        TypeError: ``vectors`` is neither float32 nor float64, or ``"triton"`` is asked for
            something other than float32 vectors and a float32, float16 or bfloat16 tensor.
    """
    N, K = (int(size) for size in features.shape)
    if vectors.ndim != 2 or vectors.shape[0] != K:
        raise ValueError(f"vectors must be [{K}, M], got shape {tuple(vectors.shape)}")
    if vectors.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"vectors must be float32 or float64, got {vectors.dtype}")
    if not (math.isfinite(damping) and damping >= 0.0):
        raise ValueError(f"damping must be finite and at least 0, got {damping}")
    if implementation not in (None, "torch", "triton"):
        raise ValueError(
            f"implementation must be 'torch', 'triton' or None, got {implementation!r}"
        )
    fits = (
        isinstance(features, Tensor)
        and features.dtype in _KERNEL_DTYPES
        and vectors.dtype == torch.float32
    )
    if implementation is None:
        implementation = "triton" if fits and features.is_cuda else "torch"
    if implementation == "triton":
        if not fits:
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(
                "implementation 'triton' must have float32 vectors and a float32, float16 or "
                f"bfloat16 tensor of features, got {vectors.dtype} and {kind}"
            )
        from .gram_triton import launch_gram_product

        rows = features if features.stride(1) == 1 else features.contiguous()
        return launch_gram_product(rows, vectors, damping)
    out = vectors * damping
    size = max(1, _BLOCK_BYTES // (vectors.element_size() * K))
    for start in range(0, N, size):
        block = torch.as_tensor(features[start : start + size]).to(vectors.dtype)
        out.addmm_(block.T, block @ vectors)
    return out


def nystrom_preconditioner(
    features: Any,
    damping: float,
    *,
    rank: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    combine: Product | None = None,
) -> Product:
    """An approximate inverse of ``ΦᵀΦ + λI`` from one pass over the features, in float64.

    Deflates the R largest eigenvalues, which a random sketch of R vectors finds; where the spectrum
    of gradient features decays, what is left needs few iterations.

    Args:
        features: ``[N, K]`` tensor or store.
        damping: λ > 0 in units of ``gram``.
        rank: R, from 1 to K.
        seed: of the sketch.
        device: of the features.
        combine: sums what processes make of the rows that each of them has; None for all rows.

    Returns:
        A function of ``[K, M]`` float64 vectors, symmetric positive definite.

    Raises:
        ValueError: ``rank`` is out of range.

    Source:
        Frangella, Tropp and Udell 2021, "Randomized Nyström preconditioning" (arXiv:2110.02820).
    """
    K = int(features.shape[1])
    if not 1 <= rank <= K:
        raise ValueError(f"rank must be from 1 to {K}, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(K, rank, generator=generator, dtype=torch.float64)
    sketch = torch.linalg.qr(sketch).Q.to(device)
    image = gram_product(features, sketch, 0.0)
    image = image if combine is None else combine(image)
    # the shift keeps the small factorisation positive definite under rounding
    shift = max(torch.finfo(torch.float64).eps * float(torch.linalg.norm(image)), 1e-300)
    image = image + shift * sketch
    core, info = torch.linalg.cholesky_ex(sketch.T @ image)
    if int(info) != 0:
        # a numerically zero sketch: nothing to deflate
        return lambda vectors: vectors
    half = torch.linalg.solve_triangular(core, image.T, upper=False).T
    basis, sigma, _ = torch.linalg.svd(half, full_matrices=False)
    eigenvalues = (sigma**2 - shift).clamp(min=0.0)
    weight = (eigenvalues[-1] + damping) / (eigenvalues + damping) - 1.0

    def apply(vectors: Tensor) -> Tensor:
        return vectors + basis @ (weight[:, None] * (basis.T @ vectors))

    return apply


def conjugate_gradient(
    product: Product,
    right: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    preconditioner: Product | None = None,
) -> Tensor:
    """Solve ``A X = right`` for a symmetric positive definite A known by its products.

    All columns share each product; each has its own step lengths and stops moving once converged.

    Args:
        product: ``[K, M] -> [K, M]``, A times vectors.
        right: ``[K, M]`` float32 or float64.
        tolerance: on the relative residual ‖b − Ax‖ / ‖b‖ of every column, above 0. It is checked
            against the residual recomputed from the solution, not only the recurrence.
        max_iterations: at least 1.
        preconditioner: ``[K, M] -> [K, M]``, an approximate inverse of A.

    Returns:
        ``[K, M]``, dtype of ``right``.

    Raises:
        ValueError: ``tolerance`` or ``max_iterations`` is out of range.
        NotConvergedError: some column is above the tolerance; the message says the residual.

    Source:
        Hestenes and Stiefel 1952, the preconditioned form.
    """
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    scale = torch.linalg.norm(right, dim=0)
    # a zero right-hand side has the zero solution
    safe = torch.where(scale > 0, scale, 1.0)
    right = right / safe
    x = torch.zeros_like(right)
    residual = right.clone()
    worst = 1.0 if bool((scale > 0).any()) else 0.0
    used = 0
    while worst > tolerance and used < max_iterations:
        before = worst
        # a restart from the true residual: the recurrence drifts from it by rounding
        used += _descend(
            product, residual, x, 0.5 * tolerance, max_iterations - used, preconditioner
        )
        residual = right - product(x)
        worst = float(torch.linalg.norm(residual, dim=0).max())
        if not worst < 0.5 * before:
            break
    if not worst <= tolerance:
        raise NotConvergedError(
            f"conjugate gradients must reach a relative residual of {tolerance:g}, "
            f"got {worst:.3e} after {used} iterations"
        )
    return x * torch.where(scale > 0, scale, 0.0)


def _descend(
    product: Product,
    residual: Tensor,
    x: Tensor,
    target: float,
    max_iterations: int,
    preconditioner: Product | None,
) -> int:
    """Move ``x`` in place until the recurrence says ``target``; the iterations used."""
    precondition = preconditioner if preconditioner is not None else (lambda vectors: vectors)
    r = residual.clone()
    z = precondition(r)
    p = z.clone()
    rz = (r * z).sum(dim=0)
    for iteration in range(max_iterations):
        active = torch.linalg.norm(r, dim=0) > target
        if not bool(active.any()):
            return iteration
        q = product(p)
        curvature = (p * q).sum(dim=0)
        active &= (curvature > 0) & (rz > 0)
        if not bool(active.any()):
            return iteration + 1
        alpha = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        x += alpha * p
        r -= alpha * q
        z = precondition(r)
        new = (r * z).sum(dim=0)
        p = z + torch.where(active, new / torch.where(active, rz, 1.0), 0.0) * p
        rz = new
    return max_iterations
