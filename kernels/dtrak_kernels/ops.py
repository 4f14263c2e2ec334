"""What is accepted: the public operations, validated; the device chooses the implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kronecker.torch import project_kronecker
from .projection import SKETCH_KINDS, Projection
from .sjlt.torch import project_sjlt

IMPLEMENTATIONS = ("torch", "triton")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# column coordinates of the stream: see the specification in `dense.reference`
_MAX_PROJ_DIM = 2**30


def project(
    grads: Tensor,
    projection: Projection,
    *,
    shapes: Sequence[Sequence[int]] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Random projection of per-sample gradients, the matrix never stored.

    .. math:: \Phi_{bk} = \sum_p G_{bp} R_{pk}, \qquad E[R R^T] = I

    No autograd formula: features are first-order quantities and nobody differentiates a score.

    Args:
        grads: ``[B, P]`` float32, float16, bfloat16 or float64, last dimension contiguous. Inputs
            are not rounded: float32 gradients keep float32 accuracy on every implementation.
        projection: the random matrix.
        shapes: shapes of the parameters whose flattened gradients make up a row, in order. Required
            by kinds ``"sjlt"`` and ``"kronecker"``, which sketch parameter by parameter; ignored by
            the others.
        scale: factor on the entries (±1 or N(0, 1)) of a dense kind, ``K**-0.5`` if ``None``.
            TRAK's own projectors have 1.
        implementation: ``"torch"``, ``"triton"``, or ``None`` for Triton on a GPU and torch
            elsewhere. ``"triton"`` never falls back. Both give the same features to rounding.
            Generator ``"fast_jl"`` runs in torch on every device.

    Returns:
        ``[B, K]`` features, float32 (float64 for float64 ``grads``, which only torch takes). A
        sample whose gradient is zero or not finite gives such features: see `check_features`.

    Raises:
        TypeError: ``grads`` is not floating, or is float64 and ``implementation`` is ``"triton"``.
        ValueError: ``grads`` is not ``[B, P]`` with contiguous rows, ``shapes`` is missing or does
            not add up to P, ``scale`` is given for a kind that has none, or ``implementation`` is
            unknown or cannot run on the device.

    Source:
        TRAK, Park et al. 2023 (arXiv:2303.14186), section 3; ±1 entries after Achlioptas 2003.
    """
    _check_grads(grads)
    B, P = grads.shape
    K = projection.num_features(P)
    out = grads.new_zeros(B, K, dtype=_feature_dtype(grads))
    if projection.kind not in SKETCH_KINDS:
        return project_(
            grads, projection, out=out, grad_dim=P, scale=scale, implementation=implementation
        )
    if scale is not None:
        raise ValueError(f"scale must be None for kind {projection.kind!r}, got {scale}")
    if shapes is None:
        raise ValueError(f"shapes must be given for kind {projection.kind!r}, got None")
    if sum(math.prod(shape) for shape in shapes) != P:
        raise ValueError(f"shapes must add up to P = {P}, got {[tuple(s) for s in shapes]}")
    check_sketch_implementation(implementation, projection.kind)
    if projection.kind == "sjlt":
        return project_sjlt(grads, projection.proj_dim, projection.seed, shapes, out)
    assert projection.factor_dim is not None
    return project_kronecker(
        grads, projection.proj_dim, projection.factor_dim, projection.seed, shapes, out
    )


