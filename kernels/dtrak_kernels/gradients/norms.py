"""Exact norms of per-sample gradients, collected while the gradients stream by."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..sjlt.torch import matrix_shape
from .accumulator import Accumulator
from .weight import (
    TRANSPOSED,
    LayerGradient,
    layer_product,
    weight_grads,
)


def prefers_ghost(positions: int, rows: int, columns: int) -> bool:
    """Whether two ``[T, T]`` Grams cost less than the gradient ``[rows, columns]`` itself."""
    return positions * (rows + columns) < rows * columns


def weight_norms(layer: LayerGradient) -> Tensor:
    """Squared norms of the per-sample gradients of a layer's weight.

    Either the gradient is formed in slices, or, where it costs less, its norm comes from the Grams
    of what it is the product of: ``‖Σ_t δ_t a_tᵀ‖² = Σ_tu (δ_t·δ_u)(a_t·a_u)``.

    Args:
        layer: what they are made of.

    Returns:
        ``[B]``, float32 (float64 for a float64 model).

    Source:
        The second form: Goodfellow 2015 (arXiv:1510.01799); for sequences, Li et al. 2022
        (arXiv:2110.05679).
    """
    module = layer.module
    squares = layer.output_grads.new_zeros(layer.num_samples, dtype=layer.dtype)
    if not isinstance(module, nn.Embedding):
        groups = 1 if isinstance(module, nn.Linear) else module.groups
        seen = layer.x if isinstance(module, TRANSPOSED) else layer.output_grads
        positions = seen[0].numel() // module.weight.shape[0] * layer.rows_per_sample
        rows, columns = module.weight.shape[0] // groups, module.weight[0].numel()
        if prefers_ghost(positions, rows, columns):
            return _ghost_norms(layer, squares)
    for part in weight_grads(layer, all_samples=False):
        squares[part.samples] += part.block.square().sum((1, 2, 3))
    return squares


def _ghost_norms(layer: LayerGradient, squares: Tensor) -> Tensor:
    product, rows = layer_product(layer), layer.rows_per_sample
    for sample in range(len(squares)):
        first, last = sample * rows, (sample + 1) * rows
        a = product.patches(first, last).flatten(0, 1)
        d = product.deltas[first:last].to(squares.dtype).flatten(0, 1)
        for a_group, d_group in zip(a.unbind(1), d.chunk(product.groups, dim=1), strict=True):
            squares[sample] += ((a_group @ a_group.T) * (d_group @ d_group.T)).sum()
    return squares


class SummingAccumulator(Accumulator):
    """For what needs the sum of all that is added to a parameter's gradient, before it is used.

    A parameter that is used once is passed to `observe` as its gradient streams by. One that is
    used several times (a module called twice, a shared weight) is held until the end,
    ``[B, *shape]``: the square of a sum is not a sum of squares.

    Args:
        shapes: of the parameters.
        num_features: ``K``.
        names: of the parameters, for errors.
    """

    counts_uses = True

    def __init__(
        self, shapes: Sequence[Sequence[int]], num_features: int, names: Sequence[str]
    ) -> None:
        super().__init__(shapes, num_features)
        self._names = names
        self._uses: Counter[int] = Counter()
        self._streamed: set[int] = set()
        self._held: dict[int, Tensor] = {}

    @abstractmethod
    def observe(self, index: int, grads: Tensor, samples: slice, first_row: int = 0) -> None:
        """Per-sample gradients of a slice of a parameter that is used once.

        Args:
            index: which parameter.
            grads: ``[b, o, I, *kernel]`` or, of a vector, ``[b, n]``.
            samples: which samples of the batch.
            first_row: first row of the parameter's matrix.
        """

    def forget(self) -> None:
        """See `Accumulator.forget`."""
        self._uses.clear()
        self._streamed.clear()
        self._held.clear()

    def expect(self, indices: Iterable[int]) -> None:
        """A forward used these parameters, some of them perhaps twice."""
        # a checkpoint runs forwards again inside the backward: those were counted before
        again = torch._C._current_graph_task_id() != -1
        self._uses.update([i for i in indices if not (again and self._uses[i])])

    def begin(self, index: int) -> None:
        """The gradient of one use of parameter ``index`` is about to come.

        Raises:
            RuntimeError: the parameter was taken for one that is used once, and is used again.
        """
        if index in self._streamed:
            raise RuntimeError(
                f"parameter {self._names[index]!r} is used again after a backward of the same "
                "batch: its norm needs every forward before the first backward"
            )
        if self._uses[index] == 1:
            self._streamed.add(index)

    def take(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """Observe, or hold, what `Accumulator.add` was given."""
        if index in self._streamed:
            self.observe(index, grads, samples, first_row)
            return
        if index not in self._held:
            shape = matrix_shape(self.shapes[index]) or (grads.shape[1],)
            self._held[index] = out.new_zeros(len(out), *shape)
        held = self._held[index][samples]
        if grads.ndim > 2:
            grads = grads.flatten(2)
            held = held[:, first_row : first_row + grads.shape[1]]
        held += grads


class NormingAccumulator(SummingAccumulator):
    """Passes gradients on to another accumulator and adds up their squares, parameter by parameter.

    Args:
        accumulator: makes the features.
        names: of the parameters, for errors.
    """

    def __init__(self, accumulator: Accumulator, names: Sequence[str]) -> None:
        super().__init__(accumulator.shapes, accumulator.num_features, names)
        self.all_samples = accumulator.all_samples
        self.accumulator = accumulator
        self._squares = torch.zeros(0)

    def forget(self) -> None:
        """See `Accumulator.forget`."""
        super().forget()
        self.accumulator.forget()

    def open(self, out: Tensor) -> None:
        """See `Accumulator.open`."""
        self._squares = out.new_zeros(len(out))
        self.accumulator.open(out)

    def close(self, out: Tensor) -> None:
        """See `Accumulator.close`."""
        self.accumulator.close(out)

    def norms(self) -> Tensor:
        """``[B]`` norms of the whole gradients."""
        held = (grads.flatten(1).square().sum(1) for grads in self._held.values())
        return sum(held, self._squares).sqrt()

    def row_multiple(self, index: int) -> int:
        """See `Accumulator.row_multiple`."""
        return self.accumulator.row_multiple(index)

    def forms_slices(self, module: nn.Module, output_grads: Tensor) -> bool:
        """See `Accumulator.forms_slices`."""
        return self.accumulator.forms_slices(module, output_grads)

    def observe(self, index: int, grads: Tensor, samples: slice, first_row: int = 0) -> None:
        """See `SummingAccumulator.observe`."""
        self._squares[samples] += grads.flatten(1).square().sum(1)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        self.accumulator.add(index, grads, out, samples, first_row)
        self.take(index, grads, out, samples, first_row)

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        if self.forms_slices(layer.module, layer.output_grads):
            super().add_weight(index, layer, out)
            return
        kept = self.accumulator.keep(index, layer.module, layer.x)
        self.accumulator.add_weight(index, replace(layer, x=kept), out)
        if index in self._streamed:
            self._squares += weight_norms(layer)
            return
        for part in weight_grads(layer, all_samples=False):
            self.take(index, part.block, out, part.samples, part.rows.start)
