"""Features with half the difference of two halves of their timesteps behind them, for their noise.

A feature is a mean over S timesteps, each with noise of its own. Half the difference of two halves
has the covariance of the feature's own noise, and costs no further forward or backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .store import Store


def order_halves(timesteps: tuple[int, ...]) -> tuple[int, ...]:
    """Every other one from the first on, then the others."""
    return (*timesteps[::2], *timesteps[1::2])


def combine_halves(halves: Tensor) -> Tensor:
    """Features and half differences ``[B, 2K]`` of the halves' parts of the mean ``[2B, K]``."""
    first, second = halves.unflatten(0, (-1, 2)).unbind(1)
    return torch.cat([first + second, first - second], dim=1)


class Columns:
    """A half of the columns of a store ``[N, 2K]``, as a store ``[N, K]`` that is read.

    Args:
        store: of settings with halves.
        half: 0 for the features, 1 for the half differences.
    """

    def __init__(self, store: Store, half: int) -> None:
        self.store, self.ids, self.batch_size = store, store.ids, store.batch_size
        self.shape = (store.shape[0], store.shape[1] // 2)
        self._columns = slice(half * self.shape[1], (half + 1) * self.shape[1])

    def load(self) -> Tensor:
        """All of them, ``[N, K]``."""
        return self[:]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """A contiguous slice of rows, ``[rows, K]``."""
        return self.store[rows][:, self._columns].contiguous()
