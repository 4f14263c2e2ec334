"""How a launch of the fused sketch is cut up: what was measured on the card, or what surely fits.

Measured configurations lie in ``configs/sketch.json``, which ``benchmarks/tune.py`` writes and
`tuning` reads. They are found by `sizes_of`: the form of the problem, which must match, and the
length of the reduction, which should be near. Neither says how many samples there are, so a sample
is launched alike alone and in a batch, and its features keep their bits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from .. import tuning

OPERATION = "sketch"

_PRECISIONS = ("ieee", "tf32x3", "tf32")
# bytes of shared memory a program may have; less on cards that are not named
_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_LEAST_SHARED = 64 * 1024


@dataclass(frozen=True)
class SketchConfig:
    """How the work is cut up; never what it computes, beyond rounding.

    Blocks, placements and signs are functions of (seed, parameter, tile). A configuration decides
    how many positions are multiplied at a time and by how many threads, hence in what order a sum
    is rounded: other configurations give other last bits, never other features.

    Attributes:
        block_t: positions per step of the reduction, a power of two from 16 to 256.
        num_warps: warps per program, a power of two of at most 32.
        num_stages: depth of the asynchronous loads, 1 to 8.
        is_rolled: shift sums through shared memory; otherwise shift loads, element by element.
        input_precision: of products of float32 inputs: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.

    Raises:
        ValueError: a field is not as above.
    """

    block_t: int = 64
    num_warps: int = 8
    num_stages: int = 3
    is_rolled: bool = True
    input_precision: str = "ieee"

    def __post_init__(self) -> None:
        if not tuning.is_power_of_two(self.block_t, 16, 256):
            raise ValueError(f"block_t must be a power of two from 16 to 256, got {self.block_t!r}")
        if not tuning.is_power_of_two(self.num_warps, 1, 32):
            raise ValueError(f"num_warps must be a power of two up to 32, got {self.num_warps!r}")
        if self.num_stages not in range(1, 9) or isinstance(self.num_stages, bool):
            raise ValueError(f"num_stages must be from 1 to 8, got {self.num_stages!r}")
        if not isinstance(self.is_rolled, bool):
            raise ValueError(f"is_rolled must be true or false, got {self.is_rolled!r}")
        if self.input_precision not in _PRECISIONS:
            raise ValueError(
                f"input_precision must be one of {', '.join(_PRECISIONS)}, "
                f"got {self.input_precision!r}"
            )


@dataclass(frozen=True)
class Form:
    """The kind of problem a launch is, as far as its compiled code goes.

    Attributes:
        tile: ``(BM, BN)``.
        dtype: of the inputs.
        is_one_tap: all columns of a tile belong to one tap of the convolution.
        is_one_axis: rows and positions are one evenly spaced axis: nothing is divided.
        is_channels_last: channels are contiguous in both inputs.
        is_wide: offsets inside a sample need 64 bits.
        is_grouped: the convolution has groups.
    """

    tile: tuple[int, int]
    dtype: torch.dtype
    is_one_tap: bool = True
    is_one_axis: bool = False
    is_channels_last: bool = True
    is_wide: bool = False
    is_grouped: bool = False

    @property
    def is_tuned(self) -> bool:
        """Whether configurations are measured for it; rare forms keep the default one."""
        return not (self.is_wide or self.is_grouped)

    def __str__(self) -> str:
        taps = "one tap" if self.is_one_tap else "several taps"
        order = "channels last" if self.is_channels_last else "channels first"
        tile = "x".join(str(side) for side in self.tile)
        axis = "one axis" if self.is_one_axis else taps
        return f"{axis}, {order}, {8 * self.dtype.itemsize} bits, tile {tile}"


_DTYPES = {16: torch.bfloat16, 32: torch.float32}
_FORM = re.compile(
    r"(one axis|one tap|several taps), channels (last|first), (16|32) bits, tile (\d+)x(\d+)"
)


def read_form(text: str) -> Form:
    """The form that `Form` writes as ``text``, with one of its dtypes.

    Raises:
        ValueError: no form is written like that.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(
            f"form must be like 'one tap, channels last, 16 bits, tile 128x128', got {text!r}"
        )
    taps, order, bits, BM, BN = found.groups()
    return Form(
        (int(BM), int(BN)),
        _DTYPES[int(bits)],
        is_one_tap=taps != "several taps",
        is_one_axis=taps == "one axis",
        is_channels_last=order == "last",
    )


def sizes_of(form: Form, reduction: int) -> dict[str, int | str]:
    """What a configuration is found by; ``reduction`` is rows per sample times positions."""
    return {"form": str(form), "T": reduction}


