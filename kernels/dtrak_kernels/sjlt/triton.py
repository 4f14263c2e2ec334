"""Weight gradients of a batch and their tile-chained sketch in one kernel, no gradient in memory.

    x [R, ..., I] or [R, I, H, W]   output_grads [R, ..., O] or [R, O, Ho, Wo]   R = B · rows
    ->  added to out [B, K] float32, exactly as `ParameterSketch.add_matrix` adds `weight_grads`

One program owns a sample and a block of the sketch. It walks the block's tiles of the weight in
increasing number; for each it reduces ``output_gradsᵀ x`` over the sample's rows and positions into
``sum [BM, BN]`` float32 (an implicit im2col: patches are addresses), shifts the sum to its place in
the block, adds it to the accumulator and flips the sign of every entry of the accumulator with a
fresh Philox bit. At the end it adds the accumulator to its window of ``out``. No atomics, one
writer per window: the same input gives the same bits.

Placement. Tiles are shifted in steps of one, which would cut every vectorised load in two-byte
pieces, so loads know nothing of shifts: the finished sum is rolled through shared memory, once per
tile, not once per step of the reduction. The accumulator is a flat vector whose index holds the
bits of row i and column j in the order, lowest first,

    j1 j2  i0 i1 i2  i4 i5 (i6)  i3  j0  j3 j4 j5 j6.

That is the order of the tensor cores' result over lanes, warps and registers: the roll reads and
writes every bank of shared memory once, and a thread's flips are the words of one Philox call,
number ``index mod 128``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ..compiling import launch
from ..gradients.weight import linear_rows
from ..random.words import Stream
from ..random.words_triton import philox_4x32
from .config import Form, SketchConfig, config_on
from .torch import ParameterSketch, as_matrix

# largest offset of an element inside a sample that 32 bits hold
MAX_NARROW = 2**31 - 1

FLIP_STREAM = tl.constexpr(int(Stream.SJLT_FLIP))


@triton.jit
def _flatten(tile, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A ``[BM, BN]`` tile in the accumulator's order, ``[BM · BN]``."""
    bits = tl.reshape(tile, (BM // 16, 2, 8, BN // 8, 4, 2))
    return tl.reshape(tl.permute(bits, (3, 5, 1, 0, 2, 4)), (BM * BN,))


@triton.jit
def _unflatten(flat, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = tl.reshape(flat, (BN // 8, 2, 2, BM // 16, 8, 4))
    return tl.reshape(tl.permute(bits, (3, 2, 4, 0, 5, 1)), (BM, BN))


@triton.jit
def _roll(flat, row_shift, column_shift, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entry (i, j) of a flattened tile moves to (i + row_shift, j + column_shift), cyclically."""
    index = tl.arange(0, BM * BN)
    i = ((index >> 5) & (BM // 16 - 1)) * 16 + ((index // (2 * BM)) & 1) * 8 + ((index >> 2) & 7)
    j = (index // (8 * BM)) * 8 + (index & 3) * 2 + ((index // (4 * BM)) & 1)
    i = (i - row_shift) & (BM - 1)
    j = (j - column_shift) & (BN - 1)
    # rows and columns apart until the last sum, so that a thread computes each of them once
    row = (i >> 4) * 32 + ((i >> 3) & 1) * (2 * BM) + (i & 7) * 4
    column = (j >> 3) * (8 * BM) + (j & 1) * (4 * BM) + ((j >> 1) & 3)
    return tl.gather(flat, row + column, 0)


@triton.jit
def _flip(  # type: ignore[no-untyped-def]
    flat, tile, low, high, key_low, key_high, BM: tl.constexpr, BN: tl.constexpr
):
    """Independent fair signs on a flattened accumulator, the ones that follow ``tile``."""
    index = tl.arange(0, BM * BN)
    calls: tl.constexpr = 2 * BM if BM < 64 else 128
    c0 = (tile * 128 + (index & (calls - 1))).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox_4x32(
        c0,
        zero + low.to(tl.uint32),
        zero + high.to(tl.uint32),
        zero + FLIP_STREAM,
        key_low,
        key_high,
    )
    is_odd = ((index // (2 * BM)) & 1) != 0
    word = tl.where(is_odd, w1, w0)
    if BM == 128:
        word = tl.where((index & 128) != 0, tl.where(is_odd, w3, w2), word)
    bit = (2 * (index // (8 * BM)) + ((index // (4 * BM)) & 1)).to(tl.uint32)
    sign = ((word << bit) & 0x80000000).to(tl.int32, bitcast=True)
    return (flat.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _halves(flat):  # type: ignore[no-untyped-def]
    """The left and the right half of the columns of a flattened tile."""
    return tl.split(tl.trans(tl.reshape(flat, (2, flat.shape[0] // 2))))


@triton.jit
def _scale_columns(  # type: ignore[no-untyped-def]
    flat, tile_ptr, row_shift, column_shift, left: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Columns of a flattened tile, from ``left`` on, times the scales of their entries."""
    width: tl.constexpr = flat.shape[0] // BM
    offs_i = (tl.arange(0, BM) - row_shift) & (BM - 1)
    offs_j = (left + tl.arange(0, width) - column_shift) & (BN - 1)
    scales = tl.load(tile_ptr + offs_i[:, None] * BN + offs_j[None, :])
    return _flatten(_unflatten(flat, BM, width) * scales.to(tl.float32), BM, width)


@triton.jit
def _scale(flat, tile_ptr, row_shift, column_shift, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A flattened tile times ``[BM, BN]`` scales, which are where its entries were unshifted."""
    if BN < 128:
        scaled = _scale_columns(flat, tile_ptr, row_shift, column_shift, 0, BM, BN)
    else:
        # in halves, so that what is loaded fits into registers
        left, right = _halves(flat)
        a, b = _halves(left)
        c, d = _halves(right)
        a = _scale_columns(a, tile_ptr, row_shift, column_shift, 0, BM, BN)
        b = _scale_columns(b, tile_ptr, row_shift, column_shift, BN // 4, BM, BN)
        left = tl.reshape(tl.trans(tl.join(a, b)), (BM * BN // 2,))
        c = _scale_columns(c, tile_ptr, row_shift, column_shift, BN // 2, BM, BN)
        d = _scale_columns(d, tile_ptr, row_shift, column_shift, 3 * BN // 4, BM, BN)
        right = tl.reshape(tl.trans(tl.join(c, d)), (BM * BN // 2,))
        scaled = tl.reshape(tl.trans(tl.join(left, right)), (BM * BN,))
    # one way out: the compiler goes on after a return inside an if
    return scaled


@triton.jit
def _add_to_window(  # type: ignore[no-untyped-def]
    flat, out_ptr, window, K, left: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Add columns of a block, flattened, from column ``left`` on, to its window of K features."""
    width: tl.constexpr = flat.shape[0] // BM
    offs_j = left + tl.arange(0, width)
    position = window + tl.arange(0, BM)[:, None] * BN + offs_j[None, :]
    out_ptrs = out_ptr + tl.where(position >= K, position - K, position)
    # [BM, width]; no other program writes here
    tl.store(out_ptrs, tl.load(out_ptrs) + _unflatten(flat, BM, width))


@triton.jit
def _gradient_tile(  # type: ignore[no-untyped-def]
    acc,
    x_ptr,
    d_ptr,
    T,
    H,
    W,
    offs_r,
    mask_r,
    h_offset,
    w_offset,
    channel,
    mask_c,
    stride_h,
    stride_w,
    stride_xr,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_dr,
    stride_dc,
    stride_dh,
    stride_dw,
    HO: tl.constexpr,
    WO: tl.constexpr,
    IS_ONE_TAP: tl.constexpr,
    IS_PADDED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``acc [BM, BN]`` plus the sum over T rows and positions of one tile of the gradient.

    Weight rows are ``offs_r``; columns are given by their tap's place in the image and a channel.
    """
    # [BM], [BN]; wide before the product with a stride
    offs_d = (offs_r.to(tl.int64) if IS_WIDE else offs_r) * stride_dc
    offs_c = (channel.to(tl.int64) if IS_WIDE else channel) * stride_xc
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        row = offs_t // (HO * WO)
        position = offs_t - row * (HO * WO)
        y = position // WO
        z = position - y * WO
        if IS_WIDE:
            row = row.to(tl.int64)
            y = y.to(tl.int64)
            z = z.to(tl.int64)
        # [BLOCK_T, BM]
        d = tl.load(
            d_ptr + (row * stride_dr + y * stride_dh + z * stride_dw)[:, None] + offs_d[None, :],
            mask=mask_t[:, None] & mask_r[None, :],
            other=0.0,
        )
        # [BLOCK_T, BN]
        if IS_ONE_TAP:
            h = y * stride_h + h_offset
            w = z * stride_w + w_offset
            if IS_PADDED:
                mask_t = mask_t & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offs_x = (row * stride_xr + h * stride_xh + w * stride_xw)[:, None] + offs_c[None, :]
            mask = mask_t[:, None] & mask_c[None, :]
        else:
            h = (y * stride_h)[:, None] + h_offset[None, :]
            w = (z * stride_w)[:, None] + w_offset[None, :]
            mask = mask_t[:, None] & mask_c[None, :]
            if IS_PADDED:
                mask = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offs_x = (row * stride_xr)[:, None] + h * stride_xh + w * stride_xw + offs_c[None, :]
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0)
        acc = tl.dot(tl.trans(d), x, acc, input_precision=INPUT_PRECISION)
    return acc


# neither a 1 nor a multiple of 16 among these makes faster code: each would be compiled apart
_ANY = ["low", "high", "key_low", "key_high", "scale", "blocks", "rows_per_sample", "H", "W"]
_ANY += ["pad_h", "pad_w", "rows_per_group"]


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=["blocks_ptr", "tiles_ptr"])
def _sketch_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [R, I, H, W]
    d_ptr,  # [R, O, HO, WO]
    blocks_ptr,  # [blocks, 3] int32: start of its window, its first tile and the one after its last
    tiles_ptr,  # [tiles, 3] int32, block by block: number, row shift, column shift
    out_ptr,  # [B, K] float32
    scales_ptr,  # [tiles, BM, BN] bf16, tiles by their numbers
    scale,
    blocks,
    rows_per_sample,
    O,
    C,
    I,  # channels per group
    H,
    W,
    KW,
    K,
    low,
    high,
    key_low,
    key_high,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    rows_per_group,
    stride_xr,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_dr,
    stride_dc,
    stride_dh,
    stride_dw,
    stride_ob,
    HO: tl.constexpr,
    WO: tl.constexpr,
    IS_ONE_TAP: tl.constexpr,
    IS_PADDED: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_ROLLED: tl.constexpr,
    IS_FLIPPED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of one sample's sketch; IS_ROLLED shifts sums, otherwise loads are shifted."""
    pid = tl.program_id(0)
    # neighbours share a sample, hence its inputs in cache
    b = (pid // blocks).to(tl.int64)
    block_ptr = blocks_ptr + 3 * (pid % blocks)
    window = tl.load(block_ptr)
    first = tl.load(block_ptr + 1)
    stop = tl.load(block_ptr + 2)
    T = rows_per_sample * (HO * WO)
    # int64 (b is) before the products with strides
    x_ptr += b * rows_per_sample * stride_xr
    d_ptr += b * rows_per_sample * stride_dr
    across = tl.cdiv(C, BN)

    acc = tl.zeros((BM * BN,), dtype=tl.float32)
    for entry in range(first, stop):
        tile = tl.load(tiles_ptr + 3 * entry)
        row_shift = tl.load(tiles_ptr + 3 * entry + 1)
        column_shift = tl.load(tiles_ptr + 3 * entry + 2)
        down = tile // across
        top = down * BM
        left = (tile - down * across) * BN
        offs_i = tl.arange(0, BM)
        offs_j = tl.arange(0, BN)
        if not IS_ROLLED:
            offs_i = (offs_i - row_shift) & (BM - 1)
            offs_j = (offs_j - column_shift) & (BN - 1)
        offs_r = top + offs_i
        mask_r = offs_r < O
        mask_c = left + offs_j < C
        if IS_ONE_TAP:
            tap = left // I
            channel = (left - tap * I) + offs_j
        else:
            tap = (left + offs_j) // I
            channel = left + offs_j - tap * I
        h_offset = (tap // KW) * dilation_h - pad_h
        w_offset = (tap % KW) * dilation_w - pad_w
        grads = tl.zeros((BM, BN), dtype=tl.float32)
        first_group = 0
        stop_group = 1
        if IS_GROUPED:
            first_group = top // rows_per_group
            stop_group = (tl.minimum(top + BM, O) - 1) // rows_per_group + 1
        # a single round, without groups, is no loop once it is compiled
        for group in range(first_group, stop_group):
            mask_g = mask_r
            if IS_GROUPED:
                mask_g = mask_r & (offs_r // rows_per_group == group)
            grads = _gradient_tile(
                grads,
                x_ptr,
                d_ptr,
                T,
                H,
                W,
                offs_r,
                mask_g,
                h_offset,
                w_offset,
                group * I + channel,
                mask_c,
                stride_h,
                stride_w,
                stride_xr,
                stride_xc,
                stride_xh,
                stride_xw,
                stride_dr,
                stride_dc,
                stride_dh,
                stride_dw,
                HO,
                WO,
                IS_ONE_TAP,
                IS_PADDED,
                IS_WIDE,
                INPUT_PRECISION,
                BLOCK_T,
            )
        flat = _flatten(grads, BM, BN)
        if HAS_SCALES:
            tile_ptr = scales_ptr + tile.to(tl.int64) * (BM * BN)
            if IS_ROLLED:
                flat = _scale(flat, tile_ptr, 0, 0, BM, BN)
            else:
                flat = _scale(flat, tile_ptr, row_shift, column_shift, BM, BN)
        if IS_ROLLED:
            flat = _roll(flat, row_shift, column_shift, BM, BN)
        if IS_SCALED:
            flat *= scale
        acc += flat
        if IS_FLIPPED:
            acc = _flip(acc, tile, low, high, key_low, key_high, BM, BN)

    out_ptr += b * stride_ob
    if BN == 128:
        # in halves, so that the addresses fit into registers
        left_half, right_half = _halves(acc)
        _add_to_window(left_half, out_ptr, window, K, 0, BM, BN)
        _add_to_window(right_half, out_ptr, window, K, BN // 2, BM, BN)
    else:
        _add_to_window(acc, out_ptr, window, K, 0, BM, BN)


@lru_cache(maxsize=4096)
def _tables(sketch: ParameterSketch, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """The kernel's two tables, and whether the last block's window reaches into the first's.

    Blocks without a tile are left out: ``[blocks, 3]`` and ``[tiles, 3]`` int32 on the device.
    """
    block_of, row_shifts, column_shifts = sketch.placement
    order = torch.argsort(block_of, stable=True)
    tiles = torch.stack([order, row_shifts[order], column_shifts[order]], dim=1)
    size = math.prod(sketch.tile)
    used, counts = torch.unique(block_of, return_counts=True)
    stops = counts.cumsum(0)
    blocks = torch.stack([(sketch.base + used * size) % sketch.proj_dim, stops - counts, stops], 1)
    overlaps = (
        sketch.proj_dim % size != 0
        and len(used) > 1
        and int(used[0]) == 0
        and int(used[-1]) == sketch.num_blocks - 1
    )
    return blocks.int().to(device), tiles.int().to(device), overlaps


def scales_in_tiles(sketch: ParameterSketch, scales: Tensor) -> Tensor:
    """A factor for every entry of a parameter, laid out for the kernel's loads.

    Args:
        sketch: of the parameter.
        scales: ``[O, I, *kernel]``, values of bfloat16.

    Returns:
        ``[tiles, BM, BN]`` bfloat16 on the device of ``scales``, zero outside the parameter.
    """
    (tile_rows, tile_columns), (down, across) = sketch.tile, sketch.grid
    matrix = as_matrix(scales.to(torch.bfloat16).unsqueeze(0)).squeeze(0)
    padded = matrix.new_zeros(down * tile_rows, across * tile_columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    tiles = padded.view(down, tile_rows, across, tile_columns).transpose(1, 2)
    return tiles.flatten(0, 1).contiguous()


def _one_axis(x: Tensor) -> int | None:
    """Stride of rows and positions of ``[R, I, H, W]`` as a single axis, None if they are not."""
    step, length = 0, 1
    for axis in (3, 2, 0):
        if x.shape[axis] == 1:
            continue
        if length == 1:
            step = x.stride(axis)
        elif x.stride(axis) != step * length:
            return None
        length *= x.shape[axis]
    return step


def _channels_last(x: Tensor) -> Tensor:
    """The same values with contiguous channels: others are read two bytes at a time.

    A copy moves less than one tile of weights would: every tile reads all positions.
    """
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _largest_offset(x: Tensor, rows_per_sample: int) -> int:
    """Elements from the first to the last of one sample of ``[R, I, H, W]``."""
    sizes = (rows_per_sample, *x.shape[1:])
    return sum((size - 1) * stride for size, stride in zip(sizes, x.stride(), strict=True))


def launch_sketch(
    module: nn.Linear | nn.Conv2d,
    x: Tensor,
    output_grads: Tensor,
    sketch: ParameterSketch,
    out: Tensor,
    rows_per_sample: int = 1,
    config: SketchConfig | None = None,
    *,
    scale: float = 1.0,
    scales: Tensor | None = None,
) -> Tensor:
    """Add the sketch of the per-sample gradients of a layer's weight to ``out``, in place.

    Args:
        module: the layer.
        x: its input, ``[R, ..., I]`` or ``[R, I, H, W]`` with ``R = B · rows_per_sample``; float32,
            float16 or bfloat16, of any strides; images whose channels are not contiguous are
            copied.
        output_grads: gradient with respect to its output, ``[R, ..., O]`` or ``[R, O, Ho, Wo]``, of
            the same dtype.
        sketch: of the weight.
        out: ``[B, K]`` float32, last dimension contiguous.
        rows_per_sample: consecutive rows of the batch that make up one sample; they are summed.
        config: launch configuration; the tuned or default one of the device if ``None``. Others
            round sums in another order, and change nothing else.
        scale: factor on the gradients.
        scales: a factor for every entry, of `scales_in_tiles`.

    Returns:
        ``out``. The same inputs on the same device give the same bits, alone or in a batch, as long
        as its tuned configurations stay the same.

    Raises:
        ValueError: the file of tuned configurations holds an impossible one for this device.
    """
    rows, pad_h, pad_w, groups = len(x), 0, 0, 1
    kernel: tuple[int, ...] = (1, 1)
    stride = dilation = kernel
    if out.numel() == 0 or x.numel() == 0 or output_grads.numel() == 0:
        return out
    if isinstance(module, nn.Conv2d):
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        groups = module.groups
        if module.padding_mode == "zeros":
            pad_w, _, pad_h, _ = module._reversed_padding_repeated_twice
        else:
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        # models run channels first unless somebody told them otherwise
        x, output_grads = _channels_last(x), _channels_last(output_grads)
    else:
        # a linear layer is a 1 x 1 convolution of an image of one line
        x, output_grads = (
            linear_rows(a, rows).transpose(1, 2).unsqueeze(2) for a in (x, output_grads)
        )
    (_, channels, H, W), (_, O, HO, WO) = x.shape, output_grads.shape
    is_padded = (
        pad_h > 0
        or pad_w > 0
        or (HO - 1) * stride[0] + (kernel[0] - 1) * dilation[0] >= H
        or (WO - 1) * stride[1] + (kernel[1] - 1) * dilation[1] >= W
    )
    is_wide = max(_largest_offset(a, rows_per_sample) for a in (x, output_grads)) > MAX_NARROW
    (BM, BN), I = sketch.tile, channels // groups
    is_one_tap = kernel == (1, 1) or I % BN == 0
    reduction, is_one_axis = rows_per_sample * HO * WO, False
    is_channels_last = x.stride(1) == output_grads.stride(1) == 1
    x_strides, d_strides = x.stride(), output_grads.stride()
    if kernel == stride == (1, 1) and not is_padded:
        x_step, d_step = _one_axis(x), _one_axis(output_grads)
        if x_step is not None and d_step is not None:
            # rows and positions are one axis: no division in the kernel
            is_one_axis = True
            x_strides, d_strides = (x_step, x_strides[1], 0, 0), (d_step, d_strides[1], 0, 0)
            rows_per_sample, H, W, HO, WO = reduction, 1, 1, 1, 1
    if config is None:
        form = Form(
            sketch.tile, x.dtype, is_one_tap, is_one_axis, is_channels_last, is_wide, groups > 1
        )
        config = config_on(x.device, form, reduction)

    blocks, tiles, overlaps = _tables(sketch, x.device)
    # the last window may reach into the first: its blocks are launched on their own
    for part in (blocks[:-1], blocks[-1:]) if overlaps else (blocks,):
        launch(
            _sketch_kernel,
            (len(part) * len(out),),
            x_ptr=x,
            d_ptr=output_grads,
            blocks_ptr=part,
            tiles_ptr=tiles,
            out_ptr=out,
            scales_ptr=scales,
            scale=scale,
            blocks=len(part),
            rows_per_sample=rows_per_sample,
            O=O,
            C=I * kernel[0] * kernel[1],
            I=I,
            H=H,
            W=W,
            KW=kernel[1],
            K=sketch.proj_dim,
            low=sketch.offset & 0xFFFFFFFF,
            high=sketch.offset >> 32,
            key_low=sketch.seed & 0xFFFFFFFF,
            key_high=sketch.seed >> 32,
            stride_h=stride[0],
            stride_w=stride[1],
            pad_h=pad_h,
            pad_w=pad_w,
            dilation_h=dilation[0],
            dilation_w=dilation[1],
            rows_per_group=O // groups,
            stride_xr=x_strides[0],
            stride_xc=x_strides[1],
            stride_xh=x_strides[2],
            stride_xw=x_strides[3],
            stride_dr=d_strides[0],
            stride_dc=d_strides[1],
            stride_dh=d_strides[2],
            stride_dw=d_strides[3],
            stride_ob=out.stride(0),
            HO=HO,
            WO=WO,
            IS_ONE_TAP=is_one_tap,
            IS_PADDED=is_padded,
            IS_GROUPED=groups > 1,
            IS_WIDE=is_wide,
            IS_ROLLED=config.is_rolled,
            IS_FLIPPED=True,
            IS_SCALED=scale != 1.0,
            HAS_SCALES=scales is not None,
            INPUT_PRECISION=config.input_precision,
            BM=BM,
            BN=BN,
            BLOCK_T=config.block_t,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
