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

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORKSPACE_BYTES = {"cpu": 2 * 2**20, "cuda": 16 * 2**20}

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS = (*PLAIN_CONVOLUTIONS, *TRANSPOSED)
Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
WeightModule = nn.Linear | nn.Embedding | Convolution
WEIGHT_MODULES = (nn.Linear, nn.Embedding, *CONVOLUTIONS)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, whose weight is ``[I, O]``."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def as_convolution(module: nn.Module) -> nn.ConvTranspose1d:
    """The transposed convolution over positions that `is_conv1d` is; it has no values."""
    inputs, outputs = module.get_parameter("weight").shape
    return nn.ConvTranspose1d(inputs, outputs, 1, bias=False, device="meta")


def positions_last(x: Tensor) -> Tensor:
    """``[R, ..., n]`` as ``[R, n, T]``, which a convolution takes."""
    return linear_rows(x, len(x)).transpose(1, 2)


@dataclass(slots=True)
class LayerGradient:
    """The per-sample gradients of a layer's weight, not formed yet: what they are the product of.

    Attributes:
        module: a linear layer, an embedding, or a convolution of one to three dimensions,
            transposed or not. Where channels were projected, its geometry alone counts.
        x: its input, ``[R, ..., I]`` or ``[R, I, *spatial]`` (token numbers ``[R, ...]`` of an
            embedding), with ``R = B · rows_per_sample``.
        output_grads: gradient with respect to its output, ``[R, ..., O]`` or ``[R, O, *spatial]``.
        rows_per_sample: consecutive rows of the batch that make up one sample; they are summed.
    """

    module: Any
    x: Tensor
    output_grads: Tensor
    rows_per_sample: int = 1

    @property
    def num_samples(self) -> int:
        """``B``."""
        return len(self.x) // self.rows_per_sample

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients: float64 for a float64 model, else float32."""
        return accumulation_dtype(self.output_grads)


@dataclass(frozen=True)
class Slice:
    """Per-sample gradients of some rows of a weight, for some samples.

    Attributes:
        samples: which samples of the batch.
        rows: which rows (first dimension) of the weight.
        block: ``[b, o, I, taps]``: the weight's own dimensions, in any memory layout.
    """

    samples: slice
    rows: slice
    block: Tensor

    @property
    def grads(self) -> Tensor:
        """``[b, o, C]``, columns ordered as in `sjlt.as_matrix`."""
        return self.block.transpose(2, 3).flatten(2)


def linear_rows(x: Tensor, rows: int) -> Tensor:
    """``[rows, ..., I]`` as ``[rows, T, I]``."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def pad_input(x: Tensor, conv: Convolution) -> Tensor:
    """``[R, I, *spatial]`` with the convolution's padding, of whatever mode, put on."""
    padding = conv._reversed_padding_repeated_twice
    if not any(padding):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, padding, mode=mode)


