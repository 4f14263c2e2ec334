"""Where per-sample gradients of one parameter end: added to the features, then forgotten."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kronecker import TwoSidedSketch, two_sided_parameters
from .ops import (
    IMPLEMENTATIONS,
    Projection,
    check_sketch_implementation,
    choose_implementation,
    project_,
)
from .sjlt import ParameterSketch, matrix_shape, sketch_parameters
from .weight_gradient import WeightModule, weight_grads, workspace_bytes


class Accumulator(ABC):
    """Adds per-sample gradients of single parameters to features ``[B, K]``.

    Attributes:
        shapes: shapes of the P parameters, in the order of the flattened gradient.
        all_samples: whether it wants all samples of a batch at once (few rows of a weight at a
            time).
    """

    all_samples = False

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [math.prod(shape) for shape in self.shapes]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]

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

    def add_weight(
        self,
        index: int,
        module: WeightModule,
        x: Tensor,
        output_grads: Tensor,
        out: Tensor,
        rows_per_sample: int,
    ) -> None:
        """Add the per-sample gradients of a layer's weight, slice by slice.

        Args:
            index: which parameter the weight is.
            module: the layer.
            x: what `keep` kept of its input; without that method of its own, the input, see
                `weight_grads`.
            output_grads: gradient with respect to its output.
            out: ``[B, K]`` features.
            rows_per_sample: consecutive rows that make up one sample.
        """
        for part in weight_grads(
            module,
            x,
            output_grads,
            rows_per_sample,
            all_samples=self.all_samples,
            row_multiple=self.row_multiple(index),
        ):
            self.add(index, part.block, out, part.samples, part.rows.start)

    def flatten(self, index: int, grads: Tensor, first_row: int) -> tuple[int, Tensor]:
        """Where a slice as `add` takes it begins in the flattened gradient, and its ``[b, n]``."""
        offset = self.offsets[index] + first_row * math.prod(self.shapes[index][1:])
        return offset, grads.reshape(len(grads), -1)

    def add_whole(self, index: int, grads: Tensor, out: Tensor, samples: slice) -> None:
        """Add ``grads [b, *shape]``, the gradient of a whole parameter."""
        if matrix_shape(self.shapes[index]) is None:
            self.add(index, grads.reshape(len(grads), -1), out, samples)
        elif grads.numel():
            self.add(index, grads, out, samples)


class DenseAccumulator(Accumulator):
    """Dense random matrices: each slice is projected at its offset through `project_`."""

    all_samples = True

    def __init__(
        self, shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None
    ) -> None:
        super().__init__(shapes)
        self.projection, self.implementation = projection, implementation
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
    """Sketches of single parameters: each slice goes where its parameter's sketch puts it."""

    sketches: Sequence[ParameterSketch | TwoSidedSketch]

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__(shapes)
        self._vectors: list[tuple[ParameterSketch, Tensor]] = []
        self._vector_bytes = 0

    def open(self, out: Tensor) -> None:
        """See `Accumulator.open`."""
        self._vectors.clear()
        self._vector_bytes = 0

    def close(self, out: Tensor) -> None:
        """Sketch the vectors that came so far, all at once."""
        if self._vectors:
            tables = [sketch.table(out.dtype) for sketch, _ in self._vectors]
            positions, signs = (torch.cat(parts) for parts in zip(*tables, strict=True))
            entries = torch.cat([grads for _, grads in self._vectors], dim=1)
            out.scatter_add_(1, positions.expand_as(entries), entries * signs)
        self.open(out)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        sketch = self.sketches[index]
        if grads.ndim > 2:
            sketch.add_block(grads, out[samples], first_row)
            return
        assert isinstance(sketch, ParameterSketch)
        # most parameters are vectors, and small: what a call costs on a CPU, they cost
        if out.device.type != "cpu" or len(grads) < len(out):
            sketch.add_vector(grads, out[samples])
            return
        self._vectors.append((sketch, grads))
        self._vector_bytes += grads.nbytes
        if self._vector_bytes > workspace_bytes(out.device):
            self.close(out)


class SjltAccumulator(SketchAccumulator):
    """The tile-chained sparse sketch: each slice of rows is placed with its signs.

    With Triton a layer's gradient and its sketch are one kernel, and no slice is ever formed.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None
    ) -> None:
        super().__init__(shapes)
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

    def add_weight(
        self,
        index: int,
        module: WeightModule,
        x: Tensor,
        output_grads: Tensor,
        out: Tensor,
        rows_per_sample: int,
    ) -> None:
        """See `Accumulator.add_weight`."""
        if self.forms_slices(module, output_grads):
            super().add_weight(index, module, x, output_grads, out, rows_per_sample)
            return
        from .sketch_kernel import launch_sketch

        assert isinstance(module, nn.Linear | nn.Conv2d)
        launch_sketch(module, x, output_grads, self.sketches[index], out, rows_per_sample)


class KroneckerAccumulator(SketchAccumulator):
    """Two-sided: the factors of a layer's gradient are projected, then multiplied."""

    def __init__(
        self, shapes: Sequence[Sequence[int]], projection: Projection, implementation: str | None
    ) -> None:
        super().__init__(shapes)
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

    def add_weight(
        self,
        index: int,
        module: WeightModule,
        x: Tensor,
        output_grads: Tensor,
        out: Tensor,
        rows_per_sample: int,
    ) -> None:
        """See `Accumulator.add_weight`."""
        sketch = self.sketches[index]
        if isinstance(module, nn.Embedding):
            super().add_weight(index, module, x, output_grads, out, rows_per_sample)
            return
        assert isinstance(sketch, TwoSidedSketch)
        sketch.add_product(module, x, output_grads, out, rows_per_sample)


class ExactAccumulator(Accumulator):
    """No projection: features are the flattened gradients ``[B, P]``."""

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
