"""The regularised inverse: a sweep of dampings against one, and the dual against inverses.

Run with ``pytest benchmarks/test_ridge.py --benchmark-only``.
"""

import time

import pytest
import torch

from dtrak_kernels.ridge import RidgeSolver

SIZES = (1000, 8192, 100)
SMOKE_SIZES = (50, 200, 5)
# the values D-TRAK's notebooks try
SWEEP = [m * 10.0**j for j in range(-2, 7) for m in (1, 2, 5)]


@pytest.fixture(scope="module")
def problem(smoke, device):
    """Features ``[N, K]`` and queries ``[M, K]``."""
    N, K, M = SMOKE_SIZES if smoke else SIZES
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, K, generator=generator).to(device)
    return features, torch.randn(M, K, generator=generator).to(device)


def sizes(problem):
    (N, K), M = problem[0].shape, len(problem[1])
    return {"N": N, "K": K, "M": M, "threads": torch.get_num_threads()}


def group(problem):
    return "ridge N={N} K={K} M={M}".format(**sizes(problem))


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def one(problem):
    features, queries = problem
    RidgeSolver(features).scores(queries, 1.0)
    synchronise()


def sweep(problem):
    features, queries = problem
    for _ in RidgeSolver(features).iter_sweep(queries, SWEEP):
        pass
    synchronise()


@pytest.mark.parametrize("what", [one, sweep], ids=["one-damping", "27-dampings"])
def test_dual(benchmark, what, problem):
    benchmark.group = group(problem)
    benchmark.extra_info.update(sizes(problem))
    benchmark.pedantic(what, args=(problem,), rounds=3, warmup_rounds=1)


def test_published_inverse(benchmark, problem, record):
    """One of the 27 float32 inverses; the other 26 cost the same, and are not run."""
    features, queries = problem
    start = time.perf_counter()
    gram = features.T @ features
    synchronise()
    gram_seconds = time.perf_counter() - start

    def inverse():
        damped = gram + 1.0e3 * torch.eye(len(gram), device=gram.device)
        queries @ torch.linalg.inv(damped) @ features.T
        synchronise()

    benchmark.group = group(problem)
    benchmark.pedantic(inverse, rounds=1)
    inverse_seconds = benchmark.stats.stats.mean if benchmark.stats else float("nan")
    start = time.perf_counter()
    sweep(problem)
    ours = time.perf_counter() - start
    published = gram_seconds + len(SWEEP) * inverse_seconds
    benchmark.extra_info.update(
        **sizes(problem),
        extrapolated=f"27 inverses from one of {inverse_seconds:.3g} s, and one float32 Gram",
        published_seconds=published,
        dual_sweep_seconds=ours,
        speedup=published / ours,
    )
    record("ridge", **benchmark.extra_info)
