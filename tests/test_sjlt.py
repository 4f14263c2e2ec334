import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from numerics import relative_error

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.sjlt import torch as sjlt_module
from dtrak_kernels.sjlt.reference import sjlt_matrix
from dtrak_kernels.sjlt.torch import ParameterSketch, as_matrix, project_sjlt

# a thin convolution, matrices of two tiles down and two across, a vector, a scalar, a single row
SHAPES = [(5, 3, 3, 3), (131, 17), (4, 139), (33,), (), (1, 20)]


def sketch(grads, proj_dim, seed, shapes=SHAPES):
    out = torch.zeros(len(grads), proj_dim, dtype=grads.dtype)
    return project_sjlt(grads, proj_dim, seed, shapes, out)


def total(shapes):
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    "proj_dim",
    # a multiple of every block; no multiple of any; below the full tile; the least
    [2**16, 20_011, 1000, 256],
)
def test_matches_the_plain_definition(proj_dim):
    grads = torch.randn(3, total(SHAPES), dtype=torch.float64)
    expected = grads @ sjlt_matrix(SHAPES, proj_dim, seed=2**40 + 3)
    assert relative_error(sketch(grads, proj_dim, 2**40 + 3), expected) < 1e-14


def test_every_parameter_has_one_sign_and_one_place():
    matrix = sketch(torch.eye(total(SHAPES)), 4096, seed=1)
    assert torch.equal((matrix != 0).sum(1), torch.ones(total(SHAPES), dtype=torch.int64))
    assert torch.equal(matrix.abs().sum(1), torch.ones(total(SHAPES)))


def test_entries_of_one_tile_never_collide():
    single = ParameterSketch((128, 128), 0, 2**15, 3)
    out = torch.zeros(1, 2**15)
    single.add_matrix(torch.ones(1, 128, 128), out)
    assert int((out != 0).sum()) == 128 * 128


def test_blocks_are_balanced():
    single = ParameterSketch((1024, 2048), 0, 5 * 128 * 128, 3)
    counts = single.placement[0].bincount(minlength=5)
    assert counts.max() - counts.min() <= 1
    # dealt at random, not in order
    assert single.placement[0][:5].tolist() != sorted(single.placement[0][:5].tolist())


@pytest.mark.parametrize("first_row", [0, 128])
@pytest.mark.parametrize("proj_dim", [256, 5000, 2**15])
@pytest.mark.parametrize("shape", [(300, 40), (140, 7, 3, 2), (150, 1, 5), (130, 3, 2, 2, 2)])
def test_blocks_go_where_tiles_go(shape, proj_dim, first_row, monkeypatch):
    """From tables or tile by tile, in whatever memory layout the gradient comes."""
    single = ParameterSketch(shape, 17, proj_dim, 9)
    assert first_row % single.tile[0] == 0
    rows = torch.randn(2, *shape, dtype=torch.float64)[:, first_row:]
    expected = torch.zeros(2, proj_dim, dtype=torch.float64)
    single.add_matrix(as_matrix(rows), expected, first_row)
    columns_last = rows.movedim(2, -1).contiguous().movedim(-1, 2)
    for grads in (rows.contiguous(), columns_last, rows.flatten(3) if rows.ndim > 3 else rows):
        out = torch.zeros_like(expected)
        single.add_block(grads, out, first_row)
        assert relative_error(out, expected) < 1e-14
    monkeypatch.setattr(sjlt_module, "TABLE_ENTRIES", math.prod(shape) - 1)
    tiled = ParameterSketch(shape, 17, proj_dim, 9)
    out = torch.zeros_like(expected)
    tiled.add_block(columns_last, out, first_row)
    assert torch.equal(out, expected)
    # what a large weight must not cost
    assert not tiled._tables


def test_slices_of_rows_add_up():
    grads = torch.randn(2, 300, 40, dtype=torch.float64)
    single = ParameterSketch((300, 40), 17, 5000, 9)
    whole, parts = torch.zeros(2, 2, 5000, dtype=torch.float64)
    single.add_matrix(grads, whole)
    single.add_matrix(grads[:, :128], parts)
    single.add_matrix(grads[:, 128:], parts, first_row=128)
    assert torch.equal(whole, parts)


