"""Which tensors exist at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of the tensors created within it, exactly and on any device.

    Memory counts once, however many views look at it, until the last of them is gone, in forward,
    backward and under functorch's transforms. Scratch memory inside an operation is not seen.

    Attributes:
        live_bytes: of tensors created within it that still exist.
        peak_bytes: highest ``live_bytes``.
        largest_bytes: of the largest single allocation made within it.

    Args:
        known: tensors that exist already (weights, inputs). Whatever an operation takes that no
            operation within made is recognised as such without being listed.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self._sizes: dict[int, int] = {}
        # weak: an address that is freed may come back as new memory
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        for tensor in known:
            self._recognise(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # torch.tensor() shows up as this no-op on memory it has just allocated
        if func is not torch.ops.aten.lift_fresh.default:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._recognise(leaf)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return out

    def _recognise(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._known[storage._cdata] = storage

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key).atexit = False
        # an operation may have grown memory it got as out=
        self.live_bytes += size - self._sizes[key]
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_bytes = max(self.largest_bytes, size)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
