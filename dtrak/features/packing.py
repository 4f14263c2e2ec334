"""Features in fewer bytes: what a store keeps of rows ``[B, K]``, and what it reads back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runs.choices import BFLOAT16, FLOAT32, INT8

# entries of a row that share a scale
GROUP = 128


def pack(features: Tensor, dtype: str) -> dict[str, Tensor]:
    """Rows as they are kept.

    Each entry of ``int8`` is a whole number of 127ths of the largest of its 128, to the nearest.

    Args:
        features: ``[B, K]`` floating, finite.
        dtype: ``"float32"`` keeps them as they are, ``"bfloat16"``, or ``"int8"``.

    Returns:
        Tensors by name: ``features [B, K]``, and ``scales [B, K / 128]`` float32 of ``"int8"``.
    """
    if dtype == FLOAT32:
        return {"features": features}
    if dtype == BFLOAT16:
        return {"features": features.to(torch.bfloat16)}
    assert dtype == INT8
    K = features.shape[1]
    groups = pad(features.float(), (0, -K % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(dim=2) / 127
    steps = torch.where(scales > 0, scales, 1.0)[:, :, None]
    whole = (groups / steps).round().clamp(-127, 127).to(torch.int8)
    return {"features": whole.flatten(1)[:, :K].contiguous(), "scales": scales}


def unpack(kept: dict[str, Tensor]) -> Tensor:
    """Rows ``[B, K]`` of what `pack` gave: float32, or double precision that was kept as it is."""
    features, scales = kept["features"], kept.get("scales")
    if scales is not None:
        K = features.shape[1]
        return features * scales.repeat_interleave(GROUP, dim=1)[:, :K]
    return features if features.dtype == torch.float64 else features.float()


def packed_bytes(num_features: int, dtype: str) -> int:
    """Bytes that a row takes on disk."""
    scales = 4 * -(-num_features // GROUP)
    each = {FLOAT32: 4 * num_features, BFLOAT16: 2 * num_features, INT8: num_features + scales}
    return each[dtype]