def sample_products(d: Tensor, a: Tensor) -> Tensor:
    """``dᵀ a`` of every sample: ``[B, T, O]`` and ``[B, T, I]`` to ``[B, O, I]``."""
    # a CPU multiplies up to five times faster with the thinner side first
    if d.shape[2] > a.shape[2]:
        return torch.bmm(a.transpose(1, 2), d).transpose(1, 2)
    return torch.bmm(d.transpose(1, 2), a)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution multiplies every position by its weight, and nothing else."""
    return (
        isinstance(module, CONVOLUTIONS)
        and all(size == 1 for size in module.kernel_size)
        and all(stride == 1 for stride in module.stride)
        and not any(module._reversed_padding_repeated_twice)
    )


def conv_patches(x: Tensor, conv: Convolution, out_size: tuple[int, ...]) -> Tensor:
    """The patches a convolution multiplies its weight with, channels last.

    Args:
        x: ``[R, I, *spatial]`` rows of its input (of its output, for a transposed convolution).
        conv: the module; its stride, padding (also asymmetric "same"), dilation and groups count.
        out_size: the positions of the patches, per spatial dimension.

    Returns:
        ``[R, positions, groups, taps·I/groups]``; a view, where every position is a patch.
    """
    # a transposed convolution may have more output than its input reaches
    if is_pointwise(conv) and x.shape[2:] == out_size:
        return x.flatten(2).transpose(1, 2).unflatten(2, (conv.groups, -1))
    windows = patch_windows(x, conv, out_size)
    columns = conv.weight.shape[1] * conv.weight[0, 0].numel()
    return windows.reshape(len(x), -1, conv.groups, columns)


def patch_windows(x: Tensor, conv: Convolution, out_size: tuple[int, ...]) -> Tensor:
    """The patches of `conv_patches`, not copied: ``[R, *positions, groups, *kernel, I/groups]``."""
    return _windows(pad_input(x, conv), out_size, conv, conv.stride, conv.groups)


def _windows(
    x: Tensor, size: tuple[int, ...], conv: Convolution, stride: tuple[int, ...], groups: int
) -> Tensor:
    """A view ``[R, *size, groups, *kernel, c/groups]`` of ``x [R, c, *spatial]``, padded before."""
    x = x.movedim(1, -1).contiguous()
    channels, steps = x.shape[-1], x.stride()[1:-1]
    return x.as_strided(
        (len(x), *size, groups, *conv.kernel_size, channels // groups),
        (
            x.stride(0),
            *(s * step for s, step in zip(stride, steps, strict=True)),
            channels // groups,
            *(dilation * step for dilation, step in zip(conv.dilation, steps, strict=True)),
            1,
        ),
    )


@dataclass(frozen=True)
class LayerProduct:
    """A weight gradient as a sum over positions of (delta, patch) outer products.

    Attributes:
        deltas: ``[R, T, O]``, what the rows of the weight are multiplied with.
        patches: of batch rows first to last: ``[r, T, groups, C]``.
        columns: ``C``.
        row_bytes: size of one row's patches.
        groups: the weight's rows in group g see the patches of group g.
    """

    deltas: Tensor
    patches: Callable[[int, int], Tensor]
    columns: int
    row_bytes: int
    groups: int


def layer_product(layer: LayerGradient) -> LayerProduct:
    """The sum of outer products that a linear layer's or a convolution's gradients are."""
    module, x, output_grads, dtype = layer.module, layer.x, layer.output_grads, layer.dtype
    rows = len(x)
    if isinstance(module, nn.Linear):
        flat = linear_rows(x, rows)
        return LayerProduct(
            linear_rows(output_grads, rows),
            lambda first, last: flat[first:last].to(dtype).unsqueeze(2),
            module.in_features,
            flat.shape[1] * module.in_features * dtype.itemsize,
            1,
        )
    # a transposed convolution is the adjoint of a convolution: input and output trade places
    source, seen = (output_grads, x) if isinstance(module, TRANSPOSED) else (x, output_grads)
    positions = tuple(seen.shape[2:])
    columns = module.weight[0].numel()
    deltas = seen.flatten(2).transpose(1, 2)
    return LayerProduct(
        deltas,
        lambda first, last: conv_patches(source[first:last].to(dtype), module, positions),
        columns,
        deltas.shape[1] * columns * module.groups * dtype.itemsize,
        module.groups,
    )


def accumulation_dtype(output_grads: Tensor) -> torch.dtype:
    """Dtype of gradients: float64 for a float64 model, else float32."""
    return torch.float64 if output_grads.dtype == torch.float64 else torch.float32


def workspace_bytes(device: torch.device) -> int:
    """`WORKSPACE_BYTES` of a device."""
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])


def weight_grads(
    layer: LayerGradient, *, all_samples: bool, row_multiple: int = 1
) -> Iterator[Slice]:
    """Per-sample gradients of the weight of a layer, slice by slice.

    Args:
        layer: what they are made of.
        all_samples: every slice holds all samples (few rows), as a dense projection wants it;
            otherwise all rows (few samples) where they fit.
        row_multiple: slices of rows begin at multiples of this.

    Yields:
        Slices float32 (float64 for a float64 model), each entry at most once; entries in no slice
        are zero, which only an embedding has.
    """
    module, x, output_grads = layer.module, layer.x, layer.output_grads
    rows_per_sample, samples, dtype = layer.rows_per_sample, layer.num_samples, layer.dtype
    if isinstance(module, nn.Embedding):
        yield from _embedding_grads(
            module, x.reshape(samples, -1), output_grads.to(dtype), all_samples, row_multiple
        )
        return
    out_rows, inputs, *kernel = module.weight.shape
    taps = math.prod(kernel)
    weight_steps, sample_step = _steps(
        out_rows,
        samples,
        inputs * taps * dtype.itemsize,
        output_grads.device,
        all_samples,
        row_multiple,
    )
    contraction = choose_contraction(layer)
    product = layer_product(layer) if contraction is None else None
    for weight_rows in weight_steps:
        for chosen in _slices(0, samples, sample_step):
            if product is None:
                assert contraction is not None
                part = slice(chosen.start * rows_per_sample, chosen.stop * rows_per_sample)
                d = output_grads[part]
                d = d[..., weight_rows] if isinstance(module, nn.Linear) else d[:, weight_rows]
                block = contraction(module, x[part], d, _length(chosen))
            else:
                fitting = workspace_bytes(x.device) // max(product.row_bytes, 1)
                parts = list(_batch_rows(chosen, rows_per_sample, max(fitting, 1)))
                grads = _add_products(product, parts, chosen, weight_rows, dtype)
                block = grads.unflatten(2, (taps, inputs)).transpose(2, 3)
            yield Slice(chosen, weight_rows, block)


def _add_products(
    product: LayerProduct,
    parts: list[tuple[slice, int, int]],
    chosen: slice,
    weight_rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Gradients ``[b, o, C]`` of some rows for some samples, whose batch rows come in parts."""
    groups, per_group = product.groups, product.deltas.shape[2] // product.groups
    total: Tensor | None = None
    for inside, begin, end in parts:
        a = product.patches(begin, end)
        a = a.reshape(_length(inside), -1, groups, a.shape[-1])
        d = product.deltas[begin:end, :, weight_rows].to(dtype)
        d = d.reshape(_length(inside), -1, _length(weight_rows))
        if groups == len(parts) == 1:
            return sample_products(d, a[:, :, 0])
        if total is None:
            total = d.new_zeros(_length(chosen), _length(weight_rows), product.columns)
        target = total[inside.start - chosen.start : inside.stop - chosen.start]
        for group in range(groups):
            low = max(group * per_group - weight_rows.start, 0)
            high = min((group + 1) * per_group, weight_rows.stop) - weight_rows.start
            if low < high:
                target[:, low:high].baddbmm_(d[:, :, low:high].transpose(1, 2), a[:, :, group])
    assert total is not None
    return total


