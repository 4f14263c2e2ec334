"""Gram accumulation, the one-pass product and conjugate gradients against float64 algebra."""

import numpy as np
import pytest
import torch
from numerics import assert_as_good_as, moat, relative_error

from dtrak_kernels.ridge.gram import (
    NotConvergedError,
    accumulate_gram,
    conjugate_gradient,
    gram_product,
    mirror_lower,
    nystrom_preconditioner,
)

# (N, K, M): aligned; ragged on every axis; one of each; more rows than 256 runs of 16
SHAPES = [(32, 64, 32), (37, 71, 5), (1, 3, 1), (4500, 7, 2)]
DTYPES = [
    torch.float32,
    torch.float16,
    # wrong in the interpreter
    pytest.param(torch.bfloat16, marks=pytest.mark.compiled),
]


def rows(N, K, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator).to(device)


class Store:
    """Rows served one slice at a time, counting how often each is served."""

    def __init__(self, features):
        self.features, self.shape = features, features.shape
        self.reads = torch.zeros(len(features), dtype=torch.int64)

    def __getitem__(self, part):
        self.reads[part] += 1
        return self.features[part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B, K", [(40, 30), (9, 1100), (1, 1)])
def test_accumulated_gram_matches_gemm(B, K, dtype, device):
    features = rows(2 * B + 3, K, device=device)
    out = torch.zeros(K, K, dtype=dtype, device=device)
    for block in features.split(B):
        accumulate_gram(block, out)
    # wider than float64, whose own products round, too
    wide = features.cpu().numpy().astype(np.longdouble)
    oracle = torch.from_numpy((wide.T @ wide).astype(np.float64))
    eager = features.to(dtype).T @ features.to(dtype)
    assert_as_good_as(out.tril(), eager.tril(), oracle.tril(), floor=torch.finfo(dtype).eps)
    whole = mirror_lower(out)
    assert torch.equal(whole, whole.T)
    assert_as_good_as(whole, eager, oracle, floor=torch.finfo(dtype).eps)


def test_accumulation_does_half_the_work_of_a_gemm(monkeypatch):
    K = 2048
    done = []
    original = torch.Tensor.addmm_

    def counting(self, left, right, **kwargs):
        done.append(self.numel())
        return original(self, left, right, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", counting)
    accumulate_gram(rows(2, K), torch.zeros(K, K))
    assert sum(done) <= 0.65 * K * K


@pytest.mark.parametrize(
    "features, out, error, match",
    [
        (torch.ones(3), torch.ones(3, 3), ValueError, r"features must be \[B, K\], got shape"),
        (torch.ones(2, 3), torch.ones(2, 2), ValueError, r"out must be \[3, 3\], got \[2, 2\]"),
        (torch.ones(2, 3), torch.ones(3, 3).half(), TypeError, "out must be float32 or float64"),
    ],
)
def test_accumulate_gram_refuses(features, out, error, match):
    with pytest.raises(error, match=match):
        accumulate_gram(features, out)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("N, K, M", SHAPES)
def test_product_matches_the_formed_gram(N, K, M, implementation, dtype, device):
    features = moat(rows(N, K, device=device).to(dtype))
    vectors = moat(rows(K, M, seed=1, device=device))
    exact = features.double()
    oracle = exact.T @ exact @ vectors.double() + 2.5 * vectors.double()
    eager = features.float().T @ (features.float() @ vectors) + 2.5 * vectors
    actual = gram_product(features, vectors, 2.5, implementation=implementation)
    assert actual.dtype == torch.float32
    assert_as_good_as(actual, eager, oracle)


@pytest.mark.parametrize(
    "config",
    [
        {"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_M": 16, "num_warps": 1, "num_stages": 1},
        {"BLOCK_N": 32, "BLOCK_K": 128, "BLOCK_M": 16, "num_warps": 8, "num_stages": 3},
    ],
    ids=["small", "wide"],
)
def test_product_does_not_depend_on_tiling(config, device):
    from dtrak_kernels.ridge.gram_triton import launch_gram_product

    features, vectors = rows(53, 90, device=device), rows(90, 21, seed=1, device=device)
    oracle = features.double().T @ (features.double() @ vectors.double()) + vectors.double()
    eager = features.T @ (features @ vectors) + vectors
    assert_as_good_as(launch_gram_product(features, vectors, 1.0, config=config), eager, oracle)


def test_product_takes_vectors_in_groups(monkeypatch, device):
    from dtrak_kernels.ridge import gram_triton as gram_kernel

    features, vectors = rows(40, 24, device=device), rows(24, 20, seed=1, device=device)
    whole = gram_kernel.launch_gram_product(features, vectors, 0.5)
    monkeypatch.setattr(gram_kernel, "_PARTIAL_BYTES", 4 * 3 * 24 * 7)
    assert relative_error(gram_kernel.launch_gram_product(features, vectors, 0.5), whole) < 1e-6


def test_product_repeats_bit_for_bit(device):
    features, vectors = rows(600, 40, device=device), rows(40, 3, seed=1, device=device)
    first = gram_product(features, vectors, 0.1, implementation="triton")
    assert torch.equal(first, gram_product(features, vectors, 0.1, implementation="triton"))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_product_of_nothing_is_the_damping(implementation, device):
    vectors = rows(5, 2, device=device)
    empty = torch.empty(0, 5, device=device)
    options = {"implementation": implementation}
    assert torch.equal(gram_product(empty, vectors, 3.0, **options), 3 * vectors)
    none = gram_product(rows(4, 5, device=device), vectors[:, :0], 3.0, **options)
    assert none.shape == (5, 0)


def test_torch_product_reads_each_row_once_and_takes_float64(monkeypatch):
    from dtrak_kernels.ridge import gram

    monkeypatch.setattr(gram, "_BLOCK_BYTES", 8 * 6 * 10)
    store, vectors = Store(rows(43, 6)), rows(6, 4, seed=1).double()
    actual = gram_product(store, vectors, 0.25)
    exact = store.features.double()
    assert relative_error(actual, exact.T @ exact @ vectors + 0.25 * vectors) < 1e-14
    assert store.reads.tolist() == [1] * 43


@pytest.mark.gpu
def test_product_beyond_two_to_the_31_elements(device):
    features = torch.zeros(2**20 + 64, 2**11, dtype=torch.float16, device=device)
    features[-1] = 1.0
    vectors = rows(2**11, 16, device=device)
    actual = gram_product(features, vectors, 0.0, implementation="triton")
    assert relative_error(actual, vectors.sum(dim=0).expand(2**11, 16)) < 1e-4


@pytest.mark.parametrize(
    "vectors, damping, options, error, match",
    [
        (torch.ones(4, 2), 1.0, {}, ValueError, r"vectors must be \[3, M\], got shape \(4, 2\)"),
        (torch.ones(3), 1.0, {}, ValueError, r"vectors must be \[3, M\], got shape \(3,\)"),
        (torch.ones(3, 2).half(), 1.0, {}, TypeError, "vectors must be float32 or float64"),
        (torch.ones(3, 2), -1.0, {}, ValueError, "damping must be finite and at least 0, got -1.0"),
        (torch.ones(3, 2), float("nan"), {}, ValueError, "damping must be finite .* got nan"),
        (
            torch.ones(3, 2),
            1.0,
            {"implementation": "cuda"},
            ValueError,
            "implementation must be 'torch', 'triton' or None, got 'cuda'",
        ),
        (
            torch.ones(3, 2).double(),
            1.0,
            {"implementation": "triton"},
            TypeError,
            "'triton' must have float32 vectors .* got torch.float64",
        ),
    ],
)
def test_product_refuses(vectors, damping, options, error, match):
    with pytest.raises(error, match=match):
        gram_product(torch.ones(5, 3), vectors, damping, **options)


def test_kernel_refuses_a_store():
    with pytest.raises(TypeError, match=r"bfloat16 tensor of features, got .* and Store"):
        gram_product(Store(rows(5, 3)), torch.ones(3, 2), 1.0, implementation="triton")


def graded(N, K, decay):
    """Features whose singular values fall by ``decay`` decades."""
    generator = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(N, K, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(K, K, generator=generator, dtype=torch.float64))
    return u * torch.logspace(0, -decay, K, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("rank", [None, 8])
def test_conjugate_gradient_solves(rank):
    features, damping = graded(60, 40, 2.0), 1e-3
    right = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    right[:, 2] = 0.0
    right[:, 3] *= 1e-12
    precondition = None if rank is None else nystrom_preconditioner(features, damping, rank=rank)
    actual = conjugate_gradient(
        lambda v: gram_product(features, v, damping),
        right,
        tolerance=1e-11,
        max_iterations=500,
        preconditioner=precondition,
    )
    gram = features.T @ features + damping * torch.eye(40, dtype=torch.float64)
    oracle = torch.linalg.solve(gram, right)
    for column in (0, 1, 3, 4):
        assert relative_error(actual[:, column], oracle[:, column]) < 1e-7
    assert torch.equal(actual[:, 2], torch.zeros(40, dtype=torch.float64))


def test_preconditioner_saves_iterations():
    features, damping = graded(120, 100, 4.0), 1e-6
    right = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    used = []
    for precondition in (None, nystrom_preconditioner(features, damping, rank=60)):
        count = [0]

        def product(vectors, count=count):
            count[0] += 1
            return gram_product(features, vectors, damping)

        conjugate_gradient(
            product, right, tolerance=1e-8, max_iterations=5000, preconditioner=precondition
        )
        used.append(count[0])
    assert used[1] < used[0] / 3


def test_preconditioner_is_the_inverse_where_its_rank_is_full():
    features, damping = graded(30, 12, 2.0), 1e-2
    apply = nystrom_preconditioner(features, damping, rank=12)
    vectors = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    damped = features.T @ features + damping * torch.eye(12, dtype=torch.float64)
    inverse = torch.linalg.solve(damped, vectors)
    ratio = apply(vectors) / inverse
    # proportional to the inverse: conjugate gradients do not see a constant factor
    assert relative_error(ratio, ratio.mean().expand_as(ratio)) < 1e-6


def test_preconditioner_of_zero_features_is_the_identity():
    vectors = rows(5, 2).double()
    apply = nystrom_preconditioner(torch.zeros(4, 5), 0.1, rank=3)
    assert relative_error(apply(vectors), vectors) < 1e-12


def test_conjugate_gradient_says_the_residual_it_reached():
    features = graded(60, 40, 3.0)
    with pytest.raises(
        NotConvergedError, match=r"relative residual of 1e-10, got \d\.\d+e.\d+ after 3"
    ):
        conjugate_gradient(
            lambda v: gram_product(features, v, 1e-9),
            torch.ones(40, 1, dtype=torch.float64),
            tolerance=1e-10,
            max_iterations=3,
        )


def test_conjugate_gradient_does_not_accept_an_indefinite_matrix():
    with pytest.raises(NotConvergedError, match="must reach a relative residual"):
        conjugate_gradient(
            lambda v: -v,
            torch.ones(4, 1, dtype=torch.float64),
            tolerance=1e-8,
            max_iterations=50,
        )


@pytest.mark.parametrize(
    "options, match",
    [
        ({"tolerance": 0.0, "max_iterations": 5}, "tolerance must be above 0, got 0.0"),
        ({"tolerance": 1e-3, "max_iterations": 0}, "max_iterations must be at least 1, got 0"),
    ],
)
def test_conjugate_gradient_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        conjugate_gradient(lambda v: v, torch.ones(3, 1), **options)


@pytest.mark.parametrize("rank", [0, 4])
def test_preconditioner_refuses_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank must be from 1 to 3, got {rank}"):
        nystrom_preconditioner(torch.ones(5, 3), 1.0, rank=rank)
