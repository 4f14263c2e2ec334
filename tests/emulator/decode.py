"""Programs to steps: Python functions of a group of blocks, one per instruction.

Families of instructions add their builders to `BUILDERS` under the first word of the opcode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulationError, UnknownInstructionError
from .ptx import Instruction, Program, members
from .types import UNSIGNED, bits_of, dtype_of

if TYPE_CHECKING:
    from .machine import Group

Registers = list[np.ndarray]
Value = Callable[[Registers], np.ndarray]
Step = Callable[["Group"], int | None]
Builder = Callable[["Decoder", Instruction], Step]

BUILDERS: dict[str, Builder] = {}

_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]+)")
# %ntid and %nctaid are constants of a launch
_BY_THREAD = ("%tid.x", "%tid.y", "%tid.z", "%laneid", "%warpid")
_BY_BLOCK = ("%ctaid.x", "%ctaid.y", "%ctaid.z")
_BY_LAUNCH = ("%ntid.x", "%ntid.y", "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
SHARED_BASE = "global_smem"


def unknown(instruction: Instruction, why: str = "") -> UnknownInstructionError:
    """The error that names an instruction nothing here can run."""
    return UnknownInstructionError(
        f"line {instruction.line}: no meaning is known of {instruction}{': ' if why else ''}{why}"
    )


def step(*names: str) -> Callable[[Builder], Builder]:
    """Registers the builder of instructions that do more than compute one register."""

    def add(builder: Builder) -> Builder:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return add


def value(*names: str) -> Callable[[Callable[[Decoder, Instruction], Value]], None]:
    """Registers the builder of what instructions put into their first operand."""

    def add(builder: Callable[[Decoder, Instruction], Value]) -> None:
        def build(decoder: Decoder, instruction: Instruction) -> Step:
            compute = builder(decoder, instruction)
            return decoder.assign(instruction, instruction.operands[0], compute)

        for name in names:
            BUILDERS[name] = build

    return add


def check_modifiers(instruction: Instruction, allowed: Collection[str]) -> list[str]:
    """The words between an opcode's name and its types, all of which must be known."""
    words = instruction.parts[1:]
    if odd := [word for word in words if word not in allowed and not _is_type(word)]:
        raise unknown(instruction, f"modifier {odd[0]!r}")
    return words


@cache
def _is_type(word: str) -> bool:
    return bool(re.fullmatch(r"[busf](8|16|32|64)|pred|bf16|bf16x2|f16x2|tf32", word))


class Decoder:
    """Gives registers, constants and special values their slots while it builds steps.

    With ``like`` it goes on where the decoder of that code stopped.
    """

    def __init__(self, program: Program, like: Code | None = None) -> None:
        self.program = program
        self.slots: dict[object, int] = dict(like.slots) if like else {}
        self.names: list[str] = list(like.names) if like else []
        self.constants: dict[int, np.ndarray] = dict(like.constants) if like else {}
        self.place = 0
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.shared_grain = like.shared_grain if like else 16
        self.global_grain = like.global_grain if like else 4
        self.has_products = any(i.opcode.startswith("wgmma") for i in program.instructions)

    def _slot(self, key: object, name: str, constant: np.ndarray | None = None) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.slots)
            self.names.append(name)
            if constant is not None:
                self.constants[self.slots[key]] = constant.reshape(1, 1)
        return self.slots[key]

    def _constant(self, operand: str, bits: int) -> int | None:
        """The slot of an immediate operand, None if it is none."""
        if operand == SHARED_BASE:
            operand = "0"
        if _INTEGER.fullmatch(operand):
            number = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
            return self._slot((operand, bits), operand, np.array(number, UNSIGNED[bits]))
        if found := _FLOAT.fullmatch(operand):
            width = 32 if found[1] in "fF" else 64
            if width != bits:
                raise EmulationError(f"{operand} is no constant of {bits} bits")
            return self._slot(operand, operand, np.array(int(found[2], 16), UNSIGNED[width]))
        return None

    def source(self, operand: str, bits: int) -> int:
        """The slot that an operand is read from."""
        if operand[0] != "%":
            constant = self._constant(operand, bits)
            if constant is not None:
                return constant
        slot = self._slot(operand, operand)
        if operand not in (*_BY_THREAD, *_BY_BLOCK, *_BY_LAUNCH):
            width = self.program.width(operand)
            if width != bits:
                raise EmulationError(f"{operand} has {width} bits, and {bits} are read")
        self.reads.add(slot)
        return slot

    def target(self, operand: str) -> int:
        """The slot that a register is written to."""
        slot = self._slot(operand, operand)
        self.writes.add(slot)
        return slot

    def reader(self, operand: str, kind: str) -> Value:
        """An operand as an array of a type."""
        bits, dtype = bits_of(kind), dtype_of(kind)
        slot = self.source(operand, bits)
        if dtype is UNSIGNED.get(bits):
            return lambda r: r[slot]
        return lambda r: r[slot].view(dtype)

    def predicate(self, operand: str) -> Value:
        """A predicate, perhaps negated, or a constant one."""
        if operand.startswith("!"):
            inner = self.predicate(operand[1:])
            return lambda r: ~inner(r)
        if _INTEGER.fullmatch(operand):
            fixed = np.array([[int(operand, 0) != 0]])
            return lambda r: fixed
        slot = self.source(operand, 1)
        return lambda r: r[slot]

    def guard(self, instruction: Instruction) -> Value | None:
        """Where an instruction runs; None is everywhere."""
        if instruction.predicate is None:
            return None
        sign = "!" if instruction.negated else ""
        return self.predicate(sign + instruction.predicate)

    def assign(self, instruction: Instruction, operand: str, compute: Value) -> Step:
        """A step that puts what ``compute`` gives into a register, where the guard holds."""
        slot, guard = self.target(operand), self.guard(instruction)
        if guard is None:

            def put(group: Group) -> None:
                registers = group.registers
                registers[slot] = compute(registers)

            return put

        def put_some(group: Group) -> None:
            group.registers[slot] = merge(
                guard(group.registers), compute(group.registers), group.registers[slot]
            )

        return put_some


