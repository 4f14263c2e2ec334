"""Counter-based random words in eager torch: the bits every implementation must reproduce.

Philox-4x32-10: 128 bits per call, a pure function of a 64-bit key (the seed) and four 32-bit
counters. Counters are *coordinates* (which column, which block of parameters), never a flattened
index that wraps. The last counter is a `Stream`, so that two uses of one seed share no bits.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """The fourth Philox counter: what the words are used for."""

    RADEMACHER = 0
    NORMAL = 1
    SJLT_FLIP = 2
    SJLT_PLACE = 3
    SJLT_VECTOR = 4
    NOISE = 5
    KRONECKER = 6


def philox_words(
    c0: Tensor | int,
    c1: Tensor | int,
    c2: Tensor | int,
    c3: Tensor | int,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four Philox-4x32-10 words for every (broadcast) counter.

    Args:
        c0: first counter, int64 tensor or int in ``[0, 2**32)``; likewise ``c1``, ``c2``, ``c3``.
        c1: second counter.
        c2: third counter.
        c3: fourth counter, by convention a `Stream`.
        seed: key, in ``[0, 2**63)``; its low word is the first key word.
        device: where to compute when every counter is an int.

    Returns:
        Four int64 tensors of the broadcast shape with values in ``[0, 2**32)``.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123),
        Philox-4x32-10.
    """
    device = next((c.device for c in (c0, c1, c2, c3) if isinstance(c, Tensor)), device)
    # ints stay ints as long as they meet no tensor: a word of a parameter costs no calls of torch
    x0, x1, x2, x3 = (c.to(torch.int64) if isinstance(c, Tensor) else c for c in (c0, c1, c2, c3))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # an int64 product wraps modulo 2**64, which keeps both halves right
        a, b = x0 * _ROUND_A, x2 * _ROUND_B
        x0, x1, x2, x3 = (
            ((b >> 32) & _MASK) ^ x1 ^ k0,
            b & _MASK,
            ((a >> 32) & _MASK) ^ x3 ^ k1,
            a & _MASK,
        )
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    words = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (x0, x1, x2, x3))
    return tuple(torch.broadcast_tensors(*words))


def box_muller(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float64 standard normals from two uniform 32-bit words.

    The radius uses ``(word_a + 1) / 2**32`` in (0, 1], so it is finite (at most 6.66).

    Source:
        Box and Muller 1958.
    """
    radius = (-2.0 * ((word_a.double() + 1.0) * 2.0**-32).log()).sqrt()
    angle = word_b.double() * (2.0 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()
