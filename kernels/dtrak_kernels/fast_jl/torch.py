"""TRAK's CUDA projector on any device: cuRAND's XORWOW under fast_jl's layout, in eager torch.

    grads [B, C]  x  R[offset : offset + C] (regenerated step by step)  ->  added to out [B, K]

The parameters are cut into as many tiles as the imitated card has multiprocessors, and every column
of every tile is a stream of its own, so the streams of many tiles and columns step side by side. A
step of one lane covers 16 parameters of its tile in two columns. Indices of the layout:

    tile   f = p // tile_size,  tile_size = (P - 1) // num_sms + 1
    step   s = (p - f·tile_size) // 16, and r is the parameter's row within its step
    lane   l = (k % 32) // 2 + 16·(r % 2), of the group of 32 columns k belongs to
    draw   i = 2·(r // 2) + k % 2 of the lane's sixteen in step s

Rademacher takes one word per step, whose bit ``i`` says +1; normal takes sixteen words, two per
Box-Muller pair, whose sine is the even draw. A stream is sequential, so a call that begins in the
middle of a tile jumps there: a step is linear over the bits of the state, and its powers are
matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense.torch import byte_sums
from ..projection import FAST_JL_GROUP

# parameters of one step
STEP = 16

_MASK = 0xFFFFFFFF
_WEYL = 362437
_BITS = 160
# streams that step side by side, and sums looked up at once
_STREAMS = 32768
_TABLE_BYTES = 2**20
_MAX_ROWS = 32


class Xorwow:
    """cuRAND's XORWOW streams, one per seed, stepped together in int32.

    Args:
        seeds: int64 of any shape, in ``[0, 2**32)``: ``curand_init(seed, 0, 0)`` of each.

    Source:
        Marsaglia 2003, "Xorshift RNGs", section 3.1; the seeding is that of ``curand_kernel.h``.
    """

    def __init__(self, seeds: Tensor) -> None:
        low = (seeds ^ 0xAAD26B49) * 1099087573 & _MASK
        # the scrambled high half of a 32-bit seed, 0xF7DCEFDD, times 2591861531
        high = 0xF7DCEFDD * 2591861531 & _MASK
        words = [
            123456789 + low,
            362436069 ^ low,
            521288629 + high + torch.zeros_like(low),
            88675123 ^ high + torch.zeros_like(low),
            5783321 + low,
        ]
        self._state = [_int32(word) for word in words]
        self._counter = _int32(6615241 + low + high)
        self._buffers = [torch.empty_like(self._counter) for _ in range(2)]
        self.shape = seeds.shape

    def __call__(self) -> Tensor:
        """The next word of every stream, int32; the next call overwrites it."""
        (first, *middle, last), (t, word) = self._state, self._buffers
        # the shift of a signed word drags its sign in
        torch.bitwise_right_shift(first, 2, out=t).bitwise_and_(0x3FFFFFFF)
        first ^= t
        torch.bitwise_left_shift(first, 1, out=t)
        first ^= t
        torch.bitwise_left_shift(last, 4, out=t)
        first ^= t
        first ^= last
        self._state = [*middle, last, first]
        self._counter += _WEYL
        return torch.add(first, self._counter, out=word)

    def jump(self, steps: int) -> None:
        """Pass over ``steps`` words, in a time that grows with their logarithm."""
        if steps < STEP:
            for _ in range(steps):
                self()
            return
        matrix = _power(steps).to(self._counter.device)
        places = torch.arange(32, dtype=torch.int32, device=matrix.device)
        words = [word.view(-1) for word in self._state]
        for start in range(0, len(words[0]), 4096):
            part = [word[start : start + 4096] for word in words]
            bits = torch.stack(part, dim=1)[..., None] >> places & 1
            bits = (bits.reshape(-1, _BITS).float() @ matrix).to(torch.int32) & 1
            # bits of one word are disjoint: wrapping, their sum is their union
            packed = (bits.view(-1, 5, 32) << places).sum(2, dtype=torch.int32)
            for word, new in zip(part, packed.unbind(1), strict=True):
                word.copy_(new)
        self._counter += _signed(steps * _WEYL)


def _signed(value: int) -> int:
    """The low 32 bits of an int, as a signed one."""
    return (value + 2**31) % 2**32 - 2**31


def _int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64."""
    return ((words + 2**31 & _MASK) - 2**31).to(torch.int32)


