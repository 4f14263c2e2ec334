"""Where per-sample gradients of one parameter end: added to the features, then forgotten."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kronecker.torch import TwoSidedSketch, two_sided_parameters
from ..ops import (
    IMPLEMENTATIONS,
    check_sketch_implementation,
    choose_implementation,
    project_,
)
from ..projection import Projection
from ..sjlt.torch import TABLE_ENTRIES, ParameterSketch, matrix_shape, sketch_parameters
from .weight import (
    Contraction,
    LayerGradient,
    Slice,
    WeightModule,
    geometry,
    weight_grads,
    whole_contraction,
    workspace_bytes,
)

# of one slice that waits for others to be scattered with
MOST_WAITING_BYTES = 64 * 2**10
# decisions that are kept: sequences come in any length
MOST_DECISIONS = 4096


class Accumulator(ABC):
    """Adds per-sample gradients of single parameters to features ``[B, K]``.

    A destination of one's own has `add`, which gets every entry of every gradient once, slice by
    slice, and may do with it what it likes: ``GradientSketcher(model, into=Destination)``. Other
    methods are overridden to be told more (`open`, `close`) or to form less (`add_weight`).

    Args:
        shapes: of the parameters.
        num_features: ``K``; 0 for a destination that keeps what it wants itself.

    Attributes:
        shapes: shapes of the parameters, in the order of the flattened gradient.
        offsets: where each begins in it.
        num_features: ``K``.
        all_samples: whether it wants all samples of a batch at once (few rows of a weight at a
            time).
        counts_uses: whether it wants to be told by `expect` and `begin` of every use of a
            parameter.
        title: what plans call it; the name of its class if empty.
        kernel: what plans say of a gradient that `add` receives.
        flop_per_entry: what `add` does with an entry, in multiplications and additions.
    """

    all_samples = False
    counts_uses = False
    title = ""
    kernel = "sliced gradient (torch)"
    flop_per_entry = 0

    def __init__(self, shapes: Sequence[Sequence[int]], num_features: int) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.num_features = num_features
        sizes = [math.prod(shape) for shape in self.shapes]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self._contractions: dict[tuple[Any, ...], Contraction | None] = {}

    def row_multiple(self, index: int) -> int:
        """Slices of rows of parameter ``index`` must begin at multiples of this."""
        return 1

    def forms_slices(self, module: nn.Module, output_grads: Tensor) -> bool:
        """Whether `add_weight` forms the layer's gradient in slices and hands them to `add`."""
        return True

    def keep(self, index: int, module: WeightModule, x: Tensor) -> Tensor:
        """What `add_weight` needs of a layer's input, kept from its forward to its backward.

        Args:
            index: which parameter the layer's weight is.
            module: the layer.
            x: its input, in the dtype of its output.
        """
        return x

    def open(self, out: Tensor) -> None:  # noqa: B027
        """A batch begins, whose features are ``[B, K]``, zeros; most keep nothing between calls."""

    def close(self, out: Tensor) -> None:  # noqa: B027
        """The batch is over: add what is still to be added."""

    def forget(self) -> None:  # noqa: B027
        """Drop what a batch, complete or not, has left."""

    def expect(self, indices: Iterable[int]) -> None:  # noqa: B027
        """A forward used these parameters; called where ``counts_uses``."""

    def begin(self, index: int) -> None:  # noqa: B027
        """The gradient of one use of a parameter is about to come; likewise."""

    @abstractmethod
    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """Add ``grads [b, o, I, *kernel]``, rows from ``first_row``, or ``[b, n]`` of a vector.

        Args:
            index: which parameter.
            grads: per-sample gradients of a slice of it.
            out: ``[B, K]`` features of the whole batch.
            samples: the rows of ``out`` that ``grads`` belongs to.
            first_row: first row of the parameter's matrix.
        """

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """Add the per-sample gradients of a layer's weight, slice by slice.

        Args:
            index: which parameter the weight is.
            layer: what they are made of; its input is what `keep` kept.
            out: ``[B, K]`` features.
        """
        for part in self.slices(index, layer):
            self.add(index, part.block, out, part.samples, part.rows.start)

    def slices(
        self, index: int, layer: LayerGradient, row_multiple: int | None = None
    ) -> Iterator[Slice]:
        """The per-sample gradients of a layer's weight as `add_weight` forms them.

        Args:
            index: which parameter the weight is.
            layer: what they are made of.
            row_multiple: instead of what `row_multiple` says.
        """
        # layers come in the same shapes batch after batch, and many take less time than a decision
        module, x, output_grads = layer.module, layer.x, layer.output_grads
        shapes = x.shape, output_grads.shape, x.dtype, output_grads.dtype, layer.rows_per_sample
        # modules that share a weight may differ, and a padding mode may be changed
        key = module, *geometry(module), x.is_cpu, *shapes
        if key not in self._contractions:
            if len(self._contractions) >= MOST_DECISIONS:
                self._contractions.clear()
            self._contractions[key] = whole_contraction(layer)
        contraction = self._contractions[key]
        if contraction is not None:
            samples = layer.num_samples
            block = contraction(module, x, output_grads, samples)
            yield Slice(slice(0, samples), slice(0, block.shape[1]), block)
            return
        if row_multiple is None:
            row_multiple = self.row_multiple(index)
        yield from weight_grads(layer, all_samples=self.all_samples, row_multiple=row_multiple)

    def flatten(self, index: int, grads: Tensor, first_row: int) -> tuple[int, Tensor]:
        """Where a slice as `add` takes it begins in the flattened gradient, and its ``[b, n]``."""
        offset = self.offsets[index] + first_row * math.prod(self.shapes[index][1:])
        return offset, grads.reshape(len(grads), -1)

    def add_whole(self, index: int, grads: Tensor, out: Tensor, samples: slice) -> None:
        """Add ``grads [b, *shape]``, the gradient of a whole parameter."""
        if len(self.shapes[index]) < 2:
            flat = grads if grads.ndim == 2 else grads.reshape(grads.shape[0], -1)
            self.add(index, flat, out, samples)
        elif grads.numel():
            self.add(index, grads, out, samples)


