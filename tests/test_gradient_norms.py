"""Exact norms of per-sample gradients, by every way they are computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import relative_error
from test_sketcher import small_unet, true_gradients, unet_output, unet_rows
from torch import nn

from dtrak_kernels import GradientSketcher, Projection
from dtrak_kernels.gradients.norms import prefers_ghost, weight_norms
from dtrak_kernels.gradients.weight import LayerGradient, weight_grads

PROJECTIONS = [
    Projection("none", 0),
    Projection("rademacher", 40),
    Projection("sjlt", 256),
    Projection("kronecker", 256, factor_dim=3),
]


def output(model, x):
    return model(x).tanh().flatten(1).cumsum(1).square().mean(1)


def looped_norms(model, x, rows_per_sample):
    norms = []
    for sample in x.split(rows_per_sample):
        model.zero_grad()
        output(model, sample).sum().backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    model.zero_grad()
    return torch.stack(norms)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_unet_norms(projection):
    model, rows = small_unet(), unet_rows(3, 2)
    sketcher = GradientSketcher(model, projection, rows_per_sample=2, norms=True)
    plain = GradientSketcher(model, projection, rows_per_sample=2)
    features = sketcher.sketch(lambda: unet_output(model, *rows), 3)
    assert torch.equal(features, plain.sketch(lambda: unet_output(model, *rows), 3))
    expected = true_gradients(model, unet_output, rows, 2).norm(dim=1)
    assert relative_error(sketcher.grad_norms, expected) < 1e-12


class Shared(nn.Module):
    """A module used twice, a weight used by two modules, a vector used by two."""

    def __init__(self):
        super().__init__()
        self.twice, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight, self.other.bias = self.twice.weight, self.twice.bias
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.embed = nn.Embedding(6, 6)

    def forward(self, x):
        x = self.other(self.twice(self.twice(x).tanh()).tanh())
        x = self.conv(self.conv(x.unsqueeze(1)).tanh()).squeeze(1)
        positions = torch.arange(6).expand(len(x), 6)
        return x + self.embed(positions).sum(2) + self.embed(5 - positions).square().sum(2)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_norm_of_a_sum_of_uses(projection):
    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(6, 6, dtype=torch.float64)
    sketcher = GradientSketcher(model, projection, rows_per_sample=2, norms=True)
    for _ in range(2):
        sketcher.sketch(lambda: output(model, x), 3)
        assert relative_error(sketcher.grad_norms, looped_norms(model, x, 2)) < 1e-12


@given(
    channels=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    size=st.integers(3, 6),
    transposed=st.booleans(),
    rows_per_sample=st.integers(1, 3),
)
def test_layer_norms_by_either_way(channels, groups, kernel, size, transposed, rows_per_sample):
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(channels[0] * groups, channels[1] * groups, kernel, groups=groups).double()
    x = torch.randn(2 * rows_per_sample, channels[0] * groups, size, size, dtype=torch.float64)
    output_grads = torch.randn_like(layer(x))
    gradient = LayerGradient(layer, x, output_grads, rows_per_sample)
    expected = torch.zeros(2, dtype=torch.float64)
    for part in weight_grads(gradient, all_samples=True):
        expected[part.samples] += part.grads.square().sum((1, 2))
    assert relative_error(weight_norms(gradient), expected) < 1e-12


def test_the_cheaper_way_is_taken():
    # one position: two dot products; many positions of few channels: the gradient
    assert prefers_ghost(1, 64, 64)
    assert not prefers_ghost(1024, 64, 64)
    layer = nn.Linear(64, 64)
    x, output_grads = torch.randn(5, 64), torch.randn(5, 64)
    expected = x.double().norm(dim=1) * output_grads.double().norm(dim=1)
    assert (
        relative_error(weight_norms(LayerGradient(layer, x, output_grads)).sqrt(), expected) < 1e-6
    )


def test_refusals():
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="grad_norms must be asked for"):
        _ = GradientSketcher(model, PROJECTIONS[0]).grad_norms
    sketcher = GradientSketcher(model, PROJECTIONS[0], norms=True)
    with pytest.raises(RuntimeError, match="grad_norms must follow a complete batch"):
        _ = sketcher.grad_norms
    x = torch.randn(2, 3)
    with sketcher.batch(2):
        output(model, x).sum().backward()
        with pytest.raises(RuntimeError, match="'weight' is used again after a backward"):
            output(model, x).sum().backward()
    sketcher = GradientSketcher(model, PROJECTIONS[0], norms=True)
    with pytest.raises(ZeroDivisionError), sketcher.batch(2):
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="grad_norms must follow a complete batch"):
        _ = sketcher.grad_norms
