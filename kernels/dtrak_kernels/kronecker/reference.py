"""Plain definition of the two-sided sketch, the judge of `kronecker`.

One entry of the matrix at a time, with the Philox of `dense.reference`: for tests only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dense.reference import philox
from ..random.words import Stream


def _words(c0: Tensor, c1: int, c2: int, stream: Stream, seed: int) -> Tensor:
    """``[4, n]``: the four words at every c0."""
    counters = (c0, *(torch.full_like(c0, c) for c in (c1, c2, int(stream))))
    return torch.stack(list(philox(counters, seed)))


def _sign(word: Tensor, bit: int) -> Tensor:
    return 1.0 - 2.0 * (word // 2**bit % 2).double()


def _vector(size: int, offset: int, proj_dim: int, seed: int) -> list[tuple[int, float]]:
    """(position, sign) of every entry of a vector."""
    low, high = offset % 2**32, offset // 2**32
    whole = torch.tensor([2**32 - 1])
    base = int(_words(whole, low, high, Stream.SJLT_PLACE, seed)[1]) % proj_dim
    words = _words(torch.arange(math.ceil(size / 128)), low, high, Stream.SJLT_VECTOR, seed)
    return [
        (
            (base + entry) % proj_dim,
            float(_sign(words[entry % 128 // 32, entry // 128], entry % 32)),
        )
        for entry in range(size)
    ]


def _factor(extent: int, factor_dim: int, offset: int, side: int, seed: int) -> Tensor:
    if extent <= factor_dim:
        return torch.eye(extent, dtype=torch.float64)
    low, high = offset % 2**32, offset // 2**32
    rows = []
    for j in range(factor_dim):
        c2 = high + 2**20 * (2 * (j // 128) + side)
        words = _words(torch.arange(extent), low, c2, Stream.KRONECKER, seed)
        rows.append(_sign(words[j % 128 // 32], j % 32))
    return torch.stack(rows) / math.sqrt(factor_dim)


def kronecker_matrix(
    shapes: Sequence[Sequence[int]], proj_dim: int, factor_dim: int, seed: int
) -> Tensor:
    """The sketch of parameters of these shapes as ``[P, K]`` float64."""
    blocks, offset = [], 0
    for shape in shapes:
        size = math.prod(shape)
        if len(shape) < 2:
            thin = torch.eye(size, dtype=torch.float64)
        else:
            left = _factor(shape[0], factor_dim, offset, 0, seed)
            right = _factor(shape[1], factor_dim, offset, 1, seed)
            taps = torch.eye(math.prod(shape[2:]), dtype=torch.float64)
            # rows: parameters (o, i, tap); columns: thin entries (j, tap, l)
            thin = torch.einsum("jo,li,st->oisjtl", left, right, taps).reshape(size, -1)
        block = torch.zeros(size, proj_dim, dtype=torch.float64)
        for entry, (position, sign) in enumerate(_vector(thin.shape[1], offset, proj_dim, seed)):
            block[:, position] += sign * thin[:, entry]
        blocks.append(block)
        offset += size
    return torch.cat(blocks)
