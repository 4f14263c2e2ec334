"""Kernels compiled before they are needed, side by side: the first batch is not minutes of silence.

Triton compiles a kernel where it is first launched, one after the other: a network has a dozen
variants, each of which takes seconds. `compile_ahead` runs a batch without launching anything, and
compiles everything it would have launched at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class _Pointer:
    """What a compiler wants to know of a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """A multiple of 16 where the tensor's address is one."""
        return self.address

    def ptr_range(self) -> int:
        """No range is known."""
        return 0


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _Pointer(argument.dtype, argument.data_ptr() % 16)
    return argument


@dataclass
class Rehearsal:
    """Launches that were asked for and did not take place.

    Attributes:
        launches: how many.
        wanted: each different one, its kernel, grid and arguments without their memory.
    """

    launches: int = 0
    wanted: dict[Any, tuple[Any, Any, dict[str, Any]]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """Note a launch; backward hooks come in a thread of their own."""
        arguments = tree_map(_without_memory, arguments)
        with self._lock:
            self.launches += 1
            key = kernel, tuple(sorted(arguments.items(), key=lambda item: item[0]))
            self.wanted.setdefault(key, (kernel, grid, arguments))


class ProgressLine:
    """Says on standard error how far compiling is, if it takes longer than a second.

    Args:
        patience: seconds before the first word.
    """

    def __init__(self, patience: float = 1.0) -> None:
        self._begin, self._said = time.monotonic() + patience, False

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` are compiled."""
        if time.monotonic() < self._begin:
            return
        is_shown = sys.stderr.isatty()
        if is_shown or not self._said or done == total:
            start, end = ("\r", "" if done < total else "\n") if is_shown else ("", "\n")
            sys.stderr.write(f"{start}kernels compiled for this GPU: {done} of {total}{end}")
            sys.stderr.flush()
            self._said = True


_rehearsal: Rehearsal | None = None


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel; inside of `compile_ahead`, note it only."""
    if _rehearsal is None:
        kernel[grid](**arguments)
    else:
        _rehearsal.add(kernel, grid, arguments)


def rehearse(run: Callable[[], Any]) -> Rehearsal:
    """What ``run()`` launches. It is run without launching: its results mean nothing.

    Raises:
        RuntimeError: inside of another rehearsal.
    """
    global _rehearsal
    if _rehearsal is not None:
        raise RuntimeError("a rehearsal must not be inside of another one")
    found = _rehearsal = Rehearsal()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            run()
    finally:
        _rehearsal = None
    return found


def compile_ahead(
    run: Callable[[], Any],
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> int:
    """Compile, side by side, every kernel that ``run()`` launches on this machine's GPU.

    Args:
        run: a batch, like ``lambda: sketcher.sketch(outputs, num_samples)``. It is run once without
            its kernels: random generators are as before, and what it returns is dropped. Meanwhile
            no other thread may launch kernels of this package: they would not run.
        progress: called with (compiled, all), from (0, all) on; not at all where there is nothing
            to compile. A `ProgressLine` if ``None``.
        workers: compilers at a time; as many as there are processors if ``None``.

    Returns:
        How many variants of kernels there are. Those that a cache has are compiled in no time.

    Raises:
        Exception: what the compiler says of a kernel it refuses.
    """
    wanted = list(rehearse(run).wanted.values())
    if not wanted:
        return 0
    from triton import AsyncCompileMode

    progress = progress or ProgressLine()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool, AsyncCompileMode(pool) as mode:
        for kernel, grid, arguments in wanted:
            kernel.warmup(grid=grid, **arguments)
        total = len(mode.raw_futures)
        if total:
            progress(0, total)
        for done, _ in enumerate(as_completed(mode.raw_futures), start=1):
            progress(done, total)
    return total
