"""Runs a program: blocks side by side in lock step for as long as they take the same branches.

A register is an array that broadcasts to ``[blocks, threads]``: what all threads of a block share
is ``[blocks, 1]``, what all blocks share ``[1, threads]``, so that most address arithmetic is done
once. Threads of a block may not part ways; blocks may, and go on as two groups.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import (
    DivergenceError,
    EmulationError,
    SerializedWarning,
    UnfinishedError,
    UninitializedError,
)
from .memory import SEVERAL, Access, GlobalMemory, SharedMemory

if TYPE_CHECKING:
    from .decode import Code
    from .traffic import Traffic

# threads in lock step: enough to hide Python's part, few enough for the processor's caches
MAX_LANES = 8192
EXIT = -1


@dataclass
class Copy:
    """A cp.async on its way: cells of shared memory, their blocks' rows, stamps of warps."""

    cells: np.ndarray
    rows: np.ndarray
    warps: np.ndarray


@dataclass
class Product:
    """A wgmma on its way: what it reads and which registers it owns."""

    cells: np.ndarray
    rows: np.ndarray
    results: frozenset[int]
    operands: frozenset[int]


@dataclass
class Group:
    """Blocks in lock step.

    Attributes:
        rows: of the blocks in shared memory.
        blocks: their numbers in the grid, ``[B, 3]``.
        numbers: the same, counted.
        registers: by slot; None before the first write.
        interval: barriers passed, from 1 on.
    """

    machine: Machine
    rows: np.ndarray
    blocks: np.ndarray
    numbers: np.ndarray
    registers: list[np.ndarray | None]
    pc: int = 0
    interval: int = 1
    copies: list[Copy] = field(default_factory=list)
    copy_groups: deque[list[Copy]] = field(default_factory=deque)
    products: list[Product] = field(default_factory=list)
    product_groups: deque[list[Product]] = field(default_factory=deque)
    # registers of products on their way
    results: set[int] = field(default_factory=set)
    operands: set[int] = field(default_factory=set)
    # registers written since the last wgmma.fence, kept where there are products
    unfenced: set[int] = field(default_factory=set)
    # matrices that registers were read as
    fragments: dict[tuple[int, ...], tuple[list[np.ndarray], np.ndarray]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self.threads = self.machine.code.program.threads
        self.shape = (len(self.rows), self.threads)
        self.warps = (np.arange(self.threads) // 32).astype(np.uint32)[None, :]
        # of each lane's block: its shared memory, and its number
        start = (self.rows * self.machine.shared.pitch)[:, None]
        self.start = np.ascontiguousarray(self.whole(start))
        self.own = np.ascontiguousarray(self.whole(self.numbers[:, None]))
        self._count_barriers(0)

    def _count_barriers(self, passed: int) -> None:
        self.interval += passed
        self.now = np.uint32(self.interval * 64)
        self.stamps = np.ascontiguousarray(self.whole(self.now + self.warps))
        self.everyone = Access(self.stamps.reshape(-1), self.now, self.own.reshape(-1))

    def barrier(self) -> None:
        """Every thread has arrived."""
        self._count_barriers(1)

    def who(self, mask: np.ndarray | None) -> Access:
        """The lanes that take part, all of them if ``mask`` is None."""
        if mask is None:
            return self.everyone
        return Access(self.stamps[mask], self.now, self.own[mask])

    def lanes(self, values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """One value per lane that takes part."""
        whole = self.whole(values)
        return whole.reshape(-1) if mask is None else whole[mask]

    def whole(self, values: np.ndarray) -> np.ndarray:
        """``[blocks, threads]`` of a register."""
        return values if values.shape == self.shape else np.broadcast_to(values, self.shape)

    def uniform(self, mask: np.ndarray, what: str) -> np.ndarray:
        """``[B]`` of a mask on which each block's threads agree.

        Raises:
            DivergenceError: they do not.
        """
        if mask.shape[1] == 1:
            return np.broadcast_to(mask[:, 0], self.shape[:1])
        every, some = mask.all(axis=1), mask.any(axis=1)
        if (every != some).any():
            raise DivergenceError(f"{what} is taken by some threads of a block only")
        return np.broadcast_to(every, self.shape[:1])

    def wait_copies(self, left: int) -> None:
        """cp.async.wait_group: what all but the last groups copied is there for their warps."""
        shared = self.machine.shared
        while len(self.copy_groups) > left:
            for copy in self.copy_groups.popleft():
                shared.written[copy.cells] = (self.now + copy.warps)[:, None]
                shared.mark_unfenced(copy.cells)

    def wait_products(self, left: int) -> None:
        """wgmma.wait_group: results of all but the last groups are there, operands are free."""
        shared = self.machine.shared
        while len(self.product_groups) > left:
            for product in self.product_groups.popleft():
                shared.read[product.cells] = self.now + SEVERAL
        rest = [p for group in self.product_groups for p in group] + self.products
        self.results = set().union(*(p.results for p in rest))
        self.operands = set().union(*(p.operands for p in rest))
        for product in rest:
            shared.read[product.cells] = np.uint32(0xFFFFFF00)

    def split(self, chosen: np.ndarray, pc: int) -> Group:
        """The chosen blocks as a group of their own that goes on at ``pc``."""
        size = len(self.rows)

        def part(array: np.ndarray | None) -> np.ndarray | None:
            return array[chosen] if array is not None and array.shape[0] == size > 1 else array

        rows = self.rows[chosen]

        def copies(group: list[Copy]) -> list[Copy]:
            kept = [(c, np.isin(c.rows, rows)) for c in group]
            return [Copy(c.cells[k], c.rows[k], c.warps[k]) for c, k in kept]

        def products(group: list[Product]) -> list[Product]:
            kept = [(p, np.isin(p.rows, rows)) for p in group]
            return [Product(p.cells[k], p.rows[k], p.results, p.operands) for p, k in kept]

        return Group(
            self.machine,
            rows,
            self.blocks[chosen],
            self.numbers[chosen],
            [part(register) for register in self.registers],
            pc,
            self.interval,
            copies(self.copies),
            deque(copies(group) for group in self.copy_groups),
            products(self.products),
            deque(products(group) for group in self.product_groups),
            set(self.results),
            set(self.operands),
            set(self.unfenced),
        )


class Machine:
    """One launch of a program.

    Args:
        code: the program, decoded.
        memory: what its pointers may point to.
        arguments: parameters as integers, pointers as addresses, floats as bits; missing: 0.
        shared_bytes: of a block.
        grid: blocks along x, y and z.
        traffic: counts what is moved, if it is asked for.
    """

    def __init__(
        self,
        code: Code,
        memory: GlobalMemory,
        arguments: list[int],
        shared_bytes: int,
        grid: tuple[int, int, int],
        traffic: Traffic | None = None,
    ) -> None:
        self.code, self.memory, self.grid, self.traffic = code, memory, grid, traffic
        self.at_once = max(1, MAX_LANES // code.program.threads)
        self.constants = code.launch_constants(arguments, grid)
        self.shared_bytes = shared_bytes
        # how often each straight run of instructions was executed, times blocks
        self.runs: Counter[tuple[int, int]] = Counter()
        self.waiting: list[Group] = []

    def run(self) -> Counter[tuple[int, int]]:
        """Run all blocks; returns how often each run of instructions (first, last) was executed."""
        x, y, z = self.grid
        count = x * y * z
        with np.errstate(all="ignore"):
            for first in range(0, count, self.at_once):
                numbers = np.arange(first, min(count, first + self.at_once))
                blocks = np.stack([numbers % x, numbers // x % y, numbers // (x * y)], axis=1)
                self.shared = SharedMemory(len(numbers), self.shared_bytes, self.code.shared_grain)
                registers = self.code.block_registers(self.constants, blocks)
                group = Group(self, np.arange(len(numbers)), blocks, numbers, registers)
                self.waiting = [group]
                while self.waiting:
                    self._run(self.waiting.pop())
        return self.runs

    def fork(self, group: Group, taken: np.ndarray, target: int, pc: int) -> int | None:
        """Where a group goes on whose blocks take a branch or not."""
        if taken.all():
            return target
        if not taken.any():
            return None
        self.waiting.append(group.split(~taken, pc + 1))
        self.waiting.append(group.split(taken, target))
        return EXIT

    def _run(self, group: Group) -> None:
        steps, end, start = self.code.steps, len(self.code.steps), group.pc
        pc = start
        try:
            while start != EXIT:
                target: int | None = EXIT
                for pc in range(start, end):
                    if group.results:
                        self._check_busy(group, pc)
                    target = steps[pc](group)
                    if target is not None:
                        break
                self.runs[start, pc] += len(group.rows)
                start = EXIT if target is None else target
        except EmulationError as error:
            raise self._located(error, group, pc) from None
        except (AttributeError, TypeError, ValueError) as error:
            slots = self.code.reads[pc]
            missing = [self.code.names[s] for s in slots if group.registers[s] is None]
            if not missing:
                raise
            undefined = UninitializedError(f"register {missing[0]} was never written")
            raise self._located(undefined, group, pc) from error

    def _check_busy(self, group: Group, pc: int) -> None:
        if self.code.program.instructions[pc].opcode.startswith("wgmma"):
            return
        reads, writes = self.code.reads[pc], self.code.writes[pc]
        if not group.results.isdisjoint(reads | writes):
            raise UnfinishedError("a register of a wgmma was used before its wait")
        if not group.operands.isdisjoint(writes):
            warnings.warn(
                f"{self.code.program.name}: a register that a wgmma may still read is written: "
                "ptxas makes its products wait for one another",
                SerializedWarning,
                stacklevel=2,
            )

    def _located(self, error: EmulationError, group: Group, pc: int) -> EmulationError:
        program = self.code.program
        instruction = program.instructions[pc]
        block = tuple(int(i) for i in group.blocks[0])
        others = f" and {len(group.rows) - 1} more" if len(group.rows) > 1 else ""
        where = f"{program.name}, line {instruction.line}, block {block}{others}"
        return type(error)(f"{where}: {instruction}: {error}")