def default_config(
    arch: int | str,
    tile: tuple[int, int],
    dtype: torch.dtype,
    reduction: int,
    *,
    is_one_tap: bool,
    is_wide: bool,
    is_channels_last: bool,
) -> SketchConfig:
    """What to launch with where nothing was measured: the largest steps that fit into registers.

    Args:
        arch: CUDA compute capability times ten (80, 90, ...), or the name of an AMD architecture.
        tile: ``(BM, BN)``.
        dtype: of the inputs.
        reduction: rows per sample times positions.
        is_one_tap: all columns of a tile belong to one tap of the convolution.
        is_wide: offsets inside a sample need 64 bits.
        is_channels_last: channels are contiguous in both inputs.
    """
    is_large = math.prod(tile) >= 2**13
    is_fast = is_one_tap and is_channels_last and not is_wide
    if dtype == torch.float32:
        # no tensor core multiplies in float32: operands take twice the registers
        is_pipelined = is_fast and isinstance(arch, int) and arch < 100
        return SketchConfig(
            16, num_warps=16 if is_large else 4, num_stages=2 if is_pipelined else 1
        )
    block_t = 64 if is_fast and is_large else 16 if is_wide or (is_large and not is_one_tap) else 32
    # a compute unit of AMD has fewer registers for a thread's share of a tile
    largest = 64 if isinstance(arch, int) else 32
    block_t = min(block_t, largest, max(16, 1 << (reduction - 1).bit_length()))
    return SketchConfig(
        block_t, num_warps=8 if is_large else 4, num_stages=3 if block_t == 64 else 2
    )


def read_config(entry: dict[str, Any], name: str) -> SketchConfig:
    """A configuration from a file.

    Args:
        entry: fields of `SketchConfig`.
        name: what to call it in an error.

    Raises:
        ValueError: there is no such field, a value is impossible, or it would change what is
            computed beyond rounding.
    """
    known = [field.name for field in fields(SketchConfig)]
    unknown = [field for field in entry if field not in known]
    if unknown:
        raise ValueError(f"{name}: fields must be among {', '.join(known)}, got {unknown[0]!r}")
    try:
        config = SketchConfig(**entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if config.input_precision != "ieee":
        raise ValueError(
            f"{name}: input_precision must be 'ieee', which keeps float32 products exact, "
            f"got {config.input_precision!r}"
        )
    return config


def find_config(form: Form, arch: int | str, reduction: int, device_name: str = "") -> SketchConfig:
    """The configuration measured on a device at the nearest reduction, or the default one.

    Args:
        form: of the problem.
        arch: see `default_config`.
        reduction: rows per sample times positions.
        device_name: as ``torch.cuda.get_device_name`` gives it; empty to measure nothing by.

    Raises:
        ValueError: what the file says of the device cannot be launched; the message names it.
    """
    if device_name and form.is_tuned:
        tuned = tuning.nearest(OPERATION, device_name, sizes_of(form, reduction))
        if tuned is not None:
            return read_config(tuned, f"configs/{OPERATION}.json, {device_name}, {form}")
    return default_config(
        arch,
        form.tile,
        form.dtype,
        reduction,
        is_one_tap=form.is_one_tap,
        is_wide=form.is_wide,
        is_channels_last=form.is_channels_last,
    )


@lru_cache(maxsize=4096)
def config_on(device: torch.device, form: Form, reduction: int) -> SketchConfig:
    """`find_config` for a device of this machine; interpreted launches have the default."""
    if device.type != "cuda":
        return find_config(form, 80, reduction)
    return find_config(form, tuning.arch_of(device), reduction, torch.cuda.get_device_name(device))


def _most_positions(config: SketchConfig, form: Form, arch: int | str) -> int:
    """Longest step whose operands fit beside the sums, by what spilled when it was compiled."""
    num_warps, is_single = config.num_warps, form.dtype.itemsize == 4
    if not isinstance(arch, int):
        # more warps share a compute unit's registers
        return 128 if num_warps <= 4 and not is_single else 32
    if math.prod(form.tile) >= 2**13:
        if is_single:
            return 64 if arch < 90 else 16
        # Hopper's tensor cores read operands from shared memory
        if arch == 90:
            return 128
        return 64 if num_warps <= 8 else 0
    if num_warps <= 4:
        return 64 if arch >= 90 else 32
    return 128 if num_warps == 8 else 64


def refusal(config: SketchConfig, form: Form, arch: int | str, reduction: int) -> str:
    """Why a configuration is not worth trying on a card, empty if it is.

    What is said of registers and shared memory comes from compiled code, not from a run.

    Args:
        config: the configuration.
        form: of the problem.
        arch: see `default_config`.
        reduction: rows per sample times positions.
    """
    is_cuda = isinstance(arch, int)
    size, bytes_each = math.prod(form.tile), form.dtype.itemsize
    if config.block_t > max(16, 1 << (reduction - 1).bit_length()):
        return f"{config.block_t} positions a step, and there are {reduction}"
    per_thread = size / (config.num_warps * (32 if is_cuda else 64))
    if per_thread > 128 // bytes_each:
        return f"{per_thread:.0f} entries a thread do not fit into registers"
    if config.block_t > _most_positions(config, form, arch):
        return f"operands of {config.block_t} positions a step do not fit into registers"
    if per_thread < 8 and config.num_warps > 4:
        return f"{per_thread:.0f} entries a thread leave most of it without work"
    buffers = config.num_stages - (arch == 80 or not is_cuda)
    # the roll reuses the memory of the loads
    shared = max(4 * size, buffers * sum(form.tile) * config.block_t * bytes_each)
    limit = _SHARED.get(arch, _LEAST_SHARED) if isinstance(arch, int) else _LEAST_SHARED
    if shared > limit:
        return f"{shared} bytes of shared memory, and a program has {limit}"
    return ""
