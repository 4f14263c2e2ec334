"""Normal entries compiled to one loop: the entries of the reference, or the eager ones instead."""

import pytest
import torch
from numerics import relative_error

from dtrak_kernels.dense import reference
from dtrak_kernels.dense import torch as dense
from dtrak_kernels.projection import Projection
from dtrak_kernels.random import normal as normals


@pytest.fixture
def forget():
    """Nothing compiled before or after."""
    normals.compiled_tile.cache_clear()
    yield
    normals.compiled_tile.cache_clear()


@pytest.fixture(scope="module")
def tile():
    made = normals.compiled_tile()
    if made is None:
        pytest.skip("torch.compile has no working C++ compiler here")
    return made


def entries_of(tile, column, coordinate, seed):
    """A tile as ``[P, K]``, its parameters in order."""
    columns = (column + torch.arange(normals.TILE))[None, :]
    index = (coordinate + torch.arange(normals.TILE))[:, None]
    made = tile(columns, index, normals.round_keys(seed)).reshape(2, 2, -1, 4, normals.TILE)
    # [half, p0, unit, call, K] to parameter = 16 unit + 8 half + 2 call + p0
    return made.permute(2, 0, 3, 1, 4).reshape(-1, normals.TILE)


@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("column, coordinate", [(0, 0), (2**30 - 300, 2**32 - 128), (9, 2**45)])
def test_eager_tiles_are_the_reference(column, coordinate, seed):
    made = entries_of(normals.normal_tile, column, coordinate, seed)
    p = 4 * coordinate + torch.arange(0, 1024, 37)
    for k in (0, 100, 255):
        for row in p.tolist():
            got = made[row - 4 * coordinate, k].item()
            # one entry of the reference, whatever its column
            assert abs(got - _entry(row, column + k, seed)) < 4e-6


def _entry(p, k, seed):
    quad = 4 * (p // 16) + p // 2 % 4
    counters = (k, quad % 2**32, quad // 2**32, 1)
    words = reference.philox(tuple(torch.tensor(c) for c in counters), seed)
    a, b = (words[2 * (p // 8 % 2) + n].double() for n in range(2))
    radius = (-2 * ((a + 1) / 2**32).log()).sqrt()
    angle = 2 * torch.pi * b / 2**32
    return (radius * (angle.sin() if p % 2 else angle.cos())).item()


# slow: the C++ compiler; the fast lane has stand-ins for it, right and wrong
@pytest.mark.full
def test_compiled_tiles_are_the_reference(tile):
    made = entries_of(tile, 0, 4 * 8, 2**40 + 7)
    oracle = reference.normal_matrix(1024, normals.TILE, 2**40 + 7, offset=16 * 8)
    error = (made.double() - oracle).abs() / oracle.abs().clamp(min=1)
    assert error.max() <= 1e-6


@pytest.mark.full
@pytest.mark.parametrize(
    "B, C, K, offset",
    [(3, 2100, 300, 0), (1, 5, 256, 1000), (300, 1024, 257, 2**40 + 16), (2, 40, 1, 2**34 - 7)],
)
def test_compiled_projections_match_the_oracle(B, C, K, offset, tile, monkeypatch):
    grads = torch.randn(B, C, generator=torch.Generator().manual_seed(0))
    oracle = grads.double() @ reference.normal_matrix(C, K, 5, offset=offset)
    used = []
    monkeypatch.setattr(dense, "COMPILE_ENTRIES", 0)
    monkeypatch.setattr(dense, "compiled_tile", lambda: used.append(1) or tile)
    out = torch.ones(B, K)
    dense.project_dense_(grads, Projection("normal", K, 5), offset, out, 1.0)
    assert relative_error(out - 1, oracle) < 1e-6
    assert len(used) == -(-B // 256)
    # float64 has entries of its own accuracy
    out = torch.zeros(B, K, dtype=torch.float64)
    dense.project_dense_(grads.double(), Projection("normal", K, 5), offset, out, 1.0)
    assert relative_error(out, oracle) < 1e-14


def test_small_projections_compile_nothing(monkeypatch):
    monkeypatch.setattr(dense, "compiled_tile", lambda: pytest.fail("compiled"))
    dense.project_dense_(
        torch.ones(1, 99), Projection("normal", 64), 0, torch.zeros(1, 64), scale=1.0
    )


def test_without_a_compiler_there_is_no_compiled_tile(forget, monkeypatch):
    def broken(*args, **kwargs):
        def run(*args):
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    assert normals.compiled_tile() is None
    grads = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(dense, "COMPILE_ENTRIES", 0)
    out = torch.zeros(2, 32)
    dense.project_dense_(grads, Projection("normal", 32, 5), 0, out, 1.0)
    assert relative_error(out, grads.double() @ reference.normal_matrix(40, 32, 5)) < 1e-6


def test_a_compiler_that_gives_other_entries_is_not_used(forget, monkeypatch):
    def wrong(function, **kwargs):
        # one call of 65536 differs in one word
        def run(columns, index, keys):
            tile = function(columns, index, keys)
            tile[3, 17, 5] += 1e-4
            return tile

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    assert normals.compiled_tile() is None
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    normals.compiled_tile.cache_clear()
    assert normals.compiled_tile() is normals.normal_tile


def test_samples_share_the_entries(monkeypatch):
    """A larger batch costs products, not entries."""
    made = []
    original = dense.normal_pairs
    monkeypatch.setattr(
        dense, "normal_pairs", lambda a, b, d: made.append(a.numel()) or original(a, b, d)
    )
    for B in (1, 200):
        made.clear()
        dense.project_dense_(
            torch.ones(B, 160), Projection("normal", 64), 0, torch.zeros(B, 64), 1.0
        )
        assert 2 * sum(made) == 160 * 64