class DenseAccumulator(Accumulator):
    """Dense random matrices: each slice is projected at its offset through `project_`."""

    all_samples = True
    kernel = "sliced gradient, dense projection"

    def __init__(
        self, shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None
    ) -> None:
        super().__init__(shapes, projection.proj_dim)
        self.projection, self.implementation = projection, implementation
        self.title, self.flop_per_entry = projection.kind, 2 * projection.proj_dim
        self.grad_dim = sum(math.prod(shape) for shape in self.shapes)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        offset, flat = self.flatten(index, grads, first_row)
        project_(
            flat.to(out.dtype).contiguous(),
            self.projection,
            offset=offset,
            out=out[samples],
            grad_dim=self.grad_dim,
            implementation=self.implementation,
        )


class SketchAccumulator(Accumulator):
    """Sketches of single parameters: each slice goes where its parameter's sketch puts it.

    On a CPU the entries of small slices wait until there are enough of them, and are scattered all
    at once: most parameters are small, and what a call costs, they cost.
    """

    sketches: Sequence[ParameterSketch | TwoSidedSketch]

    def __init__(self, shapes: Sequence[Sequence[int]], num_features: int) -> None:
        super().__init__(shapes, num_features)
        # positions, signs, entries
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._waiting_bytes = 0

    def forget(self) -> None:
        """See `Accumulator.forget`."""
        self._waiting.clear()
        self._waiting_bytes = 0

    def close(self, out: Tensor) -> None:
        """Scatter what still waits."""
        if self._waiting:
            positions, signs, entries = zip(*self._waiting, strict=True)
            values = torch.cat(entries, dim=1).mul_(torch.cat(signs))
            out.scatter_add_(1, torch.cat(positions).expand_as(values), values)
        self.forget()

    def waits(self, grads: Tensor, out: Tensor) -> bool:
        """Whether gradients of some samples are worth keeping until others come."""
        return out.is_cpu and grads.shape[0] == out.shape[0] and grads.nbytes <= MOST_WAITING_BYTES

    def scatter(self, positions: Tensor, signs: Tensor, entries: Tensor, out: Tensor) -> None:
        """Add entries times signs at their positions, at the latest when the batch closes.

        Args:
            positions: ``[n]`` int64.
            signs: ``[n]`` in the dtype of the features.
            entries: ``[B, n]`` likewise; they must stay as they are.
            out: ``[B, K]`` features.
        """
        self._waiting.append((positions, signs, entries))
        self._waiting_bytes += entries.nbytes
        if self._waiting_bytes > workspace_bytes(out.device):
            self.close(out)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        sketch = self.sketches[index]
        # a float32 layer of a model that has float64 ones
        if grads.dtype != out.dtype:
            grads = grads.to(out.dtype)
        if isinstance(sketch, TwoSidedSketch):
            sketch.add_block(grads, out[samples], first_row)
        elif sketch.size <= TABLE_ENTRIES and self.waits(grads, out):
            self.scatter(*sketch.entries(grads, first_row), out)
        elif grads.ndim > 2:
            sketch.add_block(grads, out[samples], first_row)
        else:
            sketch.add_vector(grads, out[samples])


