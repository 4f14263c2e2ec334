"""PTX types as NumPy ones, and bfloat16, which NumPy lacks."""

from __future__ import annotations

from functools import cache

import numpy as np

UNSIGNED = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
SIGNED = {bits: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
FLOATS = {bits: np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
PACKED = ("bf16x2", "f16x2")


@cache
def bits_of(kind: str) -> int:
    """Bits of a PTX type, 1 of a predicate."""
    if kind == "pred":
        return 1
    if kind in PACKED or kind == "tf32":
        return 32
    return int(kind.lstrip("bfsu"))


@cache
def dtype_of(kind: str) -> np.dtype:
    """The NumPy type that computes as a PTX type does; bits where there is none."""
    if kind == "pred":
        return np.dtype(bool)
    bits = bits_of(kind)
    if kind[0] == "s":
        return SIGNED[bits]
    if kind[0] == "f" and kind not in PACKED:
        return FLOATS[bits]
    return UNSIGNED[bits]


def float_of_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of the 16 bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_of_float(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, rounded to nearest, ties to even."""
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((word + np.uint32(0x7FFF) + ((word >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """float32 of the two 16-bit numbers in each word, low one first: one more axis of 2."""
    pairs = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return float_of_bf16(pairs) if kind == "bf16" else pairs.view(np.float16).astype(np.float32)
