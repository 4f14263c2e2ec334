"""Short programs of PTX around a few instructions, as the emulator's own tests run them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .decode import decode
from .machine import Machine
from .memory import GlobalMemory
from .ptx import parse
from .types import UNSIGNED

REGISTERS = """
    .reg .pred %p<32>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<256>;
    .reg .b64 %rd<64>;
"""


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    declare: str = "",
) -> Counter[tuple[int, int]]:
    """Run a body whose parameters ``p0``, ``p1``, ... point to the arrays, which it may change."""
    names = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    text = f".visible .entry snippet({names})\n.reqntid {threads}\n{{{REGISTERS}{declare}{body}\n}}"
    code = decode(parse(text))
    # far apart, in places that a small offset does not leave for another array
    places = [(i + 1) << 20 for i in range(len(arrays))]
    memory = GlobalMemory(
        {
            place: array.reshape(-1).view(np.uint8)
            for place, array in zip(places, arrays, strict=True)
        },
        code.global_grain,
    )
    return Machine(code, memory, places, shared, (blocks, 1, 1)).run()


def per_lane(body: str, *inputs: np.ndarray, result: str | type) -> np.ndarray:
    """``%out`` of each lane after a body that reads the lane's ``%in0``, ``%in1``, ..."""
    threads = -(-len(inputs[0]) // 32) * 32
    dtype = np.dtype(result)
    padded = [np.resize(array, threads) for array in inputs]
    out = np.zeros(threads, UNSIGNED[8 * dtype.itemsize])
    declare = f".reg .b{8 * dtype.itemsize} %out;\n"
    lines = ["mov.u32 %r0, %tid.x;"]
    for i, array in enumerate(padded):
        bits = 8 * array.itemsize
        declare += f".reg .b{bits} %in{i};\n"
        lines += [
            f"ld.param.b64 %rd0, [p{i}];",
            f"mad.wide.u32 %rd1, %r0, {array.itemsize}, %rd0;",
            f"ld.global.b{bits} %in{i}, [%rd1];",
        ]
    lines += [
        body,
        f"ld.param.b64 %rd0, [p{len(padded)}];",
        f"mad.wide.u32 %rd1, %r0, {dtype.itemsize}, %rd0;",
        f"st.global.b{8 * dtype.itemsize} [%rd1], %out;",
        "ret;",
    ]
    run("\n".join(lines), *padded, out, threads=threads, declare=declare)
    return out.view(dtype)[: len(inputs[0])]
