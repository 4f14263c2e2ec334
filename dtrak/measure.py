"""What a run cost: seconds and peak memory per stage, and which tensors it held."""

from __future__ import annotations

import resource
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


@dataclass(frozen=True)
class Stage:
    """One finished stage of a run.

    Attributes:
        name: what was done.
        seconds: wall-clock time, in seconds.
        peak_bytes: highest memory during the stage, in bytes: allocated on the device on CUDA,
            resident set of the process otherwise.
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
        _reset_peak(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stages.append(Stage(name, time.perf_counter() - start, _peak(self.device)))


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of the tensors that live within it, exactly and on any device.

    Scratch memory inside an operation is not seen.

    Attributes:
        live_bytes: of tensors created within it that still exist.
        peak_bytes: highest ``live_bytes``.
        largest_bytes: of the largest single tensor created within it.

    Args:
        known: tensors that exist already (weights, inputs) and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_bytes = max(self.largest_bytes, size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size


def format_bytes(size: int) -> str:
    """Bytes for a reader: ``12.3 MB`` (1 MB = 1e6 bytes)."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


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
