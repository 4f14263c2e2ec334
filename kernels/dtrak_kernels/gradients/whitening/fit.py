"""Fits a whitening: two passes of ordinary batches through destinations of `GradientSketcher`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..accumulator import Accumulator
from ..norms import SummingAccumulator
from ..parameters import ParameterChoice
from ..sketcher import GradientSketcher
from ..weight import TRANSPOSED, LayerGradient, linear_rows, patch_windows
from .definition import KINDS, TWO_SIDED_KINDS, Batch, ParameterWhitening, Whitening, fingerprint
from .roots import MOST_DENSE, DenseMoment, LowRankRoot, Root, SketchedMoment

# positions of a row that its layer's factors see
MOST_POSITIONS = 64
# of the mean squared entry, added to each entry's where every entry has a scale
ENTRY_DAMPING = 0.1
# a tensor of less than this is rounding, in units of the root mean square of the median tensor
# that has a gradient
FLOOR, HALF_FLOOR = 1e-6, 1e-3
# bytes of the vectors that factors are made of, at a time
_CHUNK_BYTES = 2**24


def sampled_positions(count: int) -> Tensor:
    """Which of a row's positions count: all, or 64 that depend on their number alone."""
    if count <= MOST_POSITIONS:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:MOST_POSITIONS].sort().values


def layer_vectors(layer: LayerGradient, by_channel: bool) -> tuple[Tensor, Tensor]:
    """What the rows and the columns of a layer's weight are multiplied with, at some positions.

    Args:
        layer: a linear layer or a convolution.
        by_channel: of a convolution, single positions instead of patches for the columns.

    Returns:
        ``[N, g, O/g]`` and ``[N', g, n]`` in the dtype of the gradients.
    """
    module, x, output_grads, dtype = layer.module, layer.x, layer.output_grads, layer.dtype
    if isinstance(module, nn.Linear):
        chosen = sampled_positions(linear_rows(x, len(x)).shape[1]).to(x.device)
        rows, columns = (
            linear_rows(side, len(x))[:, chosen].to(dtype).flatten(0, 1).unsqueeze(1)
            for side in (output_grads, x)
        )
        return rows, columns
    source, seen = (output_grads, x) if isinstance(module, TRANSPOSED) else (x, output_grads)
    groups, size = module.groups, tuple(seen.shape[2:])
    rows = _at_positions(seen, groups).to(dtype)
    if by_channel:
        return rows, _at_positions(source, groups).to(dtype)
    chosen = sampled_positions(math.prod(size)).to(x.device)
    places: Any = torch.unravel_index(chosen, size)
    windows = patch_windows(source, module, size)[(slice(None), *places)]
    return rows, windows.to(dtype).reshape(-1, groups, math.prod(windows.shape[3:]))


