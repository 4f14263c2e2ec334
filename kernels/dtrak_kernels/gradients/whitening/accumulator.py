"""Whitens gradients on their way to another accumulator, each layer where that costs least.

A root of a side that is one matrix for all positions can be applied to what the layer multiplied
(its input, its output gradient) or to the gradient in slices: the first costs more with more
positions, the second with larger weights. A root of whole patches cannot be applied to an input.
With the fused Triton sketch a gradient is formed only where that costs less than a root on what the
layer multiplied (an adapter's thin weights, at many positions): per-entry scales are multiplied in
its tiles, and a low-rank root of patches is a second launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accumulator import MOST_DECISIONS, Accumulator, KroneckerAccumulator, SjltAccumulator
from ..weight import (
    TRANSPOSED,
    LayerGradient,
    WeightModule,
    linear_rows,
    pad_input,
    sample_products,
    workspace_bytes,
)
from .definition import ParameterWhitening
from .roots import LowRankRoot, Root, apply_to_channels

# where a side of a layer is whitened
NOWHERE, FACTOR, SLICES, LAUNCH = "", "input", "slices", "launch"
# only that it is no convolution counts: a matrix as it comes
_MATRIX = nn.Linear(1, 1, bias=False, device="meta")


@dataclass(frozen=True)
class Route:
    """Where a layer's gradient is whitened.

    Attributes:
        columns: A: on what the columns of the weight met, on slices of the gradient, or by a launch
            of its own.
        rows: B: on what its rows met, or on slices.
        rest: what is done to slices; None where none are formed for it.
        flop: multiplications and additions of the roots, whole batch.
    """

    columns: str
    rows: str
    rest: ParameterWhitening | None
    flop: int

    def __str__(self) -> str:
        sides = [f"{side} on {where}" for side, where in (("A", self.columns), ("B", self.rows))]
        return ", ".join(s for s in sides if not s.endswith(" on ")) or "scaled"


class WhiteningAccumulator(Accumulator):
    """Passes whitened gradients on to another accumulator.

    Args:
        accumulator: what makes the features.
        parameters: the map of every parameter, on the device and in the dtype of the features.
        names: of the parameters, for errors.

    Raises:
        ValueError: a two-sided sketch is given a root of whole patches.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        parameters: Sequence[ParameterWhitening],
        names: Sequence[str],
    ) -> None:
        super().__init__(accumulator.shapes, accumulator.num_features)
        self.accumulator, self.parameters = accumulator, parameters
        self.all_samples = accumulator.all_samples
        self.counts_uses = accumulator.counts_uses
        self.title, self.kernel = accumulator.title, accumulator.kernel
        self._routes: dict[tuple[Any, ...], Route] = {}
        self._laid: dict[int, Tensor] = {}
        self._scale_signs()
        inner = getattr(accumulator, "accumulator", accumulator)
        for name, parameter in zip(names, parameters, strict=True):
            if isinstance(inner, KroneckerAccumulator) and parameter.acts_on_patches:
                raise ValueError(
                    "whitening must be of kind 'channels' (or a scale) for projection kind "
                    f"'kronecker', got one of whole patches for {name!r}"
                )

    def _scale_signs(self) -> None:
        """Leave scales to the signs of a sketch where it takes them: they come last."""
        inner = self.accumulator
        if isinstance(inner, SjltAccumulator):
            self.parameters = [
                replace(parameter, scale=parameter.scale.new_ones(()))
                if not parameter.is_zero and inner.take_scale(index, parameter.scale)
                else parameter
                for index, parameter in enumerate(self.parameters)
            ]

    def forget(self) -> None:
        """See `Accumulator.forget`."""
        self.accumulator.forget()

    def open(self, out: Tensor) -> None:
        """See `Accumulator.open`."""
        self.accumulator.open(out)

    def close(self, out: Tensor) -> None:
        """See `Accumulator.close`."""
        self.accumulator.close(out)

    def expect(self, indices: Iterable[int]) -> None:
        """See `Accumulator.expect`."""
        self.accumulator.expect(indices)

    def begin(self, index: int) -> None:
        """See `Accumulator.begin`."""
        self.accumulator.begin(index)

    def row_multiple(self, index: int) -> int:
        """See `Accumulator.row_multiple`."""
        return self.accumulator.row_multiple(index)

    def forms_slices(self, module: nn.Module, output_grads: Tensor) -> bool:
        """See `Accumulator.forms_slices`."""
        return self.accumulator.forms_slices(module, output_grads)

    def keep(self, index: int, module: WeightModule, x: Tensor) -> Tensor:
        """See `Accumulator.keep`: what is kept projected is whitened before."""
        parameter = self.parameters[index]
        if not isinstance(self.accumulator, KroneckerAccumulator):
            return self.accumulator.keep(index, module, x)
        # the gradient itself must be formed
        if parameter.has_entries:
            return x
        root = parameter.rows if isinstance(module, TRANSPOSED) else parameter.columns
        return self.accumulator.keep(index, module, _on_factor(root, module, x))

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`; of a parameter that is rotated, all rows."""
        parameter = self.parameters[index]
        if not parameter.is_zero:
            whitened = parameter.whiten(grads.to(out.dtype), first_row)
            self.accumulator.add(index, whitened, out, samples, first_row)

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        parameter = self.parameters[index]
        if parameter.is_zero:
            return
        if parameter.is_identity:
            self.accumulator.add_weight(index, layer, out)
            return
        route = self.route(index, layer)
        if isinstance(self.accumulator, KroneckerAccumulator) and route.rest is None:
            self._add_thin(index, layer, out)
            return
        precision, layer = layer.output_grads.dtype, _on_factors(layer, parameter, route)
        if route.rest is not None:
            row_multiple = self.shapes[index][0] if route.rows == SLICES else None
            for part in self.slices(index, layer, row_multiple):
                whitened = route.rest.whiten(part.block, part.rows.start)
                self.accumulator.add(index, whitened, out, part.samples, part.rows.start)
        elif self._launches(layer):
            # what is whitened is rounded once more, to what the fused kernel multiplies
            rounded = replace(
                layer, x=layer.x.to(precision), output_grads=layer.output_grads.to(precision)
            )
            self._launch(index, rounded, route, out)
        else:
            scaled = layer.output_grads.to(out.dtype)
            scaled = scaled if parameter.factor == 1 else scaled * parameter.scale
            self.accumulator.add_weight(index, _one_dtype(layer, scaled), out)

    def route(self, index: int, layer: LayerGradient) -> Route:
        """Where a layer is whitened: decided once per shape."""
        key = index, layer.module, layer.x.shape, layer.output_grads.shape
        if key not in self._routes:
            if len(self._routes) >= MOST_DECISIONS:
                self._routes.clear()
            self._routes[key] = self._choose(index, layer)
        return self._routes[key]

    def _launches(self, layer: LayerGradient) -> bool:
        """Whether the fused kernel makes the features."""
        inner = self.accumulator
        return isinstance(inner, SjltAccumulator) and not inner.forms_slices(
            layer.module, layer.output_grads
        )

    def _choose(self, index: int, layer: LayerGradient) -> Route:
        parameter, module = self.parameters[index], layer.module
        if isinstance(module, nn.Embedding):
            return Route(NOWHERE, NOWHERE, parameter, 0)
        forms = self.forms_slices(module, layer.output_grads)
        columns, column_flop = self._choose_columns(parameter, layer, forms)
        rows, row_flop = self._choose_rows(parameter, layer, forms or columns == SLICES)
        entries = parameter.has_entries and not self._launches(layer)
        rest = None
        if entries or SLICES in (columns, rows):
            rest = replace(
                parameter,
                columns=parameter.columns if columns == SLICES else None,
                rows=parameter.rows if rows == SLICES else None,
            )
        return Route(columns, rows, rest, column_flop + row_flop)

    def _choose_columns(
        self, parameter: ParameterWhitening, layer: LayerGradient, forms: bool
    ) -> tuple[str, int]:
        root, shape = parameter.columns, parameter.shape
        if root is None:
            return NOWHERE, 0
        entries = layer.num_samples * math.prod(shape)
        on_slices = entries // root.size * root.flop
        if parameter.acts_on_patches:
            is_thin = isinstance(root, LowRankRoot) and root.groups == 1
            if self._launches(layer) and is_thin and isinstance(layer.module, nn.Conv2d):
                return LAUNCH, 2 * _positions(layer, shape) * root.flop
            return SLICES, on_slices
        side = layer.output_grads if isinstance(layer.module, TRANSPOSED) else layer.x
        on_factor = side.numel() // root.size * root.flop
        if on_factor <= on_slices + self._forming(layer, shape, forms):
            return FACTOR, on_factor
        return SLICES, on_slices

    def _choose_rows(
        self, parameter: ParameterWhitening, layer: LayerGradient, forms: bool
    ) -> tuple[str, int]:
        root, shape = parameter.rows, parameter.shape
        if root is None:
            return NOWHERE, 0
        on_factor = _positions(layer, shape) * root.groups * root.flop
        on_slices = layer.num_samples * math.prod(shape) // root.size * root.flop
        # all rows at once: of few samples, and a sample must not be much
        fits = math.prod(shape) * layer.dtype.itemsize <= 4 * workspace_bytes(layer.x.device)
        is_cheap = on_factor <= on_slices + self._forming(layer, shape, forms)
        if self.all_samples or not fits or is_cheap:
            return FACTOR, on_factor
        return SLICES, on_slices

    def _forming(self, layer: LayerGradient, shape: tuple[int, ...], forms: bool) -> float:
        """Multiplications and additions of a gradient that would not be formed otherwise."""
        if forms:
            return 0
        # a two-sided sketch has no gradient to form: its input is thin already
        can_form = self._launches(layer)
        return 2 * _positions(layer, shape) * math.prod(shape) if can_form else math.inf

    def _add_thin(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """To two-sided sketches, whose side of the input was whitened before it was kept."""
        parameter, is_transposed = self.parameters[index], isinstance(layer.module, TRANSPOSED)
        root = parameter.columns if is_transposed else parameter.rows
        output_grads = _on_factor(root, layer.module, layer.output_grads.to(out.dtype))
        whitened = replace(layer, output_grads=output_grads * parameter.scale)
        self.accumulator.add_weight(index, whitened, out)

    def _launch(self, index: int, layer: LayerGradient, route: Route, out: Tensor) -> None:
        """By the fused kernel: scales in its tiles, a low-rank root of patches as a second one."""
        assert isinstance(self.accumulator, SjltAccumulator)
        parameter, launch = self.parameters[index], self.accumulator.launch
        if parameter.has_entries:
            launch(index, layer, out, scales=self._scales_in_tiles(index))
        elif route.columns != LAUNCH:
            launch(index, layer, out, scale=parameter.factor)
        else:
            root = parameter.columns
            assert isinstance(root, LowRankRoot)
            launch(index, layer, out, scale=parameter.factor * root.factor)
            thin = low_rank_part(layer, root)
            launch(index, thin, out, scale=parameter.factor)

    def _scales_in_tiles(self, index: int) -> Tensor:
        from ...sjlt.triton import scales_in_tiles

        assert isinstance(self.accumulator, SjltAccumulator)
        if index not in self._laid:
            scale = self.parameters[index].scale
            self._laid[index] = scales_in_tiles(self.accumulator.sketches[index], scale)
        return self._laid[index]


def _positions(layer: LayerGradient, shape: tuple[int, ...]) -> int:
    """Places, of all rows, whose outer products a layer's gradients are sums of."""
    seen = layer.x if isinstance(layer.module, TRANSPOSED) else layer.output_grads
    return seen.numel() // shape[0]


def _on_factor(root: Root | None, module: Any, values: Tensor) -> Tensor:
    """A root on the channels of an input or an output gradient."""
    if root is None:
        return values
    values = values.to(root.dtype)
    if isinstance(module, nn.Linear):
        return root.apply(values.unsqueeze(-2).unsqueeze(-2)).reshape(values.shape)
    return apply_to_channels(root, values)


def _on_factors(layer: LayerGradient, parameter: ParameterWhitening, route: Route) -> LayerGradient:
    """A layer whose input and output gradient are whitened where the route says so."""
    columns = parameter.columns if route.columns == FACTOR else None
    rows = parameter.rows if route.rows == FACTOR else None
    if columns is None and rows is None:
        return layer
    if isinstance(layer.module, TRANSPOSED):
        columns, rows = rows, columns
    x = _on_factor(columns, layer.module, layer.x)
    output_grads = _on_factor(rows, layer.module, layer.output_grads)
    return replace(layer, x=x, output_grads=output_grads)


def low_rank_part(layer: LayerGradient, root: LowRankRoot) -> LayerGradient:
    """``G U D Uᵀ`` of a convolution as the gradient of a linear layer, never formed.

    Its output gradients are ``(G U D)ᵀ [B, r, O]``, G U from r filters in the place of the
    convolution's own, and its input ``Uᵀ [r, C]`` is that of every sample. What U D Uᵀ takes away
    is most of G, so 8 bits would not do: of a layer in bfloat16, whose directions bfloat16 holds
    exactly, the output gradients are a rounded part and what is left, 2 r positions; else all is
    float32.
    """
    conv, x, output_grads = layer.module, layer.x, layer.output_grads
    directions = root.basis[0].T
    filters = directions.unflatten(1, (*conv.kernel_size, -1)).movedim(-1, 1)
    # in the precision of the layer's own products
    thin = F.conv2d(
        pad_input(x, conv), filters.to(x.dtype), stride=conv.stride, dilation=conv.dilation
    )
    samples = layer.num_samples
    d, a = (
        linear_rows(t.flatten(2).transpose(1, 2), len(t)).reshape(samples, -1, t.shape[1])
        for t in (output_grads.to(layer.dtype), thin.to(layer.dtype))
    )
    grads = (sample_products(d, a) * root.gains[0].to(layer.dtype)).transpose(1, 2)
    directions = directions.to(layer.dtype)
    if x.dtype == torch.bfloat16 and root.is_short:
        rounded = grads.bfloat16()
        grads = torch.cat([rounded, (grads - rounded).bfloat16()], dim=1)
        directions = directions.bfloat16().repeat(2, 1)
    return LayerGradient(_MATRIX, directions.expand(samples, -1, -1), grads)


def _one_dtype(layer: LayerGradient, output_grads: Tensor) -> LayerGradient:
    """The layer with another output gradient, its input in the same dtype."""
    return replace(layer, x=layer.x.to(output_grads.dtype), output_grads=output_grads)
