"""The regularised inverse: a sweep of dampings against one, and the dual against inverses.

Run with ``pytest benchmarks/test_ridge.py --benchmark-only``.
"""

import time

import pytest
import torch

from dtrak_kernels.ridge import RidgeSolver

N, K, M = 1000, 8192, 100
# the values D-TRAK's notebooks try
SWEEP = [m * 10.0**j for j in range(-2, 7) for m in (1, 2, 5)]


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.randn(N, K, generator=generator).to(device)
    return features, torch.randn(M, K, generator=generator).to(device)


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
    benchmark.group = f"ridge N={N} K={K} M={M}"
    benchmark.extra_info.update(N=N, K=K, M=M, threads=torch.get_num_threads())
    benchmark.pedantic(what, args=(problem,), rounds=3, warmup_rounds=1)


def test_published_inverse(benchmark, problem):
    """One of the 27 float32 inverses; the other 26 cost the same, and are not run."""
    features, queries = problem
    start = time.perf_counter()
    gram = features.T @ features
    synchronise()
    gram_seconds = time.perf_counter() - start

    def inverse():
        damped = gram + 1.0e3 * torch.eye(K, device=gram.device)
        queries @ torch.linalg.inv(damped) @ features.T
        synchronise()

    benchmark.group = f"ridge N={N} K={K} M={M}"
    benchmark.pedantic(inverse, rounds=1)
    inverse_seconds = benchmark.stats.stats.mean if benchmark.stats else float("nan")
    start = time.perf_counter()
    sweep(problem)
    ours = time.perf_counter() - start
    published = gram_seconds + len(SWEEP) * inverse_seconds
    benchmark.extra_info.update(
        N=N,
        K=K,
        M=M,
        threads=torch.get_num_threads(),
        extrapolated=f"27 inverses from one of {inverse_seconds:.3g} s, and one float32 Gram",
        published_seconds=published,
        dual_sweep_seconds=ours,
        speedup=published / ours,
    )
