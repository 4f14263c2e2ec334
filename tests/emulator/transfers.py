"""Loads and stores, asynchronous copies, and the matrix loads and stores of a warp."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .decode import SHARED_BASE, Decoder, Registers, Step, Value, step, unknown
from .errors import DivergenceError, EmulationError
from .memory import IN_FLIGHT, Access
from .ptx import Instruction, members
from .types import SIGNED, UNSIGNED, bits_of

if TYPE_CHECKING:
    from .machine import Group

_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_CACHING = re.compile(r"ca|cg|cs|wb|wt|nc|L1::\w+|L2::\w+|cta|shared::cta|aligned|sync")


def _address(decoder: Decoder, operand: str, bits: int) -> Value:
    """Addresses as int64."""
    found = _ADDRESS.fullmatch(operand)
    if found is None:
        raise EmulationError(f"{operand!r} is no address")
    offset = int(found[2] or 0)
    if found[1] == SHARED_BASE:
        fixed = np.array([[offset]], np.int64)
        return lambda r: fixed
    base = decoder.reader(found[1], f"u{bits}")
    return lambda r: base(r).astype(np.int64) + offset


def _space(instruction: Instruction) -> tuple[str, int]:
    """Where an access goes, and the registers of a vector; other modifiers must be known."""
    space, count = "", 1
    for word in instruction.parts[1:-1]:
        if word in ("global", "shared", "shared::cta"):
            space = word[:6]
        elif re.fullmatch(r"v[248]", word):
            count = int(word[1])
        elif not _CACHING.fullmatch(word):
            raise unknown(instruction, f"modifier {word!r}")
    if not space:
        raise unknown(instruction, "a state space that is not told")
    return space, count


def _mask(group: Group, guard: Value | None) -> np.ndarray | None:
    """Where the guard holds, ``[B, T]``; None is everywhere."""
    if guard is None:
        return None
    mask = guard(group.registers)
    return None if mask.all() else group.whole(mask)


def _everywhere(group: Group, mask: np.ndarray | None) -> np.ndarray:
    return np.broadcast_to(True, group.shape) if mask is None else mask


def _count_traffic(
    group: Group,
    instruction: Instruction,
    space: str,
    address: np.ndarray,
    mask: np.ndarray | None,
    nbytes: int,
) -> None:
    """Notes an access where that is asked for."""
    if (traffic := group.machine.traffic) is not None:
        add = traffic.add_shared if space == "shared" else traffic.add_global
        whole = group.whole(address)
        add(instruction.line, whole, _everywhere(group, mask), nbytes)


def _extended(values: np.ndarray, kind: str, width: int) -> np.ndarray:
    """Loaded numbers as wide as their register."""
    if values.dtype.itemsize * 8 == width:
        return values
    if kind[0] == "s":
        narrow = SIGNED[bits_of(kind)]
        return values.view(narrow).astype(SIGNED[width]).view(UNSIGNED[width])
    return values.astype(UNSIGNED[width])


@step("ld")
def _load(decoder: Decoder, instruction: Instruction) -> Step:
    if instruction.parts[1] == "param":
        return _load_parameter(decoder, instruction)
    space, count = _space(instruction)
    kind = instruction.parts[-1]
    names = members(instruction.operands[0])
    if len(names) != count:
        raise unknown(instruction)
    slots = [(i, decoder.target(n)) for i, n in enumerate(names) if n != "_"]
    widths = [decoder.program.width(name) if name != "_" else 0 for name in names]
    address = _address(decoder, instruction.operands[1], 32 if space == "shared" else 64)
    guard, dtype = decoder.guard(instruction), UNSIGNED[bits_of(kind)]
    if space == "shared":
        decoder.shared_grain = min(decoder.shared_grain, count * dtype.itemsize)
    fetch = _fetch_shared if space == "shared" else _fetch_global

    def load(group: Group) -> None:
        registers, mask = group.registers, _mask(group, guard)
        if mask is not None and not mask.any():
            for place, slot in slots:
                if registers[slot] is None:
                    registers[slot] = np.zeros((1, 1), UNSIGNED[widths[place]])
            return
        places = address(registers)
        shape, rows = fetch(group, places, mask, count, dtype)
        _count_traffic(group, instruction, space, places, mask, count * dtype.itemsize)
        for place, slot in slots:
            values = _extended(np.ascontiguousarray(rows[:, place]), kind, widths[place])
            if mask is None:
                registers[slot] = values.reshape(shape)
                continue
            old = registers[slot]
            merged = np.zeros(shape, values.dtype)
            if old is not None:
                merged[...] = old
            merged[mask] = values
            registers[slot] = merged

    return load


def _fetch_shared(
    group: Group, address: np.ndarray, mask: np.ndarray | None, count: int, dtype: np.dtype
) -> tuple[tuple[int, ...], np.ndarray]:
    shared = group.machine.shared
    offsets = group.lanes(address, mask)
    shared.check(offsets, count * dtype.itemsize, "read")
    places = offsets + group.lanes(group.start, mask)
    return group.shape, shared.load(places, count, dtype, group.who(mask))


def _fetch_global(
    group: Group, address: np.ndarray, mask: np.ndarray | None, count: int, dtype: np.dtype
) -> tuple[tuple[int, ...], np.ndarray]:
    memory = group.machine.memory
    if mask is None and not memory.is_written(int(address.flat[0])):
        # all threads that share an address read once
        return address.shape, memory.load(address.reshape(-1), count, dtype, None)
    flat = group.lanes(address, mask)
    return group.shape, memory.load(flat, count, dtype, group.who(mask))


def _load_parameter(decoder: Decoder, instruction: Instruction) -> Step:
    found = _ADDRESS.fullmatch(instruction.operands[1])
    parameters = dict(decoder.program.parameters)
    kind, target = instruction.parts[-1], instruction.operands[0]
    if found is None or found[2] or found[1] not in parameters or instruction.parts[2:-1]:
        raise unknown(instruction)
    slot = decoder._slot(found[1], found[1])
    narrow, width = UNSIGNED[bits_of(kind)], decoder.program.width(target)
    if bits_of(kind) > parameters[found[1]]:
        raise unknown(instruction, "wider than the parameter")
    return decoder.assign(
        instruction, target, lambda r: _extended(r[slot].astype(narrow), kind, width)
    )


@step("st")
def _store(decoder: Decoder, instruction: Instruction) -> Step:
    space, count = _space(instruction)
    bits = bits_of(instruction.parts[-1])
    names = members(instruction.operands[1])
    if len(names) != count:
        raise unknown(instruction)
    values = [_low_bits(decoder, name, bits) for name in names]
    address = _address(decoder, instruction.operands[0], 32 if space == "shared" else 64)
    guard, size = decoder.guard(instruction), count * bits // 8
    if space == "shared":
        decoder.shared_grain = min(decoder.shared_grain, size)
    else:
        decoder.global_grain = min(decoder.global_grain, size)

    def store(group: Group) -> None:
        registers, mask = group.registers, _mask(group, guard)
        if mask is not None and not mask.any():
            return
        rows = np.stack([group.lanes(value(registers), mask) for value in values], axis=1)
        addresses = address(registers)
        places = group.lanes(addresses, mask)
        who = group.who(mask)
        _count_traffic(group, instruction, space, addresses, mask, size)
        if space == "global":
            group.machine.memory.store(places, rows, who)
            return
        shared = group.machine.shared
        shared.check(places, size, "write")
        shared.store(places + group.lanes(group.start, mask), rows, who)

    return store


def _low_bits(decoder: Decoder, name: str, bits: int) -> Value:
    """What is stored of a register that may be wider."""
    if not name.startswith("%") or decoder.program.width(name) == bits:
        return decoder.reader(name, f"b{bits}")
    whole = decoder.reader(name, f"b{decoder.program.width(name)}")
    return lambda r: whole(r).astype(UNSIGNED[bits])


@step("cp")
def _copy(decoder: Decoder, instruction: Instruction) -> Step:
    """cp.async of 4, 8 or 16 bytes per lane, its groups and its waits."""
    parts = instruction.parts
    if parts[1:3] == ["async", "commit_group"]:

        def commit(group: Group) -> None:
            group.copy_groups.append(group.copies)
            group.copies = []

        return commit
    if parts[1:3] == ["async", "wait_group"]:
        left = int(instruction.operands[0], 0)
        return lambda group: group.wait_copies(left)
    if parts[1:3] == ["async", "wait_all"]:

        def wait_all(group: Group) -> None:
            group.copy_groups.append(group.copies)
            group.copies = []
            group.wait_copies(0)

        return wait_all
    if parts[1] != "async" or parts[3:5] not in (["shared", "global"], ["shared::cta", "global"]):
        raise unknown(instruction)
    if len(instruction.operands) not in (3, 4):
        raise unknown(instruction)
    return _start_copy(decoder, instruction)


def _start_copy(decoder: Decoder, instruction: Instruction) -> Step:
    target = _address(decoder, instruction.operands[0], 32)
    source = _address(decoder, instruction.operands[1], 64)
    nbytes = int(instruction.operands[2], 0)
    length = instruction.operands[3] if len(instruction.operands) > 3 else str(nbytes)
    taken, guard = decoder.reader(length, "u32"), decoder.guard(instruction)
    decoder.shared_grain = min(decoder.shared_grain, nbytes)
    words = nbytes // 4

    def start(group: Group) -> None:
        from .machine import Copy

        registers, mask = group.registers, _mask(group, guard)
        if mask is not None and not mask.any():
            return
        shared = group.machine.shared
        sizes = group.lanes(taken(registers), mask)
        if ((sizes != 0) & (sizes != nbytes)).any():
            raise EmulationError("a copy of part of its bytes")
        live = sizes != 0
        rows = np.zeros((len(sizes), words), np.uint32)
        if live.any():
            everyone = group.whole(taken(registers) != 0)
            chosen = everyone if mask is None else everyone & mask
            sources = group.whole(source(registers))
            rows[live] = _fetch_global(group, sources, chosen, words, UNSIGNED[32])[1]
            _count_traffic(group, instruction, "global", sources, chosen, nbytes)
        offsets = group.lanes(target(registers), mask)
        shared.check(offsets, nbytes, "write")
        _count_traffic(group, instruction, "shared", target(registers), mask, nbytes)
        places, who = offsets + group.lanes(group.start, mask), group.who(mask)
        shared.store(places, rows, who)
        cells = shared.cells(places, nbytes)
        shared.written[cells] = IN_FLIGHT
        first = group.lanes(group.rows[:, None], mask)
        group.copies.append(Copy(cells, first, who.stamps - group.now))

    return start


def _fragment(group: Group, mask: Value | None, what: str) -> None:
    if mask is not None and not np.all(mask(group.registers)):
        raise DivergenceError(f"{what} under a mask")


def _matrix_rows(
    group: Group, instruction: Instruction, address: np.ndarray, count: int, what: str
) -> tuple[np.ndarray, Access]:
    """Places of ``count`` matrices' rows of 16 bytes, lanes 8 i to 8 i + 7 have those of the i-th.

    ``[B · W · 8 · count]`` in the order of lanes, and who they are.
    """
    shared = group.machine.shared
    taking = np.broadcast_to(np.arange(group.threads) % 32 < 8 * count, group.shape)
    offsets = group.lanes(address, taking)
    shared.check(offsets, 16, what)
    _count_traffic(group, instruction, "shared", address, taking, 16)
    return offsets + group.lanes(group.start, taking), group.who(taking)


def _count(instruction: Instruction) -> tuple[int, bool]:
    """Matrices, and whether they are transposed; everything else must be as it is known."""
    words = instruction.parts[1:]
    known = {"sync", "aligned", "m8n8", "trans", "shared", "shared::cta", "b16"}
    rest = [word for word in words if word not in known]
    if len(rest) != 1 or rest[0] not in ("x1", "x2", "x4") or "m8n8" not in words:
        raise unknown(instruction)
    return int(rest[0][1]), "trans" in words


@step("ldmatrix")
def _load_matrices(decoder: Decoder, instruction: Instruction) -> Step:
    """8 x 8 matrices of 16 bits: a lane gets columns ``2 (l mod 4)`` and the next of row l / 4."""
    count, is_transposed = _count(instruction)
    slots = [decoder.target(name) for name in members(instruction.operands[0])]
    address = _address(decoder, instruction.operands[1], 32)
    guard = decoder.guard(instruction)

    def load(group: Group) -> None:
        _fragment(group, guard, "ldmatrix")
        shared, blocks = group.machine.shared, group.shape[0]
        places, who = _matrix_rows(group, instruction, address(group.registers), count, "read")
        shared.note_read(shared.cells(places, 16), who.stamps[:, None], who.now)
        rows = shared.data.view(np.uint16).reshape(-1, 8)[places // 16]
        tiles = rows.reshape(blocks, group.threads // 32, count, 8, 8)
        if is_transposed:
            tiles = tiles.swapaxes(-1, -2)
        words = np.ascontiguousarray(tiles).view(np.uint32)
        for place, slot in enumerate(slots):
            group.registers[slot] = words[:, :, place].reshape(group.shape)

    return load


@step("stmatrix")
def _store_matrices(decoder: Decoder, instruction: Instruction) -> Step:
    count, is_transposed = _count(instruction)
    values = [decoder.reader(name, "b32") for name in members(instruction.operands[1])]
    address = _address(decoder, instruction.operands[0], 32)
    guard = decoder.guard(instruction)

    def store(group: Group) -> None:
        _fragment(group, guard, "stmatrix")
        registers: Registers = group.registers  # type: ignore[assignment]
        blocks, warps = group.shape[0], group.threads // 32
        places, who = _matrix_rows(group, instruction, address(registers), count, "write")
        words = np.stack([group.whole(value(registers)) for value in values], 1)
        tiles = words.reshape(blocks, count, warps, 8, 4).view(np.uint16)
        if is_transposed:
            tiles = tiles.swapaxes(-1, -2)
        rows = np.ascontiguousarray(tiles.swapaxes(1, 2)).reshape(-1, 8)
        group.machine.shared.store(places, rows, who)

    return store
