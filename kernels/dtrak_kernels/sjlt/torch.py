"""Tile-chained sparse Johnson-Lindenstrauss sketch: the sketch that costs next to nothing.

    per-sample gradient of one parameter [B, O, C]  ->  features [B, K], every entry added once,
    signed

Specification. A parameter with two or more dimensions is a matrix: rows are its first dimension O,
columns its other dimensions with the second one last (a convolution's ``[O, I, kh, kw]`` is ``[O,
kh·kw·I]``, the order in which an implicit im2col meets channels-last activations). Any other
parameter is a vector.

* Tiles. A matrix is cut into ``BM x BN`` tiles, BM the smallest power of two in [16, 128] that is
  at least O (128 if none), BN likewise for C; while ``m = BM·BN`` exceeds K, the longer side
  (columns, where they are equal) is halved, so K must be at least 256. Tiles are numbered row by
  row.
* Blocks. The ``ceil(K/m)`` sketch blocks of a parameter are windows of m positions: block b begins
  at ``base + b·m``, positions are taken modulo K, and K should be a multiple of 16,384 or a power
  of two. Tiles are ranked by a random 64-bit key and dealt to the blocks in turn from a random
  first one: the blocks' loads differ by at most one.
* Placement. Inside its block a tile is shifted cyclically by a random amount in each direction, in
  steps of one: a hot channel sits at the same place of every tile it crosses, and shifts in whole
  groups of 8 would let it meet itself eight times too often.
* Signs. One program owns (sample, block) and walks its tiles in increasing number with one
  accumulator, adding a tile and then flipping the sign of *every* entry of the accumulator with an
  independent fair bit, after the last tile too. A tile's sign pattern is the product of its own and
  all later flips of its block, hence independent and uniform over entries and tiles.
* A vector's entry e sits at ``base + e`` modulo K with an independent fair sign.

All random choices are Philox words of (seed, offset of the parameter in the flattened gradient,
tile, entry): never of the batch, the device or the order of evaluation. Entries of one tile never
collide, entries of two tiles collide with probability about 1/K, and signs are pairwise
independent, so

    E⟨φ(x), φ(y)⟩ = ⟨x, y⟩   and   Var <= (‖x‖²‖y‖² + ⟨x, y⟩²) / K,

the CountSketch bound (Charikar, Chen and Farach-Colton 2002), with no factor of 1/√K to apply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..random.words import Stream, philox_words

# sketches whose signs `project_sjlt` keeps, and the largest of them; as much again on a GPU
_KEPT, _KEPT_BYTES = 2, 64 * 2**20
# entries of a matrix whose places are kept in tables, of 12 bytes an entry
TABLE_ENTRIES = 2**17
_MAX_TILE = 128
_MIN_TILE = 16
# tiles whose flips are made at a time, from 2 MB of words
_TILES = 512
# counter of the words that belong to a parameter as a whole, beyond any tile number
_WHOLE = 0xFFFFFFFF


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """``(O, C)`` of a parameter seen as a matrix, None for a vector or a scalar."""
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else None


def as_matrix(grads: Tensor) -> Tensor:
    """Per-sample gradients ``[B, O, I, *kernel]`` as ``[B, O, C]``, channels last."""
    return grads.movedim(2, -1).flatten(2)


def _tile_size(extent: int) -> int:
    return min(_MAX_TILE, max(_MIN_TILE, 1 << max(extent - 1, 0).bit_length()))


@dataclass(frozen=True)
class ParameterSketch:
    """Where the entries of one parameter go, and with which sign.

    Attributes:
        shape: the parameter's shape.
        offset: index of its first entry in the flattened gradient.
        proj_dim: ``K``.
        seed: key of the random stream.
    """

    shape: tuple[int, ...]
    offset: int
    proj_dim: int
    seed: int

    @cached_property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """``(BM, BN)``."""
        rows, columns = (_tile_size(extent) for extent in self._matrix)
        while rows * columns > self.proj_dim:
            rows, columns = (rows, columns // 2) if columns >= rows else (rows // 2, columns)
        return rows, columns

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Tiles down and across."""
        (rows, columns), (tile_rows, tile_columns) = self._matrix, self.tile
        return -(-rows // tile_rows), -(-columns // tile_columns)

    @property
    def num_blocks(self) -> int:
        """Sketch blocks this parameter's tiles are dealt to."""
        return -(-self.proj_dim // math.prod(self.tile))

    @property
    def _matrix(self) -> tuple[int, int]:
        matrix = matrix_shape(self.shape)
        assert matrix is not None
        return matrix

    def _words(self, c0: Tensor | int, stream: Stream) -> tuple[Tensor, ...]:
        low, high = self.offset & 0xFFFFFFFF, self.offset >> 32
        return philox_words(c0, low, high, int(stream), self.seed)

    @cached_property
    def base(self) -> int:
        """First position of block 0 (or of a vector)."""
        word = int(self._words(_WHOLE, Stream.SJLT_PLACE)[1])
        if matrix_shape(self.shape) is None:
            return word % self.proj_dim
        return 4 * (word % -(-self.proj_dim // 4)) % self.proj_dim

    @cached_property
    def placement(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per tile: its block, its row shift and its column shift; int64 ``[tiles]`` each."""
        tiles = math.prod(self.grid)
        w0, w1, w2, w3 = self._words(torch.arange(tiles), Stream.SJLT_PLACE)
        tile_rows, tile_columns = self.tile
        # two stable sorts rank by the 64-bit key (w2, w3), ties by tile number
        order = torch.argsort(w3, stable=True)
        order = order[torch.argsort(w2[order], stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(tiles)
        first = int(self._words(_WHOLE, Stream.SJLT_PLACE)[0])
        blocks = (rank + first) % self.num_blocks
        return blocks, w0 % tile_rows, w1 % tile_columns

    def flips(self, tiles: Tensor) -> Iterator[Tensor]:
        """The flip bits applied after each of ``tiles``, int64 ``[BM, BN]`` of 0 and 1.

        The call and bit of position (i, j) follow the accumulator layout of the tensor cores' m64nN
        and m16n8 instructions, so that a thread which holds 128 entries of a 128 x 128 tile needs
        one call.
        """
        tile_rows, tile_columns = self.tile
        i, j = torch.arange(tile_rows)[:, None], torch.arange(tile_columns)[None, :]
        call = ((i & 7) | ((i >> 1) & 0x18)) * 4 + ((j >> 1) & 3)
        word = ((i >> 3) & 1) + 2 * ((i >> 6) & 1)
        bit = 31 - (2 * ((j >> 3) & 15) + (j & 1))
        # together: a call of torch takes longer than the words of one tile
        for some in tiles.split(_TILES):
            calls = some[:, None] * 128 + torch.arange(128)
            for table in torch.stack(self._words(calls, Stream.SJLT_FLIP), dim=1):
                yield table[word, call] >> bit & 1

    @cached_property
    def signs(self) -> Tensor:
        """Signs, int8: ``[tiles, BM, BN]`` at accumulator positions, or ``[n]`` for a vector."""
        if matrix_shape(self.shape) is None:
            words = torch.stack(
                self._words(torch.arange(-(-self.size // 128)), Stream.SJLT_VECTOR), dim=1
            )
            bits = words[:, :, None] >> torch.arange(32) & 1
            return (1 - 2 * bits).flatten()[: self.size].to(torch.int8)
        blocks, _, _ = self.placement
        signs = torch.empty(len(blocks), *self.tile, dtype=torch.int8)
        state: dict[int, Tensor] = {}
        # backwards, as the chain goes
        last_first = torch.arange(len(blocks)).flip(0)
        for tile, bits in zip(last_first.tolist(), self.flips(last_first), strict=True):
            flip = 1 - 2 * bits.to(torch.int8)
            block = int(blocks[tile])
            state[block] = flip * state[block] if block in state else flip
            signs[tile] = state[block]
        return signs

    @cached_property
    def _tables(self) -> dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor]]:
        return {}

    def table(self, dtype: torch.dtype, columns_last: bool = False) -> tuple[Tensor, Tensor]:
        """Where every entry of the parameter goes, and with which sign; kept.

        Args:
            dtype: of the signs.
            columns_last: entries of a matrix in the order of `as_matrix`, not in the parameter's.

        Returns:
            Positions, int64, and signs, ``[n]`` each.
        """
        key = dtype, columns_last
        if key not in self._tables:
            positions, signs = self._places()
            if not columns_last and len(self.shape) > 2:
                positions, signs = (
                    t.unflatten(1, (-1, self.shape[1])).transpose(1, 2) for t in (positions, signs)
                )
            self._tables[key] = positions.flatten(), signs.flatten().to(dtype)
        return self._tables[key]

    def _places(self) -> tuple[Tensor, Tensor]:
        if matrix_shape(self.shape) is None:
            return (self.base + torch.arange(self.size)) % self.proj_dim, self.signs
        (rows, columns), (tile_rows, tile_columns) = self._matrix, self.tile
        blocks, row_shifts, column_shifts = self.placement
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        tile = row // tile_rows * self.grid[1] + column // tile_columns
        i, j = (row + row_shifts[tile]) % tile_rows, (column + column_shifts[tile]) % tile_columns
        entry = (blocks[tile] * tile_rows + i) * tile_columns + j
        return (self.base + entry) % self.proj_dim, self.signs[tile, i, j]

    def scaled(self, scale: Tensor) -> ScaledSketch:
        """The sketch of gradients times ``scale``, one number or ``[*shape]``, on a CPU."""
        return ScaledSketch(self.shape, self.offset, self.proj_dim, self.seed, scale)

    @cached_property
    def _dealt(self) -> list[tuple[int, int, int]]:
        """`placement`, tile by tile."""
        return list(zip(*(t.tolist() for t in self.placement), strict=True))

    def _signs_of_entries(self) -> Tensor:
        """`signs` of a matrix in the order of its entries, ``[O, C]``."""
        rows, columns = self._matrix
        (down, across), (tile_rows, tile_columns) = self.grid, self.tile
        padded = torch.empty(down, tile_rows, across, tile_columns, dtype=torch.int8)
        for tile, (_, row_shift, column_shift) in enumerate(self._dealt):
            padded[tile // across, :, tile % across] = self.signs[tile].roll(
                (-row_shift, -column_shift), (0, 1)
            )
        # as large as what is kept instead
        vars(self).pop("signs")
        return padded.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()

    @cached_property
    def _copied_signs(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def signs_on(self, device: torch.device, dtype: torch.dtype = torch.int8) -> Tensor:
        """Signs of the entries, ``[n]`` or ``[O, C]``, on a device; made or copied there once."""
        key = device, dtype
        if key not in self._copied_signs:
            is_vector = matrix_shape(self.shape) is None
            signs = self.signs if is_vector else self._signs_of_entries()
            self._copied_signs[key] = signs.to(device, dtype)
        return self._copied_signs[key]

    def add_vector(self, grads: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """Sketch ``scale`` times gradients ``[B, n]`` of a vector into ``out [B, K]``, in place."""
        _add_modulo(grads * self.signs_on(grads.device, grads.dtype), self.base, out, scale)

    def add_block(self, grads: Tensor, out: Tensor, first_row: int = 0) -> None:
        """Sketch per-sample gradients ``[B, R, I, *kernel]`` of rows of a matrix, as `add_matrix`.

        Args:
            grads: in any memory layout; the kernel's dimensions may be one.
            out: ``[B, K]`` features, same dtype and device.
            first_row: a multiple of BM.
        """
        # atomic additions of a GPU come in any order
        if grads.device.type != "cpu" or self.size > TABLE_ENTRIES:
            self.add_matrix(as_matrix(grads), out, first_row)
            return
        positions, signs, entries = self.entries(grads, first_row)
        out.scatter_add_(1, positions.expand_as(entries), entries * signs)

    def entries(self, grads: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """What `add_block` or `add_vector` adds, entry by entry.

        Args:
            grads: as there, ``[B, R, I, *kernel]`` or ``[B, n]``.
            first_row: as there.

        Returns:
            Positions, int64 ``[n]``, signs ``[n]`` and entries ``[B, n]``, both as ``grads``.
        """
        if grads.ndim == 2:
            return *self.table(grads.dtype), grads
        columns_last = not grads.is_contiguous()
        entries = (as_matrix(grads) if columns_last else grads).flatten(1)
        positions, signs = self.table(grads.dtype, columns_last)
        if entries.shape[1] < positions.shape[0]:
            first = first_row * math.prod(self.shape[1:])
            part = slice(first, first + entries.shape[1])
            positions, signs = positions[part], signs[part]
        return positions, signs, entries

    def add_matrix(self, grads: Tensor, out: Tensor, first_row: int = 0) -> None:
        """Sketch per-sample gradients of rows of a matrix parameter into ``out``, in place.

        Args:
            grads: ``[B, R, C]``: rows ``first_row`` to ``first_row + R`` as `as_matrix` orders
            them.
            out: ``[B, K]`` features, same dtype and device.
            first_row: a multiple of BM.
        """
        (tile_rows, _), (_, across) = self.tile, self.grid
        signs = self.signs_on(out.device)
        add_tiles = self._add_many if across >= 2 * self.num_blocks else self._add_few
        for top in range(0, grads.shape[1], tile_rows):
            rows = slice(top, min(top + tile_rows, grads.shape[1]))
            signed = grads[:, rows] * signs[first_row + rows.start : first_row + rows.stop]
            first_tile = (first_row + top) // tile_rows * across
            add_tiles(signed, self._dealt[first_tile : first_tile + across], out)

    def _start(self, number: int) -> int:
        """Where a block begins in the features."""
        return (self.base + number * math.prod(self.tile)) % self.proj_dim

    def _add_few(self, signed: Tensor, dealt: Sequence[tuple[int, int, int]], out: Tensor) -> None:
        """Add a row of tiles ``[B, BM, C]``, already signed, piece by piece to its blocks."""
        tile_columns, size = self.tile[1], math.prod(self.tile)
        # blocks that go on at the beginning of the features: added up by rows of tiles, of which
        # every slice has whole ones
        wrapped: dict[int, Tensor] = {}
        for right, (number, row_shift, column_shift) in enumerate(dealt):
            start = self._start(number)
            if start + size <= self.proj_dim:
                block = out[:, start : start + size].unflatten(1, self.tile)
            else:
                if start not in wrapped:
                    wrapped[start] = out.new_zeros(len(out), *self.tile)
                block = wrapped[start]
            entries = signed[:, :, right * tile_columns : (right + 1) * tile_columns]
            for target, source in _shifted(block, entries, row_shift, column_shift):
                target.add_(source)
        for start, block in wrapped.items():
            _add_modulo(block.flatten(1), start, out)

    def _add_many(self, signed: Tensor, dealt: Sequence[tuple[int, int, int]], out: Tensor) -> None:
        """As `_add_few`, where several tiles of a row go to one block: tiles are added whole.

        They are added up in a block with room for every shift, which is folded in the end.
        """
        tile_rows, tile_columns = self.tile
        wide: dict[int, Tensor] = {}
        for right, (number, row_shift, column_shift) in enumerate(dealt):
            if number not in wide:
                wide[number] = out.new_zeros(len(out), 2 * tile_rows, 2 * tile_columns)
            entries = signed[:, :, right * tile_columns : (right + 1) * tile_columns]
            target = wide[number].narrow(1, row_shift, entries.shape[1])
            target.narrow(2, column_shift, entries.shape[2]).add_(entries)
        for number, block in wide.items():
            block = block[:, :tile_rows] + block[:, tile_rows:]
            block = block[:, :, :tile_columns] + block[:, :, tile_columns:]
            _add_modulo(block.flatten(1), self._start(number), out)


def _shifted(
    block: Tensor, entries: Tensor, row_shift: int, column_shift: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of ``block [B, BM, BN]``, and those of the entries that cyclic shifts put there."""
    _, tile_rows, tile_columns = block.shape
    columns = _pieces(entries.shape[2], column_shift, tile_columns)
    for row, target_row, height in _pieces(entries.shape[1], row_shift, tile_rows):
        source = entries.narrow(1, row, height)
        target = block.narrow(1, target_row, height)
        for column, target_column, width in columns:
            yield target.narrow(2, target_column, width), source.narrow(2, column, width)


def _pieces(extent: int, shift: int, size: int) -> list[tuple[int, int, int]]:
    """(source, target, length) that place ``extent`` entries at ``shift`` modulo ``size``."""
    straight = min(extent, size - shift)
    pieces = [(0, shift, straight)]
    if straight < extent:
        pieces.append((straight, 0, extent - straight))
    return pieces


def _add_modulo(block: Tensor, start: int, out: Tensor, scale: float = 1.0) -> None:
    done = 0
    while done < block.shape[1]:
        size = min(block.shape[1] - done, out.shape[1] - start)
        out[:, start : start + size].add_(block[:, done : done + size], alpha=scale)
        start, done = 0, done + size


@dataclass(frozen=True, eq=False)
class ScaledSketch(ParameterSketch):
    """The sketch of a parameter whose gradients are multiplied by a scale before.

    The scale is multiplied into the signs, once: entries cost what they cost without one. On a CPU
    alone, and of parameters whose places are kept in tables.

    Attributes:
        scale: one number, or ``[*shape]``, one for every entry.
    """

    scale: Tensor

    def table(self, dtype: torch.dtype, columns_last: bool = False) -> tuple[Tensor, Tensor]:
        """See `ParameterSketch.table`; signs times scale."""
        key = dtype, columns_last
        if key not in self._tables:
            positions, signs = super().table(dtype, columns_last)
            self._tables[key] = positions, signs * self._scale(dtype, columns_last)
        return self._tables[key]

    def signs_on(self, device: torch.device, dtype: torch.dtype = torch.int8) -> Tensor:
        """See `ParameterSketch.signs_on`; of a vector, signs times scale."""
        key = device, dtype
        if key not in self._copied_signs:
            signs = super().signs_on(device, dtype)
            self._copied_signs[key] = signs * self._scale(dtype, columns_last=False)
        return self._copied_signs[key]

    def _scale(self, dtype: torch.dtype, columns_last: bool) -> Tensor:
        scale = self.scale.to(dtype)
        if scale.ndim > 2 and columns_last:
            scale = as_matrix(scale[None])
        return scale.flatten() if scale.ndim else scale


def sketch_parameters(
    shapes: Sequence[Sequence[int]], proj_dim: int, seed: int
) -> list[ParameterSketch]:
    """The sketch of every parameter of a gradient flattened in the order of ``shapes``."""
    sketches, offset = [], 0
    for shape in shapes:
        sketches.append(ParameterSketch(tuple(shape), offset, proj_dim, seed))
        offset += math.prod(shape)
    return sketches


def sketch_gradients(grads: Tensor, sketches: Iterable[Any], out: Tensor) -> Tensor:
    """Sketch dense per-sample gradients ``[B, P]`` into ``out [B, K]``, in place."""
    for sketch in sketches:
        size = math.prod(sketch.shape)
        part = grads[:, sketch.offset : sketch.offset + size].to(out.dtype)
        if matrix_shape(sketch.shape) is None:
            sketch.add_vector(part, out)
        elif size:
            sketch.add_matrix(as_matrix(part.unflatten(1, sketch.shape)), out)
    return out


def _sign_bytes(shape: Sequence[int]) -> int:
    """Of `ParameterSketch.signs`: whole tiles, or the entries of a vector."""
    if matrix_shape(shape) is None or math.prod(shape) == 0:
        return math.prod(shape)
    # K only halves tiles, which pads less
    return math.prod(
        -(-n // _tile_size(n)) * _tile_size(n) for n in (shape[0], math.prod(shape[1:]))
    )


@lru_cache(maxsize=_KEPT)
def _kept_sketches(
    shapes: tuple[tuple[int, ...], ...], proj_dim: int, seed: int
) -> list[ParameterSketch]:
    return sketch_parameters(shapes, proj_dim, seed)


def project_sjlt(
    grads: Tensor, proj_dim: int, seed: int, shapes: Sequence[Sequence[int]], out: Tensor
) -> Tensor:
    """Sketch dense per-sample gradients ``[B, P]`` into ``out [B, K]``, in place.

    Signs, which take longer to make than to use, are kept for the next call with the same shapes, K
    and seed: those of the last `_KEPT` such calls, if they take at most `_KEPT_BYTES` each.
    """
    sizes = tuple(tuple(shape) for shape in shapes)
    is_small = sum(_sign_bytes(shape) for shape in sizes) <= _KEPT_BYTES
    make = _kept_sketches if is_small else sketch_parameters
    return sketch_gradients(grads, make(sizes, proj_dim, seed), out)
