"""Where the rows of samples come from: memory, files that are decoded when asked for, a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# decoded pixels that are kept, one byte each: those of most data sets of small images
KEPT_BYTES = 512 * 2**20


class Rows(ABC):
    """N rows of one shape, read by their positions.

    Attributes:
        shape: ``(N, ...)``.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, positions: Sequence[int]) -> Tensor:
        """Rows ``[B, ...]`` float32, on the CPU, in the order asked for."""

    def __len__(self) -> int:
        return self.shape[0]


class InMemory(Rows):
    """Rows of a tensor ``[N, ...]``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def read(self, positions: Sequence[int]) -> Tensor:
        """See `Rows.read`."""
        if isinstance(positions, range) and positions.step == 1:
            return self.tensor[positions.start : positions.stop]
        return self.tensor[list(positions)]


class Decoded(Rows):
    """Pictures ``[N, C, H, W]``, decoded when they are asked for; the first ones are kept.

    Args:
        kept: ``[n, C, H, W]`` uint8, the first n, decoded already.
        decode: of the others, by position: ``[C, H, W]`` uint8.
        count: N.
    """

    def __init__(self, kept: np.ndarray, decode: Callable[[int], np.ndarray], count: int) -> None:
        self.kept, self.decode = torch.from_numpy(kept), decode
        self.shape = (count, *kept.shape[1:])

    def read(self, positions: Sequence[int]) -> Tensor:
        """See `Rows.read`."""
        chosen = list(positions)
        if all(position < len(self.kept) for position in chosen):
            return from_uint8(self.kept[chosen])
        pixels = torch.empty(len(chosen), *self.shape[1:], dtype=torch.uint8)
        for row, position in enumerate(chosen):
            is_kept = position < len(self.kept)
            pixels[row] = (
                self.kept[position] if is_kept else torch.from_numpy(self.decode(position))
            )
        return from_uint8(pixels)


class Stored(Rows):
    """Rows of a store of flattened ones, ``store[i:j]`` of which gives ``[j - i, size]``.

    Args:
        store: with ``shape``.
        shape: of one row.
    """

    def __init__(self, store: Any, shape: Sequence[int]) -> None:
        self.store, self.shape = store, (store.shape[0], *shape)

    def read(self, positions: Sequence[int]) -> Tensor:
        """See `Rows.read`."""
        chosen, parts, first = list(positions), [], 0
        for last in range(1, len(chosen) + 1):
            # neighbours are read together
            if last == len(chosen) or chosen[last] != chosen[last - 1] + 1:
                parts.append(self.store[chosen[first] : chosen[last - 1] + 1])
                first = last
        flat = torch.cat(parts) if parts else torch.empty(0, self.store.shape[1])
        return flat.unflatten(1, self.shape[1:])


class Chosen(Rows):
    """Some rows of others, in an order of their own."""

    def __init__(self, rows: Rows, positions: Sequence[int]) -> None:
        self.rows, self.positions = rows, positions
        self.shape = (len(positions), *rows.shape[1:])

    def read(self, positions: Sequence[int]) -> Tensor:
        """See `Rows.read`."""
        return self.rows.read([self.positions[position] for position in positions])


class Joined(Rows):
    """Rows of one shape one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self.shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        self._places = [(part, position) for part in self.parts for position in range(len(part))]

    def read(self, positions: Sequence[int]) -> Tensor:
        """See `Rows.read`."""
        read = [self._places[position] for position in positions]
        found = [part.read([position]) for part, position in read]
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:])


def from_uint8(pixels: Tensor) -> Tensor:
    """Bring uint8 pixels to float32 in [-1, 1]; ``to_uint8`` undoes it exactly."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)
