"""Eager definitions of the dense projections. Slow, readable, and the sole judge of correctness.

Index convention, used in every docstring of this package:
    B  samples in the batch       P  parameters (grad_dim)
    K  proj_dim                   C  parameters in one chunk of a gradient

The stream specification
------------------------
Random words come from Philox-4x32-10 with the 64-bit seed as key, low word first. Each call is
addressed by four 32-bit counters and gives four 32-bit words. Below, ``x[i]`` is bit ``i`` of
``x``, ``x[i:j]`` the number made of bits ``i`` to ``j - 1``, and ``lo``/``hi`` are the low and high
words of a 64-bit number. Entry ``(p, k)`` of the unscaled matrix, for parameter ``p`` and column
``k``:

rademacher
    counters  (4·(8·(k >> 4) + k[0:3]) + p[1:3],  lo(p >> 8),  hi(p >> 8),  Stream.RADEMACHER)
    word      2·k[3] + p[3]
    bit       15 − p[4:8] + 16·p[0]
    A set bit is an IEEE sign bit: the entry is −1; a clear bit is +1.
normal
    counters  (k,  lo(q),  hi(q),  Stream.NORMAL)  with  q = 4·(p >> 4) + p[1:3]
    words     a, b = words 2·p[3] and 2·p[3] + 1
    entry     r·cos θ if p[0] is clear, r·sin θ if it is set, where
              r = √(−2 ln((a + 1) / 2³²))  and  θ = 2π·b / 2³²

One Rademacher call is therefore 2 columns (8 apart) of 64 parameters, one normal call 4 parameters
of one column: the register fragment of the 16x16 operand of NVIDIA's matrix instructions (mma and
wgmma), so a thread generates the entries it multiplies. Counters are coordinates, so nothing
repeats for P < 2**62 and K <= 2**30, and no entry depends on the batch, the tiling or the device.
The matrix that projects is this one times K**-0.5.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from ..random.words import Stream

Word = TypeVar("Word", Tensor, int)


def _wide_product(x: Word, constant: int) -> tuple[Word, Word]:
    """High and low words of a 32x32-bit product, from 16-bit halves so that no sum leaves int64."""
    x_high, x_low = x >> 16, x & 0xFFFF
    c_high, c_low = divmod(constant, 65536)
    low = x_low * c_low
    middle = x_high * c_low + (low >> 16)
    other = x_low * c_high + (middle & 0xFFFF)
    high = x_high * c_high + (middle >> 16) + (other >> 16)
    return high, ((other & 0xFFFF) << 16) + (low & 0xFFFF)


def philox(counters: tuple[Word, ...], seed: int) -> list[Word]:
    """Philox-4x32-10 in plain integers: four counters in, four words out, int64 tensors or ints.

    Written apart from `streams.philox_words`, so that a mistake in either shows.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    words = list(counters)
    key = [seed % 2**32, seed // 2**32]
    for number in range(10):
        round_key = [
            (key[0] + number * 0x9E3779B9) % 2**32,
            (key[1] + number * 0xBB67AE85) % 2**32,
        ]
        high_0, low_0 = _wide_product(words[0], 0xD2511F53)
        high_2, low_2 = _wide_product(words[2], 0xCD9E8D57)
        words = [
            high_2 ^ words[1] ^ round_key[0],
            low_2,
            high_0 ^ words[3] ^ round_key[1],
            low_0,
        ]
    return words


def _coordinates(grad_dim: int, proj_dim: int, offset: int) -> tuple[Tensor, Tensor]:
    return offset + torch.arange(grad_dim)[:, None], torch.arange(proj_dim)[None, :]


def rademacher_matrix(grad_dim: int, proj_dim: int, seed: int, *, offset: int = 0) -> Tensor:
    """Rows ``offset`` to ``offset + P`` of the unscaled Rademacher matrix.

    Args:
        grad_dim: ``P``, rows to make.
        proj_dim: ``K``.
        seed: key, in ``[0, 2**63)``.
        offset: parameter index of the first row.

    Returns:
        ``[P, K]`` int8 of ±1, on the CPU.
    """
    p, k = _coordinates(grad_dim, proj_dim, offset)
    block = p // 256
    counters = (
        4 * (8 * (k // 16) + k % 8) + p // 2 % 4,
        block % 2**32,
        block // 2**32,
        torch.tensor(int(Stream.RADEMACHER)),
    )
    words = torch.stack(philox(counters, seed))
    which = 2 * (k // 8 % 2) + p // 8 % 2
    word = words.gather(0, which.expand(grad_dim, proj_dim)[None])[0]
    bit = (word >> (15 - p // 16 % 16 + 16 * (p % 2))) & 1
    return (1 - 2 * bit).to(torch.int8)


def normal_matrix(grad_dim: int, proj_dim: int, seed: int, *, offset: int = 0) -> Tensor:
    """Rows ``offset`` to ``offset + P`` of the unscaled normal matrix, as `rademacher_matrix`.

    Returns:
        ``[P, K]`` float64 of N(0, 1), on the CPU. Kernels make them in float32, within 1e-6.
    """
    p, k = _coordinates(grad_dim, proj_dim, offset)
    quad = 4 * (p // 16) + p // 2 % 4
    counters = (k, quad % 2**32, quad // 2**32, torch.tensor(int(Stream.NORMAL)))
    words = philox(counters, seed)
    second = p // 8 % 2 == 1
    a = torch.where(second, words[2], words[0]).double()
    b = torch.where(second, words[3], words[1]).double()
    radius = (-2 * ((a + 1) / 2**32).log()).sqrt()
    angle = 2 * math.pi * (b / 2**32)
    return radius * torch.where(p % 2 == 0, angle.cos(), angle.sin())


def project(grads: Tensor, matrix: Tensor) -> Tensor:
    """See `dtrak_kernels.ops.project`: ``grads @ matrix * K**-0.5``.

    Args:
        grads: ``[B, P]``, any floating dtype.
        matrix: ``[P, K]`` unscaled.

    Returns:
        ``[B, K]`` in the dtype of ``grads``.
    """
    return grads @ matrix.to(grads) * matrix.shape[1] ** -0.5