def project_(
    grads: Tensor,
    projection: Projection,
    *,
    offset: int = 0,
    out: Tensor,
    grad_dim: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Add the features of some columns of the gradients: ``out += grads @ R[offset : offset + C]``.

    Calls over consecutive columns add up to `project` of the whole gradient, so a large gradient
    can pass through a small workspace. In place on ``out``; the same calls give the same bits.

    Args:
        grads: ``[B, C]``, columns ``offset`` to ``offset + C`` of the gradients; dtypes as
            `project`.
        projection: of any kind but ``"sjlt"`` and ``"kronecker"``, which need whole parameters.
        offset: parameter index of the first column.
        out: ``[B, K]`` features, last dimension contiguous; float64 if ``grads`` is, else float32.
            ``[B, P]`` for kind ``"none"``, which adds to the columns themselves.
        grad_dim: ``P``; if given, ``offset + C`` must not exceed it. Required by generator
            ``"fast_jl"``, whose matrix depends on it.
        scale: see `project`.
        implementation: see `project`.

    Returns:
        ``out``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, a stride, ``offset``, ``grad_dim``, the kind, ``scale`` or
            ``implementation`` is not as above, or the tensors are on different devices.
    """
    _check_grads(grads)
    (B, C), K = grads.shape, projection.proj_dim
    if projection.kind in SKETCH_KINDS:
        raise ValueError(
            f"kind must be 'rademacher', 'normal' or 'none' for project_, got {projection.kind!r}"
        )
    if K > _MAX_PROJ_DIM:
        raise ValueError(f"proj_dim must be at most 2**30, got {K}")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    if projection.kind == "none" and grad_dim is None and out.ndim == 2:
        grad_dim = out.shape[1]
    if grad_dim is not None and offset + C > grad_dim:
        raise ValueError(
            f"offset + C must be at most grad_dim = {grad_dim}, got {offset} + {C} = {offset + C}"
        )
    if out.dtype != _feature_dtype(grads):
        raise TypeError(f"out must be {_feature_dtype(grads)}, got {out.dtype}")
    shape = (B, projection.num_features(grad_dim if grad_dim is not None else C))
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(
            f"out must be contiguous in its last dimension, got strides {out.stride()}"
        )
    if out.device != grads.device:
        raise ValueError(f"out must be on the device of grads, {grads.device}, got {out.device}")
    if projection.kind == "none" and scale is not None:
        raise ValueError(f"scale must be None for kind 'none', got {scale}")
    if projection.generator == "fast_jl":
        check_torch_only(implementation, "generator 'fast_jl'")
        if grad_dim is None:
            raise ValueError("grad_dim must be given for generator 'fast_jl', got None")
    implementation = choose_implementation(grads, implementation)
    if projection.kind == "none":
        out[:, offset : offset + C] += grads
        return out
    factor = K**-0.5 if scale is None else float(scale)
    if projection.generator == "fast_jl":
        _project_fast_jl_(
            grads,
            out,
            projection.kind == "normal",
            projection.seed,
            projection.num_sms,
            offset,
            grad_dim,
            projection.half_inputs,
            factor,
        )
    else:
        _project_(grads, out, projection.kind, K, projection.seed, offset, factor, implementation)
    return out


def check_features(features: Tensor, name: str = "features") -> Tensor:
    """Refuse a batch with a sample whose features are all zero or not finite.

    A gradient that is zero, NaN or infinite means the model output is broken for that sample (dead
    activations, an overflow in half precision, a detached graph), and its scores mean nothing.
    TRAK's CUDA projector returns zeros without a word when its launch fails, which has cost users
    whole runs.

    Args:
        features: ``[B, K]``.
        name: what to call them in the error.

    Returns:
        ``features``.

    Raises:
        ValueError: naming the first row that is not finite or all zero.

    Source:
        The silent zeros: github.com/MadryLab/trak issues 24 and 81.
    """
    finite = features.isfinite().all(dim=1)
    bad = (~(finite & (features != 0).any(dim=1))).nonzero()
    if len(bad):
        row = int(bad[0])
        what = "all zero" if finite[row] else "not finite"
        raise ValueError(
            f"{name} must be finite and not all zero in every row, got row {row} {what} "
            f"({len(bad)} of {len(features)} rows are bad)"
        )
    return features


def check_torch_only(implementation: str | None, what: str) -> None:
    """Some maps run in torch on every device.

    Args:
        implementation: what was asked for.
        what: the map, for the error.

    Raises:
        ValueError: ``implementation`` is something else.
    """
    if implementation not in (None, "torch"):
        raise ValueError(
            f"implementation must be 'torch' or None for {what}, got {implementation!r}"
        )


def check_sketch_implementation(implementation: str | None, kind: str) -> None:
    """Dense gradients are sketched in torch: the Triton kernel of ``"sjlt"`` never forms any.

    `GradientSketcher` launches it inside the backward. See `check_torch_only` for what is raised.
    """
    check_torch_only(implementation, f"kind {kind!r}")


def _feature_dtype(grads: Tensor) -> torch.dtype:
    return torch.float64 if grads.dtype == torch.float64 else torch.float32


def _check_grads(grads: Tensor) -> None:
    if grads.dtype not in _DTYPES:
        raise TypeError(f"grads must be float32, float16, bfloat16 or float64, got {grads.dtype}")
    if grads.ndim != 2:
        raise ValueError(f"grads must be [B, P], got shape {tuple(grads.shape)}")
    if grads.shape[1] > 1 and grads.stride(1) != 1:
        raise ValueError(
            f"grads must be contiguous in the last dimension, got strides {grads.stride()}"
        )


def choose_implementation(grads: Tensor, implementation: str | None) -> str:
    """The implementation for a tensor, or why it cannot be the one asked for."""
    if implementation is None:
        on_gpu = grads.device.type == "cuda" and grads.dtype != torch.float64
        return "triton" if on_gpu else "torch"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be 'torch' or 'triton', got {implementation!r}")
    if implementation == "triton":
        if grads.dtype == torch.float64:
            raise TypeError("grads must be float32, float16 or bfloat16 for triton, got float64")
        if grads.device.type != "cuda":
            from .dense.triton import IS_INTERPRETED

            if not IS_INTERPRETED:
                raise ValueError(
                    "implementation 'triton' must have grads on a GPU (or TRITON_INTERPRET=1), "
                    f"got device {grads.device}"
                )
    return implementation


@torch.library.custom_op("dtrak_kernels::project_", mutates_args={"out"})
def _project_(
    grads: Tensor,
    out: Tensor,
    kind: str,
    proj_dim: int,
    seed: int,
    offset: int,
    scale: float,
    implementation: str,
) -> None:
    projection = Projection(kind, proj_dim, seed)
    if implementation == "triton":
        from .dense.triton import launch_project

        launch_project(grads, projection, offset, out, scale=scale)
    else:
        from .dense.torch import project_dense_

        project_dense_(grads, projection, offset, out, scale)


@_project_.register_fake
def _(
    grads: Tensor,
    out: Tensor,
    kind: str,
    proj_dim: int,
    seed: int,
    offset: int,
    scale: float,
    implementation: str,
) -> None:
    return None


@torch.library.custom_op("dtrak_kernels::project_fast_jl_", mutates_args={"out"})
def _project_fast_jl_(
    grads: Tensor,
    out: Tensor,
    is_normal: bool,
    seed: int,
    num_sms: int,
    offset: int,
    grad_dim: int,
    half_inputs: bool,
    scale: float,
) -> None:
    from .fast_jl.torch import project_fast_jl_

    project_fast_jl_(grads, out, is_normal, seed, num_sms, offset, grad_dim, half_inputs, scale)


@_project_fast_jl_.register_fake
def _(
    grads: Tensor,
    out: Tensor,
    is_normal: bool,
    seed: int,
    num_sms: int,
    offset: int,
    grad_dim: int,
    half_inputs: bool,
    scale: float,
) -> None:
    return None
