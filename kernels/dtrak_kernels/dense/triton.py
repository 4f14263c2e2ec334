"""Dense random projection on an accelerator, the matrix regenerated inside the matrix product.

    grads [B, C]  --pack-->  values [R, 256 n] fp16 or bf16, on the matrix's grid of 256-blocks
    values  x  R[offset : offset + C] (made in registers)  -->  partial [S, R, K] float32
    partial  --reduce in a fixed order-->  added to out [B, K] float32

Neither the matrix nor a float32 copy of the gradients is stored. One program of the product owns
BLOCK_K columns of the matrix for BLOCK_B rows and one of S spans of the parameters. The matrix is
the *left* operand, [columns, parameters]: the stream's bit order is the register fragment of that
operand (see `reference`), so each thread makes the signs it multiplies, 128 per Philox call, and
they never pass through shared memory. Values are the right operand, read asynchronously.

Precision. Signs are exact in 16 bits, so 16-bit gradients take the tensor cores as they are. A
float32 gradient is the sum of two float16 numbers, after a power-of-two scale per sample, with an
error below 2**-22 of itself or 2**-39 of the sample's largest entry: two rows of values instead of
one. That is twice the work of float16, where ``input_precision="tf32x3"`` would be six times and
``"ieee"`` would leave the tensor cores; nothing is rounded to bfloat16. Normal entries are split in
the same way. All products accumulate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import launch
from ..projection import Projection
from ..random.words import Stream
from ..random.words_triton import box_muller, philox_4x32
from .config import DenseConfig, config_on

IS_INTERPRETED = triton.knobs.runtime.interpret

# packed values in flight, and partial sums in flight, in bytes
_PACK_BYTES = 64 * 2**20
_PARTIAL_BYTES = 256 * 2**20

RADEMACHER_STREAM = tl.constexpr(int(Stream.RADEMACHER))
NORMAL_STREAM = tl.constexpr(int(Stream.NORMAL))


@triton.jit(do_not_specialize=["B"])
def _pack_kernel(  # type: ignore[no-untyped-def]
    grads_ptr,  # [B, C]
    scale_ptr,  # [B] float32
    values_ptr,  # [B or 2B, width] fp16 or bf16
    B,
    C,
    start,
    stride_gb,
    stride_vb,
    IS_SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C columns of one sample, scaled, from column ``start`` on; zero outside ``[0, C)``."""
    pid_c = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    offs_v = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_c = start + offs_v
    # [BLOCK_C]
    g = tl.load(
        grads_ptr + b * stride_gb + offs_c, mask=(offs_c >= 0) & (offs_c < C), other=0.0
    ).to(tl.float32)
    g = g * tl.load(scale_ptr + b)
    high = g.to(values_ptr.dtype.element_ty)
    mask_v = offs_v < stride_vb
    tl.store(values_ptr + b * stride_vb + offs_v, high, mask=mask_v)
    if IS_SPLIT:
        low = (g - high.to(tl.float32)).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + (B + b) * stride_vb + offs_v, low, mask=mask_v)


