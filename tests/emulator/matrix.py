"""Tensor cores: products of a warp (mma.sync) and of a warp group (wgmma).

Products of 16-bit numbers and their sums are formed in float64 and rounded to float32 once per
instruction; a card rounds in ways of its own that are not told.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .decode import Decoder, Step, Value, step, unknown
from .errors import DivergenceError, EmulationError, RaceError, UnfinishedError, UninitializedError
from .memory import IN_FLIGHT, UNWRITTEN
from .ptx import Instruction, members
from .types import float_of_bf16, halves

if TYPE_CHECKING:
    from .machine import Group

# of a fragment: the lane's row (or column) and its place among the four lanes of a row
# dimensions are called g = lane / 4, t = lane mod 4, h = half of a word


def _words(group: Group, values: list[Value]) -> np.ndarray:
    """Registers of a fragment, ``[registers, B, W, 8, 4]``."""
    return _stacked(group, [value(group.registers) for value in values])


def _stacked(group: Group, words: list[np.ndarray]) -> np.ndarray:
    whole = np.empty((len(words), *group.shape), np.uint32)
    for row, word in zip(whole, words, strict=True):
        row[...] = word
    return whole.reshape(len(words), group.shape[0], group.threads // 32, 8, 4)


def _matrix(group: Group, values: list[Value], read: Callable, kind: str) -> np.ndarray:
    """What registers hold as float64; several products read the same ones."""
    words = [value(group.registers) for value in values]
    key = (id(read), *map(id, words))
    # the arrays are kept, or another one could get an identity
    if (found := group.fragments.get(key)) is None:
        if len(group.fragments) >= 64:
            group.fragments.clear()
        stacked = _stacked(group, words)
        found = group.fragments[key] = (words, read(stacked, kind).astype(np.float64))
    return found[1]


@step("mma")
def _multiply(decoder: Decoder, instruction: Instruction) -> Step:
    words = instruction.parts
    shape = words[3] if len(words) > 3 else ""
    if words[1:3] != ["sync", "aligned"] or words[4:6] != ["row", "col"] or len(words) != 10:
        raise unknown(instruction)
    result, left, right, start = words[6:]
    if (result, start) != ("f32", "f32") or left != right or instruction.predicate:
        raise unknown(instruction)
    read_left, read_right = {
        ("m16n8k16", "f16"): (_left_16, _right_16),
        ("m16n8k16", "bf16"): (_left_16, _right_16),
        ("m16n8k8", "f16"): (_left_16, _right_16),
        ("m16n8k8", "bf16"): (_left_16, _right_16),
        ("m16n8k8", "tf32"): (_left_32, _right_32),
        ("m16n8k4", "tf32"): (_left_32, _right_32),
    }.get((shape, left)) or _refuse(instruction)
    d, a, b, c = (members(operand) for operand in instruction.operands)
    a_values, b_values = ([decoder.reader(name, "b32") for name in v] for v in (a, b))
    starts = [decoder.reader(name, "b32") for name in c]
    slots = [decoder.target(name) for name in d]

    def multiply(group: Group) -> None:
        A = _matrix(group, a_values, read_left, left)
        B = _matrix(group, b_values, read_right, right)
        blocks, warps = A.shape[:2]
        # [B, W, i1, g, t, i0] to [i1, i0, B, W, g, t]
        product = (A @ B).reshape(blocks, warps, 2, 8, 4, 2).transpose(2, 5, 0, 1, 3, 4)
        old = _words(group, starts).view(np.float32).reshape(product.shape)
        sums = (product + old).astype(np.float32).view(np.uint32)
        for slot, words in zip(slots, sums.reshape(4, *group.shape), strict=True):
            group.registers[slot] = words

    return multiply


def _refuse(instruction: Instruction) -> tuple:
    raise unknown(instruction)


def _left_16(words: np.ndarray, kind: str) -> np.ndarray:
    """``[B, W, 16, K]``: register i has rows g + 8 (i mod 2), columns 2 t + h + 8 (i / 2)."""
    registers, blocks, warps = words.shape[:3]
    pairs = halves(words, kind).reshape(registers // 2, 2, blocks, warps, 8, 4, 2)
    return pairs.transpose(2, 3, 1, 4, 0, 5, 6).reshape(blocks, warps, 16, 4 * registers)


def _right_16(words: np.ndarray, kind: str) -> np.ndarray:
    """``[B, W, K, 8]``: register i has rows 2 t + h + 8 i, column g."""
    registers, blocks, warps = words.shape[:3]
    pairs = halves(words, kind)
    return pairs.transpose(1, 2, 0, 4, 5, 3).reshape(blocks, warps, 8 * registers, 8)


def _tf32(words: np.ndarray) -> np.ndarray:
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def _left_32(words: np.ndarray, kind: str) -> np.ndarray:
    """``[B, W, 16, K]``: register i has rows g + 8 (i mod 2), columns t + 4 (i / 2)."""
    registers, blocks, warps = words.shape[:3]
    tiles = _tf32(words).reshape(registers // 2, 2, blocks, warps, 8, 4)
    return tiles.transpose(2, 3, 1, 4, 0, 5).reshape(blocks, warps, 16, 2 * registers)


def _right_32(words: np.ndarray, kind: str) -> np.ndarray:
    """``[B, W, K, 8]``: register i has rows t + 4 i, column g."""
    registers, blocks, warps = words.shape[:3]
    return _tf32(words).transpose(1, 2, 0, 4, 3).reshape(blocks, warps, 4 * registers, 8)


@step("wgmma")
def _wgmma(decoder: Decoder, instruction: Instruction) -> Step:
    what = instruction.parts[1]
    if instruction.predicate:
        raise unknown(instruction, "under a mask")
    if what == "fence":
        return lambda group: group.unfenced.clear()
    if what == "commit_group":

        def commit(group: Group) -> None:
            group.product_groups.append(group.products)
            group.products = []

        return commit
    if what == "wait_group":
        left = int(instruction.operands[0], 0)
        return lambda group: group.wait_products(left)
    if what == "mma_async":
        return _product(decoder, instruction)
    raise unknown(instruction)


def _product(decoder: Decoder, instruction: Instruction) -> Step:
    words = instruction.parts
    found = re.fullmatch(r"m64n(\d+)k16", words[4])
    left, right = words[-2:]
    if found is None or words[5] != "f32" or left != right or left not in ("bf16", "f16"):
        raise unknown(instruction)
    N, in_registers = int(found[1]), instruction.operands[1].startswith("{")
    d = members(instruction.operands[0])
    results = frozenset(decoder.target(name) for name in d)
    values = [decoder.reader(name, "b32") for name in d]
    slots = [decoder.target(name) for name in d]
    a_values, a_slots = [], set()
    if in_registers:
        a_values = [decoder.reader(name, "b32") for name in members(instruction.operands[1])]
        a_slots = {decoder.source(name, 32) for name in members(instruction.operands[1])}
        a_address = None
    else:
        a_address = decoder.reader(instruction.operands[1], "b64")
    b_address = decoder.reader(instruction.operands[2], "b64")
    keeps = decoder.predicate(instruction.operands[3])
    flags = [int(flag) for flag in instruction.operands[4:]]
    if flags[:2] != [1, 1] or len(flags) != (3 if in_registers else 4):
        raise unknown(instruction, "negated operands, or other flags")
    a_is_transposed, b_is_transposed = (not in_registers and flags[2] == 1), flags[-1] == 1

    def multiply(group: Group) -> None:
        if group.unfenced & (results | a_slots):
            raise UnfinishedError("registers of a wgmma were written after the last wgmma.fence")
        blocks, threads = group.shape
        groups = threads // 128
        cells = []
        if a_address is None:
            fragment = _matrix(group, a_values, _left_16, left)
            A = fragment.reshape(blocks, groups, 64, 16)
        else:
            A, used = _operand(group, a_address(group.registers), 64, a_is_transposed, left)
            cells.append(used)
        B, used = _operand(group, b_address(group.registers), N, b_is_transposed, left)
        cells.append(used)
        keep = keeps(group.registers)
        if keep.all() != keep.any():
            raise DivergenceError("a wgmma that adds in some threads only")
        sums = A.astype(np.float64) @ B.astype(np.float64).swapaxes(-1, -2)
        # [B, G, warp, i1, g, j, t, i0] to [j, i1, i0, B, G, warp, g, t]
        sums = sums.reshape(blocks, groups, 4, 2, 8, N // 8, 4, 2)
        sums = sums.transpose(5, 3, 7, 0, 1, 2, 4, 6).reshape(N // 2, *group.shape)
        if keep.any():
            old = [group.whole(value(group.registers)) for value in values]
            sums = sums + np.stack(old).view(np.float32)
        for slot, row in zip(slots, sums.astype(np.float32).view(np.uint32), strict=True):
            group.registers[slot] = row
        _note(group, np.concatenate(cells, axis=1), results, frozenset(a_slots))

    return multiply


def _note(group: Group, cells: np.ndarray, results: frozenset[int], a: frozenset[int]) -> None:
    """The product is on its way: what it uses is taken until its wait."""
    from .machine import Product

    shared = group.machine.shared
    flat = cells.reshape(-1)
    shared.read[flat] = IN_FLIGHT
    rows = np.repeat(group.rows, cells.shape[1])
    group.products.append(Product(flat, rows, results, a))
    group.results |= results
    group.operands |= a


def _per_group(group: Group, descriptors: np.ndarray) -> np.ndarray:
    """``[B, G]`` of a descriptor on which the threads of each warp group agree."""
    blocks, threads = group.shape
    whole = group.whole(descriptors).reshape(blocks, threads // 128, 128)
    if (whole != whole[..., :1]).any():
        raise DivergenceError("threads of a warp group give different descriptors")
    return whole[..., 0].astype(np.int64)


def _operand(
    group: Group, descriptors: np.ndarray, rows: int, is_transposed: bool, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """``[B, G, rows, 16]`` float32 that descriptors point to, and the cells it lies in."""
    chosen = _per_group(group, descriptors)
    layout = chosen & ~np.int64(0x3FFF)
    if (layout != layout.flat[0]).any():
        raise EmulationError("descriptors of one wgmma differ in more than their start")
    offsets, swizzle = _layout(int(layout.flat[0]) & 0xFFFFFFFFFFFFFFFF, rows, is_transposed)
    shared = group.machine.shared
    start = ((chosen & 0x3FFF) << 4)[..., None, None]
    addresses = start + offsets
    addresses ^= (addresses >> 7 & swizzle) << 4
    # eight neighbours lie in one chunk of 16 bytes
    chunks = addresses[:, :, ::8] if is_transposed else addresses[..., ::8]
    shared.check(chunks, 16, "read by a wgmma")
    first = group.start[:, :1, None, None]
    cells = shared.cells((first + chunks).reshape(-1), 16)
    _check_operand(group, cells)
    values = shared.data.view(np.uint16)[(first + addresses) >> 1]
    wide = float_of_bf16(values) if kind == "bf16" else values.view(np.float16).astype(np.float32)
    return wide, cells.reshape(len(chosen), -1)


def _check_operand(group: Group, cells: np.ndarray) -> None:
    shared = group.machine.shared
    written = shared.written[cells]
    if (written >= group.now).any():
        if (written == UNWRITTEN).any():
            raise UninitializedError("a wgmma reads shared memory that nothing was written to")
        if (written >= IN_FLIGHT).any():
            raise UnfinishedError("a wgmma reads an asynchronous copy before its wait")
        raise RaceError("a wgmma reads what was written with no barrier since")
    if shared.unfenced[cells].any():
        raise RaceError("a wgmma reads what was written with no fence.proxy.async since")


@cache
def _layout(descriptor: int, rows: int, is_transposed: bool) -> tuple[np.ndarray, int]:
    """Byte offsets ``[rows, 16]`` of an operand before the swizzle, and the swizzle's bits.

    Transposed: rows are contiguous. Strides are those of the descriptor: `leading` from atom to
    atom along the contiguous dimension, `other` along the other one; the two change places where
    rows are contiguous and nothing is swizzled.
    """
    leading, other = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise EmulationError("a descriptor with a base offset")
    if mode == 0 and is_transposed:
        leading, other = other, leading
    # bytes of a row of an atom
    span = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    across = span // 2
    row, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    i, j = (row, k) if is_transposed else (k, row)
    offsets = j % 8 * span + j // 8 * other + i // across * leading + i % across * 2
    return offsets, {0: 0, 1: 7, 2: 3, 3: 1}[mode]
