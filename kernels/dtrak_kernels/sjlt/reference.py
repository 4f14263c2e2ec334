"""Plain definition of the tile-chained sparse sketch, the judge of `sjlt` and of any fused kernel.

Walks the chain of `sjlt`'s specification literally, one accumulator entry at a time, with the
Philox of `dense.reference`. Quadratic in patience: for tests only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dense.reference import philox
from ..random.words import Stream


def _call(c0: int, offset: int, stream: Stream, seed: int) -> list[int]:
    counters = (c0, offset % 2**32, offset // 2**32, int(stream))
    return philox(counters, seed)


def _power_of_two(extent: int) -> int:
    size = 16
    while size < min(extent, 128):
        size *= 2
    return size


def _parameter_index(shape: Sequence[int], row: int, column: int) -> int:
    """Position in the row-major parameter of matrix entry (row, column), columns channels last."""
    channels = shape[1]
    tap, channel = divmod(column, channels)
    taps = math.prod(shape[2:])
    return (row * channels + channel) * taps + tap


def _flip(i: int, j: int, tile: int, offset: int, seed: int, cache: dict[int, list[int]]) -> bool:
    row_code = (i % 8) + 8 * (i // 16 % 4)
    call = tile * 128 + row_code * 4 + j // 2 % 4
    if call not in cache:
        cache[call] = _call(call, offset, Stream.SJLT_FLIP, seed)
    word = cache[call][i // 8 % 2 + 2 * (i // 64 % 2)]
    return word // 2 ** (31 - (2 * (j // 8 % 16) + j % 2)) % 2 == 1


def _matrix_entries(
    shape: Sequence[int], offset: int, proj_dim: int, seed: int
) -> list[tuple[int, int, int]]:
    rows, columns = shape[0], math.prod(shape[1:])
    tile_rows, tile_columns = _power_of_two(rows), _power_of_two(columns)
    while tile_rows * tile_columns > proj_dim:
        if tile_columns < tile_rows:
            tile_rows //= 2
        else:
            tile_columns //= 2
    size = tile_rows * tile_columns
    num_blocks = math.ceil(proj_dim / size)
    down, across = math.ceil(rows / tile_rows), math.ceil(columns / tile_columns)
    first, base_word, _, _ = _call(2**32 - 1, offset, Stream.SJLT_PLACE, seed)
    base = 4 * (base_word % math.ceil(proj_dim / 4)) % proj_dim
    words = [_call(tile, offset, Stream.SJLT_PLACE, seed) for tile in range(down * across)]
    ranked = sorted(range(down * across), key=lambda tile: (words[tile][2], words[tile][3], tile))
    block_of = {tile: (rank + first) % num_blocks for rank, tile in enumerate(ranked)}
    entries = []
    cache: dict[int, list[int]] = {}
    for block in range(num_blocks):
        # (parameter index, accumulator row, accumulator column) -> sign
        accumulator: dict[tuple[int, int, int], int] = {}
        for tile in range(down * across):
            if block_of[tile] != block:
                continue
            shift = words[tile][0] % tile_rows, words[tile][1] % tile_columns
            top, left = tile // across * tile_rows, tile % across * tile_columns
            for row in range(top, min(top + tile_rows, rows)):
                for column in range(left, min(left + tile_columns, columns)):
                    i = (row - top + shift[0]) % tile_rows
                    j = (column - left + shift[1]) % tile_columns
                    accumulator[offset + _parameter_index(shape, row, column), i, j] = 1
            for key in accumulator:
                if _flip(key[1], key[2], tile, offset, seed, cache):
                    accumulator[key] *= -1
        for (parameter, i, j), sign in accumulator.items():
            position = (base + block * size + i * tile_columns + j) % proj_dim
            entries.append((parameter, position, sign))
    return entries


def _vector_entries(size: int, offset: int, proj_dim: int, seed: int) -> list[tuple[int, int, int]]:
    base = _call(2**32 - 1, offset, Stream.SJLT_PLACE, seed)[1] % proj_dim
    entries = []
    for entry in range(size):
        word = _call(entry // 128, offset, Stream.SJLT_VECTOR, seed)[entry % 128 // 32]
        sign = -1 if word // 2 ** (entry % 32) % 2 else 1
        entries.append((offset + entry, (base + entry) % proj_dim, sign))
    return entries


def sjlt_matrix(shapes: Sequence[Sequence[int]], proj_dim: int, seed: int) -> Tensor:
    """The sketch of parameters of these shapes as ``[P, K]`` float64, one ±1 per row."""
    matrix = torch.zeros(sum(math.prod(shape) for shape in shapes), proj_dim, dtype=torch.float64)
    offset = 0
    for shape in shapes:
        size = math.prod(shape)
        if len(shape) >= 2:
            entries = _matrix_entries(shape, offset, proj_dim, seed)
        else:
            entries = _vector_entries(size, offset, proj_dim, seed)
        for parameter, position, sign in entries:
            matrix[parameter, position] += sign
        offset += size
    return matrix
