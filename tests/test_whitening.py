"""Whitened features are projections of whitened gradients, by a dense oracle in float64."""

import copy

import pytest
import torch
from dense_whitening import dense_map, dense_whitened, inverse_root, second_moments
from numerics import relative_error
from test_sketcher import (
    looped_gradients,
    small_unet,
    unet_output,
    unet_rows,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrak_kernels import GradientSketcher, Projection, Whitening, project
from dtrak_kernels.gradients import weight as weight_module
from dtrak_kernels.gradients.whitening import fit as fit_module
from dtrak_kernels.gradients.whitening import roots as roots_module
from dtrak_kernels.gradients.whitening.definition import KINDS

EXACT = Projection("none")
PROJECTIONS = [
    EXACT,
    Projection("rademacher", 40, seed=3),
    Projection("normal", 33, seed=3),
    Projection("sjlt", 300, seed=3),
    Projection("kronecker", 300, seed=3, factor_dim=3),
]
WHITENING = [kind for kind in KINDS if kind != "none"]


class Net(nn.Module):
    """Something before the layer, so that its inputs are correlated, and nonlinear after it."""

    def __init__(self, first, layer):
        super().__init__()
        self.first, self.layer = first, layer

    def forward(self, x):
        return self.layer(self.first(x))


def output(model, x):
    y = model(x).tanh().flatten(1)
    return (y * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).cumsum(1).square().mean(1)


# name: (layer, shape of a row)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (5,)),
    "linear, positions": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "conv2d, one position": (lambda: nn.Conv2d(3, 5, (3, 2)), (3, 3, 2)),
    "conv2d, 1x1": (lambda: nn.Conv2d(4, 3, 1), (4, 3, 3)),
    "conv2d, stride, dilation": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=1),
        (3, 7, 6),
    ),
    "conv2d, groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (6, 4, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 2, groups=4), (4, 4, 4)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (3, 5, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (3, 6)),
    "transposed 2d, groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        (4, 3, 3),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 4)),
    "layer norm": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "fallback": (lambda: nn.PReLU(6), (6, 3)),
}


def problem(name, samples=5, rows_per_sample=2):
    torch.manual_seed(4)
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    first = nn.Linear(shape[-1], shape[-1])
    model = Net(first, layer).double()
    x = torch.randn(samples * rows_per_sample, *shape, dtype=torch.float64)
    # another set of samples is whitened than was fitted
    return model, x, x.flip(0) * 1.5 + 0.1


def fitted(model, x, kind, rows_per_sample=2, batch=2, f=output, **options):
    step = batch * rows_per_sample
    batches = [
        (lambda part=part: f(model, part), len(part) // rows_per_sample) for part in x.split(step)
    ]
    options = {"rank": 4, **options}
    return Whitening.fit(model, batches, kind=kind, rows_per_sample=rows_per_sample, **options)


def features_of(model, x, projection, whitening, rows_per_sample=2, f=output, **options):
    sketcher = GradientSketcher(
        model, projection, rows_per_sample=rows_per_sample, whitening=whitening, **options
    )
    return sketcher.sketch(lambda: f(model, x), len(x) // rows_per_sample), sketcher


def expected_features(model, x, y, kind, f=output, rows_per_sample=2, rank=4):
    grads = looped_gradients(model, f, (x,), rows_per_sample)
    maps, floored = dense_map(model, f, (x,), grads, kind, rank)
    return dense_whitened(looped_gradients(model, f, (y,), rows_per_sample), maps), floored


@pytest.mark.parametrize("workspace", [2**21, 500], ids=["one slice", "many slices"])
@pytest.mark.parametrize("kind", WHITENING)
@pytest.mark.parametrize("name", LAYERS)
def test_features_are_projected_whitened_gradients(name, kind, workspace, monkeypatch):
    monkeypatch.setitem(weight_module.WORKSPACE_BYTES, "cpu", workspace)
    model, x, y = problem(name)
    whitening = fitted(model, x, kind)
    expected, _ = expected_features(model, x, y, kind)
    assert whitening.floored == ()
    shapes = whitening.shapes
    assert (
        relative_error(whitening.apply(looped_gradients(model, output, (y,), 2)), expected) < 1e-9
    )
    for projection in PROJECTIONS:
        if projection.kind == "kronecker" and any(p.acts_on_patches for p in whitening.parameters):
            with pytest.raises(
                ValueError, match=r"must be of kind 'channels' .* for 'layer.weight'"
            ):
                features_of(model, y, projection, whitening)
            continue
        for norms in (False, True):
            features, sketcher = features_of(model, y, projection, whitening, norms=norms)
            wanted = project(expected, projection, shapes=shapes)
            assert relative_error(features, wanted) < 1e-9, (projection.kind, norms)
            if norms:
                assert relative_error(sketcher.grad_norms, expected.norm(dim=1)) < 1e-9