@cache
def _power_of_two(exponent: int) -> Tensor:
    """What ``2**exponent`` steps do to a row of the 160 bits of a state, float32 ``[160, 160]``."""
    if exponent:
        half = _power_of_two(exponent - 1)
        # sums of at most 160 ones are exact
        return (half @ half) % 2
    place = torch.arange(_BITS)
    streams = Xorwow(torch.zeros(_BITS, dtype=torch.int64))
    streams._state = [
        _int32(torch.where(place // 32 == index, 1 << place % 32, 0)) for index in range(5)
    ]
    streams()
    bits = torch.stack(streams._state, dim=1)[..., None] >> torch.arange(32, dtype=torch.int32) & 1
    return bits.reshape(_BITS, _BITS).float()


@lru_cache(maxsize=64)
def _power(steps: int) -> Tensor:
    matrix = torch.eye(_BITS)
    for exponent in range(steps.bit_length()):
        if steps >> exponent & 1:
            matrix = (matrix @ _power_of_two(exponent)) % 2
    return matrix


def _seeds(seed: int, tiles: range, columns: range, device: torch.device) -> Tensor:
    """Seeds of the streams, int64 ``[tiles, columns]``."""
    column = torch.arange(columns.start, columns.stop, device=device)
    tile = torch.arange(tiles.start, tiles.stop, device=device)[:, None]
    return (seed + 658105236 * column + 359124577 * tile) & _MASK


def _tiles(
    grads: Tensor, offset: int, tile_size: int, most: int
) -> Iterator[tuple[range, int, Tensor]]:
    """Cut ``grads`` into tiles: whole ones together, the two that may be cut on their own.

    Yields:
        The tiles; the step they begin at; their gradients ``[B, tiles, 16 n]``, zero-filled.
    """
    end = offset + grads.shape[1]
    position = offset
    while position < end:
        tile, low = divmod(position, tile_size)
        whole = (end - position) // tile_size if low == 0 else 0
        count = max(1, min(whole, most))
        size = min(tile_size - low, end - position)
        x = grads[:, position - offset : position - offset + count * size]
        first = low // STEP
        before = low - STEP * first
        x = F.pad(x.reshape(len(grads), count, size), (before, -(before + size) % STEP))
        yield range(tile, tile + count), first, x
        position += count * size


def _rademacher_sums(streams: Xorwow, x: Tensor) -> Tensor:
    """``x @ signs`` of some tiles, ``[B, K]`` float64.

    Args:
        streams: one per tile and column, ``[T, K]``.
        x: ``[B, T, 16 n]``.
    """
    B, T, length = x.shape
    # bits of a byte in their order, then parity of the row: [8, n, T, 2, B]; a set bit is +1
    x = -x.view(B, T, length // STEP, 8, 2).permute(3, 2, 1, 4, 0)
    span = min(
        _TABLE_BYTES // (512 * T * B * x.element_size()), 4 * _STREAMS // (T * streams.shape[1])
    )
    span = max(1, span)
    sums = torch.zeros(streams.shape[1], B, dtype=torch.float64, device=x.device)
    for start in range(0, length // STEP, span):
        part = x[:, start : start + span]
        steps = part.shape[1]
        table = byte_sums(part.reshape(8, -1, B))
        groups = table.shape[1]
        words = torch.stack([_deinterleave(streams()) for _ in range(steps)])
        # [n, T, groups, parity, pair of columns, byte] -> a bag per column
        lanes = words.view(steps, T, -1, 2, 16)
        bits = torch.stack([lanes & 0xFF, lanes >> 16], dim=-1)
        place = torch.arange(groups, dtype=torch.int32, device=x.device)
        place = place.view(steps, T, 1, 2, 1, 1)
        lookup = (bits * groups + place).permute(2, 4, 5, 0, 1, 3).reshape(-1, groups)
        sums += F.embedding_bag(lookup, table.view(-1, B), mode="sum")
    return sums.T


def _deinterleave(words: Tensor) -> Tensor:
    """The even ones of the low 16 bits in bits 0-7, the odd ones in bits 16-23."""
    x = (words & 0x5555) | ((words & 0xAAAA) << 15)
    x = (x | x >> 1) & 0x33333333
    x = (x | x >> 2) & 0x0F0F0F0F
    return (x | x >> 4) & 0x00FF00FF


def _normal_sums(streams: Xorwow, x: Tensor, half_inputs: bool) -> Tensor:
    """As `_rademacher_sums`, for normal entries."""
    (B, T, _), K = x.shape, streams.shape[1]
    # rows of a step in their order: [T, pair of rows, parity, groups, pairs of columns, 2]
    entries = torch.empty(T, 8, 2, K // FAST_JL_GROUP, 16, 2, dtype=x.dtype, device=x.device)
    sums = torch.zeros(B, K, dtype=torch.float64, device=x.device)
    for step in x.split(STEP, dim=2):
        for pair in range(8):
            a = streams().view(T, -1, 2, 16).transpose(1, 2)
            radius = _uniform(a, 2.0**-32).log_().mul_(-2).sqrt_()
            b = streams().view(T, -1, 2, 16).transpose(1, 2)
            angle = _uniform(b, 2.0**-32 * 2 * math.pi)
            torch.mul(radius, angle.sin(), out=entries[:, pair, ..., 0])
            torch.mul(radius, angle.cos_(), out=entries[:, pair, ..., 1])
        matrix = entries.half().to(x.dtype) if half_inputs else entries
        sums += step.reshape(B, -1) @ matrix.view(-1, K)
    return sums


def _uniform(words: Tensor, unit: float) -> Tensor:
    """``(word + ½)·unit`` with the roundings of cuRAND: float32, in (0, 2³²·unit]."""
    return (words.to(torch.int64) & _MASK).float().mul_(unit).add_(unit / 2)


def project_fast_jl_(
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
    """Add ``scale · grads @ R[offset : offset + C]`` to ``out``, R being TRAK's unscaled matrix.

    Args:
        grads: ``[B, C]`` floating, last dimension contiguous.
        out: ``[B, K]`` float64 if ``grads`` is float64, else float32; K a multiple of 32.
        is_normal: N(0, 1) entries instead of ±1.
        seed: in ``[0, 2**32)``.
        num_sms: multiprocessors of the card.
        offset: parameter index of the first column.
        grad_dim: ``P``.
        half_inputs: round gradients and normal entries to float16.
        scale: factor on the entries.

    Source:
        fast_jl 0.1.3, the extension TRAK's ``CudaProjector`` calls.
    """
    if grads.numel() == 0 or out.numel() == 0:
        return
    K = out.shape[1]
    tile_size = (grad_dim - 1) // num_sms + 1
    at_once = _STREAMS * (64 if grads.is_cuda else 1)
    width = min(K, at_once)
    rows_at_once = min(len(grads), _MAX_ROWS)
    most = min(at_once // width, _TABLE_BYTES // (512 * rows_at_once * out.element_size()))
    for rows in range(0, len(grads), _MAX_ROWS):
        x = grads[rows : rows + _MAX_ROWS]
        x = (x.half() if half_inputs else x).to(out.dtype)
        sums = torch.zeros(len(x), K, dtype=torch.float64, device=x.device)
        for tiles, first, part in _tiles(x, offset, tile_size, most):
            for start in range(0, K, width):
                columns = range(start, min(start + width, K))
                streams = Xorwow(_seeds(seed, tiles, columns, x.device))
                streams.jump(first * (STEP if is_normal else 1))
                sums[:, columns.start : columns.stop] += (
                    _normal_sums(streams, part, half_inputs)
                    if is_normal
                    else _rademacher_sums(streams, part)
                )
        out[rows : rows + _MAX_ROWS].add_(sums, alpha=scale)
