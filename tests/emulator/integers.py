"""Integers and bits: arithmetic, logic, shifts, fields and bytes of words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Registers, Value, check_modifiers, unknown, value
from .floats import float_binary, float_unary
from .ptx import Instruction
from .types import SIGNED, UNSIGNED, bits_of, dtype_of

Binary = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def _binary(decoder: Decoder, instruction: Instruction, function: Binary) -> Value:
    kind = instruction.parts[-1]
    a, b = (decoder.reader(operand, kind) for operand in instruction.operands[1:3])
    if kind[0] == "s":
        back = UNSIGNED[bits_of(kind)]
        return lambda r: function(a(r), b(r)).view(back)
    return lambda r: function(a(r), b(r))


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero; a division by zero gives all ones, as the hardware's happens to."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    if a.dtype.kind == "i":
        floor = floor + ((floor < 0) & (floor * safe != a))
    return np.where(
        b == 0, a.dtype.type(-1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max), floor
    )


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the sign of the dividend."""
    return a - _quotient(a, b) * b


_ARITHMETIC: dict[str, Binary] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "div": _quotient,
    "rem": _remainder,
}


@value(*_ARITHMETIC)
def _arithmetic(decoder: Decoder, instruction: Instruction) -> Value:
    if _is_float(instruction.parts[-1]):
        return float_binary(decoder, instruction)
    check_modifiers(instruction, ())
    return _binary(decoder, instruction, _ARITHMETIC[instruction.parts[0]])


_LOGIC: dict[str, Binary] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@value(*_LOGIC)
def _logic(decoder: Decoder, instruction: Instruction) -> Value:
    check_modifiers(instruction, ())
    function = _LOGIC[instruction.parts[0]]
    if instruction.parts[-1] == "pred":
        p, q = (decoder.predicate(operand) for operand in instruction.operands[1:3])
        return lambda r: function(p(r), q(r))
    return _binary(decoder, instruction, function)


@value("not")
def _not(decoder: Decoder, instruction: Instruction) -> Value:
    check_modifiers(instruction, ())
    if instruction.parts[-1] == "pred":
        return decoder.predicate("!" + instruction.operands[1])
    a = decoder.reader(instruction.operands[1], instruction.parts[-1])
    return lambda r: ~a(r)


@value("neg", "abs")
def _sign(decoder: Decoder, instruction: Instruction) -> Value:
    name, kind = instruction.parts[0], instruction.parts[-1]
    function: Callable[[np.ndarray], np.ndarray] = np.negative if name == "neg" else np.abs
    if _is_float(kind):
        return float_unary(decoder, instruction, function)
    check_modifiers(instruction, ())
    a, back = decoder.reader(instruction.operands[1], kind), UNSIGNED[bits_of(kind)]
    return lambda r: function(a(r)).view(back)


def _product(decoder: Decoder, instruction: Instruction, rest: tuple[str, ...]) -> Value:
    """``a b + rest``, of the low or the high half of the product, or of all of it."""
    mode, kind = instruction.parts[1], instruction.parts[-1]
    bits = bits_of(kind)
    a, b = (decoder.reader(operand, kind) for operand in instruction.operands[1:3])
    width = 2 * bits if mode == "wide" else bits
    same = {"s": SIGNED}.get(kind[0], UNSIGNED)
    c = decoder.reader(rest[0], f"{kind[0]}{width}") if rest else None
    wide = same.get(2 * bits)
    back = UNSIGNED[width]

    def low(r: Registers) -> np.ndarray:
        return a(r) * b(r)

    def full(r: Registers) -> np.ndarray:
        return a(r).astype(wide) * b(r)

    def high(r: Registers) -> np.ndarray:
        return (full(r) >> bits).astype(same[bits])

    if mode not in ("lo", "hi", "wide") or (mode != "lo" and wide is None):
        raise unknown(instruction)
    product = {"lo": low, "wide": full, "hi": high}[mode]
    if c is None:
        return lambda r: product(r).view(back)
    return lambda r: (product(r) + c(r)).view(back)


@value("mul", "mad")
def _multiply(decoder: Decoder, instruction: Instruction) -> Value:
    if _is_float(instruction.parts[-1]):
        if instruction.parts[0] == "mad":
            raise unknown(instruction)
        return float_binary(decoder, instruction)
    check_modifiers(instruction, ("lo", "hi", "wide"))
    return _product(decoder, instruction, instruction.operands[3:])


