"""Two-sided sketch: both factors of a layer's gradient are projected before they meet.

    activations [B, T, I] -> [B, T, k_i]  ┐
                                          ├─ thin gradient [B, k_o, taps, k_i] -> features [B, K]
    output_grads [B, T, O] -> [B, T, k_o] ┘

The cheapest map: thin matrix products and no gradient larger than ``k_o · taps · k_i``. The price
is variance. For gradients of stable rank ρ a layer's inner product has relative variance of about
``(2/k_o + 2/k_i) / ρ``, against ``2/K`` for the other kinds, and that does not fall with K: a layer
whose gradient has rank one (a time embedding, a bias in disguise) is estimated poorly.

Specification. A parameter with two or more dimensions is ``[O, I, *kernel]``; r is the projection's
``factor_dim``.

* Factors. ``L [k_o, O]`` with ``k_o = min(r, O)`` acts on the first dimension, ``R [k_i, I]`` with
  ``k_i = min(r, I)`` on the second; taps of a kernel are kept apart. A factor whose extent is at
  most r is the identity. Otherwise entry (j, i) is ±1: bit ``j mod 32`` of word
  ``(j mod 128) // 32`` of the Philox call at counters ``(i, low, high + 2²⁰·(2·(j // 128) + side),
  Stream.KRONECKER)``, where low and high are the words of the parameter's offset in the flattened
  gradient and side is 0 for L and 1 for R; a set bit is -1.
* Thin gradient. ``H[j, tap, l] = s · Σ L[j, o] G[o, i, tap] R[l, i]``, with a factor ``1/√k`` in s
  for each side that is not the identity.
* Place. H, flattened in that order, goes to the K features as a vector of that length does in
  `sjlt`: entry e at ``base + e`` modulo K with an independent fair sign.
* Any other parameter is a vector, as in `sjlt`.

Source:
    LoGra, Choe et al. 2024 (arXiv:2405.13954), for the two-sided projection; the sketch of the thin
    gradient is the CountSketch of Charikar, Chen and Farach-Colton 2002.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch
from torch import Tensor, nn

from ..gradients.weight import (
    TRANSPOSED,
    Convolution,
    LayerGradient,
    choose_contraction,
    grouped_grads,
    is_pointwise,
    linear_grads,
    linear_rows,
    pad_input,
    prefers_grouped,
    sample_products,
)
from ..random.words import Stream, philox_words
from ..sjlt.torch import ParameterSketch, as_matrix, matrix_shape, sketch_gradients

_OUTPUT_SIDE, _INPUT_SIDE = 0, 1


@dataclass(frozen=True)
class Factor:
    """A ±1 matrix ``[k, extent]``, or the identity.

    Attributes:
        extent: what it acts on.
        factor_dim: r.
        offset: of the parameter in the flattened gradient.
        side: 0 for output features, 1 for input features.
        seed: key of the random stream.
    """

    extent: int
    factor_dim: int
    offset: int
    side: int
    seed: int
    _cache: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def size(self) -> int:
        """``k``."""
        return min(self.extent, self.factor_dim)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is projected."""
        return self.extent <= self.factor_dim

    @property
    def scale(self) -> float:
        """What ±1 entries must be multiplied by."""
        return 1.0 if self.is_identity else self.size**-0.5

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The entries ±1, ``[k, extent]``, exact in every floating dtype."""
        key = (device, dtype)
        if key not in self._cache:
            high = self.offset >> 32
            words = [
                philox_words(
                    torch.arange(self.extent),
                    self.offset & 0xFFFFFFFF,
                    high + (2 * call + self.side << 20),
                    int(Stream.KRONECKER),
                    self.seed,
                )
                for call in range(-(-self.size // 128))
            ]
            # [calls, words, extent] -> [calls, words, bits, extent]
            bits = torch.stack([torch.stack(call) for call in words])
            bits = bits[:, :, None] >> torch.arange(32)[:, None] & 1
            rows = (1 - 2 * bits).flatten(0, 2)[: self.size]
            self._cache[key] = rows.to(device=device, dtype=dtype)
        return self._cache[key]

    def apply(self, values: Tensor) -> Tensor:
        """``[..., extent]`` to ``[..., k]``, without the scale."""
        if self.is_identity:
            return values
        return values @ self.matrix(values.device, values.dtype).T


@dataclass(frozen=True)
class TwoSidedSketch:
    """Where the gradient of one parameter with two or more dimensions goes.

    Attributes:
        shape: ``(O, I, *kernel)``.
        offset: index of its first entry in the flattened gradient.
        proj_dim: ``K``.
        factor_dim: r.
        seed: key of the random stream.
    """

    shape: tuple[int, ...]
    offset: int
    proj_dim: int
    factor_dim: int
    seed: int

    @cached_property
    def output_factor(self) -> Factor:
        """``L [k_o, O]``."""
        return Factor(self.shape[0], self.factor_dim, self.offset, _OUTPUT_SIDE, self.seed)

    @cached_property
    def input_factor(self) -> Factor:
        """``R [k_i, I]``."""
        return Factor(self.shape[1], self.factor_dim, self.offset, _INPUT_SIDE, self.seed)

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.shape[2:])

    @property
    def thin_size(self) -> int:
        """``k_o · taps · k_i``."""
        return self.output_factor.size * self.taps * self.input_factor.size

    @cached_property
    def _place(self) -> ParameterSketch:
        return ParameterSketch((self.thin_size,), self.offset, self.proj_dim, self.seed)

    @property
    def _scale(self) -> float:
        return self.output_factor.scale * self.input_factor.scale

    @cached_property
    def _tables(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        return {}

    def table(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where every entry of an unscaled thin gradient goes, and times what; kept.

        Args:
            dtype: of the factors.

        Returns:
            Positions, int64, and scaled signs, ``[k_o · taps · k_i]`` each.
        """
        if dtype not in self._tables:
            positions, signs = self._place.table(dtype)
            self._tables[dtype] = positions, signs * self._scale
        return self._tables[dtype]

    def add_thin(self, thin: Tensor, out: Tensor) -> None:
        """Place unscaled thin gradients ``[b, k_o, taps, k_i]`` in ``out [b, K]``, in place."""
        self._place.add_vector(thin.flatten(1), out, self._scale)

    def add_block(self, grads: Tensor, out: Tensor, first_row: int = 0) -> None:
        """Sketch gradients ``[b, o, I, *kernel]`` of some rows, in place."""
        self.add_matrix(as_matrix(grads), out, first_row)

    def add_matrix(self, grads: Tensor, out: Tensor, first_row: int = 0) -> None:
        """Sketch gradients ``[b, o, C]`` of some rows, columns as in `sjlt.as_matrix`, in place."""
        b, rows, _ = grads.shape
        thin = self.input_factor.apply(grads.unflatten(2, (self.taps, self.shape[1])))
        if self.output_factor.is_identity:
            full = thin.new_zeros(b, self.output_factor.size, *thin.shape[2:])
            full[:, first_row : first_row + rows] = thin
        else:
            left = self.output_factor.matrix(grads.device, grads.dtype)
            full = torch.einsum("jo,botl->bjtl", left[:, first_row : first_row + rows], thin)
        self.add_thin(full, out)

    def thin_input(self, module: nn.Linear | Convolution, x: Tensor) -> Tensor:
        """The layer's side of the thin product, from its input: all that need be kept of it.

        Args:
            module: the layer.
            x: its input, ``[R, ..., I]`` or ``[R, I, *spatial]``.

        Returns:
            ``[R, T, k]`` or ``[R · groups, k, *spatial]``, without the scale.
        """
        if isinstance(module, nn.Linear):
            return self.input_factor.apply(linear_rows(x, len(x)))
        # a transposed convolution is the adjoint of a convolution: input and output trade places
        if isinstance(module, TRANSPOSED):
            return self._project_rows(x, module.groups)
        return self._project_channels(x, self.input_factor, module.groups)

    def thin_output_grads(self, module: nn.Linear | Convolution, output_grads: Tensor) -> Tensor:
        """The other side, from the output gradient; shapes as `thin_input`."""
        if isinstance(module, nn.Linear):
            return self.output_factor.apply(linear_rows(output_grads, len(output_grads)))
        if isinstance(module, TRANSPOSED):
            return self._project_channels(output_grads, self.input_factor, module.groups)
        return self._project_rows(output_grads, module.groups)

    def thin_product(self, layer: LayerGradient, dtype: torch.dtype) -> Tensor:
        """Thin gradients of a layer's weight, made without the gradients.

        Args:
            layer: what the gradients are made of, `thin_input` in place of the input.
            dtype: of the features.

        Returns:
            ``[B, k_o, taps, k_i]``, unscaled.
        """
        module, a = layer.module, layer.x.to(dtype)
        d = self.thin_output_grads(module, layer.output_grads).to(dtype)
        samples = len(layer.output_grads) // layer.rows_per_sample
        if isinstance(module, nn.Linear):
            return linear_grads(module, a, d, samples).transpose(2, 3)
        if isinstance(module, TRANSPOSED):
            return _thin_convolution(module, d, a, samples)
        return _thin_convolution(module, a, d, samples)

    def _project_channels(self, x: Tensor, factor: Factor, groups: int) -> Tensor:
        """``[R, groups · I, *spatial]`` to ``[R · groups, k_i, *spatial]``.

        Groups become rows: they are summed as timesteps are.
        """
        x = x.reshape(len(x) * groups, -1, *x.shape[2:])
        if factor.is_identity:
            return x
        matrix = factor.matrix(x.device, x.dtype)
        return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])

    def _project_rows(self, output_grads: Tensor, groups: int) -> Tensor:
        """``[R, O, *spatial]`` to ``[R · groups, k_o, *spatial]``, each group through its rows."""
        factor = self.output_factor
        if groups == 1:
            return self._project_channels(output_grads, factor, 1)
        d = output_grads.flatten(2).unflatten(1, (groups, -1))
        dtype = d.dtype
        matrix = (
            torch.eye(factor.extent, dtype=dtype, device=d.device)
            if factor.is_identity
            else factor.matrix(d.device, dtype)
        )
        per_group = matrix.unflatten(1, (groups, -1)).transpose(0, 1)
        thin = torch.matmul(per_group, d)
        return thin.reshape(-1, factor.size, *output_grads.shape[2:])