def test_signs_are_made_once_for_calls_alike(monkeypatch):
    made = []
    flips = ParameterSketch.flips
    monkeypatch.setattr(
        ParameterSketch, "flips", lambda self, tiles: made.append(self.seed) or flips(self, tiles)
    )
    sjlt_module._kept_sketches.cache_clear()
    grads = torch.randn(2, total(SHAPES))
    first = sketch(grads, 4096, seed=1)
    count = len(made)
    assert count
    # shapes may come as any sequence
    assert torch.equal(sketch(grads, 4096, 1, [list(shape) for shape in SHAPES]), first)
    assert len(made) == count
    # K, seed and shapes are what signs depend on
    for proj_dim, seed, shapes in ((2048, 1, SHAPES), (4096, 2, SHAPES), (4096, 2, SHAPES[::-1])):
        before = len(made)
        one = sketch(grads, proj_dim, seed, shapes)
        assert len(made) > before
        oracle = grads.double() @ sjlt_matrix(shapes, proj_dim, seed)
        assert relative_error(one, oracle) < 1e-6
    assert sjlt_module._kept_sketches.cache_info().currsize <= 2
    # what would not fit into the bound is made anew
    monkeypatch.setattr(sjlt_module, "_KEPT_BYTES", total(SHAPES))
    sjlt_module._kept_sketches.cache_clear()
    assert torch.equal(sketch(grads, 4096, 1), first)
    assert sjlt_module._kept_sketches.cache_info().currsize == 0


def test_signs_do_not_depend_on_how_many_tiles_are_made_at_a_time(monkeypatch):
    signs = [ParameterSketch((300, 130), 7, 256, 3).signs]
    monkeypatch.setattr(sjlt_module, "_TILES", 4)
    signs.append(ParameterSketch((300, 130), 7, 256, 3).signs)
    assert len(signs[0]) > 4
    assert torch.equal(*signs)


def test_the_bound_on_kept_signs_counts_what_they_take():
    for shape in [*SHAPES, (0, 5), (300, 130)]:
        single = ParameterSketch(tuple(shape), 0, 2**16, 3)
        if math.prod(shape):
            assert (
                sjlt_module._sign_bytes(shape) == single.signs.numel() * single.signs.element_size()
            )
        else:
            assert sjlt_module._sign_bytes(shape) == 0


def test_matrix_order_is_channels_last_and_inverts():
    grads = torch.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    matrix = as_matrix(grads)
    assert matrix[1, 2, (3 * 6 + 4) * 4 + 1] == grads[1, 2, 1, 3, 4]
    assert torch.equal(matrix.unflatten(2, (5, 6, 4)).movedim(-1, 2), grads)


ROWS, COLUMNS, PROJ_DIM, DRAWS = 160, 384, 2 * 128 * 128, 300
DATA = ["gaussian", "rank one", "hot row", "hot column", "hot channel", "common mean", "constant"]


