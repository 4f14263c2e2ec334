"""What a run cost: seconds and peak memory per stage, and which tensors it held."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:
    # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Stage:
    """One finished stage of a run.

    Attributes:
        name: what was done.
        seconds: wall-clock time, in seconds.
        peak_bytes: highest memory during the stage, in bytes: allocated on the device on CUDA,
            resident set of the process otherwise; 0 where that is not known (Windows).
    """

    name: str
    seconds: float
    peak_bytes: int


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            # 5 resets the high-water mark of the resident set
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class StageClock:
    """Times stages and notes their peak memory, in order.

    Attributes:
        stages: the finished ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as the stage ``name``; nothing is noted when it raises."""
        self._synchronise()
        _reset_peak(self.device)
        start = time.perf_counter()
        yield
        self._synchronise()
        self.stages.append(Stage(name, time.perf_counter() - start, _peak(self.device)))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


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


def format_bytes(size: int) -> str:
    """Bytes for a reader, three digits: ``12.3 MB`` (1 MB = 1e6 bytes)."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 99.95 else f"{value:.3g} {units[0]}"


def available_bytes(device: torch.device) -> int:
    """Free memory: on the CUDA device, or of this machine (1 GB where that cannot be told)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 10**9
