"""Counts of what launches move: sectors of global memory, and wavefronts of shared memory.

A card serves 32 banks of 4 bytes at a time: a warp's access takes as many wavefronts as the busiest
bank has different words, for each 128 bytes the warp asks for. Global memory is read and written
in sectors of 32 bytes; a sector that several lanes of a warp touch moves once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

BANKS = 32
SECTOR = 32


@dataclass
class Access:
    """What one instruction did in all warps of all blocks.

    Attributes:
        warps: times that a warp executed it with a lane taking part.
        units: wavefronts of shared memory, or sectors of global memory.
        least: the same if no two words met in a bank, or if no byte of a sector was left out.
    """

    warps: int = 0
    units: int = 0
    least: int = 0


@dataclass
class Traffic:
    """Counts by line of the PTX; ``sectors`` are those that a launch touches at all."""

    shared: dict[int, Access] = field(default_factory=lambda: defaultdict(Access))
    global_: dict[int, Access] = field(default_factory=lambda: defaultdict(Access))
    _sectors: list[np.ndarray] = field(default_factory=list)

    def add_shared(self, line: int, offsets: np.ndarray, mask: np.ndarray, nbytes: int) -> None:
        """Accesses of ``nbytes`` a lane, ``[B, T]``."""
        words = max(1, nbytes // 4)
        lanes = BANKS // words
        phases, taking = offsets.reshape(-1, lanes), mask.reshape(-1, lanes)
        touched = (phases // 4)[..., None] + np.arange(words)
        # words that no lane touches sort first
        touched = np.where(taking[..., None], touched, -1).reshape(len(phases), -1)
        touched.sort(axis=1)
        is_new = np.diff(touched, axis=1, prepend=-1) != 0
        row = np.arange(len(touched))[:, None] * BANKS
        counts = np.bincount(
            (row + touched % BANKS)[is_new], minlength=len(touched) * BANKS
        ).reshape(-1, BANKS)
        access = self.shared[line]
        access.warps += int(mask.reshape(-1, 32).any(axis=1).sum())
        access.units += int(counts.max(axis=1).sum())
        access.least += int(taking.any(axis=1).sum())

    def add_global(self, line: int, addresses: np.ndarray, mask: np.ndarray, nbytes: int) -> None:
        """Accesses of ``nbytes`` a lane, ``[B, T]``."""
        warps, taking = addresses.reshape(-1, 32) // SECTOR, mask.reshape(-1, 32)
        sectors = np.sort(np.where(taking, warps, -1), axis=1)
        is_new = np.diff(sectors, axis=1, prepend=-1) != 0
        chosen = np.where(taking, addresses.reshape(-1, 32), -1)
        chosen.sort(axis=1)
        asked = (np.diff(chosen, axis=1, prepend=-1) != 0).sum(axis=1) * nbytes
        access = self.global_[line]
        access.warps += int(taking.any(axis=1).sum())
        access.units += int(is_new.sum())
        access.least += int((-(-asked // SECTOR)).sum())
        self._sectors.append(np.unique(sectors[is_new]))

    @property
    def l2_bytes(self) -> int:
        """Bytes of the sectors that warps asked for."""
        return SECTOR * sum(access.units for access in self.global_.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the sectors that were asked for at all, as if a cache kept them all."""
        self._sectors = [np.unique(np.concatenate(self._sectors))] if self._sectors else []
        return SECTOR * sum(len(sectors) for sectors in self._sectors)