def _thin_convolution(conv: Convolution, a: Tensor, d: Tensor, samples: int) -> Tensor:
    """The thin gradient of a convolution.

    Args:
        conv: its geometry.
        a: ``[R · groups, k, *spatial]`` what the kernel slides over.
        d: ``[R · groups, k, *spatial]`` at the kernel's positions.
        samples: ``B``.

    Returns:
        ``[B, k_o, taps, k_i]``, unscaled.
    """
    layer = LayerGradient(conv, a, d, len(d) // samples)
    contraction = choose_contraction(layer)
    # what follows copies more than patches of few channels
    if contraction is None and prefers_grouped(layer):
        contraction = grouped_grads
    if contraction is not None:
        return contraction(conv, a, d, samples).transpose(2, 3)
    positions = d.shape[2:]
    if is_pointwise(conv) and a.shape[2:] == positions:
        a, d = (t.flatten(2).transpose(1, 2).reshape(samples, -1, t.shape[1]) for t in (a, d))
        return sample_products(d, a).unsqueeze(2)
    a = _padded_channels_last(a, conv)
    size = a.shape[1:-1]
    if all(stride == 1 for stride in conv.stride):
        # on a grid as wide as the padded input a tap is a shift of the flattened positions
        grid = d.new_zeros(len(d), *size, d.shape[1])
        grid[(slice(None), *(slice(0, n) for n in positions))] = d.movedim(1, -1)
        a, d = (t.reshape(samples, -1, t.shape[-1]) for t in (a, grid))
        steps = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        shifts = [
            sum(t * s * g for t, s, g in zip(tap, conv.dilation, steps, strict=True))
            for tap in _taps(conv)
        ]
        length = a.shape[1]
        parts = [d[:, : length - s].transpose(1, 2) @ a[:, s:] for s in shifts]
        return torch.stack(parts, dim=2)
    d = d.movedim(1, -1).reshape(samples, -1, d.shape[1])
    parts = []
    for tap in _taps(conv):
        window = tuple(
            slice(t * dilation, t * dilation + (n - 1) * stride + 1, stride)
            for t, dilation, n, stride in zip(
                tap, conv.dilation, positions, conv.stride, strict=True
            )
        )
        seen_by_tap = a[(slice(None), *window)].reshape(samples, -1, a.shape[-1])
        parts.append(d.transpose(1, 2) @ seen_by_tap)
    return torch.stack(parts, dim=2)


def _padded_channels_last(x: Tensor, conv: Convolution) -> Tensor:
    """``[R, k, *spatial]`` as ``[R, *spatial, k]`` with the convolution's padding put on."""
    if conv.padding_mode != "zeros":
        return pad_input(x, conv).movedim(1, -1)
    # in one pass; the pads of the last dimension come first
    ends = conv._reversed_padding_repeated_twice
    pads = [(ends[axis], ends[axis + 1]) for axis in range(0, len(ends), 2)][::-1]
    size = x.shape[2:]
    padded = x.new_zeros(
        len(x), *(n + sum(pad) for n, pad in zip(size, pads, strict=True)), x.shape[1]
    )
    inside = (slice(low, low + n) for n, (low, _) in zip(size, pads, strict=True))
    padded[(slice(None), *inside)] = x.movedim(1, -1)
    return padded


def _taps(conv: Convolution) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in conv.kernel_size))


def two_sided_parameters(
    shapes: Sequence[Sequence[int]], proj_dim: int, factor_dim: int, seed: int
) -> list[TwoSidedSketch | ParameterSketch]:
    """The sketch of every parameter of a gradient flattened in the order of ``shapes``."""
    sketches: list[TwoSidedSketch | ParameterSketch] = []
    offset = 0
    for shape in shapes:
        shape = tuple(shape)
        sketches.append(
            ParameterSketch(shape, offset, proj_dim, seed)
            if matrix_shape(shape) is None
            else TwoSidedSketch(shape, offset, proj_dim, factor_dim, seed)
        )
        offset += math.prod(shape)
    return sketches


def project_kronecker(
    grads: Tensor,
    proj_dim: int,
    factor_dim: int,
    seed: int,
    shapes: Sequence[Sequence[int]],
    out: Tensor,
) -> Tensor:
    """Sketch dense per-sample gradients ``[B, P]`` into ``out [B, K]``, in place."""
    return sketch_gradients(grads, two_sided_parameters(shapes, proj_dim, factor_dim, seed), out)
