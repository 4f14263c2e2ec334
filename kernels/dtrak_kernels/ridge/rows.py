"""Feature rows in float64, read block by block, and the products that need nothing but them.

    features [n, K], a tensor or a store on disk  ->  blocks [B, K] float64, all n rows in one pass

Index legend: N training rows, n of them in this process (all, where it is alone), K features, B
rows of a block, M rows of another matrix, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .group import Group

# bytes of float64 rows held at once while streaming
BLOCK_BYTES = 32 * 2**20


class FeatureRows(Protocol):
    """What a store of features must answer: ``.shape`` and a slice of rows ``[j - i, K]``."""

    @property
    def shape(self) -> Sequence[int]:
        """``(N, K)``."""

    def __getitem__(self, rows: slice) -> Any:
        """Rows ``i:j`` as a tensor, or as an array ``torch.as_tensor`` accepts."""


def check_finite(name: str, block: Tensor, first: int = 0) -> None:
    """Refuse NaN and infinity in ``block [B, K]``, whose rows are numbered from ``first``."""
    finite = torch.isfinite(block).all(dim=1)
    if not bool(finite.all()):
        row = first + int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


class RowReader:
    """Reads ``features`` as float64 blocks that fit the memory.

    Args:
        features: ``[n, K]`` tensor or store; its rows must not change.
        memory_budget: bytes; a block takes at most an eighth of them, columns at most a quarter.
        group: of processes that have a part of the rows each, as `Group` takes it.

    Attributes:
        num_samples: ``N``.
        num_rows: ``n``.
        own: which of the N are this process's.

    Raises:
        ValueError: ``features`` is not ``[n, K]`` with N, K >= 1, or K is another elsewhere.
    """

    def __init__(
        self, features: Tensor | FeatureRows, memory_budget: int, group: Any = None
    ) -> None:
        shape = tuple(features.shape)
        if len(shape) != 2 or shape[1] < 1 or (group is None and shape[0] < 1):
            raise ValueError(f"features must be [N, K] with N, K >= 1, got shape {shape}")
        self.features, self.group = features, Group(group)
        self.num_rows, self.num_features = int(shape[0]), int(shape[1])
        # each asks for its device itself: a store without rows has one too
        counts, widths, budgets = (
            self.group.sizes(size, self.device) if self.group.world > 1 else [size]
            for size in (self.num_rows, self.num_features, memory_budget)
        )
        self.num_samples, self.memory_budget = sum(counts), min(budgets)
        if len(set(widths)) > 1 or not self.num_samples:
            raise ValueError(
                f"features must be [N, K] with N, K >= 1 and one K in every process, got {counts} "
                f"rows of {widths}"
            )
        self._counts = counts
        first = self.first_of(self.group.rank)
        self.own = slice(first, first + self.num_rows)

    @cached_property
    def device(self) -> torch.device:
        """Where the rows are, a store's said by its first one."""
        return torch.as_tensor(self.features[0:1]).device

    def zeros(self, *shape: int) -> Tensor:
        """Float64 zeros beside the rows."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` as float64, refused if any is not finite."""
        block = torch.as_tensor(self.features[start:stop])
        check_finite("features", block, self.own.start + start)
        return block.to(torch.float64)

    def block_rows(self, width: int = 1) -> int:
        """The rows of a block whose caller makes ``width`` values of each, if more than K."""
        width = max(width, self.num_features)
        return max(1, min(BLOCK_BYTES, self.memory_budget // 8) // (8 * width))

    def blocks(self, width: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, rows [B, K] float64)`` over this process's rows, each read once."""
        size = self.block_rows(width)
        for start in range(0, self.num_rows, size):
            stop = min(start + size, self.num_rows)
            yield start, stop, self.read(start, stop)

    def everyones_blocks(self, size: int) -> Iterator[tuple[int, int, Tensor]]:
        """``(process, its first row of them, rows [B, K] float64)`` over all N rows, handed round.

        Args:
            size: of a block, the same in every process.
        """
        for first in range(0, max(self._counts), size):
            mine = min(first, self.num_rows)
            block = self.read(mine, min(first + size, self.num_rows))
            for rank, rows in enumerate(self.group.each(block)):
                if len(rows):
                    yield rank, first, rows

    def first_of(self, rank: int) -> int:
        """Number, among all N, of the first row of a process."""
        return sum(self._counts[:rank])

    def columns(self) -> Iterator[Tensor]:
        """``[C, N]`` float64 blocks of Φᵀ; a store is read once per block of columns."""
        width = max(1, min(self.num_features, self.memory_budget // 4 // (8 * self.num_samples)))
        for start in range(0, self.num_features, width):
            stop = min(start + width, self.num_features)
            parts = [rows[:, start:stop] for _, _, rows in self.blocks()]
            yield self.group.join(torch.cat([self.zeros(0, stop - start), *parts])).T

    def times_rows(self, left: Tensor, out: Tensor) -> Tensor:
        """Write ``left Φᵀ`` for ``left [M, K]`` float64 to ``out [M, n]``, which is returned."""
        for start, stop, rows in self.blocks(width=left.shape[0]):
            out[:, start:stop] = left @ rows.T
        return out

    def cross(self, left: Tensor) -> Tensor:
        """``left Φᵀ [M, N]`` float64."""
        mine = self.times_rows(left, left.new_empty(left.shape[0], self.num_rows))
        return self.group.join_columns(mine)

    def moment(self, targets: Tensor) -> Tensor:
        """``Φᵀ targets [K, C]`` for ``targets [n, C]``, both float64."""
        moment = self.zeros(self.num_features, targets.shape[1])
        for start, stop, rows in self.blocks():
            moment += rows.T @ targets[start:stop]
        return self.group.sum(moment)