@triton.jit
def _sign_tile(  # type: ignore[no-untyped-def]
    words, q: tl.constexpr, dtype: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Quarter ``q`` of a 256-block of signs, ``[BLOCK_K, 64]`` in a 16-bit ``dtype``.

    ``words [BLOCK_K / 16, 8, 4, 2, 2]``: columns above bit 3, column bits 0-2, parameter bits 1-2,
    column bit 3, parameter bit 3.
    """
    ones: tl.constexpr = 0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00
    j = (4 * q + tl.arange(0, 4)).to(tl.uint32)
    # [..., 4]; two signs at a time: the bits of parameters p and p + 1 are the sign bits of the
    # halves
    pair = ((words[:, :, :, :, :, None] << j) & 0x80008000) | ones
    even = (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    odd = (pair >> 16).to(tl.uint16).to(dtype, bitcast=True)
    # [..., column bit 3, parameter bit 3, parameter bits 4-5, parameter bit 0]
    sign = tl.join(even, odd)
    return tl.reshape(tl.permute(sign, (0, 3, 1, 5, 4, 2, 6)), (BLOCK_K, 64))


@triton.jit(do_not_specialize=["rows", "blocks", "first", "key_low", "key_high"])
def _rademacher_partial_kernel(  # type: ignore[no-untyped-def]
    values_ptr,  # [rows, 256 * blocks] fp16 or bf16
    partial_ptr,  # [S, rows, K] float32
    rows,
    blocks,
    K,
    first,
    key_low,
    key_high,
    stride_vb,
    stride_ps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A [BLOCK_K, BLOCK_B] tile of signs.T @ values.T over one span of 256-parameter blocks."""
    tl.static_assert(BLOCK_K % 16 == 0, "a Philox call covers columns k and k + 8")
    pid_k = tl.program_id(0)
    pid_b = tl.program_id(1)
    pid_s = tl.program_id(2)
    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = (offs_b < rows)[None, :]
    span = tl.cdiv(blocks, tl.num_programs(2))
    start = pid_s * span
    stop = tl.minimum(start + span, blocks)

    # [BLOCK_K / 16, 8, 4]: the layout of a warp over these dimensions is that of the matrix operand
    pair = (pid_k * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16))[:, None, None] * 8
    pair = pair + tl.arange(0, 8)[None, :, None]
    c0 = (pair * 4 + tl.arange(0, 4)[None, None, :]).to(tl.uint32)
    zero = c0 * 0
    block = first.to(tl.int64) + start
    # int64 before the product with a stride: a row of values may exceed 2**31 elements
    v_ptrs = values_ptr + start.to(tl.int64) * 256 + offs_b[None, :].to(tl.int64) * stride_vb
    v_ptrs = v_ptrs + tl.arange(0, 64)[:, None]

    acc = tl.zeros((BLOCK_K, BLOCK_B), dtype=tl.float32)
    for _ in range(start, stop):
        c1 = zero + (block & 0xFFFFFFFF).to(tl.uint32)
        c2 = zero + (block >> 32).to(tl.uint32)
        w0, w1, w2, w3 = philox_4x32(c0, c1, c2, zero + RADEMACHER_STREAM, key_low, key_high)
        # [BLOCK_K / 16, 8, 4, column bit 3, parameter bit 3]
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        for q in tl.static_range(4):
            # [64, BLOCK_B]
            v = tl.load(v_ptrs + 64 * q, mask=mask_b, other=0.0)
            sign = _sign_tile(words, q, values_ptr.dtype.element_ty, BLOCK_K)
            acc = tl.dot(sign, v, acc, input_precision="ieee")
        v_ptrs += 256
        block += 1

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    p_ptrs = partial_ptr + pid_s.to(tl.int64) * stride_ps
    p_ptrs = p_ptrs + offs_b[None, :].to(tl.int64) * K + offs_k[:, None]
    tl.store(p_ptrs, acc, mask=mask_b & (offs_k < K)[:, None])