def _at_positions(image: Tensor, groups: int) -> Tensor:
    """``[R, g·n, *spatial]`` at some positions, ``[R · P, g, n]``."""
    flat = image.flatten(2)
    chosen = flat[:, :, sampled_positions(flat.shape[2]).to(flat.device)]
    return chosen.transpose(1, 2).reshape(-1, groups, flat.shape[1] // groups)


class Factors(Accumulator):
    """Adds up second moments of what layers multiply; no gradient is formed.

    Args:
        shapes: of the parameters.
        kind: of the whitening.
        rank: r.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], kind: str, rank: int) -> None:
        super().__init__(shapes, num_features=0)
        self._kind, self._rank = kind, rank
        self._rows: dict[int, DenseMoment | SketchedMoment] = {}
        self._columns: dict[int, DenseMoment | SketchedMoment] = {}
        # weights that an embedding uses have no such vectors
        self._embedded: set[int] = set()

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """Nothing is learned from finished gradients."""

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        if isinstance(layer.module, nn.Embedding):
            self._embedded.add(index)
            return
        width = max(math.prod(self.shapes[index][1:]), self.shapes[index][0])
        step = max(1, _CHUNK_BYTES // (8 * MOST_POSITIONS * width))
        for first in range(0, len(layer.x), step):
            part = slice(first, first + step)
            rows, columns = layer_vectors(
                LayerGradient(layer.module, layer.x[part], layer.output_grads[part]),
                self._kind == "channels",
            )
            self._moment(self._columns, index, columns).add(columns)
            if self._kind != "lowrank":
                self._moment(self._rows, index, rows).add(rows)

    def _moment(
        self, moments: dict[int, DenseMoment | SketchedMoment], index: int, values: Tensor
    ) -> DenseMoment | SketchedMoment:
        if index not in moments:
            _, groups, size = values.shape
            moments[index] = (
                DenseMoment(groups, size, values.device)
                if size <= MOST_DENSE
                else SketchedMoment(groups, size, self._rank, values.device)
            )
        return moments[index]

    def roots(self, damping: float) -> tuple[dict[int, Root], dict[int, Root]]:
        """``B^(-1/2)`` and ``A^(-1/2)`` by parameter, float64."""
        rank = self._rank if self._kind == "lowrank" else None
        rows, columns = (
            {i: m.root(damping, rank) for i, m in moments.items() if i not in self._embedded}
            for moments in (self._rows, self._columns)
        )
        return rows, columns


class SecondMoments(SummingAccumulator):
    """Adds up squares of gradients, before and after their rotation.

    Args:
        shapes: of the parameters.
        names: of the parameters.
        parameters: their rotations.
        by_entry: whether to tell entries apart; kept as an attribute.

    Attributes:
        raw: sum over samples and entries, by parameter.
        rotated: the same after the rotation, ``[]`` or, by entry, ``[*shape]``.
        num_samples: that were seen.
        is_half: whether a layer computed in less than float32.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        names: Sequence[str],
        parameters: Sequence[ParameterWhitening],
        by_entry: bool,
    ) -> None:
        super().__init__(shapes, 0, names)
        self._parameters, self.by_entry = parameters, by_entry
        self.raw: dict[int, Tensor] = {}
        self.rotated: dict[int, Tensor] = {}
        self.num_samples, self.is_half = 0, False

    def row_multiple(self, index: int) -> int:
        """B mixes all rows."""
        has_rows = self._parameters[index].rows is not None
        return self.shapes[index][0] if has_rows else 1

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        self.take(index, grads.to(out.dtype), out, samples, first_row)

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        self.is_half |= layer.output_grads.dtype in (torch.float16, torch.bfloat16)
        super().add_weight(index, layer, out)

    def observe(self, index: int, grads: Tensor, samples: slice, first_row: int = 0) -> None:
        """See `SummingAccumulator.observe`."""
        shape = self.shapes[index]
        if index not in self.raw:
            self.raw[index] = torch.zeros((), dtype=torch.float64, device=grads.device)
            self.rotated[index] = self.raw[index].new_zeros(shape if self.by_entry else ())
        self.raw[index] += _sum_of_squares(grads)
        if not self.by_entry:
            self.rotated[index] += _sum_of_squares(self._parameters[index].whiten(grads, first_row))
            return
        squares = grads.square().sum(0, dtype=torch.float64)
        total = self.rotated[index]
        target = total if len(shape) < 2 else total[first_row : first_row + grads.shape[1]]
        target += squares.reshape(target.shape)

    def close(self, out: Tensor) -> None:
        """Parameters that were used several times are complete."""
        self.num_samples += len(out)
        for index, grads in self._held.items():
            shape = self.shapes[index]
            self.observe(
                index,
                grads.unflatten(2, shape[1:]) if len(shape) > 1 else grads,
                slice(0, len(out)),
            )


def _sum_of_squares(grads: Tensor) -> Tensor:
    return grads.square().sum(dtype=torch.float64)


def _bias_weights(sketcher: GradientSketcher) -> dict[int, int]:
    """Which weight's B a bias shares, by their indices."""
    return {
        layer.owned["bias"]: layer.owned["weight"]
        for layer in sketcher.layers
        if layer.weighing is not None
        and "bias" in layer.owned
        and not isinstance(layer.weighing, TRANSPOSED)
    }