def merge(mask: np.ndarray, new: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """New values where a mask holds; a register never written holds zeros elsewhere."""
    return np.where(mask, new, np.zeros((), new.dtype) if old is None else old)


class Code:
    """A decoded program.

    Args:
        program: to decode.
        like: code of a program of the same kernel, of which what is equal is taken over.

    Attributes:
        steps: one per instruction.
        reads, writes: slots of each.
        names: of slots.
        shared_grain: bytes of its smallest access to shared memory.
        global_grain: the same of stores to global memory, at most 4.
    """

    def __init__(self, program: Program, like: Code | None = None) -> None:
        self.program = program
        decoder = Decoder(program, like)
        known: dict[Instruction, int] = {}
        if like and like.has_products == decoder.has_products:
            known = {instruction: i for i, instruction in enumerate(like.program.instructions)}
        self.steps: list[Step] = []
        self.reads: list[frozenset[int]] = []
        self.writes: list[frozenset[int]] = []
        for decoder.place, instruction in enumerate(program.instructions):
            place = known.get(instruction)
            # what may jump knows where it stands
            if like and place is not None and instruction.parts[0] not in ("bra", "ret", "exit"):
                self.steps.append(like.steps[place])
                self.reads.append(like.reads[place])
                self.writes.append(like.writes[place])
                continue
            builder = BUILDERS.get(instruction.parts[0])
            if builder is None:
                raise unknown(instruction)
            decoder.reads, decoder.writes = set(), set()
            try:
                built = builder(decoder, instruction)
            except UnknownInstructionError:
                raise
            except (EmulationError, ValueError, IndexError, KeyError) as error:
                raise unknown(instruction, str(error)) from error
            writes = frozenset(decoder.writes)
            if decoder.has_products and not instruction.opcode.startswith("wgmma"):
                built = _noting(built, writes)
            self.steps.append(built)
            self.reads.append(frozenset(decoder.reads))
            self.writes.append(writes)
        self.names, self.slots = decoder.names, decoder.slots
        self.shared_grain, self.global_grain = decoder.shared_grain, decoder.global_grain
        self.constants, self.has_products = decoder.constants, decoder.has_products

    def launch_constants(
        self, arguments: list[int], grid: tuple[int, int, int]
    ) -> list[np.ndarray | None]:
        """Registers before the first instruction, without what differs between blocks."""
        registers: list[np.ndarray | None] = [None] * len(self.slots)
        for slot, constant in self.constants.items():
            registers[slot] = constant

        def put(name: str, array: np.ndarray) -> None:
            if name in self.slots:
                registers[self.slots[name]] = array

        threads = np.arange(self.program.threads, dtype=np.uint32)[None, :]
        zero = np.zeros((1, 1), np.uint32)
        for name, array in zip(
            _BY_THREAD, (threads, zero, zero, threads % 32, threads // 32), strict=True
        ):
            put(name, array)
        sizes = (self.program.threads, 1, 1, *grid)
        for name, size in zip(_BY_LAUNCH, sizes, strict=True):
            put(name, zero + np.uint32(size))
        padded = arguments + [0] * (len(self.program.parameters) - len(arguments))
        for (name, bits), number in zip(self.program.parameters, padded, strict=True):
            put(name, np.array([[number & ((1 << bits) - 1)]], UNSIGNED[bits]))
        return registers

    def block_registers(
        self, constants: list[np.ndarray | None], blocks: np.ndarray
    ) -> list[np.ndarray | None]:
        """Registers of a group of blocks, whose numbers in the grid are ``[B, 3]``."""
        registers = list(constants)
        for axis, name in enumerate(_BY_BLOCK):
            if name in self.slots:
                registers[self.slots[name]] = blocks[:, axis : axis + 1].astype(np.uint32)
        return registers


def _noting(built: Step, writes: frozenset[int]) -> Step:
    """The same step, which notes registers written since the last wgmma.fence."""
    if not writes:
        return built

    def noting(group: Group) -> int | None:
        group.unfenced |= writes
        return built(group)

    return noting


def decode(program: Program, like: Code | None = None) -> Code:
    """Steps of a program, perhaps an edited one, ``like`` the code it was before.

    Raises:
        UnknownInstructionError: it has an instruction of no known meaning.
    """
    from . import control, floats, integers, matrix, moves, transfers  # noqa: F401

    return Code(program, like)


__all__ = [
    "BUILDERS",
    "Code",
    "Decoder",
    "check_modifiers",
    "decode",
    "members",
    "merge",
    "step",
    "unknown",
    "value",
]
