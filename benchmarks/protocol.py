"""How a number comes to be: agreement first, then rounds that take turns, beside measured roofs.

A `Provider` is one way to do the work of a case. `race` runs each once, notes its peak memory and
how far its result is from what it must be, drops those that disagree, and then times the others in
rounds: everyone once, each time in another order, so that a machine that slows down slows all, and
nobody has to follow the same neighbour, whose memory and caches it finds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtrak.runs.measure import TensorMeter

# a GPU's cache is overwritten before every timed call
_FLUSH_BYTES = 256 * 2**20


class Absent(Exception):
    """A provider that cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """The least a job can cost.

    Attributes:
        flops: floating-point operations.
        bytes: its inputs and its result, each moved once.
        dtype: of the matrix products.
    """

    flops: float
    bytes: float
    dtype: str = "float32"


@dataclass(frozen=True)
class Check:
    """Something a result must agree with.

    Attributes:
        what: it is compared with, in words.
        error: how far off a result is.
        allowed: largest error that counts as agreement.
    """

    what: str
    error: Callable[[Any], float]
    allowed: float


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a case.

    Attributes:
        name: who.
        prepare: builds what may be kept between calls (a stored matrix, a projector) and returns
            the function to time; raises `Absent` where the provider cannot run.
        checks: what its result must agree with, on the very inputs that are timed.
        work: what the job is worth, however it is done.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    checks: tuple[Check, ...]
    work: Work


@dataclass(frozen=True)
class Roofs:
    """What this machine does at best, measured in this run.

    Attributes:
        copy: bytes per second, read and written, of a copy larger than the caches.
        gemm: floating-point operations per second of a large matrix product.
        dtype: of that product.
    """

    copy: float
    gemm: float
    dtype: str

    def best(self, other: Roofs) -> Roofs:
        """The higher of each: a busy moment lowers what was measured, not what is possible."""
        return Roofs(max(self.copy, other.copy), max(self.gemm, other.gemm), self.dtype)

    def floor(self, work: Work) -> float:
        """Seconds below which the work cannot be done here."""
        return max(work.flops / self.gemm, work.bytes / self.copy)


