"""Per-sample weight gradients of one layer at a time, from what its forward and backward saw.

    activations [B, T, I]  x  output_grads [B, T, O]  ->  gradients [b, o, C] of a slice of samples
    and rows

A layer's rows of the forward batch belong to samples in groups of ``rows_per_sample``; positions
and rows of one sample are one reduction axis T, so several timesteps or tokens cost no extra
gradient. Slices are chosen so that neither they nor the patches of a convolution exceed the
device's `WORKSPACE_BYTES` (what its cache holds), except where a single row of the batch or a
single row of the weight already does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORKSPACE_BYTES = {"cpu": 2 * 2**20, "cuda": 16 * 2**20}


@dataclass(frozen=True)
class Slice:
    """Per-sample gradients of some rows of a weight, for some samples.

    Attributes:
        samples: which samples of the batch.
        rows: which rows (output features or channels) of the weight.
        grads: ``[b, o, C]``, columns ordered as in `sjlt.as_matrix`.
    """

    samples: slice
    rows: slice
    grads: Tensor


def linear_rows(x: Tensor, rows: int) -> Tensor:
    """``[rows, ..., I]`` as ``[rows, T, I]``."""
    return x.reshape(rows, -1, x.shape[-1])


def conv2d_patches(x: Tensor, conv: nn.Conv2d, out_size: tuple[int, int]) -> Tensor:
    """The input patches of a convolution, channels last.

    Args:
        x: ``[R, I, H, W]`` input rows.
        conv: the module; its stride, padding (also asymmetric "same"), dilation and groups count.
        out_size: ``(Ho, Wo)``.

    Returns:
        ``[R, Ho·Wo, groups, kh·kw·I/groups]``, contiguous.
    """
    if any(conv._reversed_padding_repeated_twice):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    x = x.permute(0, 2, 3, 1).contiguous()
    rows, _, width, channels = x.shape
    (high, wide), (kh, kw) = out_size, conv.kernel_size
    (sh, sw), (dh, dw) = conv.stride, conv.dilation
    line, groups = width * channels, conv.groups
    patches = x.as_strided(
        (rows, high, wide, groups, kh, kw, channels // groups),
        (x.stride(0), sh * line, sw * channels, channels // groups, dh * line, dw * channels, 1),
    )
    return patches.reshape(rows, high * wide, groups, kh * kw * (channels // groups))


def weight_grads(
    module: nn.Linear | nn.Conv2d,
    x: Tensor,
    output_grads: Tensor,
    rows_per_sample: int,
    *,
    all_samples: bool,
    row_multiple: int = 1,
) -> Iterator[Slice]:
    """Per-sample gradients of the weight of a linear or 2-D convolution layer, slice by slice.

    Args:
        module: the layer.
        x: its input, ``[R, ..., I]`` or ``[R, I, H, W]``, with ``R = B · rows_per_sample``.
        output_grads: gradient with respect to its output, ``[R, ..., O]`` or ``[R, O, Ho, Wo]``.
        rows_per_sample: consecutive rows of the batch that make up one sample; they are summed.
        all_samples: every slice holds all samples (few rows), as a dense projection wants it;
            otherwise all rows (few samples) where they fit.
        row_multiple: slices of rows begin at multiples of this.

    Yields:
        Slices that cover the batch and the weight once, float32 (float64 for a float64 model).
    """
    dtype = torch.float64 if output_grads.dtype == torch.float64 else torch.float32
    rows = len(x)
    samples = rows // rows_per_sample
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    if isinstance(module, nn.Conv2d):
        out_size = (output_grads.shape[2], output_grads.shape[3])
        deltas = output_grads.flatten(2).transpose(1, 2)
        columns = module.weight[0].numel()
        row_bytes = out_size[0] * out_size[1] * columns * groups * dtype.itemsize
    else:
        deltas = linear_rows(output_grads, rows)
        x = linear_rows(x, rows)
        columns, row_bytes = module.in_features, x.shape[1] * module.in_features * dtype.itemsize
    out_rows = deltas.shape[2]

    def patches(first: int, last: int) -> Tensor:
        part = x[first:last].to(dtype)
        if isinstance(module, nn.Conv2d):
            return conv2d_patches(part, module, out_size)
        return part.unsqueeze(2)

    per_weight_row = max(columns * dtype.itemsize, 1)
    workspace = WORKSPACE_BYTES.get(deltas.device.type, WORKSPACE_BYTES["cuda"])
    fitting = max(workspace // per_weight_row, 1)
    if all_samples:
        sample_step, row_step = max(samples, 1), fitting // max(samples, 1)
    else:
        sample_step, row_step = max(fitting // out_rows, 1), fitting
    row_step = max(row_step // row_multiple, 1) * row_multiple
    fitting_rows = max(workspace // max(row_bytes, 1), 1)
    per_group = out_rows // groups
    for weight_rows in _slices(0, out_rows, row_step):
        for chosen in _slices(0, samples, sample_step):
            grads = deltas.new_zeros(_length(chosen), _length(weight_rows), columns, dtype=dtype)
            for part, begin, end in _batch_rows(chosen, rows_per_sample, fitting_rows):
                a = patches(begin, end)
                a = a.reshape(_length(part), -1, groups, a.shape[-1])
                d = deltas[begin:end, :, weight_rows].to(dtype)
                d = d.reshape(_length(part), -1, _length(weight_rows)).transpose(1, 2)
                target = grads[part.start - chosen.start : part.stop - chosen.start]
                for group in range(groups):
                    low = max(group * per_group - weight_rows.start, 0)
                    high = min((group + 1) * per_group, weight_rows.stop) - weight_rows.start
                    if low < high:
                        target[:, low:high].baddbmm_(d[:, low:high], a[:, :, group])
            yield Slice(chosen, weight_rows, grads)


def _length(part: slice) -> int:
    return part.stop - part.start


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _batch_rows(chosen: slice, rows_per_sample: int, most: int) -> Iterator[tuple[slice, int, int]]:
    """Samples and their batch rows, at most ``most`` at a time: whole samples where they fit."""
    if most >= rows_per_sample:
        for part in _slices(chosen.start, chosen.stop, most // rows_per_sample):
            yield part, part.start * rows_per_sample, part.stop * rows_per_sample
        return
    for sample in range(chosen.start, chosen.stop):
        for rows in _slices(sample * rows_per_sample, (sample + 1) * rows_per_sample, most):
            yield slice(sample, sample + 1), rows.start, rows.stop
