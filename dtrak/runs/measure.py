"""What a run cost: seconds and peak memory per stage, and which tensors it held."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrak_kernels.gradients.memory import TensorMeter as TensorMeter

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
