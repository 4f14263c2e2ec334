"""The two-sided sketch against its plain definition, its statistics, and the layers it fuses."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import relative_error
from torch import nn

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.kronecker.reference import kronecker_matrix
from dtrak_kernels.kronecker.torch import Factor

SHAPES = [(5, 7), (11,), (4, 6, 3, 3), (9, 2, 3), (3, 1, 2, 1, 2), (140, 3)]


@pytest.mark.parametrize("proj_dim", [1, 60, 4096])
@pytest.mark.parametrize("factor_dim", [1, 3, 130])
def test_matrix_is_the_definition(proj_dim, factor_dim):
    P = sum(math.prod(shape) for shape in SHAPES)
    projection = Projection("kronecker", proj_dim, seed=2**40 + 5, factor_dim=factor_dim)
    actual = project(torch.eye(P, dtype=torch.float64), projection, shapes=SHAPES)
    expected = kronecker_matrix(SHAPES, proj_dim, factor_dim, 2**40 + 5)
    assert (actual - expected).abs().max() < 1e-14
    assert (expected != 0).any(1).sum() > 0.99 * P


def test_golden_factor_signs():
    """Frozen: a change of these is a change of everybody's features."""
    matrix = kronecker_matrix([(40, 20)], 4096, 16, seed=7)
    digest = [
        int((matrix[p].sign() * torch.arange(1, 4097, dtype=torch.float64)).sum()) for p in (0, 799)
    ]
    assert digest == [-39050, 8470]


def test_factors_of_parameters_and_sides_differ():
    factors = [
        Factor(200, 150, offset, side, 3).matrix(torch.device("cpu"), torch.float64)
        for offset in (0, 1600, 2**32)
        for side in (0, 1)
    ]
    for i, first in enumerate(factors):
        # no two rows of one factor, and no two factors, are alike
        assert (first @ first.T - 200 * torch.eye(150)).abs().max() < 100
        for second in factors[:i]:
            assert (first * second).mean().abs() < 5 / (200 * 150) ** 0.5


def _inner_products(x, y, shapes, draws, **options):
    both = torch.stack([x, y])
    values = []
    for seed in range(draws):
        features = project(both, Projection("kronecker", seed=seed, **options), shapes=shapes)
        values.append(float(features[0] @ features[1]))
    return torch.tensor(values, dtype=torch.float64)


# statistical: one of them in the fast lane
KINDS = ["gaussian", "hot channel", "constant"]


@pytest.mark.parametrize(
    "kind", ["rank one", *[pytest.param(k, marks=pytest.mark.full) for k in KINDS]]
)
def test_inner_products_are_unbiased(kind):
    shapes, draws = [(24, 20, 3, 3), (24,), (30, 40)], 300
    torch.manual_seed(0)

    def gradient():
        parts = []
        for shape in shapes:
            if kind == "rank one" and len(shape) > 1:
                part = torch.outer(torch.randn(shape[0]), torch.randn(math.prod(shape[1:])))
            elif kind == "constant":
                part = torch.ones(shape) + 0.1 * torch.randn(shape)
            else:
                part = torch.randn(shape)
            if kind == "hot channel" and len(shape) > 1:
                part = part.reshape(shape)
                part[:, 2] *= 20
            parts.append(part.flatten())
        return torch.cat(parts).double()

    x = gradient()
    y = gradient() + 0.5 * x
    values = _inner_products(x, y, shapes, draws, proj_dim=2048, factor_dim=8)
    error = (values.mean() - x @ y) / (values.std() / draws**0.5)
    assert abs(error) < 4


# slow: statistical; that means are right is in the fast lane
@pytest.mark.full
def test_variance_is_what_the_docstring_says():
    """Rank one is the worst case; Gaussian gradients come close to the other kinds."""
    shape, k, draws = [(64, 64)], 8, 600
    torch.manual_seed(0)
    x = torch.randn(64 * 64, dtype=torch.float64)
    gaussian = _inner_products(x, x, shape, draws, proj_dim=65536, factor_dim=k)
    x1 = torch.outer(torch.randn(64), torch.randn(64)).flatten().double()
    rank_one = _inner_products(x1, x1, shape, draws, proj_dim=65536, factor_dim=k)
    relative = [float(v.var() / v.mean() ** 2) for v in (gaussian, rank_one)]
    # exact for a rank-one gradient of ±1 factors: (1 + 2/k)² - 1, less the diagonal's share
    expected = (1 + 2 / k) ** 2 - 1
    assert 0.6 * expected < relative[1] < 1.4 * expected
    assert relative[0] < expected / 3


