"""Plain definition of TRAK's CUDA projection matrix, the judge of `fast_jl.torch`.

One stream after another, in Python's integers, entries placed as fast_jl's threads place them. For
small matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def stream(seed: int) -> Iterator[int]:
    """Words of cuRAND's XORWOW after ``curand_init(seed, 0, 0)``, for a seed of 32 bits.

    Source:
        ``_curand_init_scratch`` and ``curand`` of cuRAND 10's ``curand_kernel.h``.
    """
    s0, s1 = seed % 2**32 ^ 0xAAD26B49, 0xF7DCEFDD
    t0, t1 = 1099087573 * s0 % 2**32, 2591861531 * s1 % 2**32
    v = [123456789 + t0, 362436069 ^ t0, 521288629 + t1, 88675123 ^ t1, 5783321 + t0]
    v = [word % 2**32 for word in v]
    d = (6615241 + t1 + t0) % 2**32
    while True:
        t = v[0] ^ v[0] // 4
        v = [*v[1:], (v[4] ^ v[4] * 16 ^ t ^ t * 2) % 2**32]
        d = (d + 362437) % 2**32
        yield (v[4] + d) % 2**32


def normals(words: Iterator[int]) -> Iterator[float]:
    """``curand_normal``: the sine, then the cosine, of each Box-Muller pair.

    cuRAND rounds the uniform number to float32, which decides the largest entries; the rest is
    float64 here.
    """
    while True:
        u = torch.tensor(float(next(words)), dtype=torch.float32) * 2.0**-32 + 2.0**-33
        angle = 2 * math.pi * (next(words) + 0.5) / 2**32
        radius = math.sqrt(-2 * math.log(u.item()))
        yield radius * math.sin(angle)
        yield radius * math.cos(angle)


def matrix(kind: str, grad_dim: int, proj_dim: int, seed: int, num_sms: int) -> Tensor:
    """The unscaled matrix.

    Args:
        kind: ``"rademacher"`` or ``"normal"``.
        grad_dim: ``P``.
        proj_dim: ``K``, a multiple of 32.
        seed: in ``[0, 2**32)``.
        num_sms: multiprocessors of the card.

    Returns:
        ``[P, K]`` float64, on the CPU.

    Source:
        fast_jl 0.1.3; compared with cuRAND's own code in ``tests/fixtures``.
    """
    tiles = min(grad_dim, num_sms)
    tile_size = (grad_dim - 1) // tiles + 1
    steps = math.ceil(tile_size / 16)
    result = torch.full((grad_dim, proj_dim), float("nan"), dtype=torch.float64)
    for tile in range(tiles):
        rows = result[tile * tile_size : (tile + 1) * tile_size]
        for column in range(proj_dim):
            words = stream(seed + 658105236 * column + 359124577 * tile)
            draws = normals(words)
            group, lane = divmod(column, 32)
            for step in range(steps):
                if kind == "rademacher":
                    word = next(words)
                    values = [2.0 * (word >> bit & 1) - 1 for bit in range(16)]
                else:
                    values = [next(draws) for _ in range(16)]
                for draw, value in enumerate(values):
                    row, place = divmod(2 * lane + draw % 2 + 64 * (draw // 2), 32)
                    if 16 * step + row < len(rows):
                        rows[16 * step + row, 32 * group + place] = value
    return result