@value("shl", "shr")
def _shift(decoder: Decoder, instruction: Instruction) -> Value:
    check_modifiers(instruction, ())
    name, kind = instruction.parts[0], instruction.parts[-1]
    bits, back = bits_of(kind), UNSIGNED[bits_of(kind)]
    a, amount = decoder.reader(instruction.operands[1], kind), instruction.operands[2]
    by = decoder.reader(amount, "u32")
    function = np.left_shift if name == "shl" else np.right_shift
    is_signed = kind[0] == "s" and name == "shr"
    dtype = dtype_of(kind)

    def shift(r: Registers) -> np.ndarray:
        count = by(r)
        inside = np.minimum(count, np.uint32(bits - 1)).astype(dtype)
        shifted = function(a(r), inside).view(back)
        # a signed number leaves its sign, others nothing
        return shifted if is_signed else np.where(count >= bits, back.type(0), shifted)

    if amount.isdigit() and int(amount) < bits:
        fixed = dtype.type(int(amount))
        return lambda r: function(a(r), fixed).view(back)
    return shift


@value("shf")
def _funnel(decoder: Decoder, instruction: Instruction) -> Value:
    words = check_modifiers(instruction, ("l", "r", "wrap", "clamp"))
    low, high, by = (decoder.reader(operand, "b32") for operand in instruction.operands[1:4])
    is_left, wraps = words[0] == "l", words[1] == "wrap"

    def funnel(r: Registers) -> np.ndarray:
        count = (by(r) & 31 if wraps else np.minimum(by(r), np.uint32(32))).astype(np.uint64)
        both = high(r).astype(np.uint64) << 32 | low(r)
        return ((both << count) >> 32 if is_left else both >> count).astype(np.uint32)

    return funnel


@value("bfe")
def _extract(decoder: Decoder, instruction: Instruction) -> Value:
    """A field of bits, with its sign for a signed type."""
    check_modifiers(instruction, ())
    kind = instruction.parts[-1]
    if bits_of(kind) != 32:
        raise unknown(instruction)
    a = decoder.reader(instruction.operands[1], kind)
    start, length = (decoder.reader(operand, "u32") for operand in instruction.operands[2:4])

    def extract(r: Registers) -> np.ndarray:
        first = (start(r) & 255).astype(np.int64)
        count = np.minimum(length(r) & 255, 32).astype(np.int64)
        field = (a(r).astype(np.int64) >> np.minimum(first, 63)) & ((np.int64(1) << count) - 1)
        if kind[0] == "s":
            # bits beyond the word repeat its sign, which the wide word holds already
            top = np.int64(1) << np.maximum(count - 1, 0)
            field = np.where(count == 0, 0, (field ^ top) - top)
        return (field & 0xFFFFFFFF).astype(np.uint32)

    return extract


@value("prmt")
def _permute(decoder: Decoder, instruction: Instruction) -> Value:
    """Bytes of two words, chosen by four digits; the eighth bit of a byte if the digit's top is."""
    if instruction.parts != ["prmt", "b32"]:
        raise unknown(instruction)
    a, b, chosen = (decoder.reader(operand, "b32") for operand in instruction.operands[1:4])

    def permute(r: Registers) -> np.ndarray:
        both = b(r).astype(np.uint64) << 32 | a(r)
        digits = chosen(r).astype(np.uint64)
        result = np.zeros((1, 1), np.uint64)
        for place in range(4):
            digit = (digits >> (4 * place)) & 15
            byte = (both >> (8 * (digit & 7))) & 255
            byte = np.where(digit & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint64)
            result = result | byte << (8 * place)
        return result.astype(np.uint32)

    return permute


@value("lop3")
def _logic_of_three(decoder: Decoder, instruction: Instruction) -> Value:
    if instruction.parts != ["lop3", "b32"]:
        raise unknown(instruction)
    a, b, c = (decoder.reader(operand, "b32") for operand in instruction.operands[1:4])
    table = int(instruction.operands[4], 0)

    def combine(r: Registers) -> np.ndarray:
        x, y, z = a(r), b(r), c(r)
        result = np.zeros((1, 1), np.uint32)
        for row in range(8):
            if table >> row & 1:
                result = result | (
                    (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
                )
        return result

    return combine


@value("popc", "clz", "brev")
def _bits(decoder: Decoder, instruction: Instruction) -> Value:
    check_modifiers(instruction, ())
    name, kind = instruction.parts[0], instruction.parts[-1]
    a, bits = decoder.reader(instruction.operands[1], kind), bits_of(kind)

    def unpack(r: Registers) -> np.ndarray:
        """Bits of words, highest first, on a last axis."""
        word = np.ascontiguousarray(a(r))
        parts = word.byteswap().view(np.uint8).reshape(*word.shape, bits // 8)
        return np.unpackbits(parts, axis=-1)

    def count(r: Registers) -> np.ndarray:
        return unpack(r).sum(axis=-1, dtype=np.uint32)

    def zeros(r: Registers) -> np.ndarray:
        digits = unpack(r)
        return np.where(digits.any(-1), digits.argmax(-1), bits).astype(np.uint32)

    def reverse(r: Registers) -> np.ndarray:
        packed = np.packbits(unpack(r)[..., ::-1], axis=-1)
        return np.ascontiguousarray(packed).view(UNSIGNED[bits])[..., 0].byteswap()

    return {"popc": count, "clz": zeros, "brev": reverse}[name]