LAYERS = {
    "linear": (nn.Linear(9, 14), (6, 5, 9)),
    "linear, one position": (nn.Linear(9, 14), (6, 9)),
    "conv 3x3": (nn.Conv2d(10, 12, 3, padding=1), (6, 10, 6, 5)),
    "conv 1x1": (nn.Conv2d(10, 12, 1), (6, 10, 4, 5)),
    "5x3, dilated": (nn.Conv2d(3, 12, (5, 3), padding=2, dilation=(1, 2)), (6, 3, 6, 7)),
    "stride": (nn.Conv2d(10, 12, 3, stride=2, padding=1), (6, 10, 7, 6)),
    "unequal stride, dilation": (nn.Conv2d(9, 8, 2, stride=(1, 2), dilation=2), (6, 9, 6, 6)),
    "same, asymmetric": (nn.Conv2d(9, 8, (4, 2), padding="same"), (6, 9, 6, 6)),
    "groups": (nn.Conv2d(12, 18, 3, groups=3, padding=1), (6, 12, 5, 5)),
    "depthwise": (nn.Conv2d(7, 14, 3, groups=7), (6, 7, 5, 5)),
    "reflect": (nn.Conv2d(9, 8, 3, padding=1, padding_mode="reflect"), (6, 9, 5, 5)),
    "conv1d": (nn.Conv1d(9, 11, 3, padding=1), (6, 9, 8)),
    "conv3d": (nn.Conv3d(9, 8, 2), (6, 9, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(9, 12, 3, stride=2, padding=1), (6, 9, 4, 4)),
    "transposed, groups": (
        nn.ConvTranspose2d(9, 12, 3, groups=3, output_padding=1, stride=2),
        (6, 9, 4, 3),
    ),
    "transposed 1d": (nn.ConvTranspose1d(9, 12, 3), (6, 9, 4)),
    "group norm": (nn.GroupNorm(3, 9), (6, 9, 4)),
    "PReLU (recomputed)": (nn.PReLU(9), (6, 9, 3)),
}


def _output(model, x):
    return model(x).tanh().flatten(1).cumsum(1).square().mean(1)


def _true_gradients(model, x, rows_per_sample):
    rows = []
    for sample in x.split(rows_per_sample):
        model.zero_grad()
        _output(model, sample).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("factor_dim", [4, 64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, factor_dim):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(*shape, dtype=torch.float64)
    projection = Projection("kronecker", 300, seed=4, factor_dim=factor_dim)
    sketcher = GradientSketcher(layer, projection, rows_per_sample=2)
    features = sketcher.sketch(lambda: _output(layer, x), len(x) // 2)
    matrix = kronecker_matrix(sketcher.shapes, 300, factor_dim, 4)
    assert relative_error(features, _true_gradients(layer, x, 2) @ matrix) < 1e-12


def test_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 9, padding_idx=2), nn.Linear(9, 4)).double()
    tokens = torch.randint(30, (6, 5))
    tokens[0, 0] = 2
    sketcher = GradientSketcher(
        model, Projection("kronecker", 128, factor_dim=4), rows_per_sample=3
    )
    features = sketcher.sketch(lambda: _output(model, tokens), 2)
    matrix = kronecker_matrix(sketcher.shapes, 128, 4, 0)
    assert relative_error(features, _true_gradients(model, tokens, 3) @ matrix) < 1e-12


@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(7, 10), st.integers(7, 10)),
    rows_per_sample=st.integers(1, 3),
    factor_dim=st.integers(1, 6),
)
def test_any_convolution(
    channels, groups, kernel, stride, padding, dilation, size, rows_per_sample, factor_dim
):
    torch.manual_seed(0)
    layer = nn.Conv2d(
        channels[0] * groups,
        channels[1] * groups,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    ).double()
    x = torch.randn(2 * rows_per_sample, channels[0] * groups, *size, dtype=torch.float64)
    projection = Projection("kronecker", 77, factor_dim=factor_dim)
    sketcher = GradientSketcher(layer, projection, rows_per_sample=rows_per_sample)
    features = sketcher.sketch(lambda: _output(layer, x), 2)
    expected = project(
        _true_gradients(layer, x, rows_per_sample), projection, shapes=sketcher.shapes
    )
    assert relative_error(features, expected) < 1e-11


def test_fields():
    assert Projection("kronecker", 100).factor_dim == 16
    with pytest.raises(ValueError, match="factor_dim must be a positive int, got 0"):
        Projection("kronecker", 100, factor_dim=0)
    with pytest.raises(ValueError, match="factor_dim must be None for kind 'sjlt', got 4"):
        Projection("sjlt", 1000, factor_dim=4)
    with pytest.raises(ValueError, match="implementation must be 'torch' or None for kind 'kron"):
        GradientSketcher(nn.Linear(2, 2), Projection("kronecker", 9), implementation="triton")
    with pytest.raises(ValueError, match="shapes must be given for kind 'kronecker', got None"):
        project(torch.randn(2, 6), Projection("kronecker", 9))


@pytest.mark.parametrize("name", [name for name in LAYERS if "PReLU" not in name])
def test_float32_layers(name):
    """Also the grouped convolution of a CPU, which float64 does not take."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = layer.double(), torch.randn(*shape, dtype=torch.float64)
    projection = Projection("kronecker", 300, seed=4, factor_dim=4)
    exact = GradientSketcher(layer, projection, rows_per_sample=2)
    expected = exact.sketch(lambda: _output(layer, x), len(x) // 2)
    single = copy.deepcopy(layer).float()
    sketcher = GradientSketcher(single, projection, rows_per_sample=2)
    features = sketcher.sketch(lambda: _output(single, x.float()), len(x) // 2)
    assert features.dtype == torch.float32
    assert relative_error(features, expected) < 2e-6
