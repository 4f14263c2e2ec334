"""Floating point: arithmetic, approximations, comparisons' helpers and conversions.

Approximate instructions (``.approx``, ``.full``) give the correctly rounded result: what the tests
learn is that a kernel is right where a function is as good as it can be, not how good it is on a
card. ``.ftz`` takes numbers below the smallest normal one as zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Registers, Value, check_modifiers, unknown, value
from .ptx import Instruction
from .types import (
    FLOATS,
    PACKED,
    SIGNED,
    UNSIGNED,
    bf16_of_float,
    bits_of,
    dtype_of,
    float_of_bf16,
)

Unary = Callable[[np.ndarray], np.ndarray]
_ROUNDING = ("rn", "ftz", "approx", "full", "NaN")


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _with_ftz(instruction: Instruction, function: Callable[..., np.ndarray]) -> Callable:
    if "ftz" not in instruction.parts:
        return function
    return lambda *values: _flush(function(*(_flush(v) for v in values)))


def _plain(instruction: Instruction) -> str:
    """The type, which must be one NumPy computes in."""
    kind = instruction.parts[-1]
    if kind in PACKED or kind == "bf16":
        raise unknown(instruction, f"arithmetic in {kind}")
    return kind


def float_binary(decoder: Decoder, instruction: Instruction) -> Value:
    """add, sub, mul, div, min and max of floating-point numbers."""
    words = check_modifiers(instruction, _ROUNDING)
    name, kind = instruction.parts[0], _plain(instruction)
    functions = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        # the number of a number and a NaN, unless asked otherwise
        "min": np.minimum if "NaN" in words else np.fmin,
        "max": np.maximum if "NaN" in words else np.fmax,
    }
    if name not in functions:
        raise unknown(instruction)
    function, back = _with_ftz(instruction, functions[name]), UNSIGNED[bits_of(kind)]
    a, b = (decoder.reader(operand, kind) for operand in instruction.operands[1:3])
    return lambda r: function(a(r), b(r)).view(back)


def float_unary(decoder: Decoder, instruction: Instruction, function: Unary) -> Value:
    """A function of one floating-point number."""
    check_modifiers(instruction, _ROUNDING)
    kind = _plain(instruction)
    a, back = decoder.reader(instruction.operands[1], kind), UNSIGNED[bits_of(kind)]
    exact = _with_ftz(instruction, function)
    return lambda r: exact(a(r)).view(back)


def _rounded_once(function: Unary) -> Unary:
    """A function computed in float64."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_FUNCTIONS: dict[str, Unary] = {
    "sqrt": np.sqrt,
    "rsqrt": _rounded_once(lambda x: 1 / np.sqrt(x)),
    "rcp": _rounded_once(lambda x: 1 / x),
    "ex2": _rounded_once(np.exp2),
    "lg2": _rounded_once(np.log2),
    "sin": _rounded_once(np.sin),
    "cos": _rounded_once(np.cos),
    "tanh": _rounded_once(np.tanh),
}


@value(*_FUNCTIONS)
def _function(decoder: Decoder, instruction: Instruction) -> Value:
    return float_unary(decoder, instruction, _FUNCTIONS[instruction.parts[0]])


@value("fma")
def _fused(decoder: Decoder, instruction: Instruction) -> Value:
    """``a b + c`` rounded once: a product of float32 is exact in float64."""
    check_modifiers(instruction, ("rn", "ftz"))
    kind = instruction.parts[-1]
    if kind not in ("f32", "f16"):
        raise unknown(instruction)
    a, b, c = (decoder.reader(operand, kind) for operand in instruction.operands[1:4])
    dtype, back, wide = FLOATS[bits_of(kind)], UNSIGNED[bits_of(kind)], FLOATS[64]

    def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return (np.multiply(x, y, dtype=wide) + z).astype(dtype)

    exact = _with_ftz(instruction, fused)
    return lambda r: exact(a(r), b(r), c(r)).view(back)


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_MODIFIERS = ("rn", "rna", "ftz", "sat", *_TO_WHOLE)