# (module, x [B·S, ...], output_grads [B·S, ...], B) -> [B, O, I, taps]
Contraction = Callable[[Any, Tensor, Tensor, int], Tensor]


def choose_contraction(layer: LayerGradient) -> Contraction | None:
    """How the gradients of a layer are best made; None for patches and a matrix product.

    Args:
        layer: what they are made of, or what its channels were projected to.
    """
    module, x, output_grads = layer.module, layer.x, layer.output_grads
    # nothing need be copied to the precision that products are accumulated in
    wide = x.dtype == output_grads.dtype == accumulation_dtype(output_grads)
    if isinstance(module, nn.Linear):
        return linear_grads if wide else None
    if not isinstance(module, PLAIN_CONVOLUTIONS) or module.groups != 1 or not len(x):
        return None
    inputs, outputs = x.shape[1], output_grads.shape[1]
    taps = math.prod(module.kernel_size)
    if is_pointwise(module):
        fits = len(x) * outputs * inputs * x.dtype.itemsize <= workspace_bytes(x.device)
        return pointwise_grads if wide and fits and x.device.type == "cpu" else None
    # the patches of one side are small
    if taps * inputs <= 2 * outputs:
        return None
    if taps * outputs <= 2 * inputs and _can_trade(module):
        return traded_grads
    return grouped_grads if prefers_grouped(layer) else None