def _scales(moments: SecondMoments, names: Sequence[str]) -> tuple[list[Tensor], list[str]]:
    """S of every parameter, float64, and the names of those that are nothing but rounding."""
    count = moments.num_samples
    sizes = [max(math.prod(shape), 1) for shape in moments.shapes]
    zero = torch.zeros((), dtype=torch.float64)
    raw = [
        float(moments.raw.get(index, zero) / (count * size)) ** 0.5
        for index, size in enumerate(sizes)
    ]
    for name, size in zip(names, raw, strict=True):
        if not math.isfinite(size):
            raise ValueError(
                f"gradients must be finite to fit a whitening, got {name!r} that is not"
            )
    some = [size for size in raw if size > 0] or [0.0]
    floor = float(torch.tensor(some, dtype=torch.float64).median()) * (
        HALF_FLOOR if moments.is_half else FLOOR
    )
    scales, floored = [], []
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if raw[index] <= floor:
            floored.append(name)
            scales.append(zero)
        elif not moments.by_entry:
            scales.append((moments.rotated[index] / (count * size)).rsqrt())
        else:
            squares = moments.rotated[index] / count
            scale = (squares + ENTRY_DAMPING * squares.mean()).rsqrt()
            kept = torch.where(squares.sqrt() > floor, scale, 0.0)
            # what a kernel multiplies with is what everyone multiplies with
            scales.append(kept.to(torch.bfloat16).double())
    return scales, floored


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: str,
    rank: int,
    damping: float,
    parameters: ParameterChoice,
    rows_per_sample: int,
    factor_batches: Iterable[Batch] | None,
    function: str,
) -> Whitening:
    """See `Whitening.fit`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive int, got {rank!r}")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive, got {damping!r}")
    for given, name in ((batches, "batches"), (factor_batches, "factor_batches")):
        if given is not None and iter(given) is given:
            raise TypeError(f"{name} must be gone through twice, got an iterator: pass a list")
    # the choice is made once: it may be a one-off iterable of names
    names = GradientSketcher(model, into=_Nothing, parameters=parameters).parameter_names
    rows, columns, biases = _roots(
        model,
        batches if factor_batches is None else factor_batches,
        kind,
        rank,
        damping,
        names,
        rows_per_sample if factor_batches is None else 1,
    )
    sketcher = GradientSketcher(model, into=_Nothing, parameters=names)
    device, dtype = sketcher.device, sketcher.dtype
    moved = {
        id(root): _as_used(root.to(device, dtype)) for root in (*rows.values(), *columns.values())
    }
    one = torch.ones((), dtype=dtype, device=device)
    maps = []
    for index, shape in enumerate(sketcher.shapes):
        left = rows.get(biases.get(index, index))
        right = columns.get(index)
        maps.append(
            ParameterWhitening(shape, one, left and moved[id(left)], right and moved[id(right)])
        )
    floored: list[str] = []
    if kind != "none":
        sketcher = GradientSketcher(
            model,
            into=partial(SecondMoments, names=names, parameters=maps, by_entry=kind == "diagonal"),
            parameters=names,
            rows_per_sample=rows_per_sample,
        )
        moments = _pass(sketcher, batches)
        assert isinstance(moments, SecondMoments)
        if moments.num_samples == 0:
            raise ValueError("batches must hold at least one sample, got none")
        moments.is_half |= any(
            p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()
        )
        scales, floored = _scales(moments, names)
        maps = [
            ParameterWhitening(m.shape, scale.to(device, dtype), m.rows, m.columns)
            for m, scale in zip(maps, scales, strict=True)
        ]
    return Whitening(
        kind=kind,
        rank=rank,
        damping=damping,
        function=function,
        model=fingerprint(model),
        names=tuple(names),
        parameters=tuple(maps),
        floored=tuple(floored),
    )


def _as_used(root: Root) -> Root:
    """The root with directions that tensor cores multiply exactly, unless it is double."""
    # what a kernel multiplies with is what everyone multiplies with
    if isinstance(root, LowRankRoot) and root.dtype != torch.float64:
        return root.shortened()
    return root


class _Nothing(Accumulator):
    """Of no features, and nothing comes."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__(shapes, 0)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""


def _roots(
    model: nn.Module,
    batches: Iterable[Batch],
    kind: str,
    rank: int,
    damping: float,
    names: Sequence[str],
    rows_per_sample: int,
) -> tuple[dict[int, Root], dict[int, Root], dict[int, int]]:
    """The first pass: ``B^(-1/2)`` and ``A^(-1/2)`` by parameter, and the weight of every bias."""
    if kind not in TWO_SIDED_KINDS:
        return {}, {}, {}
    sketcher = GradientSketcher(
        model,
        into=partial(Factors, kind=kind, rank=rank),
        parameters=names,
        rows_per_sample=rows_per_sample,
    )
    factors = _pass(sketcher, batches)
    assert isinstance(factors, Factors)
    return *factors.roots(damping), _bias_weights(sketcher)


def _pass(sketcher: GradientSketcher, batches: Iterable[Batch]) -> Accumulator:
    for outputs, num_samples in batches:
        sketcher.sketch(outputs, num_samples)
    return sketcher.into
