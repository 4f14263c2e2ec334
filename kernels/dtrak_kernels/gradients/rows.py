"""Where a layer's tensors have the samples of the batch, and a check that they are there.

A call of a layer sees tensors, not samples. Its rows are told by sizes, and sizes can lie: a
sequence may be as long as the batch is large. `RowCheck` asks the gradients themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .weight import is_conv1d

if TYPE_CHECKING:
    from .hooks import Layer, Seen

# what maps every position of its input for itself
_POINTWISE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_MULTIHEAD = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)
# relative change of the size of a sample's gradient that is no rounding
_CHANGE = 0.01


@dataclass(frozen=True)
class Rows:
    """Where a tensor has the rows of the batch.

    Attributes:
        dim: the dimension.
        per_sample: consecutive rows of it that belong to one sample.
    """

    dim: int
    per_sample: int

    def of_sample(self, x: Tensor, sample: int) -> Tensor:
        """The rows of one sample."""
        return x.narrow(self.dim, sample * self.per_sample, self.per_sample)


@dataclass(frozen=True)
class CallRows:
    """Where the tensors of one call of a layer have the rows of the batch.

    Attributes:
        leaves: of the arguments, in the order of `flatten_call`; None for what all samples share.
        outputs: of the output's tensors, likewise.
        shared: the layer ran once for the whole batch: its output is to be repeated.
    """

    leaves: tuple[Rows | None, ...]
    outputs: tuple[Rows | None, ...]
    shared: bool = False

    def is_unusual(self, layer: Layer, rows_per_sample: int) -> bool:
        """Whether sizes suggest these rows of a layer, and no check has confirmed it."""
        place = self.outputs[0]
        if place is None or isinstance(layer.module, nn.MultiheadAttention | nn.RNNBase):
            return False
        if self.shared:
            return not layer.shared
        is_usual = place.per_sample in {rows_per_sample, *layer.finer}
        return place.dim != layer.sample_dim or not is_usual


def sequence_first(module: nn.Module) -> Iterator[nn.Module]:
    """Modules inside one that take their samples in the second dimension, by its own word."""
    for parent in module.modules():
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            if not parent.self_attn.batch_first:
                yield from parent.children()
        # a final norm of the stack
        elif isinstance(parent, nn.TransformerEncoder | nn.TransformerDecoder):
            first: Any = next(iter(parent.layers), None)
            if isinstance(parent.norm, nn.Module) and first is not None:
                attention = getattr(first, "self_attn", None)
                if not getattr(attention, "batch_first", True):
                    yield parent.norm


def find_rows(
    seen: Seen,
    outputs: Sequence[Tensor],
    has_rule: bool,
    rows: int,
    num_samples: int,
    guess: bool,
) -> CallRows | None:
    """Where one call of a layer has the rows of the batch.

    Args:
        seen: what it was given.
        outputs: tensors that it returned.
        has_rule: whether a rule applies, to its only input and output.
        rows: of the batch, ``num_samples · rows_per_sample``.
        num_samples: B.
        guess: whether what sizes alone suggest is going to be checked.

    Returns:
        None if the rows are nowhere to be seen.
    """
    if has_rule:
        return _rows_of_rule(seen.layer, seen.inputs[0], outputs[0], rows, num_samples, guess)
    return _rows_of_call(seen, outputs, rows, num_samples, guess)


def _rows_of_rule(
    layer: Layer, x: Tensor, output: Tensor, rows: int, num_samples: int, guess: bool
) -> CallRows | None:
    if not x.ndim or not output.ndim:
        return None
    per_sample, count = rows // num_samples, x.shape[0]
    embeds = isinstance(layer.module, nn.Embedding)
    # dimensions that the layer runs over one by one
    free = x.ndim if embeds else x.ndim - len(getattr(layer.module, "normalized_shape", (1,)))
    free = free if isinstance(layer.module, _POINTWISE) or is_conv1d(layer.module) else 1

    def found(dim: int, per_sample: int, shared: bool = False) -> CallRows:
        place = (Rows(dim, per_sample),)
        return CallRows(place, place, shared)

    if num_samples == 1:
        # whatever the rows are, they are those of the one sample
        return found(0, count) if output.shape[0] == count else None
    if layer.sample_dim == 1:
        seen = free >= 2 and x.shape[1] == output.shape[1] == rows
        return found(1, per_sample) if seen else None
    if embeds or layer.shared or guess:
        one_row = count == 1 and rows > 1 and free >= 2
        # labels of samples, or of rows
        of_rows = count == rows or (count == num_samples and not layer.shared)
        of_positions = embeds and free == 1 and (layer.shared or not of_rows)
        if one_row or of_positions:
            return found(0, per_sample, shared=True)
    if output.shape[0] != count:
        return None
    if count == rows:
        return found(0, per_sample)
    if guess and free >= 2 and x.shape[1] == rows:
        return found(1, per_sample)
    if (guess or count // num_samples in layer.finer) and count and count % num_samples == 0:
        return found(0, count // num_samples)
    return None


def _rows_of_call(
    seen: Seen, outputs: Sequence[Tensor], rows: int, num_samples: int, guess: bool
) -> CallRows | None:
    layer, args, kwargs, leaves = seen.layer, seen.args, seen.kwargs, seen.leaves
    if num_samples == 1:
        # nothing need be taken apart
        return CallRows((None,) * len(leaves), (None,) * len(outputs))
    known = _known_dims(layer.module, args, kwargs, len(outputs))
    if known is not None:
        places = [
            tuple(
                Rows(dim, x.shape[dim] // num_samples)
                if isinstance(x, Tensor)
                and dim is not None
                and dim < x.ndim
                and not x.shape[dim] % rows
                else None
                for x, dim in zip(tensors, dims, strict=True)
            )
            for tensors, dims in zip((leaves, outputs), known, strict=True)
        ]
        missing = any(
            isinstance(x, Tensor) and dim is not None and place is None
            for tensors, dims, found in zip((leaves, outputs), known, places, strict=True)
            for x, dim, place in zip(tensors, dims, found, strict=True)
        )
        # not a single sequence, or packed ones
        batched = outputs[0].ndim == 3
        return CallRows(places[0], places[1]) if batched and not missing else None
    sizes = {rows}
    count = outputs[0].shape[0] if outputs[0].ndim else 0
    if (guess or count // num_samples in layer.finer) and count and count % num_samples == 0:
        sizes.add(count)
    found = [
        tuple(
            Rows(0, x.shape[0] // num_samples)
            if isinstance(x, Tensor) and x.ndim and x.shape[0] in sizes
            else None
            for x in tensors
        )
        for tensors in (leaves, outputs)
    ]
    return CallRows(found[0], found[1]) if any(found[0]) and any(found[1]) else None


def _known_dims(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], num_outputs: int
) -> tuple[list[int | None], list[int | None]] | None:
    """Dimension of the samples by leaf and output, for modules of torch that put them elsewhere."""
    names: tuple[str, ...]
    outputs: tuple[int, ...]
    dims: dict[str, int | None]
    first = int(not getattr(module, "batch_first", True))
    if isinstance(module, nn.MultiheadAttention):
        names = _MULTIHEAD
        dims = dict.fromkeys(("query", "key", "value"), first)
        dims["key_padding_mask"] = 0
        mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None)
        # of every head, or of all samples
        dims["attn_mask"] = 0 if isinstance(mask, Tensor) and mask.ndim == 3 else None
        outputs = first, 0
    elif isinstance(module, nn.RNNBase):
        names, dims = ("input", "hx"), {"input": first, "hx": 1}
        outputs = first, 1, 1
    else:
        return None
    given = [*zip(names, args, strict=False), *kwargs.items()]
    leaves = [dims.get(name) for name, value in given for _ in tree_leaves(value)]
    return leaves, list(outputs[:num_outputs])


def repeat_rows(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """What a layer saw or made once for the batch, a view for each of its rows.

    Args:
        x: its input or output.
        indices: its input: of one dimension, or with a first dimension of 1.
        rows: of the batch.
    """
    x = x if indices.ndim > 1 and indices.shape[0] == 1 else x.unsqueeze(0)
    return x.expand(rows, *x.shape[1:])


def missing_rows(
    seen: Seen,
    outputs: Sequence[Tensor],
    rows: int,
    rows_per_sample: int,
    first_of_batch: bool,
) -> str:
    """One line: a layer's tensors have the rows of the batch nowhere, why, and what to do.

    Args:
        seen: what it was given.
        outputs: tensors that it returned.
        rows: of the batch.
        rows_per_sample: S.
        first_of_batch: whether no other layer has seen the batch.
    """
    layer, inputs = seen.layer, seen.inputs
    shapes = [list(x.shape) for x in outputs]
    counts = {x.shape[0] if x.ndim else 0 for x in (*inputs, *outputs)}
    count = counts.pop() if len(counts) == 1 else 0
    known = isinstance(layer.module, nn.MultiheadAttention | nn.RNNBase)
    if not known and any(x.ndim > 2 and x.shape[1] == rows for x in (*inputs, *outputs)):
        cause = "samples seem to be in the second dimension: put them first"
    elif first_of_batch and count > 1 and count != rows and count % rows_per_sample == 0:
        cause = f"is num_samples wrong? This batch seems to have {count // rows_per_sample} samples"
    elif known:
        cause = (
            "give it tensors [B, T, n] or [T, B, n] as its batch_first says, padded, not packed; "
            "or one sample at a time"
        )
    elif isinstance(layer.module, nn.Embedding):
        cause = (
            "a table that samples share is looked up by indices of one dimension, or with a first "
            "dimension of 1; or leave it out with parameters="
        )
    else:
        cause = (
            "work shared between samples has no per-sample gradient: sketch one sample at a time, "
            "or leave its parameters out with parameters="
        )
    return (
        f"{layer.title} must see and return {rows} rows (samples x rows_per_sample), got output "
        f"{shapes[0] if len(shapes) == 1 else shapes} from inputs "
        f"{[list(x.shape) for x in inputs]}: {cause}"
    )


def wrong_outputs(f: Tensor, num_samples: int, rows_per_sample: int) -> str:
    """The end of a line on outputs of a wrong shape: the cause, where the shape shows it."""
    if f.ndim == 0:
        return ": a loss averaged over the batch? Keep one per sample, as reduction='none' does"
    if f.ndim == 1 and rows_per_sample > 1 and len(f) == num_samples:
        return f": one per sample, where a sample has {rows_per_sample} rows"
    if f.ndim == 1 and len(f) % rows_per_sample == 0:
        return f": num_samples is {num_samples}, this looks like {len(f) // rows_per_sample}"
    return ""


def wrong_rows(layer: Layer, shape: tuple[int, ...], f: Tensor) -> str:
    """One line on a layer whose rows are not those of the samples.

    Args:
        layer: the one nearest the outputs.
        shape: of its output.
        f: ``[rows]``, the outputs.
    """
    if bool((f == f[0]).all()):
        return (
            "outputs of a sample must depend on that sample alone, got the same for all rows, with "
            "a gradient of other samples: a loss averaged over the batch? Keep one per sample, as "
            "reduction='none' does"
        )
    if isinstance(layer.module, nn.Embedding):
        remedy = "a table that samples share: look it up by indices [1, T] or [B, T]"
    else:
        remedy = (
            "is its first dimension something else (a sequence, tokens of an expert), or do "
            "samples meet in what follows (statistics of the batch)?"
        )
    return (
        f"{layer.title} with output {list(shape)} has rows that are not those of single samples: "
        f"their gradients change with other samples' outputs. {remedy[0].upper()}{remedy[1:]} Put "
        "samples first, sketch one sample at a time, or leave its parameters out with parameters="
    )


class RowCheck:
    """Whether every layer's rows are the samples that they are taken for.

    The gradient of the outputs of every other sample comes first, then that of all. Of what a layer
    receives, rows of the samples left out must be exactly zero at first, and the others already
    what they will be. Rows in the order of their samples, but not one of each (tokens that were
    routed to an expert), are found surely: to differ from their numbers by even steps alone they
    would have to rise by one each. Others are found unless all of their errors are even.

    Args:
        num_samples: B, at least 2.
        device: of the outputs.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        # on the CPU at the end: layers may be on several devices
        self.kept = torch.arange(num_samples) % 2 == 0
        self._device = device
        self._calls: dict[tuple[str, int, int], tuple[Layer, tuple[int, ...]]] = {}
        self._whole: dict[tuple[str, int, int], Tensor] = {}
        self._masked: dict[tuple[str, int, int], Tensor] = {}
        self._sizes, self._count = self._masked, Counter[tuple[str, int]]()

    def see(self, layer: Layer, number: int, output_grads: Tensor, dim: int) -> None:
        """Note how large the gradient of each sample's rows is.

        Args:
            layer: which received it.
            number: of the output.
            output_grads: what it received.
            dim: of its rows.
        """
        if not output_grads.numel():
            return
        call = layer.name, number
        key = (*call, self._count[call])
        self._count[call] += 1
        self._calls[key] = layer, tuple(output_grads.shape)
        grads = output_grads.abs() if output_grads.is_complex() else output_grads
        wide = torch.promote_types(grads.dtype, torch.float32)
        others = [d for d in range(grads.ndim) if d != dim]
        # over no dimension it would be one over all
        sizes = torch.linalg.vector_norm(grads, 1, others, dtype=wide) if others else grads.abs()
        self._sizes[key] = sizes.view(len(self.kept), -1).sum(1)

    def weights(self, rows: int) -> Tensor:
        """``[rows]`` bool: the outputs whose gradient comes first."""
        return self.kept.repeat_interleave(rows // len(self.kept)).to(self._device)

    def go_on(self) -> None:
        """From here on the gradient of all outputs is seen."""
        self._sizes, self._count = self._whole, Counter[tuple[str, int]]()

    def has_lost_samples(self) -> bool:
        """Whether all samples that were left out at first have no gradient at all, others have."""
        if not self._whole:
            return False
        largest = torch.stack([size.cpu().double() for size in self._whole.values()]).amax(0)
        return bool((largest[self.kept] > 0).any() and (largest[~self.kept] == 0).all())

    def first_wrong(self) -> tuple[Layer, tuple[int, ...]] | None:
        """The layer nearest the outputs whose rows are others, and the shape of its output."""
        keys = [key for key in self._masked if key in self._whole]
        if not keys:
            return None
        whole, masked = (
            torch.stack([sizes[key].cpu().double() for key in keys])
            for sizes in (self._whole, self._masked)
        )
        changed = (masked - whole).abs() > _CHANGE * whole.amax(1, keepdim=True)
        # what is not finite says nothing, and compares as false
        wrong = torch.where(self.kept, changed, masked > 0).any(1).tolist()
        return next(
            (self._calls[k] for k, is_wrong in zip(keys, wrong, strict=True) if is_wrong), None
        )


@contextmanager
def leaves_kept(root: Any) -> Iterator[None]:
    """Within it, a backward leaves no gradient at the leaves of a graph.

    Args:
        root: a node of the graph.
    """
    variables, nodes, known = [], [root], {root}
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "AccumulateGrad":
            variables.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                nodes.append(following)
    grads = [variable.grad for variable in variables]
    for variable in variables:
        variable.grad = None
    try:
        yield
    finally:
        for variable, grad in zip(variables, grads, strict=True):
            variable.grad = grad