def _saturated(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Whole numbers of floats: the nearest that the type holds, 0 of a NaN."""
    limits = np.iinfo(dtype)
    inside = np.where(np.isnan(x), 0, x).astype(np.float64)
    low, high = inside <= limits.min, inside >= limits.max
    whole = np.where(low | high, 0, inside).astype(dtype)
    return np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), whole))


def _tf32(words: np.ndarray, to_even: bool) -> np.ndarray:
    """The upper 19 bits, rounded to nearest; ties go to even, or away from zero."""
    wide = words.astype(np.uint64)
    half = 0xFFF + ((wide >> 13) & 1) if to_even else 0x1000
    return ((wide + half) & 0xFFFFE000).astype(np.uint32)


def _pack(decoder: Decoder, instruction: Instruction) -> Value:
    """Two float32 as 16-bit halves of a word, the first one above."""
    upper, lower = (decoder.reader(operand, "f32") for operand in instruction.operands[1:3])
    is_bf16 = instruction.parts[-2] == "bf16x2"

    def narrow(x: np.ndarray) -> np.ndarray:
        bits = bf16_of_float(x) if is_bf16 else x.astype(np.float16).view(np.uint16)
        return bits.astype(np.uint32)

    return lambda r: narrow(upper(r)) << 16 | narrow(lower(r))


def _convert_float(x: np.ndarray, kind: str, words: list[str]) -> np.ndarray:
    """Floating-point numbers as another type, by the modifiers of a cvt."""
    whole = next((_TO_WHOLE[word] for word in words if word in _TO_WHOLE), None)
    if "ftz" in words and x.dtype == np.float32:
        x = _flush(x)
    if whole is not None:
        x = whole(x)
    if kind == "bf16":
        return bf16_of_float(x)
    if kind[0] in "su":
        return _saturated(x, dtype_of(kind))
    return np.clip(x, 0, 1).astype(dtype_of(kind)) if "sat" in words else x.astype(dtype_of(kind))


@value("cvt")
def _convert(decoder: Decoder, instruction: Instruction) -> Value:
    words = check_modifiers(instruction, _MODIFIERS)
    to, of = words[-2:]
    if to in PACKED and of == "f32" and "rn" in words:
        return _pack(decoder, instruction)
    source, target = instruction.operands[1], instruction.operands[0]
    if to == "tf32":
        word = decoder.reader(source, "b32")
        return lambda r: _tf32(word(r), "rna" not in words)
    if "rna" in words or to in PACKED or of in PACKED:
        raise unknown(instruction)
    a = _relaxed(decoder, source, of)
    width = decoder.program.width(target)
    back = UNSIGNED[width]
    # a number narrower than its register is extended by its sign, or by zeros
    extended = (SIGNED if to[0] == "s" else UNSIGNED)[width]
    if of[0] in "su":
        if "sat" in words:
            raise unknown(instruction)
        dtype = dtype_of(to)
        if to == "bf16":
            raise unknown(instruction)
        if to[0] == "f":
            return lambda r: a(r).astype(dtype).view(back)
        return lambda r: a(r).astype(dtype).astype(extended).view(back)

    def convert(r: Registers) -> np.ndarray:
        x = float_of_bf16(a(r)) if of == "bf16" else a(r)
        result = _convert_float(x, to, words)
        return result.view(back) if to[0] in "fb" else result.astype(extended).view(back)

    return convert


def _relaxed(decoder: Decoder, operand: str, kind: str) -> Value:
    """An operand whose register may be wider than the type: its low bits."""
    bits, dtype = bits_of(kind), dtype_of(kind)
    if operand[0] != "%" or operand[1:4] == "tid" or operand[1:4] == "cta":
        return decoder.reader(operand, kind)
    width = decoder.program.width(operand)
    if width <= bits:
        return decoder.reader(operand, kind)
    whole, narrow = decoder.reader(operand, f"b{width}"), UNSIGNED[bits]
    return lambda r: whole(r).astype(narrow).view(dtype)