def gradients(kind: str) -> torch.Tensor:
    """Two gradients of a weight of two by three tiles, ``[2, ROWS, COLUMNS]``."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = normal(2, ROWS, COLUMNS)
    if kind == "rank one":
        matrices = normal(2, ROWS, 1) * normal(2, 1, COLUMNS)
    elif kind == "hot row":
        matrices[:, 5] *= 100
    elif kind == "hot column":
        matrices[:, :, 3] *= 100
    elif kind == "hot channel":
        # the same input channel in every tap, so at the same place of every tile
        matrices[:, :, 3::128] *= 100
    elif kind == "common mean":
        matrices += 3 * normal(1, ROWS, COLUMNS) + 2
    elif kind == "constant":
        matrices = torch.ones_like(matrices)
    return matrices


def sketched_products(proj_dim, draws, tamper=None):
    """Inner products of the two sketches, ``[kinds, draws]``."""
    grads = torch.cat([gradients(kind) for kind in DATA])
    products = []
    for seed in range(draws):
        one = ParameterSketch((ROWS, COLUMNS), 0, proj_dim, seed)
        if tamper is not None:
            tamper(one)
        out = torch.zeros(len(grads), proj_dim, dtype=torch.float64)
        one.add_matrix(grads, out)
        products.append((out[0::2] * out[1::2]).sum(1))
    return torch.stack(products, dim=1)


@pytest.fixture(scope="module")
def products():
    return {proj_dim: sketched_products(proj_dim, DRAWS) for proj_dim in (PROJ_DIM, 1024)}


def exact_and_bound(kind, proj_dim):
    x, y = gradients(kind).flatten(1)
    exact = float(x @ y)
    return exact, (float(x @ x) * float(y @ y) + exact**2) / proj_dim


# statistics of the definition, which the fast lane compares entry by entry
@pytest.mark.full
@pytest.mark.parametrize("proj_dim", [PROJ_DIM, 1024], ids=["full tiles", "small tiles"])
@pytest.mark.parametrize("kind", DATA)
def test_inner_products_are_unbiased_and_within_the_bound(kind, proj_dim, products):
    drawn = products[proj_dim][DATA.index(kind)]
    exact, bound = exact_and_bound(kind, proj_dim)
    # four standard errors of the mean; of a variance, whose own error is about sqrt(2 / draws)
    assert abs(float(drawn.mean()) - exact) < 4 * math.sqrt(bound / DRAWS)
    assert float(drawn.var()) < 1.15 * bound * (1 + 4 * math.sqrt(2 / DRAWS))


def worst_ratio(products, proj_dim):
    """Variance over its bound, and bias in standard errors, of the worst kind of data."""
    ratios, biases = [], []
    for kind, drawn in zip(DATA, products, strict=True):
        exact, bound = exact_and_bound(kind, proj_dim)
        ratios.append(float(drawn.var()) / bound)
        biases.append(abs(float(drawn.mean()) - exact) / math.sqrt(bound / len(drawn)))
    return max(ratios), max(biases)


def test_the_last_flip_matters():
    def without_last_flip(one):
        signs, blocks = one.signs.clone(), one.placement[0]
        for block in blocks.unique():
            (bits,) = one.flips((blocks == block).nonzero().max()[None])
            signs[blocks == block] *= 1 - 2 * bits.to(torch.int8)
        one.__dict__["signs"] = signs

    # a constant gradient: with every flip the sum over positions has mean 0
    grads = torch.ones(1, ROWS, COLUMNS, dtype=torch.float64)
    signs = []
    for seed in range(100):
        one = ParameterSketch((ROWS, COLUMNS), 0, PROJ_DIM, seed)
        without_last_flip(one)
        out = torch.zeros(1, PROJ_DIM, dtype=torch.float64)
        one.add_matrix(grads, out)
        signs.append(float(out.sum()))
    mean, error = torch.tensor(signs).mean(), torch.tensor(signs).std() / 10
    assert abs(mean) > 10 * error


def test_one_sign_for_a_whole_tile_is_caught():
    def one_sign_per_tile(one):
        one.__dict__["signs"] = one.signs[:, :1, :1].expand_as(one.signs).clone()

    assert worst_ratio(sketched_products(PROJ_DIM, 60, one_sign_per_tile), PROJ_DIM)[0] > 10


def test_tiles_without_shifts_are_caught():
    def unshifted(one):
        blocks, rows, columns = one.placement
        one.__dict__["placement"] = (blocks, torch.zeros_like(rows), torch.zeros_like(columns))

    assert worst_ratio(sketched_products(PROJ_DIM, 60, unshifted), PROJ_DIM)[0] > 3


def test_shifts_in_groups_of_eight_are_caught():
    def coarse(one):
        blocks, rows, columns = one.placement
        one.__dict__["placement"] = (blocks, rows // 8 * 8, columns // 8 * 8)

    assert worst_ratio(sketched_products(PROJ_DIM, 200, coarse), PROJ_DIM)[0] > 2


def test_distinct_seeds_and_offsets_are_unrelated():
    size = 40 * 50
    places = [sketch(torch.eye(size), 4096, seed, [(40, 50)]) for seed in (0, 1)]
    shifted = sketch(torch.eye(size + 1), 4096, 0, [(1,), (40, 50)])[1:]
    for other in (places[1], shifted):
        # under independence about size / 4096 entries agree in place
        assert int(((places[0] * other) != 0).sum()) < 60


# statistics on a trained model
@pytest.mark.full
def test_real_gradients_are_within_the_bound():
    """Of a trained U-Net: hot channels, rank-one layers and a common direction at once."""
    from dtrak.data.images import load_data
    from dtrak.models.unet import digits_model
    from dtrak.training.trainer import Recipe, train

    data = load_data("digits")
    model = digits_model()
    train(model, data.images, Recipe(steps=60, batch_size=32))
    exact = GradientSketcher(model.module, Projection("none", 0), rows_per_sample=2)
    torch.manual_seed(0)
    x = data.images[:6].repeat_interleave(2, 0) * 0.7 + 0.3 * torch.randn(12, 1, 8, 8)
    t = torch.tensor([100, 600]).repeat(6)
    grads = exact.sketch(lambda: model.module(x, t).sample.square().flatten(1).mean(1), 6).double()
    grads /= grads.norm(dim=1, keepdim=True)
    gram, draws, K = grads @ grads.T, 40, 4096
    # a common direction is what makes them hard
    assert gram.mean() > 0.3
    errors = []
    for seed in range(draws):
        features = project(grads, Projection("sjlt", K, seed=seed), shapes=exact.shapes)
        errors.append(features @ features.T - gram)
    errors = torch.stack(errors)
    bound = (1 + gram.square()) / K
    assert (errors.mean(0) / (errors.std(0) / draws**0.5)).abs().max() < 4.5
    assert errors.square().mean() / bound.mean() < 1.15


@pytest.mark.parametrize("name", ["quality_sketches.py", "quality_lds.py"])
def test_the_documented_table_is_the_newest_row(name, monkeypatch):
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    # it exits with the reason where the table is another
    importlib.import_module(name.removesuffix(".py")).main()
