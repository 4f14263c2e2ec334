"""Normal entries of the stream on a CPU: eager, and one compiled loop for matrices that repay it.

Eager torch makes an entry with some twenty passes over int64 buffers. One loop that keeps a call's
words in registers is several times as fast, and `torch.compile` writes it where there is a C++
compiler. Both give the words of `dense.reference` exactly, and its entries within 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .words import Stream, box_muller, philox_words

# coordinates and columns of a compiled tile: its float32 entries fill a second-level cache
TILE = 256
# compiling takes a quarter of a minute once per machine, then seconds per process: about what eager
# torch needs for so many entries, and projections come in many batches
COMPILE_ENTRIES = 2**28

_MASK = 0xFFFFFFFF


def normal_pairs(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Box-Muller on words in the low 32 bits of int64, within 1e-6 also in float32.

    Args:
        a: int64, words of the radius.
        b: int64 of the same shape, words of the angle.
        dtype: float32 or float64.

    Returns:
        Two tensors of independent normals, in ``dtype``.
    """
    if dtype == torch.float64:
        return box_muller(a & _MASK, b & _MASK)
    # u = (a + 1) / 2**32 as a float32 and what that leaves out, which near 1 decides the logarithm
    signed = a.to(torch.int32)
    turn = (signed >> 31).float()
    part = signed.float().mul_(2.0**-32).add_(2.0**-32)
    u = part - turn
    rest = part.sub_(turn.add_(u)).div_(u)
    radius = u.log_().add_(rest).mul_(-2).sqrt_()
    # half a turn is a sign bit; the angle left, below a quarter turn, keeps more digits
    b = b.to(torch.int32)
    double = b << 1
    sign = b.bitwise_xor_(double).bitwise_and_(-(2**31))
    radius.view(torch.int32).bitwise_xor_(sign)
    angle = double.float().mul_(math.pi * 2.0**-32)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def normal_tile(columns: Tensor, index: Tensor, keys: Tensor) -> Tensor:
    """Every entry of some columns and coordinates, in the form that compiles to one loop.

    Args:
        columns: int64 ``[1, columns]``.
        index: int64 ``[coordinates, 1]``: a coordinate is four parameters, see `dense.reference`.
        keys: int64 ``[10, 2]``, the key of each round.

    Returns:
        ``[4, coordinates, columns]`` float32; the first axis is ``2 · (parameter bit 3) +
        (parameter bit 0)``.
    """
    x0, x1, x2 = columns, index & _MASK, index >> 32
    x3 = torch.full_like(x0, int(Stream.NORMAL))
    for number in range(10):
        k0, k1 = keys[number].unbind()
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            ((b >> 32) & _MASK) ^ x1 ^ k0,
            b & _MASK,
            ((a >> 32) & _MASK) ^ x3 ^ k1,
            a & _MASK,
        )
    pairs = (*normal_pairs(x0, x1, torch.float32), *normal_pairs(x2, x3, torch.float32))
    return torch.stack(pairs)


def round_keys(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys of the ten rounds of Philox-4x32, int64 ``[10, 2]``."""
    numbers = torch.arange(10, device=device)[:, None]
    start = torch.tensor([seed & _MASK, seed >> 32], device=device)
    step = torch.tensor([0x9E3779B9, 0xBB67AE85], device=device)
    return (start + numbers * step) & _MASK


@cache
def compiled_tile() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """`normal_tile` compiled for a CPU, or ``None`` where that fails or gives other entries.

    Call it with `TILE` columns and coordinates.
    """
    columns = (2**31 - 7 + torch.arange(TILE))[None, :]
    index = (2**40 - 5 + torch.arange(TILE))[:, None]
    seed = 2**62 + 2**33 + 12345
    words = philox_words(columns, index & _MASK, index >> 32, int(Stream.NORMAL), seed)
    expected = torch.stack([*box_muller(*words[:2]), *box_muller(*words[2:])])
    function = torch.compile(normal_tile, dynamic=False)
    try:
        with torch.no_grad():
            entries = function(columns, index, round_keys(seed))
    except Exception:
        # no C++ compiler, or one that cannot do it: whatever torch raises, eager torch is right
        return None
    error = (entries - expected).abs() / expected.abs().clamp(min=1)
    return function if bool((error <= 1e-6).all()) else None