@dataclass
class Outcome:
    """What became of a provider.

    Attributes:
        seconds: of every round.
        errors: of every check.
        peak_bytes: most memory alive at once beyond the inputs, kept state included: allocated on
            the device on CUDA, tensors elsewhere.
        absent: why it did not run.
        failure: why it does not count.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    absent: str = ""
    failure: str = ""

    @property
    def counts(self) -> bool:
        """Whether it was timed."""
        return bool(self.seconds)

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the rounds, in seconds."""
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        low, middle, high = seconds.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        return low, middle, high


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64."""
    if actual.shape != oracle.shape:
        raise ValueError(f"result must have shape {tuple(oracle.shape)}, got {tuple(actual.shape)}")
    actual, oracle = actual.detach().double(), oracle.detach().double()
    return float((actual - oracle).norm() / oracle.norm())


def gram_error(features: Tensor, grads: Tensor) -> float:
    """Root mean square error of inner products, in units of its theoretical spread.

    1 is what any unbiased projection of independent entries gives.

    Args:
        features: ``[B, K]``.
        grads: ``[B, P]``.
    """
    found, true = gram(features), gram(grads)
    squares = true.diagonal()
    spread = ((squares[:, None] * squares + true**2) / features.shape[1]).sqrt()
    upper = torch.triu_indices(*true.shape)
    return float(((found - true) / spread)[upper[0], upper[1]].square().mean().sqrt())


def gram(x: Tensor) -> Tensor:
    """Inner products of rows in float64, without a float64 copy of them all."""
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for part in x.split(2**20, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total.cpu()


def live_bytes() -> int:
    """Memory of the CPU tensors Python knows and `gc.freeze` did not hide, in bytes.

    Memory with several views counts once.
    """
    gc.collect()
    things = gc.get_objects()
    # not isinstance, which asks proxies for their class and so wakes lazy modules
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, Tensor)}
    storages = {}
    for thing in things:
        if type(thing) in kinds and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def measure_roofs(device: torch.device, dtype: str, *, smoke: bool = False) -> Roofs:
    """A large copy and a large matrix product, the best of several.

    Convolutions in float32 use the TF32 units of a GPU by default, and our dense kernels those of
    16 bits: the product does, too, or what it is the roof of would pass it.
    """
    cuda = device.type == "cuda"
    size = 1024 if smoke else 2**26 if not cuda else 2**28
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    side = 64 if smoke else 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    product = torch.empty_like(a)

    def best(run: Callable[[], Any]) -> float:
        return min(timed(run, device, None) for _ in range(1 if smoke else 6))

    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        gemm = 2 * side**3 / best(lambda: torch.mm(a, b, out=product))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Roofs(copy, gemm, dtype)


def make_flush(device: torch.device) -> Tensor | None:
    """What overwrites the cache of a GPU; nothing elsewhere."""
    if device.type != "cuda":
        return None
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def timed(run: Callable[[], Any], device: torch.device, flush: Tensor | None) -> float:
    """Seconds of a call, on the device's own clock if that is a GPU.

    Args:
        run: the call.
        device: where it runs.
        flush: of `make_flush`; overwritten before.
    """
    if device.type == "cuda":
        # the flush also keeps the device busy while the call is enqueued
        if flush is not None:
            flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _prepared(provider: Provider, device: torch.device, outcome: Outcome) -> Any:
    """The function to time and its first result, its peak memory noted."""
    if device.type == "cuda":
        synchronise(device)
        # what earlier providers used is free: some ask before they make a matrix
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run = provider.prepare()
        result = run()
        synchronise(device)
        outcome.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return run, result
    before = live_bytes()
    run = provider.prepare()
    # the first run may make what later ones keep (a sketch's signs), and the result is dropped
    run()
    kept = live_bytes() - before
    with TensorMeter() as meter:
        result = run()
    outcome.peak_bytes = kept + meter.peak_bytes
    return run, result


def _words(reason: Exception) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"


def _first_run(provider: Provider, device: torch.device, outcome: Outcome) -> Any:
    """The function to time, after a run of it that was measured and compared; or ``None``."""
    try:
        run, result = _prepared(provider, device, outcome)
        outcome.errors = [check.error(result) for check in provider.checks]
    except Absent as reason:
        outcome.absent = str(reason)
        return None
    # a peer may fail in any way of its own (memory, a missing rule); the others go on
    except Exception as reason:
        outcome.failure = _words(reason)
        return None
    for check, error in zip(provider.checks, outcome.errors, strict=True):
        # not `>`: NaN is no agreement
        if not error <= check.allowed:
            outcome.failure = (
                f"disagrees with {check.what}: error {error:.2e} > {check.allowed:.2e}"
            )
            return None
    return run


def race(
    providers: Sequence[Provider],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 50),
) -> dict[str, Outcome]:
    """Compare, then time.

    Args:
        providers: who competes.
        device: where.
        seconds: what a provider may use beyond the least number of rounds.
        rounds: least and most rounds.

    Returns:
        An outcome per provider.
    """
    outcomes = {provider.name: Outcome() for provider in providers}
    runs: dict[str, Callable[[], Any]] = {}
    gc.collect()
    # what exists already is nobody's: not looked through for every provider
    gc.freeze()
    try:
        for provider in providers:
            run = _first_run(provider, device, outcomes[provider.name])
            if run is not None:
                runs[provider.name] = run
        flush = make_flush(device)
        least, most = rounds
        order, shuffle = list(runs), random.Random(0)
        gc.collect()
        gc.disable()
        for number in range(most):
            due = [n for n in order if number < least or sum(outcomes[n].seconds) < seconds]
            if not due:
                break
            for name in shuffle.sample(due, len(due)):
                try:
                    outcomes[name].seconds.append(timed(runs[name], device, flush))
                # what it keeps beside the others may be too much
                except Exception as reason:
                    order.remove(name)
                    outcomes[name] = Outcome(failure=_words(reason))
                    del runs[name]
    finally:
        gc.enable()
        gc.unfreeze()
    return outcomes


def figures(
    provider: Provider,
    outcome: Outcome,
    baseline: tuple[str, Outcome] | None,
    roofs: Roofs,
) -> dict[str, Any]:
    """The figures of a row.

    Args:
        provider: who was timed.
        outcome: how it went.
        baseline: whom its time is divided by, if anyone.
        roofs: of this run.
    """
    low, middle, high = outcome.percentiles
    result = {
        "provider": provider.name,
        "baseline": None,
        "ratio": None,
        "rounds": len(outcome.seconds),
        "p20_seconds": low,
        "p50_seconds": middle,
        "p80_seconds": high,
        "peak_bytes": outcome.peak_bytes,
        "agreement": [
            {"with": check.what, "error": error, "allowed": check.allowed}
            for check, error in zip(provider.checks, outcome.errors, strict=True)
        ],
        "dtype": provider.work.dtype,
        "flops": provider.work.flops,
        "bytes": provider.work.bytes,
        "roof_fraction": roofs.floor(provider.work) / middle,
        "roof_bytes_per_second": roofs.copy,
        "roof_flops_per_second": roofs.gemm,
    }
    if baseline is not None:
        result["baseline"] = baseline[0]
        result["ratio"] = middle / baseline[1].percentiles[1]
    return result
