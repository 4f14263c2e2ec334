"""Dense projections in eager torch, on any device: what a machine without Triton runs.

    grads [B, C]  x  R[offset : offset + C] (regenerated block by block)  ->  added to out [B, K]

Rademacher signs are never expanded. Eight bits of a stream word select one of the 256 signed sums
of eight gradient entries, so a byte of randomness is one table row to add ("four Russians"): for
each block of parameters, a table ``[256, groups, B]`` of signed sums, then ``embedding_bag`` over
the stream's bytes. Normal entries are made in float32, a tile at a time, and multiplied (see
`random.normal`). Beside the float64 sums ``[rows, K]`` no buffer exceeds `WORKSPACE_BYTES`. Blocks
are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..projection import Projection
from ..random.normal import COMPILE_ENTRIES, TILE, compiled_tile, normal_pairs, round_keys
from ..random.words import Stream

WORKSPACE_BYTES = 4 * 2**20

# samples per table: a table row is then a few cache lines
_TABLE_ROWS = 32
# samples that share an entry once it is made
_NORMAL_ROWS = 256
# a block of gradients, and the table of its signed sums, stay in a core's second-level cache
_TABLE_BYTES = 2**20
# Philox calls in flight, four words each in int64; two threads' worth of elementwise work
_CALLS = 65536

_MASK = 0xFFFFFFFF


def project_dense_(
    grads: Tensor,
    projection: Projection,
    offset: int,
    out: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Add ``grads @ R[offset : offset + C]`` to ``out``, R being the scaled projection matrix.

    Args:
        grads: ``[B, C]`` floating, columns ``offset`` to ``offset + C`` of the gradients, any
            strides.
        projection: kind ``"rademacher"`` or ``"normal"``, generator ``"philox"``.
        offset: parameter index of the first column, any non-negative int.
        out: ``[B, K]`` float64 if ``grads`` is float64, else float32. Added to.
        scale: factor on the entries, ``K**-0.5`` if ``None``.

    Returns:
        ``out``.
    """
    scale = projection.proj_dim**-0.5 if scale is None else scale
    if grads.numel() == 0 or out.numel() == 0:
        return out
    is_sign = projection.kind == "rademacher"
    add, step = (_add_rademacher_, _TABLE_ROWS) if is_sign else (_add_normal_, _NORMAL_ROWS)
    # all rows are cut like the fullest ones: equal gradients of a batch give equal features
    most = min(len(grads), step)
    for rows in range(0, len(grads), step):
        sums = add(grads[rows : rows + step], projection, offset, out.dtype, most)
        out[rows : rows + step].add_(sums, alpha=scale)
    return out