def geometry(module: WeightModule) -> tuple[Any, ...]:
    """What a contraction depends on beside the module's kind and the shapes."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return ()
    return module.stride, module.padding, module.dilation, module.padding_mode


def whole_contraction(layer: LayerGradient) -> Contraction | None:
    """How all gradients of a weight are made at once; None where `weight_grads` is needed."""
    if isinstance(layer.module, nn.Embedding):
        return None
    size = layer.num_samples * layer.module.weight.numel() * layer.dtype.itemsize
    return None if size > workspace_bytes(layer.x.device) else choose_contraction(layer)


def linear_grads(module: nn.Linear, x: Tensor, output_grads: Tensor, samples: int) -> Tensor:
    """Gradients of a linear layer's weight.

    Args:
        module: the layer; its numbers of features do not matter.
        x: ``[B · S, ..., I]``.
        output_grads: ``[B · S, ..., O]``.
        samples: ``B``.

    Returns:
        ``[B, O, I, 1]``.
    """
    a, d = (t.reshape(samples, -1, t.shape[-1]) for t in (x, output_grads))
    return sample_products(d, a).unsqueeze(3)


def pointwise_grads(conv: Convolution, x: Tensor, output_grads: Tensor, samples: int) -> Tensor:
    """Gradients of a 1x1 convolution's weight, row by row and then summed.

    Neither side is copied to bring the rows of a sample together.

    Args:
        conv: its geometry; its numbers of channels do not matter.
        x: ``[B · S, I, *spatial]``.
        output_grads: ``[B · S, O, *spatial]``.
        samples: ``B``.

    Returns:
        ``[B, O, I, 1]``.
    """
    products = torch.bmm(output_grads.flatten(2), x.flatten(2).transpose(1, 2))
    if len(products) > samples:
        products = products.unflatten(0, (samples, -1)).sum(1)
    return products.unsqueeze(3)


def _can_trade(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    return (
        conv.padding_mode == "zeros"
        and all(stride == 1 for stride in conv.stride)
        and min(_traded_padding(conv)) >= 0
    )


def _traded_padding(conv: Convolution) -> list[int]:
    """Of the output gradient, in the order of `F.pad`."""
    reaches = [(n - 1) * step for n, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    ends = conv._reversed_padding_repeated_twice
    return [reaches[-1 - index // 2] - end for index, end in enumerate(ends)]


def traded_grads(conv: Convolution, x: Tensor, output_grads: Tensor, samples: int) -> Tensor:
    """Gradients of a convolution's weight from patches of its output gradient.

    Input and output gradient trade places: the sum over output positions of a patch of the input is
    the sum over input positions of a patch of the output gradient, its taps in reverse. Much less
    to copy where there are few output channels.

    Args:
        conv: its geometry, stride 1 and zeros as padding; its numbers of channels do not matter.
        x: ``[B · S, I, *spatial]``.
        output_grads: ``[B · S, O, *spatial]``.
        samples: ``B``.

    Returns:
        ``[B, O, I, taps]``.
    """
    inputs, outputs, size = x.shape[1], output_grads.shape[1], tuple(x.shape[2:])
    dtype = accumulation_dtype(output_grads)
    taps, rows_per_sample = math.prod(conv.kernel_size), len(x) // samples
    row_bytes = math.prod(size) * max(taps * outputs, inputs) * dtype.itemsize
    fitting = max(workspace_bytes(x.device) // max(row_bytes, 1), 1)
    total = x.new_zeros(samples, inputs, taps * outputs, dtype=dtype)
    padding = _traded_padding(conv)
    for inside, begin, end in _batch_rows(slice(0, samples), rows_per_sample, fitting):
        padded = F.pad(output_grads[begin:end].to(dtype), padding)
        patches = _windows(padded, size, conv, (1,) * len(size), 1)
        patches = patches.reshape(_length(inside), -1, taps * outputs)
        a = x[begin:end].to(dtype).flatten(2).transpose(1, 2).reshape(_length(inside), -1, inputs)
        total[inside].baddbmm_(a.transpose(1, 2), patches)
    return total.unflatten(2, (taps, outputs)).flip(2).permute(0, 3, 1, 2)


def prefers_grouped(layer: LayerGradient) -> bool:
    """Whether one convolution with a group per sample beats patches and a matrix product.

    On a CPU in float32, where the gradient kernel of the convolution library copies no patches and
    there are enough positions for it: twice to four times as fast there, slower elsewhere.

    Args:
        layer: what the gradients are made of, or what its channels were projected to.
    """
    module, x, output_grads = layer.module, layer.x, layer.output_grads
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups != 1 or not len(x):
        return False
    # its patches are its input
    if is_pointwise(module):
        return False
    if output_grads.device.type != "cpu" or output_grads.dtype != torch.float32:
        return False
    positions = output_grads[0, 0].numel() * layer.rows_per_sample
    return positions >= 2 * max(x.shape[1], output_grads.shape[1])


def grouped_grads(conv: Convolution, x: Tensor, output_grads: Tensor, samples: int) -> Tensor:
    """Gradients of a convolution's weight, the samples as groups of one convolution.

    Args:
        conv: its geometry; its numbers of channels do not matter.
        x: ``[B · S, I, *spatial]``.
        output_grads: ``[B · S, O, *spatial]``.
        samples: ``B``.

    Returns:
        ``[B, O, I, taps]``.
    """

    def grouped(t: Tensor) -> Tensor:
        # [B · S, c, *spatial] -> [S, B · c, *spatial]
        return t.to(torch.float32).unflatten(0, (samples, -1)).transpose(0, 1).flatten(1, 2)

    ends = conv._reversed_padding_repeated_twice
    padding = list(ends[::2][::-1])
    if conv.padding_mode != "zeros" or ends[::2] != ends[1::2]:
        x, padding = pad_input(x, conv), [0] * len(padding)
    inputs, outputs = x.shape[1], output_grads.shape[1]
    weight = x.new_empty(1, dtype=torch.float32).expand(
        samples * outputs, inputs, *conv.kernel_size
    )
    _, grads, _ = torch.ops.aten.convolution_backward(
        grouped(output_grads),
        grouped(x),
        weight,
        None,
        list(conv.stride),
        padding,
        list(conv.dilation),
        False,
        [0] * len(padding),
        samples,
        [False, True, False],
    )
    return grads.view(samples, outputs, inputs, -1)


def _embedding_grads(
    module: nn.Embedding,
    tokens: Tensor,
    output_grads: Tensor,
    all_samples: bool,
    row_multiple: int,
) -> Iterator[Slice]:
    """Slices of rows that some token of the batch has; the others' gradients are zero."""
    (samples, _), columns = tokens.shape, module.embedding_dim
    deltas = output_grads.reshape(*tokens.shape, columns)
    used = tokens != (-1 if module.padding_idx is None else module.padding_idx)
    weight_steps, sample_step = _steps(
        module.num_embeddings,
        samples,
        columns * deltas.dtype.itemsize,
        deltas.device,
        all_samples,
        row_multiple,
    )
    for weight_rows in weight_steps:
        for chosen in _slices(0, samples, sample_step):
            row = tokens[chosen] - weight_rows.start
            hit = used[chosen] & (row >= 0) & (row < _length(weight_rows))
            if not hit.any():
                continue
            grads = deltas.new_zeros(_length(chosen) * _length(weight_rows), columns)
            first = torch.arange(_length(chosen), device=row.device) * _length(weight_rows)
            grads.index_add_(0, (row + first[:, None])[hit], deltas[chosen][hit])
            block = grads.view(_length(chosen), -1, columns, 1)
            yield Slice(chosen, weight_rows, block)


def _steps(
    out_rows: int,
    samples: int,
    row_bytes: int,
    device: torch.device,
    all_samples: bool,
    row_multiple: int,
) -> tuple[list[slice], int]:
    """Slices of the weight's rows, and how many samples go with each: what the workspace holds."""
    fitting = max(workspace_bytes(device) // max(row_bytes, 1), 1)
    if all_samples:
        sample_step, row_step = max(samples, 1), fitting // max(samples, 1)
    else:
        sample_step, row_step = max(fitting // out_rows, 1), fitting
    row_step = max(row_step // row_multiple, 1) * row_multiple
    return list(_slices(0, out_rows, row_step)), sample_step


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