@triton.jit(do_not_specialize=["rows", "blocks", "first", "key_low", "key_high"])
def _normal_partial_kernel(  # type: ignore[no-untyped-def]
    values_ptr,  # [rows, 256 * blocks] float16
    partial_ptr,  # [S, rows, K] float32
    rows,
    blocks,
    K,
    first,
    key_low,
    key_high,
    stride_vb,
    stride_ps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A [BLOCK_K, BLOCK_B] tile of normals.T @ values.T over one span of 256-parameter blocks."""
    tl.static_assert(BLOCK_K % 16 == 0, "columns come in register fragments of 16")
    pid_k = tl.program_id(0)
    pid_b = tl.program_id(1)
    pid_s = tl.program_id(2)
    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = (offs_b < rows)[None, :]
    # steps of 64 parameters: every entry takes registers until it is multiplied
    span = tl.cdiv(blocks, tl.num_programs(2))
    start = 4 * pid_s * span
    stop = tl.minimum(start + 4 * span, 4 * blocks)

    # [BLOCK_K / 16, 8, 4] as in the Rademacher kernel, then [..., column bit 3, parameter bits 4-5]
    k = (pid_k * BLOCK_K + 16 * tl.arange(0, BLOCK_K // 16))[:, None, None]
    k = k + tl.arange(0, 8)[None, :, None] + tl.zeros((1, 1, 4), tl.int32)
    call = tl.arange(0, 4)[None, None, :] + tl.zeros((BLOCK_K // 16, 8, 1), tl.int32)
    bit3 = tl.arange(0, 2)[None, None, None, :, None]
    j = tl.arange(0, 4)[None, None, None, None, :]
    c0 = (k[:, :, :, None, None] + 8 * bit3 + 0 * j).to(tl.uint32)
    quad = (call[:, :, :, None, None] + 4 * j + 0 * bit3).to(tl.uint32)
    zero = c0 * 0
    # 16 quads per step, so adding a quad to the low word never carries
    step = 4 * first.to(tl.int64) + start
    v_ptrs = values_ptr + start.to(tl.int64) * 64 + offs_b[None, :].to(tl.int64) * stride_vb
    v_ptrs = v_ptrs + tl.arange(0, 64)[:, None]

    acc = tl.zeros((BLOCK_K, BLOCK_B), dtype=tl.float32)
    for _ in range(start, stop):
        # [64, BLOCK_B]
        v = tl.load(v_ptrs, mask=mask_b, other=0.0)
        c1 = quad + ((step * 16) & 0xFFFFFFFF).to(tl.uint32)
        c2 = zero + ((step * 16) >> 32).to(tl.uint32)
        w0, w1, w2, w3 = philox_4x32(c0, c1, c2, zero + NORMAL_STREAM, key_low, key_high)
        x0, y0 = box_muller(w0, w1)
        x1, y1 = box_muller(w2, w3)
        # [..., column bit 3, parameter bits 4-5, parameter bit 3, parameter bit 0]
        entry = tl.join(tl.join(x0, x1), tl.join(y0, y1))
        entry = tl.reshape(tl.permute(entry, (0, 3, 1, 4, 5, 2, 6)), (BLOCK_K, 64))
        high = entry.to(tl.float16)
        low = (entry - high.to(tl.float32)).to(tl.float16)
        acc = tl.dot(high, v, acc, input_precision="ieee")
        acc = tl.dot(low, v, acc, input_precision="ieee")
        v_ptrs += 64
        step += 1

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    p_ptrs = partial_ptr + pid_s.to(tl.int64) * stride_ps
    p_ptrs = p_ptrs + offs_b[None, :].to(tl.int64) * K + offs_k[:, None]
    tl.store(p_ptrs, acc, mask=mask_b & (offs_k < K)[:, None])


@triton.jit(do_not_specialize=["B", "splits"])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # [S, B or 2B, K] float32
    factor_ptr,  # [B] float32
    out_ptr,  # [B, K] float32
    B,
    K,
    splits,
    stride_ps,
    stride_ob,
    IS_SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K features of one sample: spans are added in their order, then scaled, then added."""
    pid_k = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    # [BLOCK_K]
    acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
    p_ptrs = partial_ptr + b * K + offs_k
    # from the row of a sample's high part to that of its low part, in int64
    low = (b + B) * K - b * K
    for _ in range(0, splits):
        part = tl.load(p_ptrs, mask=mask, other=0.0)
        if IS_SPLIT:
            part += tl.load(p_ptrs + low, mask=mask, other=0.0)
        acc += part
        p_ptrs += stride_ps
    o_ptrs = out_ptr + b * stride_ob + offs_k
    out = tl.load(o_ptrs, mask=mask, other=0.0)
    tl.store(o_ptrs, out + acc * tl.load(factor_ptr + b), mask=mask)


def _splits(config: DenseConfig, tiles: int, blocks: int, plane: int, device: torch.device) -> int:
    """Spans of parameters: about two programs per multiprocessor, if the partial sums fit."""
    if config.splits:
        return min(config.splits, blocks)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // tiles, blocks, _PARTIAL_BYTES // (4 * plane)))


def _accumulate(
    values: Tensor,
    factor: Tensor,
    out: Tensor,
    projection: Projection,
    first: int,
    config: DenseConfig,
) -> None:
    """Add the product of whole 256-blocks, ``values [B or 2B, 256 n]``, to ``out [B, K]``."""
    (B, K), rows, blocks = out.shape, len(values), values.shape[1] // 256
    block_b = min(config.block_b, max(16, triton.next_power_of_2(rows)))
    grid_k, grid_b = triton.cdiv(K, config.block_k), triton.cdiv(rows, block_b)
    splits = _splits(config, grid_k * grid_b, blocks, rows * K, out.device)
    partial = torch.empty(splits, rows, K, dtype=torch.float32, device=out.device)
    kernel = (
        _rademacher_partial_kernel if projection.kind == "rademacher" else _normal_partial_kernel
    )
    launch(
        kernel,
        (grid_k, grid_b, splits),
        values_ptr=values,
        partial_ptr=partial,
        rows=rows,
        blocks=blocks,
        K=K,
        first=first,
        key_low=projection.seed & 0xFFFFFFFF,
        key_high=projection.seed >> 32,
        stride_vb=values.stride(0),
        stride_ps=partial.stride(0),
        BLOCK_B=block_b,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    block = min(1024, triton.next_power_of_2(K))
    launch(
        _reduce_kernel,
        (triton.cdiv(K, block), B),
        partial_ptr=partial,
        factor_ptr=factor,
        out_ptr=out,
        B=B,
        K=K,
        splits=splits,
        stride_ps=partial.stride(0),
        stride_ob=out.stride(0),
        IS_SPLIT=rows != B,
        BLOCK_K=block,
    )


def _row_scale(grads: Tensor) -> Tensor:
    """A power of two per sample that brings its largest entry to [2**14, 2**15), ``[B]``."""
    largest = torch.linalg.vector_norm(grads, ord=float("inf"), dim=1, dtype=torch.float32)
    _, exponent = torch.frexp(torch.where(largest.isfinite(), largest, torch.ones_like(largest)))
    # the bits of a float32 power of two: its exponent, biased
    biased = (15 - exponent).clamp(-126, 126) + 127
    return (biased.to(torch.int32) << 23).view(torch.float32)


def _project_packed(
    grads: Tensor,
    row_scale: Tensor,
    out: Tensor,
    projection: Projection,
    offset: int,
    scale: float,
    dtype: torch.dtype,
    config: DenseConfig,
) -> None:
    """Copy columns into whole 256-blocks of ``dtype``, a workspace at a time, and multiply."""
    B, C = grads.shape
    is_split = grads.dtype == torch.float32
    rows = 2 * B if is_split else B
    factor = scale / row_scale
    blocks = max(1, _PACK_BYTES // (512 * rows))
    end = triton.cdiv(offset + C, 256)
    for first in range(offset // 256, end, blocks):
        count = min(blocks, end - first)
        values = torch.empty(rows, 256 * count, dtype=dtype, device=grads.device)
        launch(
            _pack_kernel,
            (triton.cdiv(256 * count, 1024), B),
            grads_ptr=grads,
            scale_ptr=row_scale,
            values_ptr=values,
            B=B,
            C=C,
            start=256 * first - offset,
            stride_gb=grads.stride(0),
            stride_vb=values.stride(0),
            IS_SPLIT=is_split,
            BLOCK_C=1024,
        )
        _accumulate(values, factor, out, projection, first, config)


def _project_rows(
    grads: Tensor,
    projection: Projection,
    offset: int,
    out: Tensor,
    scale: float,
    config: DenseConfig,
) -> None:
    B, C = grads.shape

    def packed(start: int, stop: int, row_scale: Tensor, dtype: torch.dtype) -> None:
        part = grads[:, start:stop]
        _project_packed(part, row_scale, out, projection, offset + start, scale, dtype, config)

    if grads.dtype == torch.float32 or projection.kind == "normal":
        packed(0, C, _row_scale(grads), torch.float16)
        return
    ones = torch.ones(B, dtype=torch.float32, device=grads.device)
    head = min(-offset % 256, C)
    body = grads[:, head : C - (offset + C) % 256]
    is_aligned = grads.stride(0) % 16 == 0 and body.data_ptr() % 16 == 0
    if body.shape[1] < 256 or not is_aligned:
        packed(0, C, ones, grads.dtype)
        return
    # whole aligned blocks are read where they lie
    tail = head + body.shape[1]
    _accumulate(body, scale * ones, out, projection, (offset + head) // 256, config)
    for start, stop in ((0, head), (tail, C)):
        if start < stop:
            packed(start, stop, ones, grads.dtype)


def launch_project(
    grads: Tensor,
    projection: Projection,
    offset: int,
    out: Tensor,
    config: DenseConfig | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Add ``grads @ R[offset : offset + C]`` to ``out``, R being the scaled projection matrix.

    Args:
        grads: ``[B, C]`` float32, float16 or bfloat16, last dimension contiguous.
        projection: kind ``"rademacher"`` or ``"normal"``.
        offset: parameter index of the first column.
        out: ``[B, K]`` float32, last dimension contiguous. Added to.
        config: launch configuration; the tuned or default one of the device if ``None``.
        scale: factor on the entries, ``K**-0.5`` if ``None``.

    Returns:
        ``out``. The same inputs on the same device give the same bits.
    """
    if grads.numel() == 0:
        return out
    config = config or config_on(projection.kind, grads, projection.proj_dim)
    scale = projection.proj_dim**-0.5 if scale is None else scale
    # a batch so large that one span of partial sums would not fit is cut
    step = max(config.block_b, min(32768, _PARTIAL_BYTES // (8 * projection.proj_dim)))
    for row in range(0, len(grads), step):
        rows = slice(row, row + step)
        _project_rows(grads[rows], projection, offset, out[rows], scale, config)
    return out
