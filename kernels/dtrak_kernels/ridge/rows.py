"""Feature rows in float64, read block by block, and the products that need nothing but them.

    features [N, K], a tensor or a store on disk  ->  blocks [B, K] float64, all N rows in one pass

Index legend: N training rows, K features, B rows of a block, M rows of another matrix, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

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
        features: ``[N, K]`` tensor or store; its rows must not change.
        memory_budget: bytes; a block takes at most an eighth of them, columns at most a quarter.

    Raises:
        ValueError: ``features`` is not ``[N, K]`` with N, K >= 1.
    """

    def __init__(self, features: Tensor | FeatureRows, memory_budget: int) -> None:
        shape = tuple(features.shape)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"features must be [N, K] with N, K >= 1, got shape {shape}")
        self.features = features
        self.num_samples, self.num_features = int(shape[0]), int(shape[1])
        self.memory_budget = memory_budget

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
        check_finite("features", block, start)
        return block.to(torch.float64)

    def block_rows(self, width: int = 1) -> int:
        """The rows of a block whose caller makes ``width`` values of each, if more than K."""
        width = max(width, self.num_features)
        return max(1, min(BLOCK_BYTES, self.memory_budget // 8) // (8 * width))

    def blocks(self, width: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, rows [B, K] float64)`` over all rows, each read once."""
        size = self.block_rows(width)
        for start in range(0, self.num_samples, size):
            stop = min(start + size, self.num_samples)
            yield start, stop, self.read(start, stop)

    def columns(self) -> Iterator[Tensor]:
        """``[C, N]`` float64 blocks of Φᵀ; a store is read once per block of columns."""
        width = max(1, min(self.num_features, self.memory_budget // 4 // (8 * self.num_samples)))
        for start in range(0, self.num_features, width):
            stop = min(start + width, self.num_features)
            yield torch.cat([rows[:, start:stop] for _, _, rows in self.blocks()]).T

    def times_rows(self, left: Tensor, out: Tensor) -> Tensor:
        """Write ``left Φᵀ`` for ``left [M, K]`` float64 to ``out [M, N]``, which is returned."""
        for start, stop, rows in self.blocks(width=left.shape[0]):
            out[:, start:stop] = left @ rows.T
        return out

    def cross(self, left: Tensor) -> Tensor:
        """``left Φᵀ [M, N]`` float64."""
        return self.times_rows(left, left.new_empty(left.shape[0], self.num_samples))

    def moment(self, targets: Tensor) -> Tensor:
        """``Φᵀ targets [K, C]`` for ``targets [N, C]``, both float64."""
        moment = self.zeros(self.num_features, targets.shape[1])
        for start, stop, rows in self.blocks():
            moment += rows.T @ targets[start:stop]
        return moment
