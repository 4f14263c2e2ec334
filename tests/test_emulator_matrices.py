"""Matrix instructions of the emulator against plain matrix products, and what moves matrices."""

import numpy as np
import pytest
import torch
from emulator.snippets import run

RANDOM = np.random.default_rng(11)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def numbers(*shape, kind):
    """Numbers that the type holds, as float32, and their bits."""
    exact = torch.from_numpy(RANDOM.standard_normal(shape).astype(np.float32)).to(DTYPES[kind])
    return exact.float().numpy(), exact.view(torch.int16).numpy().view(np.uint16)


def names(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def loads(parameter, first, count):
    """Words ``[count, threads]`` of a parameter to registers from ``first`` on, lane by lane."""
    lines = [f"ld.param.b64 %rd0, [p{parameter}];", "mad.wide.u32 %rd1, %r0, 4, %rd0;"]
    return lines + [f"ld.global.b32 %r{first + i}, [%rd1+{{{i}}}];" for i in range(count)]


def program(*parts, threads):
    """Lines, in which ``{i}`` stands for i rows of one word per thread."""
    text = "\n".join(["mov.u32 %r0, %tid.x;", *parts, "ret;"])
    for i in range(64):
        text = text.replace(f"+{{{i}}}]", f"+{4 * i * threads}]")
    return text


def stores(parameter, first, count):
    lines = [f"ld.param.b64 %rd0, [p{parameter}];", "mad.wide.u32 %rd1, %r0, 4, %rd0;"]
    return lines + [f"st.global.b32 [%rd1+{{{i}}}], %r{first + i};" for i in range(count)]


def pair(low, high):
    return int(low) | int(high) << 16


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("K", [16, 8])
def test_a_warp_multiplies_matrices(kind, K):
    A, a_bits = numbers(16, K, kind=kind)
    B, b_bits = numbers(K, 8, kind=kind)
    C = RANDOM.standard_normal((16, 8)).astype(np.float32)
    a_words, b_words = np.zeros((K // 4, 32), np.uint32), np.zeros((K // 8, 32), np.uint32)
    c_words = np.zeros((4, 32), np.float32)
    # the tables of the PTX manual, lane by lane
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for i in range(K // 2):
            row = group if i % 4 < 2 else group + 8
            column = place * 2 + (i & 1) + (8 if i >= 4 else 0)
            a_words[i // 2, lane] |= int(a_bits[row, column]) << 16 * (i % 2)
        for i in range(K // 4):
            row = place * 2 + (i & 1) + (8 if i >= 2 else 0)
            b_words[i // 2, lane] |= int(b_bits[row, group]) << 16 * (i % 2)
        for i in range(4):
            c_words[i, lane] = C[group + (8 if i >= 2 else 0), place * 2 + (i & 1)]
    out = np.zeros((4, 32), np.float32)
    run(
        program(
            *loads(0, 10, K // 4),
            *loads(1, 20, K // 8),
            *loads(2, 30, 4),
            f"mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32 "
            f"{names(40, 4)}, {names(10, K // 4)}, {names(20, K // 8)}, {names(30, 4)};",
            *stores(3, 40, 4),
            threads=32,
        ),
        a_words,
        b_words,
        c_words,
        out,
    )
    D = A.astype(np.float64) @ B + C
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)
            assert out[i, lane] == np.float32(D[row, column])


def test_a_warp_multiplies_matrices_of_tf32():
    A, B = (RANDOM.integers(-999, 999, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    a_words, b_words = np.zeros((4, 32), np.float32), np.zeros((2, 32), np.float32)
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for i in range(4):
            a_words[i, lane] = A[group + 8 * (i % 2), place + 4 * (i // 2)]
        for i in range(2):
            b_words[i, lane] = B[place + 4 * i, group]
    # bits that tf32 has not are not read
    a_words = (a_words.view(np.uint32) | 0xFFF).view(np.float32)
    out, zero = np.zeros((4, 32), np.float32), np.zeros((4, 32), np.float32)
    run(
        program(
            *loads(0, 10, 4),
            *loads(1, 20, 2),
            *loads(2, 30, 4),
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            f"{names(40, 4)}, {names(10, 4)}, {names(20, 2)}, {names(30, 4)};",
            *stores(3, 40, 4),
            threads=32,
        ),
        a_words,
        b_words,
        zero,
        out,
    )
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2
            assert out[i, lane] == (A @ B)[row, column]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_pass_through_shared_memory(count, trans):
    """Row i of matrix m is stored by lane 8 m + i; ldmatrix gives lane l its row l / 4."""
    rows = RANDOM.integers(0, 2**16, (8 * count, 8)).astype(np.uint16)
    padded = np.zeros((32, 8), np.uint16)
    padded[: 8 * count] = rows
    out = np.zeros((count, 32), np.uint32)
    run(
        program(
            "ld.param.b64 %rd0, [p0];",
            "mad.wide.u32 %rd1, %r0, 16, %rd0;",
            "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];",
            # rows lie in an order of their own, 48 bytes apart
            "xor.b32 %r5, %r0, 5;",
            "mul.lo.s32 %r5, %r5, 48;",
            "st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};",
            "bar.sync 0;",
            f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names(10, count)}, [%r5];",
            *stores(1, 10, count),
            threads=32,
        ),
        padded.view(np.uint32),
        out,
        shared=32 * 48,
    )
    for m in range(count):
        matrix = rows[8 * m : 8 * m + 8]
        matrix = matrix.T if trans else matrix
        for lane in range(32):
            i, j = lane // 4, 2 * (lane % 4)
            assert out[m, lane] == pair(matrix[i, j], matrix[i, j + 1])


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(trans):
    words = RANDOM.integers(0, 2**32, (4, 64), dtype=np.uint64).astype(np.uint32)
    out = np.zeros_like(words)
    run(
        program(
            *loads(0, 10, 4),
            "mul.lo.s32 %r5, %r0, 16;",
            f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {names(10, 4)};",
            f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names(20, 4)}, [%r5];",
            *stores(1, 20, 4),
            threads=64,
        ),
        words,
        out,
        threads=64,
        shared=1024,
    )
    assert np.array_equal(words, out)


# --- products of a warp group: the layouts of the PTX manual, "Strides" and "Shared memory layout"

SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
FENCES = ["fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.fence.sync.aligned;"]


def place_of(row, k, rows, is_transposed, mode):
    """Byte of element (row, k) of an operand of 16 columns, the descriptor's two strides."""
    span = SWIZZLES[mode]
    across = span // 2
    contiguous, other = (row, k) if is_transposed else (k, row)
    length = rows if is_transposed else 16
    atoms = -(-length // across)
    # atoms of 8 lines, side by side along the contiguous dimension, then below one another
    leading, stride = 8 * span, 8 * span * atoms
    line, column = other % 8, contiguous % across
    chunk = column // 8 ^ {0: 0, 1: line, 2: line // 2, 3: line // 4}[mode] % max(1, span // 16)
    byte = (contiguous // across) * leading + (other // 8) * stride
    byte += line * span + chunk * 16 + column % 8 * 2
    # "leading" and "stride" of the descriptor change places in this one layout
    return (byte, stride, leading) if is_transposed and mode == 0 else (byte, leading, stride)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["K major", "rows major"])
@pytest.mark.parametrize("mode", SWIZZLES)
@pytest.mark.parametrize("adds", [False, True], ids=["new", "adds"])
def test_a_warp_group_multiplies_matrices(kind, is_transposed, mode, adds):
    N = 32
    A, a_bits = numbers(64, 16, kind=kind)
    B, b_bits = numbers(N, 16, kind=kind)
    C = RANDOM.standard_normal((64, N)).astype(np.float32)
    image = np.zeros(8192, np.uint16)
    descriptors = []
    for start, rows, bits in ((0, 64, a_bits), (8192, N, b_bits)):
        for row in range(rows):
            for k in range(16):
                byte, leading, stride = place_of(row, k, rows, is_transposed, mode)
                image[(start + byte) // 2] = bits[row, k]
        word = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
        descriptors.append(word)
    c_words = np.zeros((16, 128), np.float32)

    def element(i, thread):
        """Row and column that register i of a thread holds."""
        warp, lane = thread // 32, thread % 32
        return 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2

    for thread in range(128):
        for i in range(16):
            c_words[i, thread] = C[element(i, thread)]
    out = np.zeros_like(c_words)
    flag = int(is_transposed)
    lines = ["ld.param.b64 %rd0, [p0];", "mad.wide.u32 %rd1, %r0, 16, %rd0;"]
    lines.append("mul.lo.s32 %r5, %r0, 16;")
    for step in range(0, 16384, 2048):
        lines.append(f"ld.global.v4.b32 {names(1, 4)}, [%rd1+{step}];")
        lines.append(f"st.shared.v4.b32 [%r5+{step}], {names(1, 4)};")
    run(
        program(
            *lines,
            *loads(1, 100, 16),
            *FENCES,
            f"mov.b64 %rd5, {descriptors[0]};",
            f"mov.b64 %rd6, {descriptors[1]};",
            f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{kind}.{kind} "
            f"{names(100, 16)}, %rd5, %rd6, {int(adds)}, 1, 1, {flag}, {flag};",
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 0;",
            *stores(2, 100, 16),
            threads=128,
        ),
        image,
        c_words,
        out,
        threads=128,
        shared=16384,
    )
    D = A.astype(np.float64) @ B.T + (C if adds else 0)
    for thread in range(128):
        for i in range(16):
            assert out[i, thread] == np.float32(D[element(i, thread)])


def test_a_warp_group_takes_its_left_operand_from_registers():
    A, a_bits = numbers(64, 16, kind="bf16")
    B, b_bits = numbers(8, 16, kind="bf16")
    image = np.zeros(2048, np.uint16)
    for row in range(8):
        for k in range(16):
            byte, leading, stride = place_of(row, k, 8, False, 3)
            image[byte // 2] = b_bits[row, k]
    descriptor = leading >> 4 << 16 | stride >> 4 << 32 | 3 << 62
    a_words = np.zeros((4, 128), np.uint32)
    for thread in range(128):
        warp, lane = thread // 32, thread % 32
        for i in range(8):
            row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
            column = lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)
            a_words[i // 2, thread] |= int(a_bits[row, column]) << 16 * (i % 2)
    out = np.zeros((4, 128), np.float32)
    run(
        program(
            *loads(0, 10, 4),
            "ld.param.b64 %rd0, [p1];",
            "mad.wide.u32 %rd1, %r0, 16, %rd0;",
            "mul.lo.s32 %r5, %r0, 16;",
            f"ld.global.v4.b32 {names(1, 4)}, [%rd1];",
            f"st.shared.v4.b32 [%r5], {names(1, 4)};",
            *(f"mov.b32 %r{100 + i}, 0;" for i in range(4)),
            *FENCES,
            f"mov.b64 %rd6, {descriptor};",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
            f"{names(100, 4)}, {names(10, 4)}, %rd6, 1, 1, 1, 0;",
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 0;",
            *stores(2, 100, 4),
            threads=128,
        ),
        a_words,
        image[:1024],
        out,
        threads=128,
        shared=2048,
    )
    D = A.astype(np.float64) @ B.T
    for thread in range(128):
        warp, lane = thread // 32, thread % 32
        for i in range(4):
            row, column = 16 * warp + lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
            assert out[i, thread] == np.float32(D[row, column])
