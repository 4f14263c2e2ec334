"""A batch of which nothing but the shapes is real, and what memory it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from .accumulator import Accumulator, KroneckerAccumulator, SketchAccumulator
from .memory import TensorMeter
from .weight import LayerGradient, WeightModule, workspace_bytes


@dataclass(frozen=True)
class BatchMemory:
    """What a batch holds beside the weights, in bytes.

    Attributes:
        activation_bytes: alive between forward and backward: what autograd keeps and what the
            sketcher keeps, where they are the same tensors once.
        peak_bytes: most alive at once, features and workspace included.
        checkpointed: calls of layers whose inputs are dropped and made again.
        reentrant: of these, by re-entrant checkpoints.
    """

    activation_bytes: int
    peak_bytes: int
    checkpointed: int
    reentrant: int


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by the name of their dtype, shared memory once."""
    sizes: Counter[str] = Counter()
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            sizes[str(tensor.dtype).removeprefix("torch.")] += storage.nbytes()
    return dict(sizes)


# whose workspace for the backward is known to their library alone, and empty without values
_RECURRENT = ("aten::mkldnn_rnn_layer", "aten::_cudnn_rnn")


class ShapeMeter(TensorMeter):
    """A `TensorMeter` of tensors that have no values.

    Where a value decides how to go on it is taken for false, or zero: checks that raise pass.
    Recurrent layers run once for each shape, to see how much of them their library keeps.

    Args:
        mode: what makes real tensors into such ones; None if all of them are on the meta device.
    """

    def __init__(self, mode: FakeTensorMode | None) -> None:
        self._mode = mode
        self._workspaces: dict[str, tuple[int, ...]] = {}
        super().__init__()

    def _without_values(self, leaf: Any) -> Any:
        if self._mode is None or not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        return self._mode.from_tensor(leaf)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if func is not torch.ops.aten.lift_fresh.default:
            args, kwargs = tree_map(self._without_values, (args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in _RECURRENT and self._mode is not None:
            out = self._with_workspace(func, args, kwargs, out)
        return out

    def _with_workspace(self, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[Any, ...]:
        """The outputs of a recurrent layer, those that are empty as large as they really are."""
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, (args, kwargs))
        key = f"{func} {shapes}"
        if key not in self._workspaces:
            with _disable_current_modes():
                real = func(*tree_map(_zeros, args), **tree_map(_zeros, kwargs or {}))
            self._workspaces[key] = tuple(x.numel() if isinstance(x, Tensor) else 0 for x in real)
        grown = []
        for fake, numel in zip(out, self._workspaces[key], strict=True):
            if numel and not fake.numel():
                fake = fake.new_empty(numel)
                self._track(fake)
            grown.append(fake)
        return tuple(grown)


def _zeros(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


_ATTENTION = nn.functional.scaled_dot_product_attention


class _Attention(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output, and a number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if query.is_meta:
        return _Attention.apply(query, key, value, attn_mask)
    return _ATTENTION(query, key, value, attn_mask, *args, **kwargs)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the meta device as a card does it: torch would take the plain product there."""
    nn.functional.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = _ATTENTION


class PlannedAccumulator(Accumulator):
    """Takes the memory that another accumulator would take, and does nothing else.

    Args:
        accumulator: the other one.
        keeps_inputs: whether layers' inputs are kept as they are.
        work: bytes of the largest tensor of a layer's backward whose gradient is not formed, by
            module.
        kept: bytes of what is kept of a layer's input where it is projected, by module.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        keeps_inputs: bool,
        work: dict[nn.Module, int],
        kept: dict[nn.Module, int],
    ) -> None:
        super().__init__(accumulator.shapes, accumulator.num_features)
        self.accumulator, self.all_samples = accumulator, accumulator.all_samples
        self._thin = isinstance(accumulator, KroneckerAccumulator) and not keeps_inputs
        self._work, self._kept = work, kept
        self._waiting: list[Tensor] = []

    def row_multiple(self, index: int) -> int:
        """See `Accumulator.row_multiple`."""
        return self.accumulator.row_multiple(index)

    def keep(self, index: int, module: WeightModule, x: Tensor) -> Tensor:
        """See `Accumulator.keep`."""
        if not self._thin or isinstance(module, nn.Embedding):
            return x
        return x.new_empty(self._kept[module], dtype=torch.uint8)

    def add_weight(self, index: int, layer: LayerGradient, out: Tensor) -> None:
        """See `Accumulator.add_weight`."""
        module = layer.module
        formed = self.accumulator.forms_slices(module, layer.output_grads)
        if formed and not isinstance(module, nn.Embedding):
            super().add_weight(index, layer, out)
        else:
            # the gradient and a copy with signs, of an embedding or of thin factors
            size = self._work[module]
            held = out.new_empty(size, dtype=torch.uint8)
            held.new_empty(size)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""
        accumulator = self.accumulator
        if isinstance(accumulator, SketchAccumulator) and accumulator.waits(grads, out):
            self._waiting.append(grads.to(out.dtype))
            if sum(x.nbytes for x in self._waiting) > workspace_bytes(out.device):
                self.close(out)
        else:
            # with signs
            out.new_empty(math.prod(grads.shape))

    def close(self, out: Tensor) -> None:
        """See `Accumulator.close`."""
        if self._waiting:
            values = torch.cat([x.reshape(len(x), -1) for x in self._waiting], dim=1)
            values.new_empty(values.shape[1], dtype=torch.int64)
        self.forget()

    def forget(self) -> None:
        """See `Accumulator.forget`."""
        self._waiting.clear()
