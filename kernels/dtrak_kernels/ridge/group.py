"""Processes that hold the rows between them: what each has is summed, or handed round.

    rows Φ_r [N_r, K] of process r  ->  Φ = [Φ_0; Φ_1; …] [N, K], never in one place

Every call is one that all processes make, in the same order. Where there is no process group, this
process has all rows and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """A process group of `torch.distributed`, or this process alone.

    Attributes:
        rank: of this process.
        world: how many there are.

    Args:
        group: the process group; None for this process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensors of one shape, in place; the same bits for all."""
        if self.world > 1:
            # of all ways to sum, only one place that adds is the same bits for all by definition
            dist.reduce(tensor, self._global(0), group=self._group)
            dist.broadcast(tensor, self._global(0), group=self._group)
        return tensor

    def each(self, tensor: Tensor) -> Iterator[Tensor]:
        """Everybody's tensor in turn, one held at a time; their first dimensions may differ."""
        if self.world == 1:
            yield tensor
            return
        for rank, size in enumerate(self.sizes(tensor.shape[0], tensor.device)):
            mine = rank == self.rank
            part = tensor.contiguous() if mine else tensor.new_empty(size, *tensor.shape[1:])
            # nothing to send
            if part.numel():
                dist.broadcast(part, self._global(rank), group=self._group)
            yield part

    def join(self, tensor: Tensor) -> Tensor:
        """Everybody's rows ``[N_r, ...]``, one after the other ``[N, ...]``."""
        return tensor if self.world == 1 else torch.cat(list(self.each(tensor)))

    def first(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first process's tensor on the CPU, of a shape that all know."""
        found = torch.empty(shape, dtype=dtype) if self.rank or tensor is None else tensor
        if self.world > 1:
            dist.broadcast(found, self._global(0), group=self._group)
        return found

    def join_columns(self, tensor: Tensor) -> Tensor:
        """Everybody's columns ``[M, N_r]``, side by side ``[M, N]``."""
        return tensor if self.world == 1 else self.join(tensor.T).T.contiguous()

    def sizes(self, size: int, device: torch.device) -> list[int]:
        """Everybody's number."""
        sizes = torch.zeros(self.world, dtype=torch.int64, device=device)
        sizes[self.rank] = size
        return [int(each) for each in self.sum(sizes)]

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)
