"""Global and shared memory, with a shadow that knows who touched what since the last barrier.

The shadow holds a stamp per cell, the smallest access a program makes: 64 times the number of
barriers its block has passed, plus a warp. A stamp is of the present interval if it is at least
``now``, the stamp of warp 0; then only its own warp may go on from there. Stamps above all others
mean memory that nothing was written to, and memory that something asynchronous still uses.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np

from .errors import (
    ConflictError,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    UnfinishedError,
    UninitializedError,
)

UNWRITTEN = np.uint32(0xFFFFFFFF)
IN_FLIGHT = np.uint32(0xFFFFFF00)
# the warp of a stamp that stands for several
SEVERAL = np.uint32(63)
POISON = 0xFF


@dataclass(frozen=True)
class Access:
    """Who accesses memory: one element per lane that takes part, in the lanes' order.

    Attributes:
        stamps: of each lane's warp, now.
        now: the smallest stamp since the last barrier.
        blocks: number of each lane's block in the launch.
    """

    stamps: np.ndarray
    now: np.uint32
    blocks: np.ndarray


def _check_aligned(addresses: np.ndarray, nbytes: int, what: str) -> None:
    wrong = addresses & (nbytes - 1)
    if wrong.any():
        first = int(addresses[np.argmax(wrong != 0)])
        raise MisalignedError(f"{what} of {nbytes} bytes at {first:#x}, which is not aligned")


def _store(view: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
    """Write rows, and find lanes that write different ones to the same place."""
    view[index] = values
    lost = (view[index] != values).any(axis=-1)
    if lost.any():
        lane = int(np.argmax(lost))
        raise ConflictError(
            f"{int(lost.sum())} lanes write other values than another lane to the same address, "
            f"first lane {lane} of those that write"
        )


@dataclass
class Allocation:
    """A piece of global memory: its address, its bytes, and who wrote to it in this launch."""

    base: int
    data: np.ndarray
    owners: np.ndarray | None = field(default=None, repr=False)
    stamps: np.ndarray | None = field(default=None, repr=False)

    def view(self, count: int, dtype: np.dtype) -> np.ndarray:
        """The bytes as rows of ``count`` elements."""
        size = count * dtype.itemsize
        whole = len(self.data) // size * size
        return self.data[:whole].view(dtype).reshape(-1, count)


class GlobalMemory:
    """Allocations by address.

    Args:
        allocations: base address and bytes of each; they do not overlap.
        grain: bytes of a cell of the shadow.
    """

    def __init__(self, allocations: dict[int, np.ndarray], grain: int = 4) -> None:
        self.grain = grain
        self._bases = sorted(allocations)
        self._allocations = [Allocation(base, allocations[base]) for base in self._bases]

    def locate(
        self, addresses: np.ndarray, nbytes: int, what: str
    ) -> tuple[Allocation, np.ndarray]:
        """The allocation that all of these addresses lie in, and their offsets.

        Raises:
            OutOfBoundsError, MisalignedError: an address is not good for ``nbytes``.
        """
        first = int(addresses[0])
        place = bisect.bisect_right(self._bases, first) - 1
        if place < 0:
            raise OutOfBoundsError(f"{what} of {nbytes} bytes at {first:#x}, which is in no tensor")
        allocation = self._allocations[place]
        offsets = addresses - allocation.base
        if offsets.min() < 0 or offsets.max() + nbytes > len(allocation.data):
            wrong = (offsets < 0) | (offsets + nbytes > len(allocation.data))
            raise OutOfBoundsError(
                f"{what} of {nbytes} bytes at offset {int(offsets[np.argmax(wrong)])} "
                f"of a tensor of {len(allocation.data)} bytes"
            )
        _check_aligned(addresses, nbytes, what)
        if allocation.base % nbytes:
            raise MisalignedError(f"a tensor's memory starts at {allocation.base:#x}")
        return allocation, offsets

    def _cells(self, offsets: np.ndarray, nbytes: int) -> np.ndarray:
        first = (offsets // self.grain)[:, None]
        return first + np.arange(max(1, nbytes // self.grain))

    def load(
        self, addresses: np.ndarray, count: int, dtype: np.dtype, who: Access | None
    ) -> np.ndarray:
        """Rows of ``count`` elements, one per address; ``who`` may be None before any store."""
        nbytes = count * dtype.itemsize
        allocation, offsets = self.locate(addresses, nbytes, "read")
        if allocation.owners is not None and who is not None:
            assert allocation.stamps is not None
            cells = self._cells(offsets, nbytes)
            owners, stamps = allocation.owners[cells], allocation.stamps[cells]
            foreign = (owners != 0) & (owners != who.blocks[:, None] + 1)
            if foreign.any():
                raise RaceError("read of global memory that another block of this launch wrote")
            recent = (owners != 0) & (stamps >= who.now) & (stamps != who.stamps[:, None])
            if recent.any():
                raise RaceError("read of global memory that another warp wrote, with no barrier")
        return allocation.view(count, dtype)[offsets // nbytes]

    def is_written(self, address: int) -> bool:
        """Whether this launch has written to the allocation of an address."""
        place = bisect.bisect_right(self._bases, address) - 1
        return place >= 0 and self._allocations[place].owners is not None

    def store(self, addresses: np.ndarray, values: np.ndarray, who: Access) -> None:
        """Write one row of values per address."""
        nbytes = values.shape[1] * values.dtype.itemsize
        allocation, offsets = self.locate(addresses, nbytes, "write")
        if allocation.owners is None or allocation.stamps is None:
            count = -(-len(allocation.data) // self.grain)
            allocation.owners = np.zeros(count, np.int32)
            allocation.stamps = np.zeros(count, np.uint32)
        cells = self._cells(offsets, nbytes)
        owners, mine = allocation.owners[cells], who.blocks[:, None] + 1
        if ((owners != 0) & (owners != mine)).any():
            raise RaceError("two blocks of one launch write to the same global memory")
        view, index = allocation.view(values.shape[1], values.dtype), offsets // nbytes
        stamps = allocation.stamps[cells]
        recent = (owners != 0) & (stamps >= who.now) & (stamps != who.stamps[:, None])
        if recent.any() and (view[index] != values)[recent.any(axis=1)].any():
            raise RaceError("two warps write to the same global memory, with no barrier")
        _store(view, index, values)
        allocation.owners[cells] = mine
        allocation.stamps[cells] = who.stamps[:, None]
        if (allocation.owners[cells] != mine).any():
            raise RaceError("two blocks of one launch write to the same global memory")


class SharedMemory:
    """The shared memory of the blocks of a launch, side by side.

    Args:
        blocks: how many.
        size: bytes of each.
        grain: bytes of a cell of the shadow.
    """

    def __init__(self, blocks: int, size: int, grain: int) -> None:
        self.size, self.grain = size, grain
        # whole rows of every access, beyond which nothing is in bounds
        self.pitch = -(-size // 128) * 128
        self.data = np.full(blocks * self.pitch, POISON, np.uint8)
        cells = blocks * self.pitch // grain
        self.written = np.full(cells, UNWRITTEN)
        self.read = np.zeros(cells, np.uint32)
        # written by ordinary stores since the last proxy fence; kept where products read it
        self.unfenced = np.zeros(cells, bool)
        self.has_unfenced = False

    def check(self, offsets: np.ndarray, nbytes: int, what: str) -> None:
        """Raises where offsets inside a block are not good for ``nbytes``."""
        if offsets.min() < 0 or offsets.max() + nbytes > self.size:
            wrong = (offsets < 0) | (offsets + nbytes > self.size)
            raise OutOfBoundsError(
                f"{what} of {nbytes} bytes at {int(offsets.ravel()[np.argmax(wrong)])} "
                f"of {self.size} bytes of shared memory"
            )
        _check_aligned(offsets.ravel(), nbytes, what)

    def cells(self, places: np.ndarray, nbytes: int) -> np.ndarray:
        """Cells of accesses, ``[n, cells each]``."""
        return (places // self.grain)[:, None] + np.arange(nbytes // self.grain)

    def note_read(self, cells: np.ndarray, stamps: np.ndarray, now: np.uint32) -> None:
        """A read of cells by warps whose stamps are given, ``[n, 1]``."""
        written = self.written[cells]
        if (written >= now).any():
            if (written == UNWRITTEN).any():
                raise UninitializedError("read of shared memory that nothing was written to")
            if (written >= IN_FLIGHT).any():
                raise UnfinishedError("read of an asynchronous copy before its wait")
            if ((written >= now) & (written != stamps)).any():
                raise RaceError("read of shared memory that another warp wrote, with no barrier")
        before = self.read[cells]
        self.read[cells] = stamps
        several = (self.read[cells] != stamps) | ((before >= now) & (before != stamps))
        if several.any():
            self.read[cells[several]] = now + SEVERAL

    def check_write(
        self, cells: np.ndarray, stamps: np.ndarray, now: np.uint32, changed: np.ndarray | None
    ) -> None:
        """A write to cells: nothing may still use them. ``changed``: rows that hold other bits."""
        written = self.written[cells]
        recent = (written >= now) & (written != UNWRITTEN)
        if recent.any():
            if (recent & (written >= IN_FLIGHT)).any():
                raise UnfinishedError("write to the place of an asynchronous copy before its wait")
            other = (recent & (written != stamps)).any(axis=1)
            if (other if changed is None else other & changed).any():
                raise RaceError("two warps write to the same shared memory, with no barrier")
        read = self.read[cells]
        if (read >= now).any():
            if (read >= IN_FLIGHT).any():
                raise UnfinishedError("write to an operand that a product may still read")
            if ((read >= now) & (read != stamps)).any():
                raise RaceError("write to shared memory that another warp read, with no barrier")

    def load(self, places: np.ndarray, count: int, dtype: np.dtype, who: Access) -> np.ndarray:
        """Rows of ``count`` elements at places (a block's start plus an offset)."""
        nbytes = count * dtype.itemsize
        self.note_read(self.cells(places, nbytes), who.stamps[:, None], who.now)
        return self.data.view(dtype).reshape(-1, count)[places // nbytes]

    def store(self, places: np.ndarray, values: np.ndarray, who: Access) -> None:
        """Write one row of values per place."""
        nbytes = values.shape[1] * values.dtype.itemsize
        view = self.data.view(values.dtype).reshape(-1, values.shape[1])
        index, cells = places // nbytes, self.cells(places, nbytes)
        stamps = who.stamps[:, None]
        self.check_write(cells, stamps, who.now, (view[index] != values).any(axis=1))
        _store(view, index, values)
        self.written[cells] = stamps
        self.mark_unfenced(cells)

    def mark_unfenced(self, cells: np.ndarray) -> None:
        """Cells hold what the asynchronous proxy has not been told of."""
        self.unfenced[cells] = True
        self.has_unfenced = True

    def fence(self, blocks: np.ndarray) -> None:
        """A proxy fence of these blocks."""
        if self.has_unfenced:
            rows = self.unfenced.reshape(-1, self.pitch // self.grain)
            rows[blocks] = False
            self.has_unfenced = bool(self.unfenced.any())
