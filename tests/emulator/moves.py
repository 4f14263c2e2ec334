"""Moves, choices, comparisons, and words that pass between the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .decode import Decoder, Registers, Step, Value, check_modifiers, step, unknown, value
from .ptx import Instruction, members
from .types import UNSIGNED, bits_of

if TYPE_CHECKING:
    from .machine import Group


@step("mov")
def _move(decoder: Decoder, instruction: Instruction) -> Step:
    check_modifiers(instruction, ())
    kind, (target, source) = instruction.parts[-1], instruction.operands
    if target.startswith("{"):
        return _unpack(decoder, instruction)
    if kind == "pred":
        return decoder.assign(instruction, target, decoder.predicate(source))
    if not source.startswith("{"):
        return decoder.assign(instruction, target, decoder.reader(source, kind))
    parts, bits = members(source), bits_of(kind)
    size = bits // len(parts)
    values = [decoder.reader(part, f"b{size}") for part in parts]
    dtype = UNSIGNED[bits]

    def pack(r: Registers) -> np.ndarray:
        word = values[0](r).astype(dtype)
        for place, part in enumerate(values[1:], 1):
            word = word | part(r).astype(dtype) << (size * place)
        return word

    return decoder.assign(instruction, target, pack)


def _unpack(decoder: Decoder, instruction: Instruction) -> Step:
    """A word cut into registers, lowest first; ``_`` drops a part."""
    targets = members(instruction.operands[0])
    bits = bits_of(instruction.parts[-1])
    size = bits // len(targets)
    word = decoder.reader(instruction.operands[1], f"b{bits}")

    def part_of(place: int) -> Value:
        narrow = UNSIGNED[size]
        return lambda r: (word(r) >> (size * place)).astype(narrow)

    # the word may be overwritten by its own part
    puts = [
        decoder.assign(instruction, name, part_of(place))
        for place, name in enumerate(targets)
        if name != "_"
    ]
    if instruction.operands[1] in targets:
        raise unknown(instruction, "a word that is overwritten by its own part")

    def put_all(group: Group) -> None:
        for put in puts:
            put(group)

    return put_all


@value("selp")
def _choose(decoder: Decoder, instruction: Instruction) -> Value:
    check_modifiers(instruction, ())
    kind = f"b{bits_of(instruction.parts[-1])}"
    a, b = (decoder.reader(operand, kind) for operand in instruction.operands[1:3])
    chosen = decoder.predicate(instruction.operands[3])
    return lambda r: np.where(chosen(r), a(r), b(r))


Comparison = Callable[[np.ndarray, np.ndarray], np.ndarray]

_COMPARISONS: dict[str, Comparison] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def _comparison(instruction: Instruction, name: str, is_float: bool) -> Comparison:
    """How two numbers compare; with a NaN only the unordered ones and ``nan`` hold."""
    if not is_float:
        if name not in _COMPARISONS:
            raise unknown(instruction, f"comparison {name!r}")
        return _COMPARISONS[name]
    if name == "nan":
        return _nan
    if name == "num":
        return lambda a, b: ~_nan(a, b)
    if name == "ne":
        return lambda a, b: np.not_equal(a, b) & ~_nan(a, b)
    if name.endswith("u") and name[:-1] in _COMPARISONS:
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | _nan(a, b)
    if name not in ("eq", "lt", "le", "gt", "ge"):
        raise unknown(instruction, f"comparison {name!r}")
    return _COMPARISONS[name]


@step("setp")
def _compare(decoder: Decoder, instruction: Instruction) -> Step:
    name, *words, kind = instruction.parts[1:]
    combine = next((_COMBINE[word] for word in words if word in _COMBINE), None)
    if [word for word in words if word not in _COMBINE] or kind == "bf16":
        raise unknown(instruction)
    function = _comparison(instruction, name, kind[0] == "f")
    a, b = (decoder.reader(operand, kind) for operand in instruction.operands[1:3])
    other = decoder.predicate(instruction.operands[3]) if combine else None
    targets = instruction.operands[0].split("|")

    def compare(r: Registers) -> np.ndarray:
        holds = function(a(r), b(r))
        return combine(holds, other(r)) if combine and other else holds

    if len(targets) == 1:
        return decoder.assign(instruction, targets[0], compare)

    def opposite(r: Registers) -> np.ndarray:
        unlike = ~function(a(r), b(r))
        return combine(unlike, other(r)) if combine and other else unlike

    puts = [
        decoder.assign(instruction, target.strip(), compute)
        for target, compute in zip(targets, (compare, opposite), strict=True)
    ]

    def put_both(group: Group) -> None:
        for put in puts:
            put(group)

    return put_both


@step("shfl")
def _shuffle(decoder: Decoder, instruction: Instruction) -> Step:
    """A word of another lane of the warp; its own where that lane lies outside of its segment."""
    if instruction.parts[1] != "sync" or instruction.parts[3] != "b32":
        raise unknown(instruction)
    mode = instruction.parts[2]
    target, source, lane, clamp, taking_part = instruction.operands
    if taking_part not in ("-1", "0xffffffff", "0xFFFFFFFF"):
        raise unknown(instruction, "some lanes only")
    if "|" in target or instruction.predicate is not None or mode not in _LANES:
        raise unknown(instruction)
    word, by, limits = (decoder.reader(operand, "b32") for operand in (source, lane, clamp))
    slot, threads = decoder.target(target), decoder.program.threads
    own = np.arange(threads)[None, :] % 32
    warp = np.arange(threads)[None, :] // 32 * 32

    def shuffle(group: Group) -> None:
        r = group.registers
        offset, packed = by(r).astype(np.int64) & 31, limits(r).astype(np.int64)
        segment, last = packed >> 8 & 31, packed & 31
        highest = (own & segment) | (last & ~segment)
        lowest = own & segment
        other, is_inside = _LANES[mode](own, offset, lowest, highest, segment)
        place = warp + np.where(is_inside, other, own)
        words = group.whole(word(r))
        r[slot] = np.take_along_axis(words, group.whole(place), axis=1)

    return shuffle


_Lane = Callable[..., tuple[np.ndarray, np.ndarray]]


def _up(own, offset, lowest, highest, segment):  # type: ignore[no-untyped-def]
    # the clamp of an upward shuffle is a lower limit
    other = own - offset
    return other, other >= highest


def _down(own, offset, lowest, highest, segment):  # type: ignore[no-untyped-def]
    other = own + offset
    return other, other <= highest


def _butterfly(own, offset, lowest, highest, segment):  # type: ignore[no-untyped-def]
    other = own ^ offset
    return other, other <= highest


def _index(own, offset, lowest, highest, segment):  # type: ignore[no-untyped-def]
    other = lowest | (offset & ~segment)
    return other, other <= highest


_LANES: dict[str, _Lane] = {"up": _up, "down": _down, "bfly": _butterfly, "idx": _index}