class SjltAccumulator(SketchAccumulator):
    """The tile-chained sparse sketch: each slice of rows is placed with its signs.

    With Triton a layer's gradient and its sketch are one kernel, and no slice is ever formed.
    """

    title = "sjlt"
    kernel = "sliced gradient, sparse sketch (torch)"
    flop_per_entry = 2

    def __init__(
        self, shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None
    ) -> None:
        super().__init__(shapes, projection.proj_dim)
        self.implementation = implementation
        self.sketches: list[ParameterSketch] = sketch_parameters(
            self.shapes, projection.proj_dim, projection.seed
        )

    def forms_slices(self, module: nn.Module, output_grads: Tensor) -> bool:
        """See `Accumulator.forms_slices`."""
        if choose_implementation(output_grads, self.implementation) == "torch":
            return True
        return not isinstance(module, nn.Linear | nn.Conv2d)

    def row_multiple(self, index: int) -> int:
        """A slice is whole rows of tiles."""
        return self.sketches[index].tile[0] if matrix_shape(self.shapes[index]) else 1

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        if self.forms_slices(layer.module, layer.output_grads):
            super().add_weight(index, layer, out)
        else:
            self.launch(index, layer, out)

    def take_scale(self, index: int, scale: Tensor) -> bool:
        """Multiply a scale into a parameter's signs, where they are kept in tables.

        Args:
            index: which parameter.
            scale: of its gradients, one number or ``[*shape]``.

        Returns:
            Whether it was done: gradients are then to come without the scale.
        """
        sketch = self.sketches[index]
        is_torch = choose_implementation(scale, self.implementation) == "torch"
        if not (is_torch and scale.is_cpu and sketch.size <= TABLE_ENTRIES):
            return False
        self.sketches[index] = sketch.scaled(scale)
        return True

    def launch(
        self,
        index: int,
        layer: LayerGradient,
        out: Tensor,
        scale: float = 1.0,
        scales: Tensor | None = None,
    ) -> None:
        """Add the sketch of a layer's gradients by the fused kernel.

        Args:
            index: which parameter the weight is.
            layer: what the gradients are made of.
            out: ``[B, K]`` features.
            scale: factor on the gradients.
            scales: a factor for every entry, see `launch_sketch`.
        """
        from ..sjlt.triton import launch_sketch

        launch_sketch(
            layer.module,
            layer.x,
            layer.output_grads,
            self.sketches[index],
            out,
            layer.rows_per_sample,
            scale=scale,
            scales=scales,
        )


class KroneckerAccumulator(SketchAccumulator):
    """Two-sided: the factors of a layer's gradient are projected, then multiplied."""

    title = "kronecker"
    # of an embedding, whose gradient alone is formed
    kernel = "sliced gradient, thin products"
    flop_per_entry = 2

    def __init__(
        self, shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None
    ) -> None:
        super().__init__(shapes, projection.proj_dim)
        check_sketch_implementation(implementation, projection.kind)
        assert projection.factor_dim is not None
        self.sketches = two_sided_parameters(
            self.shapes, projection.proj_dim, projection.factor_dim, projection.seed
        )

    def forms_slices(self, module: nn.Module, output_grads: Tensor) -> bool:
        """See `Accumulator.forms_slices`."""
        return isinstance(module, nn.Embedding)

    def keep(self, index: int, module: WeightModule, x: Tensor) -> Tensor:
        """See `Accumulator.keep`: the thin input is all that is needed."""
        sketch = self.sketches[index]
        if isinstance(module, nn.Embedding):
            return x
        assert isinstance(sketch, TwoSidedSketch)
        return sketch.thin_input(module, x)

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        sketch = self.sketches[index]
        if isinstance(layer.module, nn.Embedding):
            super().add_weight(index, layer, out)
            return
        assert isinstance(sketch, TwoSidedSketch)
        thin = sketch.thin_product(layer, out.dtype)
        if self.waits(thin, out):
            self.scatter(*sketch.table(out.dtype), thin.flatten(1), out)
        else:
            sketch.add_thin(thin, out)


class ExactAccumulator(Accumulator):
    """No projection: features are the flattened gradients ``[B, P]``."""

    title = "none"

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__(shapes, sum(math.prod(shape) for shape in shapes))

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        offset, flat = self.flatten(index, grads, first_row)
        out[samples, offset : offset + flat.shape[1]] += flat


def make_accumulator(
    shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None = None
) -> Accumulator:
    """The accumulator of a projection for parameters of these shapes.

    Raises:
        ValueError: the implementation is unknown, or the projection has none of that name.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be 'torch' or 'triton', got {implementation!r}")
    if projection.kind == "sjlt":
        return SjltAccumulator(shapes, projection, implementation)
    if projection.kind == "kronecker":
        return KroneckerAccumulator(shapes, projection, implementation)
    if projection.kind == "none":
        check_sketch_implementation(implementation, projection.kind)
        return ExactAccumulator(shapes)
    return DenseAccumulator(shapes, projection, implementation)