def _aligned_blocks(
    grads: Tensor, offset: int, unit: int, length: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Cut ``grads`` at multiples of ``unit`` parameters, zero-filled where a block overhangs.

    Yields:
        The coordinate ``p // unit`` of the first unit, and ``[B, n]`` in ``dtype`` with n a
        multiple of ``unit`` and at most ``length``.
    """
    end = offset + grads.shape[1]
    first = offset // unit * unit
    for start in range(first, end, length):
        stop = min(start + length, -(-end // unit) * unit)
        low, high = max(start, offset), min(stop, end)
        block = grads[:, low - offset : high - offset].to(dtype)
        yield start // unit, F.pad(block, (low - start, stop - high))


class _Philox:
    """Philox-4x32-10 over a grid of columns and parameter coordinates, in reused buffers.

    Words 0 and 2 are the rows of one buffer, words 1 and 3 of another: half the operations, which
    for blocks that stay in a cache cost as much to start as to run.
    """

    def __init__(self, seed: int, stream: Stream, device: torch.device) -> None:
        self.keys = [
            ((seed + n * 0x9E3779B9) & _MASK, ((seed >> 32) + n * 0xBB67AE85) & _MASK)
            for n in range(10)
        ]
        self.stream = int(stream)
        # a round swaps the rows, so every other one finds its constants swapped
        factors = torch.tensor([0xD2511F53, 0xCD9E8D57], device=device)
        keys = torch.tensor(self.keys[2:], device=device).flip(1)
        self.rounds = [
            (factors.roll(n % 2), keys[n].roll(n % 2)) for n in range(len(self.keys) - 2)
        ]
        self._shape: torch.Size | None = None
        self._buffers: list[Tensor] = []

    def __call__(self, c0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Four words for every ``(c0, index)``.

        Args:
            c0: int64 first counter, broadcastable with ``index``.
            index: int64 coordinate of the parameters: its two halves are the counters c1 and c2.

        Returns:
            Words 0 and 2, and words 1 and 3: int64 ``[2, *the broadcast shape]`` whose low 32 bits
            are the words; the next call overwrites them.
        """
        shape = torch.broadcast_shapes(c0.shape, index.shape)
        if shape != self._shape:
            self._shape = shape
            self._buffers = [c0.new_empty(2, *shape) for _ in range(3)]
        even, odd, product = self._buffers
        # the first round, and the products of the second, see the counters one axis at a time
        (k0, k1), (k2, k3) = self.keys[:2]
        one, two = c0 * 0xD2511F53, (index >> 32) * 0xCD9E8D57
        s0 = ((two >> 32) & _MASK) ^ (index & _MASK) ^ k0
        s2 = ((one >> 32) & _MASK) ^ self.stream ^ k1
        s1, s3 = two & _MASK, one & _MASK
        one, two = s0 * 0xD2511F53, s2 * 0xCD9E8D57
        torch.bitwise_xor(((two >> 32) & _MASK) ^ k2, s1, out=even[0])
        torch.bitwise_xor(((one >> 32) & _MASK) ^ k3, s3, out=even[1])
        ones = (1,) * len(shape)
        last = (two, one)
        for factors, keys in self.rounds:
            # int64 products wrap modulo 2**64, which keeps both halves right
            torch.mul(even, factors.view(2, *ones), out=product)
            torch.bitwise_right_shift(product, 32, out=even)
            # the low halves are not masked: only their low 32 bits are ever used
            even[0].bitwise_xor_(last[1])
            even[1].bitwise_xor_(last[0])
            even.bitwise_xor_(keys.view(2, *ones)).bitwise_and_(_MASK)
            last = (product[0], product[1])
            odd, product = product, odd
        self._buffers = [even, odd, product]
        return even, odd


def byte_sums(x: Tensor) -> Tensor:
    """All 256 signed sums of groups of eight entries: what a byte of signs can select.

    Args:
        x: ``[8, groups, B]``, entries in the order of the bits.

    Returns:
        ``[256, groups, B]``; a set bit of the byte subtracts its entry.
    """
    nibble = torch.arange(16, device=x.device)[:, None]
    signs = 1 - 2 * ((nibble >> torch.arange(4, device=x.device)) & 1)
    low, high = signs.to(x.dtype) @ x.reshape(2, 4, -1)
    return (high[:, None] + low).reshape(256, *x.shape[1:])


def _signed_sums(block: Tensor) -> Tensor:
    """The sums that the bytes of the stream select.

    Args:
        block: ``[B, 256 n]``, aligned to 256 parameters.

    Returns:
        ``[256, 2, 16 n, B]``: byte value; parameter bit 3, which selects the word; bytes of that
        word's position in stream order (block, call, byte). Indexing follows `reference`.
    """
    # parameter = 256 block + 16 j + 8 half + 2 call + p0, and byte i of a word holds p0 = i // 2
    # and j = 15 - 8 (i % 2) - bit
    x = block.reshape(len(block), -1, 2, 8, 2, 4, 2).flip(2, 3)
    x = x.permute(3, 4, 1, 5, 6, 2, 0)
    return byte_sums(x.reshape(8, -1, len(block))).reshape(256, 2, -1, len(block))


def _add_rademacher_(
    grads: Tensor, projection: Projection, offset: int, dtype: torch.dtype, most: int
) -> Tensor:
    """``grads @ signs``, ``[B, K]`` float64, cut for ``most`` samples, at most `_TABLE_ROWS`."""
    B, K, device = len(grads), projection.proj_dim, grads.device
    pairs = 8 * -(-K // 16)
    chunk = min(pairs, _CALLS // 4)
    blocks = max(1, min(_CALLS // (4 * chunk), _TABLE_BYTES // (256 * most * dtype.itemsize)))
    span = max(1, _TABLE_BYTES // (256 * 32 * most * dtype.itemsize))
    philox = _Philox(projection.seed, Stream.RADEMACHER, device)
    calls = torch.arange(4, device=device)
    # [columns in groups of 16, column bit 3, column bits 0-2, B]
    sums = torch.zeros(pairs // 8, 2, 8, B, dtype=torch.float64, device=device)
    for first, block in _aligned_blocks(grads, offset, 256, 256 * blocks, dtype):
        index = first + torch.arange(block.shape[1] // 256, device=device)[:, None]
        for start in range(0, pairs, chunk):
            pair = torch.arange(start, min(start + chunk, pairs), device=device)
            # [pairs, blocks * calls * bytes]: little-endian, the order of the table's groups
            words = philox(4 * pair[:, None, None] + calls, index)
            values = [
                words[word % 2][word // 2].to(torch.int32).view(torch.uint8).reshape(len(pair), -1)
                for word in range(4)
            ]
            target = sums[start // 8 : start // 8 + len(pair) // 8]
            for sub in range(0, len(index), span):
                table = _signed_sums(block[:, 256 * sub : 256 * (sub + span)])
                groups = table.shape[2]
                place = torch.arange(groups, dtype=torch.int32, device=device)
                for word, value in enumerate(values):
                    row, half = divmod(word, 2)
                    lookup = torch.add(
                        place + groups * half,
                        value[:, 16 * sub : 16 * sub + groups],
                        alpha=2 * groups,
                    )
                    bags = F.embedding_bag(lookup, table.reshape(-1, B), mode="sum")
                    target[:, row] += bags.view(-1, 8, B)
    return sums.reshape(-1, B)[:K].T


def _add_normal_(
    grads: Tensor, projection: Projection, offset: int, dtype: torch.dtype, most: int
) -> Tensor:
    """``grads @ normals``, ``[B, K]`` float64, cut for ``most`` samples, at most `_NORMAL_ROWS`."""
    B, K, device = len(grads), projection.proj_dim, grads.device
    sums = torch.zeros(B, K, dtype=torch.float64, device=device)
    if grads.shape[1] * K >= COMPILE_ENTRIES and device.type == "cpu" and dtype == torch.float32:
        tile = compiled_tile()
        if tile is not None:
            return _add_compiled_(sums, tile, grads, projection.seed, offset)
    chunk = min(K, _CALLS // 4, max(1, WORKSPACE_BYTES // (dtype.itemsize * most)))
    units = max(1, min(_CALLS // (4 * chunk), _TABLE_BYTES // (16 * most * dtype.itemsize)))
    philox = _Philox(projection.seed, Stream.NORMAL, device)
    for first, block in _aligned_blocks(grads, offset, 16, 16 * units, dtype):
        # parameter = 16 unit + 8 half + 2 call + p0: [p0, B, half and call]
        x = block.reshape(B, -1, 2, 4, 2).permute(4, 0, 2, 1, 3).reshape(2, B, -1)
        index = 4 * first + torch.arange(x.shape[2] // 2, device=device)[:, None]
        for start in range(0, K, chunk):
            columns = torch.arange(start, min(start + chunk, K), device=device)
            pairs = normal_pairs(*philox(columns, index), dtype)
            even, odd = (entries.view(-1, len(columns)) for entries in pairs)
            sums[:, start : start + len(columns)] += torch.addmm(x[0] @ even, x[1], odd)
    return sums


def _add_compiled_(
    sums: Tensor,
    tile: Callable[[Tensor, Tensor, Tensor], Tensor],
    grads: Tensor,
    seed: int,
    offset: int,
) -> Tensor:
    """``sums += grads @ normals`` with the entries of `compiled_tile`, whose shape is fixed."""
    B, K = sums.shape
    keys = round_keys(seed)
    with torch.no_grad():
        for first, block in _aligned_blocks(grads, offset, 16, 4 * TILE, torch.float32):
            # [B, half, p0, unit and call], the order of the tile; entries beyond meet zeros
            x = F.pad(block, (0, 4 * TILE - block.shape[1])).reshape(B, -1, 2, 4, 2)
            x = x.permute(0, 2, 4, 1, 3).reshape(B, -1)
            index = 4 * first + torch.arange(TILE)[:, None]
            for start in range(0, K, TILE):
                columns = (start + torch.arange(TILE))[None, :]
                part = x @ tile(columns, index, keys).view(4 * TILE, TILE)
                sums[:, start : start + TILE] += part[:, : K - start]
    return sums
